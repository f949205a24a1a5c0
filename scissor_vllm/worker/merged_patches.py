"""Which places of a tower call are computed, and where their values go. All towers use it.

Only the M places that ``scissor_vllm.patch_merging`` selects have rows. A place without a row takes
that of its anchor, plus the change of the probes around it. ``placed`` does so for a layer's keys
and values, and for the tower's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from scissor_vllm.patch_merging import (
    Grid,
    computed_patches,
    nearest_probes,
    probe_grid,
    probe_places,
    square_grid,
)
from scissor_vllm.worker.pinned import to_device

_DECAY = 8 / 9
"""Decay of a probe's weight with its squared distance on the lattice."""

_MAX_LATTICES = 64


@dataclass(frozen=True)
class Placement:
    """Where the values of computed rows go, among the N places of T frames."""

    row_of_place: torch.Tensor
    """Row for each place, int32 (N,)."""
    move_of_place: torch.Tensor
    """Index of the move that is added at each place, -1 for none, int32 (N,)."""
    probes: torch.Tensor
    """Rows of each frame's lattice, and rows of their anchors, int32 (2, T, n): for each of the L
    probes as many as it has rows."""
    weights: torch.Tensor
    """Weight of each probe's change in the move around each probe, (T, L, L) in the tower's dtype.
    """


@dataclass(frozen=True)
class MergedPatches(Placement):
    """Which patches of T frames with P places are computed, where one patch is a place."""

    computed: torch.Tensor
    """Indices of the M computed patches among the T*P, ascending, int32 (M,)."""
    query_ends: torch.Tensor
    """Bounds of each frame's queries among the M, int32 (T + 1,)."""
    key_ends: torch.Tensor
    """Bounds of each frame's keys among the T*P, int32 (T + 1,)."""

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.query_ends) - 1

    @property
    def num_places(self) -> int:
        """P."""
        return len(self.row_of_place) // self.num_frames

    @classmethod
    def of(cls, anchors: torch.Tensor, device: torch.device, dtype: torch.dtype) -> MergedPatches:
        """Return the plan for the frames of a tower call, without a host synchronization.

        Args:
            anchors: int64 (T, P) on the CPU, counted from the call's first frame, P in a square.
            device: of the tower.
            dtype: of the tower.
        """
        num_frames, num_places = anchors.shape
        plan = Plan.of(anchors, square_grid(num_places), device)
        key_ends = torch.arange(num_frames + 1, device=device, dtype=torch.int32) * num_places
        return cls(
            plan.row_of_place.flatten().int(),
            plan.move_of_place.flatten().int(),
            plan.probes.int(),
            plan.weights.to(dtype),
            plan.computed.int(),
            ends_of(plan.is_computed.sum(dim=1)).int(),
            key_ends,
        )


@dataclass(frozen=True)
class Plan:
    """The same for T frames with P places, on the device; int64 but for flags and weights."""

    is_computed: torch.Tensor
    """bool (T, P)."""
    computed: torch.Tensor
    """Indices among the T*P of the place of each of the M rows, (M,)."""
    row_of_place: torch.Tensor
    """(T, P)."""
    move_of_place: torch.Tensor
    """(T, P)."""
    probes: torch.Tensor
    """(2, T, L)."""
    weights: torch.Tensor
    """float32 (T, L, L)."""

    @classmethod
    def of(
        cls,
        anchors: torch.Tensor,
        grid: Grid,
        device: torch.device,
        order: torch.Tensor | None = None,
        num_rows: int | None = None,
    ) -> Plan:
        """Return the plan for anchors, without a host synchronization.

        The device makes it: on the CPU it takes the host 5 to 8 ms a video, in which it launches
        nothing.

        Args:
            anchors: int64 (T, P) on the CPU, counted from the first frame.
            grid: of the P places.
            device: of the tower.
            order: places of a frame in the order of its rows, int64 (P,) on the device; None for
                their own.
            num_rows: length of ``computed``, at least M; further ones are 0. None for M.
        """
        num_frames, num_places = anchors.shape
        if num_rows is None:
            num_rows = int(computed_patches(anchors, grid).sum())
        lattice, nearest = _lattice(grid, device)
        anchors = to_device(anchors.to(torch.int16), device).long()
        frames = torch.arange(num_frames, device=device)[:, None]
        is_computed = (anchors == frames).index_fill(1, lattice, True)
        in_order = in_rows_order(is_computed, order)
        row = (in_order.flatten().cumsum(0) - 1).view(num_frames, num_places)
        places = torch.arange(num_places, device=device) if order is None else order
        computed = numbers_of_rows(in_order, row, frames * num_places + places, num_rows)
        if order is not None:
            row = torch.empty_like(row).index_copy_(1, order, row)
        of_probes = anchors.index_select(1, lattice)
        rows_of_probes = row.index_select(1, lattice)
        move = frames * len(lattice) + nearest
        return cls(
            is_computed,
            computed,
            row.gather(0, torch.where(is_computed, frames, anchors)),
            torch.where(is_computed, -1, move),
            torch.stack([rows_of_probes, rows_of_probes.gather(0, of_probes)]),
            probe_weights(of_probes != frames, probe_grid(grid)),
        )


