"""Painted frames on their way to the tower: a camera's and a codec's faults, then normalisation."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812

Tensor = torch.Tensor

_BLOCK = 8
_LUMA = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_DEAD_ZONE = 1 / 3
"""Rounding of video encoders: what is below two thirds of a step becomes nothing."""


def normalised(frames: Tensor) -> Tensor:
    """Return pixels (B, T, 3, H, W) float32 for the tower, from values 0 to 1.

    The same as the saved processor's: CLIP's mean and deviation.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = (
        torch.tensor(values, device=frames.device)[:, None, None]
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return (frames - mean) / std


def as_values(frames: Tensor) -> Tensor:
    """Return uint8 frames (B, T, H, W, 3) as float32 (B, T, 3, H, W) from 0 to 1."""
    return frames.permute(0, 1, 4, 2, 3).float() / 255


def filmed(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Return frames as a camera and an encoder at random settings leave them.

    Some clips are a little soft, most have coarse colours and blocks, some have noise. Made
    alike for all frames of a clip but for the noise.

    Args:
        frames: (B, T, 3, H, W) float32, 0 to 1; H and W multiples of 8.
        generator: on the frames' device.
    """
    count, device = len(frames), frames.device

    def draw(probability: float, low: float, high: float) -> Tensor:
        """Return a number for each clip, 0 for those spared."""
        chance, value = torch.rand(2, count, 1, 1, 1, 1, device=device, generator=generator)
        return torch.where(chance < probability, low + (high - low) * value, 0.0)

    shape = frames.shape
    flat = frames.flatten(0, 1)
    soft = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, stride=1).view(shape)
    frames = torch.lerp(frames, soft, draw(0.4, 0.0, 0.5))
    noise = torch.randn(shape, device=device, generator=generator)
    frames = frames + noise * draw(0.3, 0.0, 4 / 255)
    planes = _mixed(frames, _LUMA)
    small = F.avg_pool2d(planes[:, :, 1:].flatten(0, 1), 2)
    chroma = F.interpolate(small, scale_factor=2.0, mode="bilinear").view(*shape[:2], 2, *shape[3:])
    planes = torch.cat([planes[:, :, :1], torch.lerp(planes[:, :, 1:], chroma, 0.9)], dim=2)
    planes = _quantised(planes, draw(0.7, 0.005, 0.08))
    return _mixed(planes, _inverse_luma()).clamp(0, 1)


def _mixed(frames: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Return frames with each pixel's three values times a 3 x 3 matrix."""
    weight = torch.tensor(matrix, device=frames.device)[:, :, None, None]
    return F.conv2d(frames.flatten(0, 1), weight).view(frames.shape)


@cache
def _inverse_luma() -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, torch.linalg.inv(torch.tensor(_LUMA, dtype=torch.float64)).tolist()))


@cache
def _cosines() -> Tensor:
    """Return the two-dimensional cosine transform of a block, (64, 64), orthonormal."""
    steps = torch.arange(_BLOCK, dtype=torch.float64)
    rows = torch.cos(math.pi * (steps[None] + 0.5) * steps[:, None] / _BLOCK)
    rows *= torch.where(steps == 0, math.sqrt(1 / _BLOCK), math.sqrt(2 / _BLOCK))[:, None]
    return torch.kron(rows, rows).float()


def _quantised(planes: Tensor, step: Tensor) -> Tensor:
    """Return planes with each block's frequencies rounded to multiples of a clip's step."""
    batch, num_frames, channels, height, width = planes.shape
    cosines = _cosines().to(planes.device)
    blocks = planes.view(-1, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    blocks = blocks.transpose(2, 3).reshape(batch, -1, _BLOCK * _BLOCK)
    frequencies = blocks @ cosines.T
    size = step.view(batch, 1, 1).clamp(min=1e-4)
    levels = (frequencies.abs() / size + _DEAD_ZONE).floor()
    coarse = frequencies.sign() * levels * size
    # The mean of a block is coded finer, as codecs do.
    coarse[..., 0] = frequencies[..., 0]
    blocks = (coarse @ cosines).view(-1, height // _BLOCK, width // _BLOCK, _BLOCK, _BLOCK)
    return blocks.transpose(2, 3).reshape(batch, num_frames, channels, height, width)
