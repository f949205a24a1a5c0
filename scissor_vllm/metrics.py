"""Prometheus metrics of video compression, on the server's ``/metrics``.

API servers count requests and time decoding and preprocessing. Workers time the vision tower and
compression. prometheus_client merges the values of several processes if
``PROMETHEUS_MULTIPROC_DIR`` names a directory before its first import. `scissor-vllm serve` makes
one. vLLM makes one for several API servers only.
"""

from __future__ import annotations

import logging
import math
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar


class Reason(StrEnum):
    """Refusal reasons, used as a Prometheus label."""

    INVALID_RATIO = "invalid_ratio"
    """No number in (0, 1]."""
    RATIO_BELOW_MINIMUM = "ratio_below_minimum"
    INVALID_BUDGET = "invalid_budget"
    """No integer of at least 1."""
    BUDGET_TOO_SMALL = "budget_too_small"
    """Less than the least that the request's videos must keep."""
    INVALID_IMAGES = "invalid_images"
    """``compress_images`` is no boolean, not allowed, or there is no run of images."""
    UNSUPPORTED_MODEL = "unsupported_model"
    """A ratio or a budget for a model whose videos are not compressed."""
    PROCESSOR_OPTIONS = "processor_options"
    """One of our settings in a request's ``mm_processor_kwargs``."""
    MEDIA_NOT_ALLOWED = "media_not_allowed"
    """A URL that ``--allowed-media-domains`` or ``--allowed-local-media-path`` forbids."""
    MEDIA_NOT_FETCHED = "media_not_fetched"
    """An invalid URL, or one that cannot be fetched."""
    UNREADABLE_VIDEO = "unreadable_video"
    """No frame of it can be decoded."""
    VIDEO_TOO_LARGE = "video_too_large"
    """The decoded frames take too many bytes."""
    VIDEO_TOO_LONG = "video_too_long"
    """Too many tokens before compression, or too many kept tokens for one engine step."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The compressed prompt exceeds the model's length."""
    OTHER = "other"
    """vLLM's own: an unknown model, a wrong parameter."""


if TYPE_CHECKING:
    import torch
    from prometheus_client import Counter, Histogram

logger = logging.getLogger(__name__)

T = TypeVar("T")

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

VIDEO_STAGE_SECONDS = "scissor_vllm:video_stage_seconds"
"""Histogram by ``stage``. In the API server: "decode" (file to frames) and "preprocess" (frames to
the engine's input). In the worker: "tower" and "compress"; one call may hold several uncompressed
videos."""

VIDEO_CACHE_QUERIES = "scissor_vllm:video_cache_queries"
VIDEO_CACHE_HITS = "scissor_vllm:video_cache_hits"
"""Counters by ``cache``: "frames" (decoded, in the API server) and "features" (in the worker)."""

VIDEO_CACHE_CROSS_RATIO_HITS = "scissor_vllm:video_cache_cross_ratio_hits"
"""Counter: hits of "features" at a ratio that is new for the cached video."""

VIDEO_REQUESTS = "scissor_vllm:video_requests"
"""Counter by ``method`` and ``outcome``: chats with a video. "answered": complete. "refused":
status 4xx. "failed": status 5xx. "aborted": the client disconnected."""

VIDEO_TOKENS = "scissor_vllm:video_tokens"
RETAINED_VIDEO_TOKENS = "scissor_vllm:retained_video_tokens"
"""Counters by ``method``: video tokens before and after compression, of requests that were not
refused. Uncompressed videos count too. Videos that a client names by ``uuid`` alone do not."""

VIDEO_PATCHES = "scissor_vllm:video_patches"
COMPUTED_VIDEO_PATCHES = "scissor_vllm:computed_video_patches"
"""Counters: patches of these requests' videos where the vision tower may leave some out, and those
of them that it computes for a video that is not cached."""

