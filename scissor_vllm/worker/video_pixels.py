"""A video's pixels on the model's device, as the vision tower takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from scissor_vllm.normalization import normalized
from scissor_vllm.patch_merging import GROUP_FRAMES
from scissor_vllm.video_fields import (
    FRAME_OF,
    PATCH_ANCHORS,
    PIXEL_NORMALIZATION,
    VIDEO_FRAMES,
    VIDEO_IDENTITY,
)


@dataclass(frozen=True)
class VideoPixels:
    """One video's pixels on the model's device, given to the tower in the model's dtype."""

    pixels: torch.Tensor
    """As stock's processor prepares them, a frame's pixels (T, ...) in the model's dtype, or
    ``VIDEO_FRAMES``."""
    normalization: torch.Tensor | None = None
    """``PIXEL_NORMALIZATION`` of frames, None for stock's pixels."""
    dtype: torch.dtype | None = None
    """The model's, for frames."""
    identity: bytes | None = None
    """``VIDEO_IDENTITY``, None for pixels that are not recognized again."""
    frame_of: torch.Tensor | None = None
    """``FRAME_OF``, None if every frame is there."""
    tokens_per_frame: int | None = None
    """P, where it differs by video; None for the model's own."""
    anchors: torch.Tensor | None = None
    """``PATCH_ANCHORS``, None if every patch is to be computed."""

    def __len__(self) -> int:
        return len(self.pixels if self.frame_of is None else self.frame_of)

    def split(self, num_frames: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield what the tower is called with: pixels of at most so many frames, (t, C, H, W), made
        when they are asked for, and their anchors (t, P) if patches stand for others there.

        A frame that repeats the one before it is not among them, see ``repeated``.
        """
        if self.anchors is None:
            for block in self.pixels.split(num_frames):
                yield (self._for_tower(block),)
            return
        if num_frames > GROUP_FRAMES:
            # So that no group lies in two calls.
            num_frames -= num_frames % GROUP_FRAMES
        first = 0
        for block, named in zip(
            self.pixels.split(num_frames), self.anchors.split(num_frames), strict=True
        ):
            # An anchor before the call gives way to the call's first frame, where it stood too.
            anchors = (named.to(torch.int64) - first).clamp(min=0)
            merges = bool((anchors != torch.arange(len(block))[:, None]).any())
            yield (self._for_tower(block), anchors) if merges else (self._for_tower(block),)
            first += len(block)

    def repeated(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows (T, ...) from those of the frames that ``split`` gave."""
        if self.frame_of is None:
            return rows
        return rows[self.frame_of.to(rows.device, non_blocking=True)]

    def whole(self) -> torch.Tensor:
        """Return all pixels, (T, C, H, W)."""
        return self.repeated(self._for_tower(self.pixels))

    def _for_tower(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.normalization is None or self.dtype is None:
            return pixels
        return normalized(pixels, self.normalization, self.dtype)


def batched_pixels(videos: list[VideoPixels]) -> torch.Tensor | list[torch.Tensor]:
    """Return all pixels as vLLM batches them: (B, T, C, H, W), a list where lengths differ."""
    whole = [video.whole() for video in videos]
    if len({len(pixels) for pixels in whole}) > 1:
        return whole
    return whole[0][None] if len(whole) == 1 else torch.stack(whole)


def take_video_pixels(fields: dict[str, Any], dtype: torch.dtype) -> list[VideoPixels]:
    """Take ``VIDEO_FRAMES`` out of the fields of a batch and return them, [] if there are none.

    Args:
        fields: what vLLM calls ``embed_multimodal`` with: frames (B, T, H, W, C), or a list if
            lengths differ, their normalization (B, 2, C), and if any their identities (B, 4), what
            repeats, (B, T) or a list, and anchors of patches, (B, T, P) or a list.
        dtype: the model's.
    """
    frames = fields.pop(VIDEO_FRAMES, None)
    normalization = fields.pop(PIXEL_NORMALIZATION, None)
    identities = fields.pop(VIDEO_IDENTITY, None)
    repeats = fields.pop(FRAME_OF, None)
    anchors = fields.pop(PATCH_ANCHORS, None)
    if frames is None:
        return []
    if identities is None:
        names: list[bytes | None] = [None] * len(frames)
    else:
        names = [identity.numpy().tobytes() for identity in identities]
    if repeats is None:
        repeats = [None] * len(frames)
    if anchors is None:
        anchors = [None] * len(frames)
    return [
        VideoPixels(pixels, scale, dtype, name, frame_of, anchors=stand)
        for pixels, scale, name, frame_of, stand in zip(
            frames, normalization, names, repeats, anchors, strict=True
        )
    ]
