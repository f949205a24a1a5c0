"""Statistics of a cell, from its raw values, by vLLM's definitions.

TTFT: time to the first token. TPOT: time after the first token, divided by output tokens less one;
undefined with one token. E2E: time to the last token. Goodput: requests per second that meet every
objective; an undefined TPOT counts as met. All times are of the client's clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from scissor_vllm.loadtest.workload import ratio_name
from scissor_vllm.metrics import VIDEO_CACHE_HITS, VIDEO_CACHE_QUERIES, VIDEO_STAGE_SECONDS

PERCENTILES = (50, 90, 99)
OBJECTIVES = ("ttft", "tpot", "e2el")
"""Metrics of service level objectives in milliseconds, as in ``vllm bench serve --goodput``."""
VIDEO_STAGES = ("decode", "preprocess", "tower", "compress")
STAGES = {
    **{f"video_{stage}": f'{VIDEO_STAGE_SECONDS}{{stage="{stage}"}}' for stage in VIDEO_STAGES},
    "queue": "vllm:request_queue_time_seconds",
    "prefill": "vllm:request_prefill_time_seconds",
    "decode": "vllm:request_decode_time_seconds",
}
"""Histograms of the server by stage, in order of a request.

vLLM's prefill begins when a request is scheduled: tower and compression lie inside it.
"""
CACHES = {
    "prefix": ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits"),
    "mm": ("vllm:mm_cache_queries", "vllm:mm_cache_hits"),
    **{
        cache: tuple(
            f'{name}{{cache="{cache}"}}' for name in (VIDEO_CACHE_QUERIES, VIDEO_CACHE_HITS)
        )
        for cache in ("frames", "features")
    },
}
"""Counters of queries and hits by cache."""
PREEMPTIONS = "vllm:num_preemptions"
"""Counter of requests that lost their KV cache to another, and are prefilled again."""


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """Return objectives in milliseconds from ``ttft:2000`` and the like.

    Raises:
        ValueError: a pair is not of this form.
    """
    objectives = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            milliseconds = float(value)
        except ValueError:
            milliseconds = -1.0
        if name not in OBJECTIVES or not milliseconds >= 0:
            raise ValueError(
                f"an objective must be one of {', '.join(OBJECTIVES)}, a colon and milliseconds, "
                f"got {pair!r}: write for example ttft:2000"
            )
        objectives[name] = milliseconds
    return objectives


def summarize(
    run: dict[str, Any], cell: dict[str, Any], goodput: dict[str, float] | None = None
) -> dict[str, Any]:
    """Return one flat row of a run's cell, with None for unknown values.

    Args:
        run: a run of a result file.
        cell: one of its cells.
        goodput: objectives in milliseconds; None for those of the run.
    """
    good = [request for request in cell["requests"] if request["error"] is None]
    failed = [request for request in cell["requests"] if request["error"] is not None]
    duration = cell["duration_seconds"]
    objectives = run["settings"].get("goodput_milliseconds", {}) if goodput is None else goodput
    prompt, output = _mean(good, "prompt_tokens"), _mean(good, "output_tokens")
    kv_tokens = None if prompt is None else prompt + (output or 0)
    kv_bytes = run["server"].get("kv_cache_bytes_per_token")
    row: dict[str, Any] = {
        "label": run["label"],
        "retention_ratio": ratio_name(cell["retention_ratios"]),
        "max_concurrency": cell["max_concurrency"],
        "request_rate_per_second": cell["request_rate_per_second"],
        "completed": len(good),
        "failed": len(failed),
        "duration_seconds": duration,
        "requests_per_second": len(good) / duration,
        "goodput_requests_per_second": (
            sum(_meets(request, objectives) for request in good) / duration if objectives else None
        ),
        "video_seconds_per_second": _total(good, "video_seconds", duration),
        "output_tokens_per_second": _total(good, "output_tokens", duration),
        **_percentiles("ttft", [request["ttft_seconds"] for request in good]),
        **_percentiles("tpot", [t for t in map(tpot_seconds, good) if t is not None]),
        **_percentiles("itl", [t for request in good for t in request.get("itl_seconds", ())]),
        **_percentiles("e2e", [request["e2e_seconds"] for request in good]),
        "prompt_tokens": prompt,
        "video_tokens": _mean(good, "video_tokens"),
        "retained_video_tokens": _mean(good, "retained_video_tokens"),
        "kv_cache_tokens_per_request": kv_tokens,
        "kv_cache_bytes_per_request": (
            kv_tokens * kv_bytes if kv_tokens is not None and kv_bytes else None
        ),
        **_usage(cell),
        **_stages(cell, len(good)),
        **_hit_rates(cell),
        "preemptions": _counters(cell).get(PREEMPTIONS),
        "distinct_videos": len({request["video"] for request in cell["requests"]}),
        "errors": "; ".join(f"{n} x {reason}" for reason, n in count_errors(cell).items()),
    }
    return row


def summarize_all(
    runs: Iterable[dict[str, Any]], goodput: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of all cells of all runs, each with its gain over ``stock``.

    ``requests_per_second_over_stock`` and ``ttft_p50_over_stock`` compare with the first cell that
    sent no ratio at the same concurrency and request rate; None where there is none.
    """
    rows = [summarize(run, cell, goodput) for run in runs for cell in run["cells"]]
    stock: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in rows:
        if row["retention_ratio"] == "stock":
            stock.setdefault((row["max_concurrency"], row["request_rate_per_second"]), row)
    for row in rows:
        base = stock.get((row["max_concurrency"], row["request_rate_per_second"]))
        for name, key in (
            ("requests_per_second_over_stock", "requests_per_second"),
            ("ttft_p50_over_stock", "ttft_p50_seconds"),
        ):
            row[name] = row[key] / base[key] if base and base[key] and row[key] else None
    return rows


