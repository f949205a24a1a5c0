"""Which places of a tower call are computed, and where their values go. All towers use it.

Only the M places that ``scissor_vllm.patch_merging`` selects have rows. A place without a row takes
that of its anchor, plus the change of the probes around it. ``placed`` does so for a layer's keys
and values, and for the tower's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

_BYTES_OF_INT, _ALIGNMENT_BYTES = 4, 16


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
    num_queries: list[int]
    """Number of queries of each frame."""

    @property
    def num_places(self) -> int:
        """P."""
        return len(self.row_of_place) // len(self.num_queries)

    @classmethod
    def of(cls, anchors: torch.Tensor, device: torch.device, dtype: torch.dtype) -> MergedPatches:
        """Return the plan for the frames of a tower call, without a host synchronization.

        Args:
            anchors: int64 (T, P) on the CPU, counted from the call's first frame, P in a square.
            device: of the tower.
            dtype: of the tower.
        """
        num_frames, num_places = anchors.shape
        plan = Plan.of(anchors, square_grid(num_places))
        num_queries = plan.is_computed.sum(dim=1)
        fields = to_device_at_once(
            {
                "computed": plan.computed,
                "row_of_place": plan.row_of_place.flatten(),
                "move_of_place": plan.move_of_place.flatten(),
                "probes": plan.probes,
                "weights": plan.weights,
                "query_ends": ends_of(num_queries),
                "key_ends": torch.arange(num_frames + 1) * num_places,
            },
            device,
        )
        fields["weights"] = fields["weights"].to(dtype)
        return cls(**fields, num_queries=num_queries.tolist())


@dataclass(frozen=True)
class Plan:
    """The same on the CPU, for T frames with P places; int64 but for flags and weights."""

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
    def of(cls, anchors: torch.Tensor, grid: Grid, order: torch.Tensor | None = None) -> Plan:
        """Return the plan for anchors.

        Args:
            anchors: int64 (T, P), counted from the first frame.
            grid: of the P places.
            order: places of a frame in the order of its rows, int64 (P,); None for their own.
        """
        num_frames, num_places = anchors.shape
        frames, places = torch.arange(num_frames)[:, None], torch.arange(num_places)
        order = places if order is None else order
        is_computed = computed_patches(anchors, grid)
        in_order = is_computed[:, order]
        row = torch.empty_like(anchors)
        row[:, order] = (in_order.flatten().cumsum(0) - 1).view(num_frames, num_places)
        lattice = probe_places(grid)
        move = frames * len(lattice) + nearest_probes(grid)
        return cls(
            is_computed,
            (frames * num_places + order)[in_order],
            row[torch.where(is_computed, frames, anchors), places],
            torch.where(is_computed, -1, move),
            torch.stack([row[:, lattice], row[anchors[:, lattice], lattice]]),
            probe_weights((anchors != frames)[:, lattice], probe_grid(grid)),
        )


def ends_of(lengths: torch.Tensor) -> torch.Tensor:
    """Return where parts of n lengths begin and end, int64 (n + 1,)."""
    return nn.functional.pad(lengths.cumsum(0), (1, 0))


def to_device_at_once(
    parts: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return tensors on a device by one copy, without a host synchronization.

    Args:
        parts: on the CPU, by name; float32, or integers that fit into int32.
        device: where to.

    Returns:
        float32 or int32.
    """
    flat = [
        part.flatten().view(torch.int32) if part.is_floating_point() else part.flatten().int()
        for part in (part.contiguous() for part in parts.values())
    ]
    # Each part begins at a multiple of 16 bytes: kernels are compiled anew for other addresses.
    num_aligned = _ALIGNMENT_BYTES // _BYTES_OF_INT
    padded = [nn.functional.pad(part, (0, -len(part) % num_aligned)) for part in flat]
    split = to_device(torch.cat(padded), device).split([*map(len, padded)])
    return {
        name: (values.view(torch.float32) if part.is_floating_point() else values)[
            : part.numel()
        ].view(part.shape)
        for (name, part), values in zip(parts.items(), split, strict=True)
    }


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
    near = [_near(length) for length in grid or square_grid(has_anchor.shape[1])]
    weights = torch.kron(*near) * has_anchor[:, None]
    alone = weights.sum(dim=2, keepdim=True) == 0
    weights = torch.where(alone, has_anchor[:, None].float(), weights)
    return weights / weights.sum(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


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
