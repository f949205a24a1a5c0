"""Which patches of a video the vision tower computes, as processor and tower both count them.

A patch that hardly differs from its anchor, an earlier frame's patch at the same place, takes the
anchor's values. But a tower's values of what stands still change with the rest of the frame. So a
lattice of patches is computed in every frame, and what changes there moves the values around it.

Pure torch, on the CPU. ``PATCH_ANCHORS`` in ``scissor_vllm.video_fields`` is the form of anchors.
"""

from __future__ import annotations

import math

import torch

GROUP_FRAMES = 4
"""A patch and its anchor lie in the same group of so many frames, counted from the first."""

PROBE_STEP = 3
"""Rows and columns of patches between two of the lattice."""


def probe_places(num_places: int) -> torch.Tensor:
    """Return the places of the lattice, int64 (L,), on a square grid of P places."""
    side = math.isqrt(num_places)
    line = torch.arange(PROBE_STEP // 2, side, PROBE_STEP)
    return (line[:, None] * side + line).flatten()


def nearest_probes(num_places: int) -> torch.Tensor:
    """Return which of the lattice is in each place's cell, int64 (P,)."""
    side = math.isqrt(num_places)
    num_lines = len(range(PROBE_STEP // 2, side, PROBE_STEP))
    line = (torch.arange(side) // PROBE_STEP).clamp(max=num_lines - 1)
    return (line[:, None] * num_lines + line).flatten()


def computed_patches(anchors: torch.Tensor) -> torch.Tensor:
    """Return which patches the tower computes.

    Args:
        anchors: frame numbers, (T, P) of any integer type.

    Returns:
        bool (T, P).
    """
    computed = anchors == torch.arange(len(anchors), dtype=anchors.dtype)[:, None]
    computed[:, probe_places(anchors.shape[1])] = True
    return computed
