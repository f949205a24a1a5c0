"""Makes frames of the pixels of a video's computed places, on the model's device.

A place that the tower does not compute gets the pixels of its anchor. They are read only if a call
of the tower begins within a group, in that call's first frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from scissor_vllm.patch_merging import Grid, computed_patches
from scissor_vllm.worker.pinned import to_device


@dataclass(frozen=True)
class ComputedPlaces:
    """Stands for the pixels of T frames, or of T temporal patches."""

    pixels: torch.Tensor
    """``VIDEO_PLACES``, uint8 (M, n, side, side, C) on the CPU."""
    anchors: torch.Tensor
    """``PATCH_ANCHORS``, (T, P) on the CPU."""
    grid: Grid
    """Of the P places."""

    def __len__(self) -> int:
        return len(self.anchors)

    def frames(self, first: int, end: int, device: torch.device) -> torch.Tensor:
        """Return consecutive frames, uint8 ((end - first) * n, H, W, C) on the device.

        Args:
            first: number of the first frame.
            end: number of the frame behind the last one.
            device: of the model.
        """
        rows = self._rows[first:end]
        least, most = int(rows.min()), int(rows.max())
        pixels = to_device(self.pixels[least : most + 1], device)
        numbers = to_device((rows - least).flatten().int(), device)
        _, num_frames, side, _, num_channels = pixels.shape
        places = pixels.index_select(0, numbers).view(
            -1, *self.grid, num_frames, side, side, num_channels
        )
        height, width = (length * side for length in self.grid)
        in_lines = places.permute(0, 3, 1, 4, 2, 5, 6)
        return in_lines.reshape(-1, height, width, num_channels)

    @cached_property
    def _rows(self) -> torch.Tensor:
        """Return the row of each place's pixels, int64 (T, P)."""
        computed = computed_patches(self.anchors, self.grid)
        row = computed.flatten().cumsum(0).sub_(1).view(self.anchors.shape)
        frames = torch.arange(len(self.anchors))[:, None]
        return row.gather(0, torch.where(computed, frames, self.anchors.long()))
