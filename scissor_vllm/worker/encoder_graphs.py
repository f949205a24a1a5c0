"""CUDA graphs of a vision tower's layers: one launch instead of hundreds.

The host takes 13 ms to launch SigLIP's layers and 27 to 40 ms to launch Qwen-VL's with merged
patches, time in which it prepares nothing else. A graph reads its input at fixed addresses, so rows
and indices are copied there. Graphs differ by their number of rows. Merged patches have any number,
so it is rounded up; the rows that this adds are computed and not used. All graphs of a tower share
one buffer of rows, one of outputs and one memory pool.

A LLaVA tower that merges patches also has graphs for calls whose patches are all computed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from scissor_vllm.cuda_graphs import captured

_GRAPH_STEPS = 48
"""Numbers of rows for which there are graphs, up to all places of a call: 1 % is computed for
nothing in the mean."""

_MAX_GRAPHS = 64
USES_BEFORE_CAPTURE = 1
"""Number of eager runs of a kind before its capture; they compile the kernels."""

Key = tuple[object, ...]
Launch = Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
"""Launches the layers on rows and on other inputs, without a host synchronization, and returns
their output: the rows themselves, or a new tensor."""


def graph_rows(num_rows: int, most_rows: int) -> int:
    """Return the number of rows with which a graph computes ``num_rows`` of ``most_rows``."""
    step = max(1, most_rows // _GRAPH_STEPS)
    return math.ceil(num_rows / step) * step


@dataclass
class _Kind:
    """Runs of one key."""

    inputs: list[torch.Tensor]
    """What the graph reads beside the rows."""
    num_uses: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    launch: Launch | None = None
    """What was captured: the graph also reads tensors that belong to it."""
    output: torch.Tensor | None = None
    """Of the graph."""


class EncoderGraphs:
    """Graphs of one tower, for one run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # No run's width is 0, so the first run replaces them.
        self._rows = self._output = torch.empty(0, 0, dtype=torch.uint8, device=device)
        self._kinds: dict[Key, _Kind] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_stream = torch.cuda.Stream(device)

    def run(
        self,
        key: Key,
        rows: torch.Tensor,
        num_rows: int,
        most_rows: int,
        inputs: Sequence[torch.Tensor],
        launch: Launch,
    ) -> torch.Tensor:
        """Return what the layers make of rows.

        Args:
            key: what the launches depend on, except values on the device and ``num_rows``.
            rows: (M, C), contiguous.
            num_rows: rows that the graph computes, at least M, see :func:`graph_rows`.
            most_rows: no run of this key has more.
            inputs: other tensors on the device, of the same shapes for one key and ``num_rows``.
            launch: launches the layers.

        Returns:
            the output for ``num_rows`` rows, valid until the next run.
        """
        if not _fits(self._rows, max(num_rows, most_rows), rows):
            self.forget()
            self._rows = rows.new_zeros(max(num_rows, most_rows), rows.shape[1])
        key = (*key, num_rows)
        kind = self._kind(key, inputs)
        held = self._rows[:num_rows]
        held[: len(rows)].copy_(rows)
        for theirs, given in zip(kind.inputs, inputs, strict=True):
            theirs.copy_(given)
        if kind.graph is None and kind.num_uses == USES_BEFORE_CAPTURE:
            self._capture(kind, held, launch, key)
        kind.num_uses += 1
        if kind.graph is not None and kind.output is not None:
            kind.graph.replay()
            return kind.output
        output = launch(held, kind.inputs)
        most_outputs = math.ceil(len(self._rows) / num_rows * len(output))
        if output is not held and not _fits(self._output, most_outputs, output):
            self.forget()
            self._kinds[key] = kind
            self._output = output.new_empty(most_outputs, output.shape[1])
        return output

    def _kind(self, key: Key, inputs: Sequence[torch.Tensor]) -> _Kind:
        """Return the kind of a key; one that has no graph makes room for it."""
        kind = self._kinds.get(key)
        if kind is not None:
            return kind
        kind = _Kind([torch.empty_like(tensor) for tensor in inputs])
        if len(self._kinds) >= _MAX_GRAPHS:
            seldom = next((name for name, kept in self._kinds.items() if kept.graph is None), None)
            if seldom is None:
                return kind
            del self._kinds[seldom]
        self._kinds[key] = kind
        return kind

    def _capture(self, kind: _Kind, held: torch.Tensor, launch: Launch, key: Key) -> None:
        """Have a kind's graph, unless capture fails."""

        def launch_into_held() -> None:
            output = launch(held, kind.inputs)
            if output is not held:
                # In the graphs' pool an output of each would stay.
                output = self._output[: len(output)].copy_(output)
            kind.output = output

        kind.launch = launch
        kind.graph = captured(launch_into_held, self._pool, self._capture_stream, key)

    def forget(self) -> None:
        """End all graphs: buffers that they use are replaced, or weights are."""
        if self._kinds:
            torch.cuda.synchronize(self._device)
            self._kinds.clear()
            # A pool ends with the last of its graphs.
            self._pool = torch.cuda.graph_pool_handle()


def _fits(buffer: torch.Tensor, num_rows: int, like: torch.Tensor) -> bool:
    return len(buffer) >= num_rows and buffer.shape[1] == like.shape[1]