def in_rows_order(values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Return values of places, (T, P), in the order of rows."""
    return values if order is None else values.index_select(1, order)


def numbers_of_rows(
    has_row: torch.Tensor, row: torch.Tensor, numbers: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Return the number of each row, int64 (``num_rows``,), 0 where no place has the row.

    Args:
        has_row: bool (T, P).
        row: of each place that has one, int64 (T, P), below ``num_rows``.
        numbers: of each place, int64 (T, P).
        num_rows: so many.
    """
    # Places without a row share one behind the last.
    target = torch.where(has_row, row, num_rows).flatten()
    held = torch.zeros(num_rows + 1, dtype=torch.int64, device=row.device)
    return held.scatter_(0, target, numbers.flatten())[:num_rows]


@lru_cache(_MAX_LATTICES)
def _lattice(grid: Grid, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probes' places (L,), and the index of the probe near each place (P,)."""
    with torch.inference_mode(False):
        return to_device(probe_places(grid), device), to_device(nearest_probes(grid), device)


def ends_of(lengths: torch.Tensor) -> torch.Tensor:
    """Return where parts of n lengths begin and end, int64 (n + 1,)."""
    return nn.functional.pad(lengths.cumsum(0), (1, 0))


def probe_weights(has_anchor: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """Return the weight of each probe's change in the move around each probe.

    Weights fall with distance, over the probe and its eight neighbours on the lattice. If none of
    these has an anchor, all probes of the frame with an anchor have equal weights.

    Args:
        has_anchor: bool (T, L), which probes would take an anchor's values if they were no probes.
        grid: of the L probes, None for a square.

    Returns:
        float32 (T, L, L), rows that sum to 1, or to 0 in a frame with no such probe.
    """
    grid = grid or square_grid(has_anchor.shape[1])
    weights = _near_weights(grid, has_anchor.device) * has_anchor[:, None]
    alone = weights.sum(dim=2, keepdim=True) == 0
    weights = torch.where(alone, has_anchor[:, None].float(), weights)
    return weights / weights.sum(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


@lru_cache(_MAX_LATTICES)
def _near_weights(grid: Grid, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return to_device(torch.kron(*map(_near, grid)), device)


def _near(length: int) -> torch.Tensor:
    line = torch.arange(length)
    apart = line[:, None] - line
    return torch.exp(-_DECAY * apart.square()) * apart.abs().le(1)


def moves_of(rows: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Return the moves of computed rows (M, D), each contiguous, (T*n, D)."""
    if rows.is_cuda:
        from scissor_vllm.worker.row_placement import row_differences

        changes = row_differences(rows, placement.probes)
    else:
        of_frame, of_anchors = rows[placement.probes]
        changes = of_frame - of_anchors
    weights = placement.weights
    return torch.bmm(weights, changes.view(*weights.shape[:2], -1)).view(-1, rows.shape[1])


def placed(rows: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Return the values of each place, (N, D), from computed rows (M, D), each contiguous."""
    moves = moves_of(rows, placement)
    if rows.is_cuda:
        from scissor_vllm.worker.row_placement import place_rows

        return place_rows(rows, placement.row_of_place, moves, placement.move_of_place)
    added = moves[placement.move_of_place.clamp(min=0)]
    return rows[placement.row_of_place] + added * (placement.move_of_place >= 0)[:, None]