REQUESTED_RETENTION_RATIO = "scissor_vllm:requested_retention_ratio"
RETENTION_RATIO = "scissor_vllm:retention_ratio"
"""Histograms of chats with a video: the requested ratio, allowed or not, and the ratio in force of
requests that are not refused."""

AUTO_CHOICES = "scissor_vllm:auto_choices"
"""Counter by ``retention_ratio``: requests whose ratio the server chose."""

REFUSED_REQUESTS = "scissor_vllm:refused_requests"
"""Counter by ``reason``: refused requests with a video or an invalid ratio."""

SIMILARITY_THRESHOLD = "scissor_vllm:similarity_threshold"
"""Histogram, in the worker: similarity threshold of a compressed video, for methods that have
one."""

METRICS = (
    VIDEO_STAGE_SECONDS,
    VIDEO_CACHE_QUERIES,
    VIDEO_CACHE_HITS,
    VIDEO_CACHE_CROSS_RATIO_HITS,
    VIDEO_REQUESTS,
    VIDEO_TOKENS,
    RETAINED_VIDEO_TOKENS,
    VIDEO_PATCHES,
    COMPUTED_VIDEO_PATCHES,
    REQUESTED_RETENTION_RATIO,
    RETENTION_RATIO,
    AUTO_CHOICES,
    REFUSED_REQUESTS,
    SIMILARITY_THRESHOLD,
)
"""All of them, counters without Prometheus' ``_total``."""


class Outcome(StrEnum):
    """What became of a request."""

    ANSWERED = "answered"
    REFUSED = "refused"
    FAILED = "failed"
    ABORTED = "aborted"


_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)
_COSINES = (0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.995, 1)
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_MAX_UNREAD = 256
"""Most pending values of a GPU, stages or thresholds. Further ones are dropped."""


