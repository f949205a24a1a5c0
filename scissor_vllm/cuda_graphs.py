"""Captures CUDA graphs while a server uses the device."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

logger = logging.getLogger(__name__)


def captured(
    launch: Callable[[], None],
    pool: Any,
    stream: torch.cuda.Stream,
    kind: object,
) -> torch.cuda.CUDAGraph | None:
    """Return the captured graph of launches, None if capture fails.

    ``torch.cuda.graph`` would synchronize the device first; nothing here needs that.

    Args:
        launch: launches kernels on the current stream, without a host synchronization.
        pool: ``torch.cuda.graph_pool_handle()``, shared with graphs that run one after the other.
        stream: to capture on; the current stream's earlier work comes before.
        kind: what the log calls the launches.
    """
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    try:
        with torch.cuda.stream(stream):
            # Other threads of a server use the device during the capture.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        logger.warning("no CUDA graph of %s: %s", kind, error)
        _end_failed_capture(stream)
        return None
    return graph


def _end_failed_capture(stream: torch.cuda.Stream) -> None:
    """Have torch draw random numbers again, by a capture that does not fail.

    A failed one leaves the generator in the belief that a capture goes on, and it then raises.
    """
    empty = torch.cuda.CUDAGraph()
    with suppress(RuntimeError), torch.cuda.stream(stream):
        empty.capture_begin(capture_error_mode="thread_local")
        empty.capture_end()
