"""Cuts frames into patches on the model's device, for towers that take patches (Qwen-VL)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scissor_vllm.normalization import normalized

_NUM_CHANNELS = 3


@dataclass(frozen=True)
class PatchShape:
    """Shape of a tower's patches in frames."""

    size: int
    """Side in pixels."""
    num_frames: int
    """Number of frames in a patch."""
    num_merged: int
    """Number of a token's patches in each direction; they are contiguous in the output."""

    def patches_of(
        self,
        rows: torch.Tensor,
        frame_size: tuple[int, int],
        normalization: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the Hugging Face processor's patches, (n, C * frames * size * size).

        Args:
            rows: of the same shape, pixels of the frames of consecutive temporal patches.
            frame_size: height and width.
            normalization: float32 (2, C) on the same device, None for normalized frames.
            dtype: of normalized patches.
        """
        height, width = frame_size
        frames = rows.reshape(-1, height, width, _NUM_CHANNELS)
        if normalization is None:
            frames = frames.permute(0, 3, 1, 2)
        else:
            frames = normalized(frames, normalization, dtype)
        merged, size = self.num_merged, self.size
        cells = frames.reshape(
            *(-1, self.num_frames, _NUM_CHANNELS),
            *(height // size // merged, merged, size),
            *(width // size // merged, merged, size),
        )
        return cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(len(rows), -1)
