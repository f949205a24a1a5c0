"""Which patches of a video the vision tower computes; the processor and the tower both use this.

A place is a patch, or the patches of a token where the tower joins patches to tokens. A place's
anchor is the same place in an earlier frame. A place that hardly differs from its anchor takes the
anchor's values. But the tower's values of a still place change with the rest of its frame. So a
lattice of places, the probes, is computed in every frame, and the change of probes is added to the
values around them.

Pure torch, on the CPU. ``PATCH_ANCHORS`` in ``scissor_vllm.video_fields`` is the format of anchors.
"""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import torch

CALL_FRAMES = 32
"""Most frames of a tower call in which places are merged. On a GPU such a call is a CUDA graph.
Longer calls keep the GPU busy while the host launches, and their graphs would take more memory."""

GROUP_FRAMES = 6
"""Most frames of a group; a place and its anchor are in the same group."""

PROBE_STEP = 3
"""Distance between two probes in rows and in columns of places."""

Grid = tuple[int, int]
"""Number of rows and of columns."""


def group_lengths(num_frames: int) -> list[int]:
    """Return the lengths of a video's groups, in order.

    They follow from the number of frames alone, so the processor and the tower agree on them. No
    group lies in two blocks of at most ``CALL_FRAMES`` frames. Blocks differ by at most one frame,
    and so do the groups of a block.

    Args:
        num_frames: T, without frames that repeat the previous frame.
    """
    return [length for groups in _blocks(num_frames) for length in groups]


def call_lengths(num_frames: int, most: int) -> list[int]:
    """Return the lengths of a video's tower calls, in order.

    A call is a block of groups, or a part of one. A group is cut only if it is longer than a call.

    Args:
        num_frames: T, as :func:`group_lengths` takes it.
        most: number of frames that fit into a call.
    """
    calls: list[int] = []
    for groups in _blocks(num_frames):
        parts = [part for length in groups for part in _balanced(length, most)]
        calls += shared_lengths(parts, len(_packed(parts, most)))
    return calls


def shared_lengths(lengths: list[int], num_shares: int) -> list[int]:
    """Return the lengths of at most ``num_shares`` runs of whole groups, the longest one shortest.

    Args:
        lengths: of the groups, in order.
        num_shares: at least 1.
    """
    shortest = max(*lengths, math.ceil(sum(lengths) / num_shares))
    shares = (_packed(lengths, most) for most in itertools.count(shortest))
    return next(share for share in shares if len(share) <= num_shares)


def _blocks(num_frames: int) -> list[list[int]]:
    return [_balanced(length, GROUP_FRAMES) for length in _balanced(num_frames, CALL_FRAMES)]


def _balanced(num_frames: int, most: int) -> list[int]:
    """Return the lengths of the fewest parts of at most ``most`` frames, as equal as can be."""
    num_parts = math.ceil(num_frames / most)
    ends = [part * num_frames // num_parts for part in range(num_parts + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def _packed(lengths: list[int], most: int) -> list[int]:
    """Return the lengths of runs of whole groups, each as long as ``most`` frames allow."""
    runs: list[int] = []
    for length in lengths:
        if runs and runs[-1] + length <= most:
            runs[-1] += length
        else:
            runs.append(length)
    return runs


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