@contextmanager
def metrics_directory(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Share the metrics of child processes through a directory for the duration of the context.

    The operator's directory is created if it is missing, and is not removed.
    """
    if named := environment.get(DIRECTORY_VARIABLE):
        Path(named).mkdir(parents=True, exist_ok=True)
        yield
        return
    with tempfile.TemporaryDirectory(
        prefix="scissor-vllm-metrics-", ignore_cleanup_errors=True
    ) as folder:
        environment[DIRECTORY_VARIABLE] = folder
        try:
            yield
        finally:
            del environment[DIRECTORY_VARIABLE]


class StageClock:
    """Times the stages of a video in one process.

    On a GPU it records CUDA events at a stage's start and end and reads them in a later call. So
    there is no host synchronization, and the times of the last video appear with the next one.
    """

    def __init__(self) -> None:
        self._unread: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._is_silent = ContextVar("is_silent", default=False)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Record no stage within the block, whose work belongs to no request."""
        token = self._is_silent.set(True)
        try:
            yield
        finally:
            self._is_silent.reset(token)

    @contextmanager
    def stage(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Record the duration of the block unless it raises.

        Args:
            name: the stage.
            device: the device of the block's work, the CPU if None.
        """
        if self._is_silent.get():
            yield
            return
        if device is not None and device.type == "cuda":
            with self._stage_on_gpu(name):
                yield
            return
        start = time.perf_counter()
        yield
        self._record(name, time.perf_counter() - start)

    @contextmanager
    def _stage_on_gpu(self, name: str) -> Iterator[None]:
        import torch

        self._read_ended()
        if len(self._unread) >= _MAX_UNREAD or torch.cuda.is_current_stream_capturing():
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._unread.append((name, begin, end))

    def _read_ended(self) -> None:
        while self._unread and self._unread[0][2].query():
            name, begin, end = self._unread.popleft()
            self._record(name, begin.elapsed_time(end) / 1e3)

    def _record(self, name: str, seconds: float) -> None:
        _video_stage_seconds().labels(stage=name).observe(seconds)


class ThresholdReader:
    """Records thresholds that a GPU is still computing, without host synchronization.

    A threshold is copied to pinned memory asynchronously and read in a later call, as in
    `StageClock`.
    """

    def __init__(self) -> None:
        self._slots: torch.Tensor | None = None
        self._free: list[int] = []
        self._unread: deque[tuple[int, torch.cuda.Event]] = deque()

    def read(self, threshold: torch.Tensor) -> None:
        """Queue a threshold to be recorded.

        Args:
            threshold: () float64 on a GPU, of the current stream; NaN is not recorded.
        """
        import torch

        self._read_ended()
        if torch.cuda.is_current_stream_capturing():
            return
        if self._slots is None:
            # Allocated once: allocating pinned memory can synchronize with the device.
            self._slots = torch.empty(_MAX_UNREAD, dtype=torch.float64, pin_memory=_can_pin())
            self._free = list(range(_MAX_UNREAD))
        if not self._free:
            return
        slot = self._free.pop()
        self._slots[slot].copy_(threshold, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._unread.append((slot, copied))

    def _read_ended(self) -> None:
        while self._unread and self._unread[0][1].query():
            slot, _ = self._unread.popleft()
            assert self._slots is not None
            self._record(float(self._slots[slot]))
            self._free.append(slot)

    def _record(self, threshold: float) -> None:
        if math.isinf(threshold):
            logger.error(
                "a search for a similarity threshold left fewer parts than rows; tokens of the "
                "video stand in for the missing rows: please report this"
            )
        elif not math.isnan(threshold):
            record_threshold(threshold)


def _can_pin() -> bool:
    import torch

    return torch.cuda.is_available()


def record_threshold(threshold: float) -> None:
    """Record the similarity threshold of a compressed video."""
    _compression().threshold.observe(threshold)


def count_cache_query(cache: str, is_hit: bool) -> None:
    """Count a cache lookup of a video."""
    queries, hits = _video_cache_counters()
    queries.labels(cache=cache).inc()
    hits.labels(cache=cache).inc(int(is_hit))


def count_cross_ratio_hit() -> None:
    """Count a feature cache hit at a ratio that is new for the video."""
    _compression().cross_ratio_hits.inc()


def count_request(method: str, outcome: Outcome, requested_ratio: float | None) -> None:
    """Count a chat with a video.

    Args:
        method: the server's compression method.
        outcome: the request's outcome.
        requested_ratio: the ratio in the request, None without one.
    """
    metrics = _requests()
    metrics.requests.labels(method=method, outcome=outcome.value).inc()
    if requested_ratio is not None:
        metrics.requested_ratio.observe(requested_ratio)


def count_tokens(method: str, ratio: float, num_tokens: int, num_retained: int) -> None:
    """Count the tokens of a request's videos, and the ratio in force."""
    metrics = _requests()
    metrics.ratio.observe(ratio)
    metrics.tokens.labels(method=method).inc(num_tokens)
    metrics.retained_tokens.labels(method=method).inc(num_retained)


def count_auto_choice(ratio: float) -> None:
    """Count a request whose ratio the server chose."""
    _auto_choices().labels(retention_ratio=f"{ratio:g}").inc()


def begin_auto_choices_at_zero(ratios: Iterable[float]) -> None:
    """Export the ratios that may be chosen before any is."""
    for ratio in ratios:
        _auto_choices().labels(retention_ratio=f"{ratio:g}")


def count_patches(num_patches: int, num_computed: int) -> None:
    """Count the patches of a request's videos, and those that the tower computes."""
    metrics = _requests()
    metrics.patches.inc(num_patches)
    metrics.computed_patches.inc(num_computed)


def count_refusal(reason: Reason) -> None:
    """Count a request that was refused."""
    _requests().refused.labels(reason=reason.value).inc()


def begin_requests_at_zero(method: str) -> None:
    """Export the API server's counters at zero, so that the first request is an increase."""
    metrics = _requests()
    for outcome in Outcome:
        metrics.requests.labels(method=method, outcome=outcome.value)
    metrics.tokens.labels(method=method)
    metrics.retained_tokens.labels(method=method)
    for reason in Reason:
        metrics.refused.labels(reason=reason.value)
    _begin_at_zero(("decode", "preprocess"), "frames")


def begin_compression_at_zero() -> None:
    """Export the worker's counters at zero."""
    _compression()
    _begin_at_zero(("tower", "compress"), "features")


def _begin_at_zero(stages: tuple[str, ...], kept: str) -> None:
    for stage in stages:
        _video_stage_seconds().labels(stage=stage)
    for counter in _video_cache_counters():
        counter.labels(cache=kept)


@dataclass(frozen=True)
class _Requests:
    """Metrics of API servers."""

    requests: Counter
    tokens: Counter
    retained_tokens: Counter
    patches: Counter
    computed_patches: Counter
    requested_ratio: Histogram
    ratio: Histogram
    refused: Counter


@dataclass(frozen=True)
class _Compression:
    """Metrics of workers."""

    threshold: Histogram
    cross_ratio_hits: Counter


def _once(make: Callable[[], T]) -> Callable[[], T]:
    """Return a thread-safe function that computes its value on the first call."""
    lock, made = threading.Lock(), cache(make)

    def get() -> T:
        with lock:
            return made()

    return get


@_once
def _requests() -> _Requests:
    from prometheus_client import Counter, Histogram

    return _Requests(
        requests=Counter(VIDEO_REQUESTS, "Chats with a video.", ["method", "outcome"]),
        tokens=Counter(VIDEO_TOKENS, "Video tokens before compression.", ["method"]),
        retained_tokens=Counter(
            RETAINED_VIDEO_TOKENS, "Video tokens after compression.", ["method"]
        ),
        patches=Counter(VIDEO_PATCHES, "Patches of videos where the tower may leave some out."),
        computed_patches=Counter(COMPUTED_VIDEO_PATCHES, "Those of them that it computes."),
        requested_ratio=Histogram(
            REQUESTED_RETENTION_RATIO,
            "Requested retention ratio of chats with a video.",
            buckets=_RATIOS,
        ),
        ratio=Histogram(
            RETENTION_RATIO,
            "Retention ratio in force of chats with a video.",
            buckets=_RATIOS,
        ),
        refused=Counter(
            REFUSED_REQUESTS, "Refused requests with a video or an invalid ratio.", ["reason"]
        ),
    )


@_once
def _auto_choices() -> Counter:
    from prometheus_client import Counter

    documentation = "Requests with a video whose retention ratio the server chose."
    return Counter(AUTO_CHOICES, documentation, ["retention_ratio"])


@_once
def _compression() -> _Compression:
    from prometheus_client import Counter, Histogram

    return _Compression(
        threshold=Histogram(
            SIMILARITY_THRESHOLD,
            "Similarity threshold of compressed videos.",
            buckets=_COSINES,
        ),
        cross_ratio_hits=Counter(
            VIDEO_CACHE_CROSS_RATIO_HITS,
            "Feature cache hits at a ratio that is new for the video.",
        ),
    )


@_once
def _video_stage_seconds() -> Histogram:
    from prometheus_client import Histogram

    documentation = "Seconds that a video takes in each stage before the language model."
    return Histogram(VIDEO_STAGE_SECONDS, documentation, ["stage"], buckets=_SECONDS)


@_once
def _video_cache_counters() -> tuple[Counter, Counter]:
    from prometheus_client import Counter

    queries = "Cache lookups of videos."
    hits = "Cache hits of videos."
    return (
        Counter(VIDEO_CACHE_QUERIES, queries, ["cache"]),
        Counter(VIDEO_CACHE_HITS, hits, ["cache"]),
    )


CLOCK = StageClock()
THRESHOLDS = ThresholdReader()
"""The instances of this process."""
