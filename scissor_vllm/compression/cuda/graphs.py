"""CUDA graphs of searches: one launch instead of a hundred.

Launching a search's small kernels one by one takes the host longer than the GPU takes to run them.
A graph reads the video's shape from the device, so one serves all shapes whose frames need the same
lanes: ``2 * len(LANES)`` graphs at most, all on one workspace and one memory pool.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from scissor_vllm.compression.cuda.workspace import (
    SHARED_LANES,
    SHARED_TOKENS,
    Workspace,
    num_lanes,
)
from scissor_vllm.cuda_graphs import captured

USES_BEFORE_CAPTURE = 1
"""Number of eager searches of a kind before its capture; they compile the kernels."""

Key = tuple[object, ...]


class SharedSearches:
    """A device's workspace and its graphs, for one search at a time."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        """Allocate for searches of up to so many tokens."""
        self.workspace = Workspace.shared(num_tokens, device)
        self._graphs: dict[Key, torch.cuda.CUDAGraph | None] = {}
        self._num_uses: dict[Key, int] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_stream = torch.cuda.Stream(device)
        self._ended = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[Workspace]:
        """Yield the workspace, ordered after the device's earlier work on it."""
        stream = torch.cuda.current_stream(self.workspace.device)
        stream.wait_event(self._ended)
        try:
            yield self.workspace
        finally:
            self._ended.record(stream)

    def start(self, key: Key, launch: Callable[[], None]) -> None:
        """Launch work on the workspace, as a CUDA graph if this kind was captured.

        Args:
            key: everything that the launches depend on, except values on the device.
            launch: launches the work, without a host synchronization.
        """
        graph = self._graphs.get(key)
        if graph is None and key not in self._graphs:
            uses = self._num_uses[key] = self._num_uses.get(key, 0) + 1
            if uses > USES_BEFORE_CAPTURE:
                graph = self._graphs[key] = captured(launch, self._pool, self._capture_stream, key)
        if graph is None:
            launch()
        else:
            graph.replay()


_lock = threading.Lock()
_shared: dict[torch.device, SharedSearches] = {}


@contextmanager
def shared(
    num_tokens: int, per_frame: int, device: torch.device
) -> Iterator[SharedSearches | None]:
    """Yield the device's shared searches, for exclusive use in the context.

    None for a video that is too large, or while the caller captures a graph.
    """
    is_small = num_tokens <= SHARED_TOKENS and num_lanes(per_frame) <= SHARED_LANES
    if not is_small or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        yield None
        return
    with _lock:
        searches = _shared.get(device)
        if searches is None or searches.workspace.capacity < num_tokens:
            if searches is not None:
                # It may still be in use. A server's first video is its largest one.
                torch.cuda.synchronize(device)
                del _shared[device]
            searches = _shared[device] = SharedSearches(num_tokens, device)
        yield searches


def clear() -> None:
    """Free the memory of all shared searches."""
    with _lock:
        if _shared:
            torch.cuda.synchronize()
        _shared.clear()
