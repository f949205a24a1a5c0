"""A video's pixels, as input of the vision tower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from scissor_vllm.normalization import normalized
from scissor_vllm.patch_merging import call_lengths, square_grid
from scissor_vllm.video_fields import (
    FRAME_OF,
    KEEPS_EVERY_FRAME,
    PATCH_ANCHORS,
    PIXEL_NORMALIZATION,
    TOWER_FP8,
    VIDEO_FRAMES,
    VIDEO_IDENTITY,
    VIDEO_PLACES,
)
from scissor_vllm.worker.computed_places import ComputedPlaces
from scissor_vllm.worker.pinned import to_device


@dataclass(frozen=True)
class VideoPixels:
    """One video's pixels; the tower gets them on its device, in the model's dtype."""

    pixels: torch.Tensor | ComputedPlaces
    """Pixels (T, ...) of vLLM's processor in the model's dtype, ``VIDEO_FRAMES`` on the CPU, or
    ``VIDEO_PLACES`` in their stead."""
    normalization: torch.Tensor | None = None
    """``PIXEL_NORMALIZATION`` of ``VIDEO_FRAMES``, on the model's device; None for pixels of vLLM's
    processor."""
    dtype: torch.dtype | None = None
    """The model's dtype, for ``VIDEO_FRAMES``."""
    identity: bytes | None = None
    """``VIDEO_IDENTITY``, the key in the feature cache; None for pixels that are not cached."""
    frame_of: torch.Tensor | None = None
    """``FRAME_OF``, None if no frame repeats."""
    tokens_per_frame: int | None = None
    """P of this video, None for the model's default."""
    anchors: torch.Tensor | None = None
    """``PATCH_ANCHORS``, None if the tower computes every patch."""
    keeps_every_frame: bool = False
    """``KEEPS_EVERY_FRAME``."""
    in_fp8: bool = False
    """``TOWER_FP8``."""
    model_device: torch.device | None = None
    """None for that of ``normalization``, or of pixels of vLLM's processor."""
    frame_shape: tuple[int, ...] | None = None
    """Shape in which the tower gets each of T from ``VIDEO_PLACES``, None for (H, W, C)."""

    @property
    def device(self) -> torch.device:
        """Device of the tower."""
        if self.model_device is not None:
            return self.model_device
        if self.normalization is not None:
            return self.normalization.device
        assert isinstance(self.pixels, torch.Tensor)
        return self.pixels.device

    def __len__(self) -> int:
        return len(self.pixels if self.frame_of is None else self.frame_of)

    def split(self, num_frames: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the arguments of each tower call.

        They are pixels (t, C, H, W) of at most ``num_frames`` frames and, if patches are merged in
        them, anchors (t, P). Frames that repeat the previous frame are left out, see ``repeated``.
        """
        if self.anchors is None:
            for first in range(0, len(self.pixels), num_frames):
                yield (self._frames(first, min(first + num_frames, len(self.pixels))),)
            return
        first = 0
        for length in call_lengths(len(self.pixels), num_frames):
            end = first + length
            # An anchor before this call is replaced by the call's first frame, which has the patch.
            anchors = (self.anchors[first:end].to(torch.int64) - first).clamp(min=0)
            merges = bool((anchors != torch.arange(length)[:, None]).any())
            frames = self._frames(first, end)
            yield (frames, anchors) if merges else (frames,)
            first = end

    def repeated(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows (T, ...) of all frames from the rows of the frames of ``split``."""
        if self.frame_of is None:
            return rows
        return rows[self.frame_of.to(rows.device, non_blocking=True)]

    def whole(self) -> torch.Tensor:
        """Return the pixels of all frames, (T, C, H, W)."""
        return self.repeated(self._frames(0, len(self.pixels)))

    def _frames(self, first: int, end: int) -> torch.Tensor:
        """Return consecutive frames as the tower gets them."""
        if isinstance(self.pixels, torch.Tensor):
            pixels = self.pixels[first:end]
        else:
            pixels = self.pixels.frames(first, end, self.device)
            if self.frame_shape is not None:
                pixels = pixels.view(end - first, *self.frame_shape)
        if self.normalization is None or self.dtype is None:
            return pixels
        frames = to_device(pixels, self.normalization.device)
        return normalized(frames, self.normalization, self.dtype)


def batched_pixels(videos: list[VideoPixels]) -> torch.Tensor | list[torch.Tensor]:
    """Return all pixels as vLLM batches them: (B, T, C, H, W), or a list if lengths differ."""
    whole = [video.whole() for video in videos]
    if len({len(pixels) for pixels in whole}) > 1:
        return whole
    return whole[0][None] if len(whole) == 1 else torch.stack(whole)


def take_every_frame(fields: dict[str, Any], num_videos: int) -> list[bool]:
    """Take ``KEEPS_EVERY_FRAME`` out of the fields of a batch and return it for each video."""
    taken = fields.pop(KEEPS_EVERY_FRAME, None)
    return [False] * num_videos if taken is None else [bool(every) for every in taken]


def take_video_pixels(fields: dict[str, Any], dtype: torch.dtype) -> list[VideoPixels]:
    """Return a batch's videos of ``VIDEO_FRAMES``, [] without that field.

    Args:
        fields: the arguments of ``embed_multimodal``; our fields are removed. They are frames
            (B, T, H, W, C), or ``VIDEO_PLACES`` in their stead, and normalization (B, 2, C), and
            optionally identities (B, 4), repeats (B, T), anchors (B, T, P) and ``TOWER_FP8`` (B,).
            Fields are lists if lengths differ.
        dtype: the model's dtype.
    """
    frames = fields.pop(VIDEO_FRAMES, None)
    places = fields.pop(VIDEO_PLACES, None)
    normalization = fields.pop(PIXEL_NORMALIZATION, None)
    identities = fields.pop(VIDEO_IDENTITY, None)
    repeats = fields.pop(FRAME_OF, None)
    anchors = fields.pop(PATCH_ANCHORS, None)
    # Videos with a field and without it come in batches of their own.
    in_fp8 = fields.pop(TOWER_FP8, None) is not None
    if places is not None:
        frames = [
            ComputedPlaces(pixels, stand, square_grid(stand.shape[1]))
            for pixels, stand in zip(places, anchors, strict=True)
        ]
    if frames is None:
        return []
    keeps_every_frame = take_every_frame(fields, len(frames))
    if identities is None:
        names: list[bytes | None] = [None] * len(frames)
    else:
        names = [identity.numpy().tobytes() for identity in identities]
    if repeats is None:
        repeats = [None] * len(frames)
    if anchors is None:
        anchors = [None] * len(frames)
    return [
        VideoPixels(
            pixels,
            scale,
            dtype,
            name,
            frame_of,
            anchors=stand,
            keeps_every_frame=every,
            in_fp8=in_fp8,
        )
        for pixels, scale, name, frame_of, stand, every in zip(
            frames, normalization, names, repeats, anchors, keeps_every_frame, strict=True
        )
    ]
