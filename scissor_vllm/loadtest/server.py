"""The server under test: its model, its version, and ``/metrics``."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scissor_vllm.metrics import VIDEO_CACHE_HITS, VIDEO_CACHE_QUERIES, VIDEO_STAGE_SECONDS

HISTOGRAMS = (
    "vllm:time_to_first_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    VIDEO_STAGE_SECONDS,
)
"""Histograms, read as sum and count; the last is ours, by ``stage``. Each may be missing."""
COUNTERS = (
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:mm_cache_queries",
    "vllm:mm_cache_hits",
    "vllm:num_preemptions",
    VIDEO_CACHE_QUERIES,
    VIDEO_CACHE_HITS,
)
"""Counters without the suffix ``_total``; the last two are ours, by ``cache``. Each may be
missing."""
_LABELS = ("stage", "cache")
_NUMBER_BYTES = {"auto": 2, "float16": 2, "bfloat16": 2} | dict.fromkeys(
    ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"), 1
)
"""Bytes of a number by ``--kv-cache-dtype``; other dtypes also store scales."""
FINISHED = "vllm:e2e_request_latency_seconds"
_SETTLE_SECONDS = 3.0
_TIMEOUT_SECONDS = 30.0
_USAGE = re.compile(rb"^vllm:kv_cache_usage_perc(?:\{[^\n]*\})? (\S+)$", re.M)
_RUNNING = re.compile(rb"^vllm:num_requests_running(?:\{[^\n]*\})? (\S+)$", re.M)


class ServerError(Exception):
    """The server cannot be measured; the message names the remedy."""


def get(url: str) -> bytes:
    """Return the body of a GET, with the key of ``OPENAI_API_KEY`` if it is set.

    Raises:
        OSError: no answer, a status other than 200, or an incomplete body.
    """
    request = urllib.request.Request(url)
    if key := os.environ.get("OPENAI_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            return bytes(response.read())
    except http.client.HTTPException as error:
        raise OSError(f"{url} broke off: {error!r}") from error


def check_health(base_url: str) -> None:
    """Raise ServerError if the server is not up.

    Raises:
        ServerError: the server is not up.
    """
    try:
        get(f"{base_url}/health")
    except OSError as error:
        raise ServerError(
            f"the server at {base_url} stopped answering ({error}): see its log, start it again, "
            "and go on with --append"
        ) from error


def describe_server(base_url: str, model: str | None) -> dict[str, Any]:
    """Return the server's model, and its version and KV cache size where known.

    Raises:
        ServerError: the server does not answer, or does not serve `model`.
    """
    try:
        models = json.loads(get(f"{base_url}/v1/models"))["data"]
    except (OSError, ValueError, KeyError) as error:
        raise ServerError(
            f"--base-url must name a running server, {base_url}/v1/models gave: {error}; start one "
            "with `scissor-vllm serve MODEL`, and set OPENAI_API_KEY if it wants a key"
        ) from error
    names = [entry["id"] for entry in models]
    if model is not None and model not in names:
        raise ServerError(f"--model must be one of {', '.join(names)}, got {model}")
    entry = models[0] if model is None else models[names.index(model)]
    return {
        "model": entry["id"],
        "model_path": entry.get("root"),
        "max_model_len": entry.get("max_model_len"),
        "vllm_version": _version(base_url),
    }


def has_plugin(base_url: str) -> bool:
    """Return whether the plugin is active in a server.

    The OpenAPI description shows it, or /metrics if only vLLM's routes are loaded.
    """
    for path, mark in (("/openapi.json", b'"retention_ratio"'), ("/metrics", b"scissor_vllm:")):
        try:
            if mark in get(base_url + path):
                return True
        except OSError:
            continue
    return False


def _version(base_url: str) -> str | None:
    try:
        return str(json.loads(get(f"{base_url}/version"))["version"])
    except (OSError, ValueError, KeyError):
        return None


def kv_cache_bytes_per_token(model_path: str | None, told: Snapshot | None = None) -> int | None:
    """Return the bytes of one token in the KV cache, None if unknown.

    It is 2 x layers x KV heads x head size x bytes of a number. The shapes come from the model's
    config, in its folder or in the hub's local cache; nothing is downloaded. The dtype is that of
    the server's cache. "auto" is the dtype of the computation: two bytes, or four with float32. On
    a CPU the server's cache size tells which.

    Args:
        model_path: the server's name of its model.
        told: the server's metrics, None without any.
    """
    num_numbers = _num_cached_numbers(model_path)
    dtype = (told and told.kv_cache_dtype) or "auto"
    if num_numbers is None or dtype not in _NUMBER_BYTES:
        return None
    num_bytes = num_numbers * _NUMBER_BYTES[dtype]
    if dtype != "auto" or told is None or not (told.kv_cache_bytes and told.num_kv_cache_tokens):
        return num_bytes
    # With tensor parallelism the size is that of one worker.
    return max(num_bytes, told.kv_cache_bytes // told.num_kv_cache_tokens)


def _num_cached_numbers(model_path: str | None) -> int | None:
    """Return the count of numbers of a token in the KV cache, None without a config."""
    path = _config_path(model_path)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text())
        text = config.get("text_config") or config
        heads = text["num_attention_heads"]
        head_size = text.get("head_dim") or text["hidden_size"] // heads
        kv_heads = text.get("num_key_value_heads") or heads
        return int(2 * text["num_hidden_layers"] * kv_heads * head_size)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _config_path(model_path: str | None) -> Path | None:
    if not model_path:
        return None
    local = Path(model_path, "config.json")
    if local.is_file():
        return local
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model_path, "config.json")
    except (ImportError, ValueError):
        return None
    return Path(cached) if isinstance(cached, str) else None


@dataclass(frozen=True)
class Snapshot:
    """Cumulative metrics of the server at one time."""

    histograms: dict[str, tuple[float, float]]
    """Sum and count by name and ``{stage="..."}``, if any."""
    counters: dict[str, float]
    """Counters by name and ``{cache="..."}``, if any."""
    num_kv_cache_tokens: int | None
    """Tokens that fit into the KV cache."""
    kv_cache_bytes: int | None = None
    """Bytes of the KV cache in each worker, if known."""
    kv_cache_dtype: str | None = None
    """Value of ``--kv-cache-dtype``."""


def parse_metrics(text: str) -> Snapshot:
    """Return the metrics of a Prometheus exposition, summed over engines and models."""
    from prometheus_client.parser import text_string_to_metric_families

    histograms: dict[str, tuple[float, float]] = {}
    counters: dict[str, float] = {}
    capacity = cache_bytes = 0
    cache_dtype: str | None = None
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name, value = sample.name, sample.value
            label = "".join(
                f'{{{key}="{sample.labels[key]}"}}' for key in _LABELS if key in sample.labels
            )
            if name.endswith(("_sum", "_count")):
                base, which = name.rsplit("_", 1)
                if base in HISTOGRAMS:
                    total, count = histograms.get(base + label, (0.0, 0.0))
                    histograms[base + label] = (
                        (total + value, count) if which == "sum" else (total, count + value)
                    )
            elif name.removesuffix("_total") in COUNTERS:
                key = name.removesuffix("_total") + label
                counters[key] = counters.get(key, 0.0) + value
            elif name == "vllm:cache_config_info":
                capacity += _product(sample.labels, "num_gpu_blocks", "block_size")
                cache_bytes += _product(sample.labels, "kv_cache_memory_bytes")
                cache_dtype = sample.labels.get("cache_dtype")
    return Snapshot(histograms, counters, capacity or None, cache_bytes or None, cache_dtype)


def _product(labels: dict[str, str], *names: str) -> int:
    """Return the product of numbers in labels, 0 if one is missing or not a number."""
    try:
        return math.prod(int(labels[name]) for name in names)
    except (KeyError, ValueError):
        return 0


def difference(before: Snapshot | None, after: Snapshot | None) -> dict[str, Any] | None:
    """Return the difference of two snapshots; None without both or after a restart.

    ``histograms`` maps names to their ``sum_seconds`` and ``count``, ``counters`` to a number.
    """
    if before is None or after is None:
        return None
    histograms = {}
    for name, (total, count) in after.histograms.items():
        old_total, old_count = before.histograms.get(name, (0.0, 0.0))
        if count < old_count:
            return None
        histograms[name] = {
            "sum_seconds": round(total - old_total, 6),
            "count": int(count - old_count),
        }
    counters = {k: v - before.counters.get(k, 0.0) for k, v in after.counters.items()}
    return {"histograms": histograms, "counters": counters}


@dataclass
class Metrics:
    """The ``/metrics`` of a server, which may have none."""

    url: str

    def read(self) -> Snapshot | None:
        """Return the current snapshot, None without ``/metrics``."""
        try:
            return parse_metrics(get(self.url).decode())
        except (OSError, ValueError):
            return None

    def read_after(self, before: Snapshot | None, num_finished: int) -> Snapshot | None:
        """Return the snapshot once it has `num_finished` more requests, or after a timeout.

        The engine reports a request shortly after its last token.
        """
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            now = self.read()
            if now is None or before is None or FINISHED not in now.histograms:
                return now
            old = before.histograms.get(FINISHED, (0.0, 0.0))[1]
            if now.histograms[FINISHED][1] - old >= num_finished or time.monotonic() > deadline:
                return now
            time.sleep(0.1)


@dataclass
class UsageSampler:
    """Samples the use of the KV cache in a thread."""

    url: str
    interval_seconds: float
    """0 disables sampling."""
    samples: list[dict[str, float]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> UsageSampler:
        if self.interval_seconds > 0:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        begin = time.monotonic()
        while not self._stop.wait(self.interval_seconds):
            try:
                text = get(self.url)
            except OSError:
                return
            if (sample := usage(text)) is not None:
                self.samples.append({"seconds": round(time.monotonic() - begin, 3), **sample})


def usage(text: bytes) -> dict[str, float] | None:
    """Return the used share of the KV cache (mean over engines) and the running requests."""
    shares = [float(share) for share in _USAGE.findall(text)]
    if not shares:
        return None
    running = sum(float(number) for number in _RUNNING.findall(text))
    return {
        "kv_cache_usage": round(sum(shares) / len(shares), 6),
        "num_requests_running": running,
    }
