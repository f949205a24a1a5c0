"""Pixel normalization: the front end checks it, the worker computes it."""

from __future__ import annotations

import torch

_FRAMES_AT_ONCE = 16
"""Most frames in float32 at a time: 27 MiB at 384 x 384."""


def normalized(
    frames: torch.Tensor, normalization: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return (T, C, H, W) in ``dtype``: (frames - mean) / std, computed in float32.

    Args:
        frames: uint8 (T, H, W, C).
        normalization: float32 (2, C) on the same device.
        dtype: the model's.
    """
    num_frames, height, width, num_channels = frames.shape
    mean, std = normalization[:, :, None, None].unbind()
    out = torch.empty((num_frames, num_channels, height, width), dtype=dtype, device=frames.device)
    for block, place in zip(frames.split(_FRAMES_AT_ONCE), out.split(_FRAMES_AT_ONCE), strict=True):
        values = block.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        place.copy_(values.sub_(mean).div_(std))
    return out
