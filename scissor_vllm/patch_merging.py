"""Which patches of a video the vision tower computes; the processor and the tower both use this.

A patch's anchor is the patch at the same place in an earlier frame. A patch that hardly differs
from its anchor takes the anchor's values. But the tower's values of a still patch change with the
rest of its frame. So a lattice of patches, the probes, is computed in every frame, and the change
of probes is added to the values around them.

Pure torch, on the CPU. ``PATCH_ANCHORS`` in ``scissor_vllm.video_fields`` is the format of anchors.
"""

from __future__ import annotations

import math

import torch

GROUP_FRAMES = 4
"""Number of frames in a group; a patch and its anchor are in the same group."""

PROBE_STEP = 3
"""Distance between two probes in rows and in columns of patches."""


def probe_places(num_places: int) -> torch.Tensor:
    """Return the places of the probes, int64 (L,), on a square grid of P places."""
    side = math.isqrt(num_places)
    line = torch.arange(PROBE_STEP // 2, side, PROBE_STEP)
    return (line[:, None] * side + line).flatten()


def nearest_probes(num_places: int) -> torch.Tensor:
    """Return the index of the probe in each place's cell of the lattice, int64 (P,)."""
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
