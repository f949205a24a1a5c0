"""CUDA graphs of a vision tower's layers: one launch instead of hundreds.

The host takes 13 ms to launch SigLIP's layers, time in which it prepares nothing else. A graph
reads its input at fixed addresses, so rows and indices are copied there. Graphs differ by their
number of rows. Merged patches have any number, so it is rounded up; the rows that this adds are
computed and not used. All graphs share one buffer of rows and one memory pool.

Videos whose patches are all computed have none: with 42 ms of work on the GPU the launches are
hidden, and a graph gained 1 % of requests/s (docs/benchmarks.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from scissor_vllm.cuda_graphs import captured

GRAPH_FRAMES = 32
"""Most frames of a call that is captured. Longer calls keep the GPU busy while the host launches,
and their graphs would take more memory."""

_MAX_GRAPHS = 64
USES_BEFORE_CAPTURE = 1
"""Number of eager runs of a kind before its capture; they compile the kernels."""

Key = tuple[object, ...]
Launch = Callable[[torch.Tensor, Sequence[torch.Tensor]], None]
"""Launches the layers on rows, in place, and on other inputs, without a host synchronization."""


@dataclass
class _Kind:
    """Runs of one key."""

    inputs: list[torch.Tensor]
    """What the graph reads beside the rows."""
    num_uses: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class EncoderGraphs:
    """Graphs of one tower, for one run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows = torch.empty(0, 0, device=device)
        self._kinds: dict[Key, _Kind] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_stream = torch.cuda.Stream(device)

    def run(
        self,
        key: Key,
        rows: torch.Tensor,
        num_rows: int,
        inputs: Sequence[torch.Tensor],
        launch: Launch,
    ) -> torch.Tensor:
        """Return what the layers make of rows.

        Args:
            key: what the launches depend on, except values on the device and ``num_rows``.
            rows: (M, C), contiguous.
            num_rows: rows that the graph computes, at least M.
            inputs: other tensors on the device, of the same shapes for one key.
            launch: launches the layers.

        Returns:
            (M, C), valid until the next run.
        """
        self._reserve(num_rows, rows)
        key = (*key, num_rows)
        kind = self._kinds.get(key)
        if kind is None:
            kind = _Kind([torch.empty_like(tensor) for tensor in inputs])
            if len(self._kinds) < _MAX_GRAPHS:
                self._kinds[key] = kind
        held = self._rows[:num_rows]
        held[: len(rows)].copy_(rows)
        for theirs, given in zip(kind.inputs, inputs, strict=True):
            theirs.copy_(given)
        if kind.graph is None and kind.num_uses == USES_BEFORE_CAPTURE:
            kind.graph = captured(
                lambda: launch(held, kind.inputs), self._pool, self._capture_stream, key
            )
        kind.num_uses += 1
        if kind.graph is None:
            launch(held, kind.inputs)
        else:
            kind.graph.replay()
        return held[: len(rows)]

    def _reserve(self, num_rows: int, like: torch.Tensor) -> None:
        """Have a buffer of so many rows; a larger one ends all graphs, which read the former."""
        if len(self._rows) >= num_rows and self._rows.shape[1] == like.shape[1]:
            return
        if self._kinds:
            torch.cuda.synchronize(self._device)
            self._kinds.clear()
            # A pool ends with the last of its graphs.
            self._pool = torch.cuda.graph_pool_handle()
        self._rows = like.new_zeros(num_rows, like.shape[1])
