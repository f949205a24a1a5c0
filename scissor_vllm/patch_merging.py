"""Which patches of a video the vision tower computes; the processor and the tower both use this.

A place is a patch, or the patches of a token where the tower joins patches to tokens. A place's
anchor is the same place in an earlier frame. A place that hardly differs from its anchor takes the
anchor's values. But the tower's values of a still place change with the rest of its frame. So a
lattice of places, the probes, is computed in every frame, and the change of probes is added to the
values around them.

Pure torch, on the CPU. ``PATCH_ANCHORS`` in ``scissor_vllm.video_fields`` is the format of anchors.
"""

from __future__ import annotations

import math

import torch

GROUP_FRAMES = 4
"""Number of frames in a group; a place and its anchor are in the same group."""

PROBE_STEP = 3
"""Distance between two probes in rows and in columns of places."""

Grid = tuple[int, int]
"""Number of rows and of columns."""


def square_grid(num_places: int) -> Grid:
    """Return the grid of P places in a square."""
    side = math.isqrt(num_places)
    return side, side


def probe_grid(grid: Grid) -> Grid:
    """Return the grid of the probes on a grid of places."""
    rows, columns = map(len, map(_probe_lines, grid))
    return rows, columns


def probe_places(grid: Grid) -> torch.Tensor:
    """Return the places of the probes, int64 (L,), row by row."""
    rows, columns = map(_probe_lines, grid)
    return (rows[:, None] * grid[1] + columns).flatten()


def nearest_probes(grid: Grid) -> torch.Tensor:
    """Return the index of the probe in each place's cell of the lattice, int64 (P,)."""
    num_rows, num_columns = probe_grid(grid)
    row = (torch.arange(grid[0]) // PROBE_STEP).clamp(max=num_rows - 1)
    column = (torch.arange(grid[1]) // PROBE_STEP).clamp(max=num_columns - 1)
    return (row[:, None] * num_columns + column).flatten()


def _probe_lines(length: int) -> torch.Tensor:
    return torch.arange(min(PROBE_STEP // 2, length - 1), length, PROBE_STEP)


def computed_patches(anchors: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """Return which places the tower computes.

    Args:
        anchors: frame numbers, (T, P) of any integer type.
        grid: of the places, None for a square.

    Returns:
        bool (T, P).
    """
    computed = anchors == torch.arange(len(anchors), dtype=anchors.dtype)[:, None]
    computed[:, probe_places(grid or square_grid(anchors.shape[1]))] = True
    return computed