def tpot_seconds(request: dict[str, Any]) -> float | None:
    """Return the time per output token after the first, None with fewer than two."""
    tokens = request["output_tokens"]
    if not tokens or tokens < 2:
        return None
    return float((request["e2e_seconds"] - request["ttft_seconds"]) / (tokens - 1))


def count_errors(cell: dict[str, Any]) -> dict[str, int]:
    """Return the number of failed requests by reason, the most frequent first."""
    reasons = Counter(r["error"] for r in cell["requests"] if r["error"] is not None)
    return dict(reasons.most_common())


def _meets(request: dict[str, Any], objectives: dict[str, float]) -> bool:
    seconds = {
        "ttft": request["ttft_seconds"],
        "tpot": tpot_seconds(request) or 0.0,
        "e2el": request["e2e_seconds"],
    }
    return all(seconds[name] <= limit / 1000 for name, limit in objectives.items())


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    import numpy as np

    return {
        f"{name}_p{p}_seconds": float(np.percentile(values, p)) if len(values) else None
        for p in PERCENTILES
    }


def _known(requests: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [request[key] for request in requests if request.get(key) is not None]


def _mean(requests: Sequence[dict[str, Any]], key: str) -> float | None:
    values = _known(requests, key)
    return sum(values) / len(values) if values else None


def _total(requests: Sequence[dict[str, Any]], key: str, duration: float) -> float | None:
    values = _known(requests, key)
    return sum(values) / duration if values or not requests else None


def _usage(cell: dict[str, Any]) -> dict[str, float | None]:
    samples = (cell.get("kv_cache") or {}).get("samples") or []
    shares = [sample["kv_cache_usage"] for sample in samples]
    return {
        "kv_cache_usage_mean": sum(shares) / len(shares) if shares else None,
        "kv_cache_usage_max": max(shares, default=None),
    }


def _stages(cell: dict[str, Any], completed: int) -> dict[str, float | None]:
    """Return the server's seconds in each stage per completed request."""
    histograms = (cell.get("server_metrics") or {}).get("histograms", {})
    row: dict[str, float | None] = {}
    for stage, name in STAGES.items():
        histogram = histograms.get(name)
        known = histogram is not None and histogram["count"] > 0 and completed > 0
        row[f"stage_{stage}_seconds"] = histogram["sum_seconds"] / completed if known else None
    return row


def _hit_rates(cell: dict[str, Any]) -> dict[str, float | None]:
    counters = _counters(cell)
    row: dict[str, float | None] = {}
    for cache, (queries_name, hits_name) in CACHES.items():
        queries, hits = counters.get(queries_name), counters.get(hits_name, 0.0)
        row[f"{cache}_cache_hit_rate"] = hits / queries if queries else None
    return row


def _counters(cell: dict[str, Any]) -> dict[str, float]:
    counters: dict[str, float] = (cell.get("server_metrics") or {}).get("counters", {})
    return counters
