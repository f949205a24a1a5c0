"""What our part of a request takes, as Prometheus metrics on the server's own ``/metrics``.

The values come from several processes: the API servers decode and prepare, the workers encode and
compress. prometheus_client joins them if ``PROMETHEUS_MULTIPROC_DIR`` names a directory before it
is first imported; `scissor-vllm serve` makes one, vLLM by itself for several API servers only.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from prometheus_client import Counter, Histogram

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

VIDEO_STAGE_SECONDS = "scissor_vllm:video_stage_seconds"
"""Histogram by ``stage``: "decode" (a file to frames, in the API server), "preprocess" (a request's
frames to the engine's input, there too), "tower" and "compress" (in the worker; one call may hold
several videos that are kept whole)."""

VIDEO_CACHE_QUERIES = "scissor_vllm:video_cache_queries"
VIDEO_CACHE_HITS = "scissor_vllm:video_cache_hits"
"""Counters by ``cache``: "frames" (decoded, in the API server) and "features" (in the worker)."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_MAX_UNREAD = 256
"""Stages of a GPU whose end was not seen yet; one more is left out."""


@contextmanager
def metrics_directory(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Let the processes that are started inside share their metrics, and clean up after them.

    A directory that the operator named stays as it is.
    """
    if environment.get(DIRECTORY_VARIABLE):
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

    On a GPU it marks a stage's begin and end in the stream, and reads them when a later stage comes
    by: nothing waits for the GPU, and what the last video took is seen with the next.
    """

    def __init__(self) -> None:
        self._unread: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def stage(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Record how long the block takes; one that raises is not recorded.

        Args:
            name: of the stage.
            device: where the block's work is done, the CPU if None.
        """
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
        with _lock:
            histogram = _video_stage_seconds()
        histogram.labels(stage=name).observe(seconds)


_lock = threading.Lock()


@cache
def _video_stage_seconds() -> Histogram:
    from prometheus_client import Histogram

    documentation = "Seconds that a video takes in each stage before the language model."
    return Histogram(VIDEO_STAGE_SECONDS, documentation, ["stage"], buckets=_SECONDS)


def count_cache_query(cache: str, is_hit: bool) -> None:
    """Count that a video was looked for in a cache."""
    with _lock:
        queries, hits = _video_cache_counters()
    queries.labels(cache=cache).inc()
    hits.labels(cache=cache).inc(int(is_hit))


@cache
def _video_cache_counters() -> tuple[Counter, Counter]:
    from prometheus_client import Counter

    queries = "Videos looked for among those that are kept for another question."
    hits = "Videos found among those that are kept for another question."
    return (
        Counter(VIDEO_CACHE_QUERIES, queries, ["cache"]),
        Counter(VIDEO_CACHE_HITS, hits, ["cache"]),
    )


CLOCK = StageClock()
"""The one of this process."""
