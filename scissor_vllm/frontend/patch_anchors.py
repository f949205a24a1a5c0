"""Decides from pixels which patches of a video need not be encoded again.

A patch takes the values of its anchor if its pixels hardly differ from the anchor's: from those of
the patch that was computed, not of the frame before, so that slow changes do not add up. Noise of
a sensor or of a codec is averaged over 2 x 2 pixels first.

A frame in which the camera moved is encoded whole. What tells it are its textured patches, those
that would differ from themselves moved by two pixels: smooth ones, such as a sky, match by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from scissor_vllm.patch_merging import GROUP_FRAMES, computed_patches
from scissor_vllm.video_fields import FRAME_OF, PATCH_ANCHORS, VIDEO_FRAMES

MIN_MATCHING = 0.4
"""Least share of a frame's textured patches that match their anchors, or all are computed."""

MIN_TEXTURED = 0.02
"""Least share of patches that must be textured to tell whether the camera moves. With fewer, the
picture is smooth, and is the same wherever the camera points."""

MAX_COMPUTED = 0.9
"""With a larger share of patches to compute, gathering costs what leaving out saves."""

_POOL = 2


def patch_anchors(frames: torch.Tensor, patch_size: int, threshold: float) -> torch.Tensor | None:
    """Return ``PATCH_ANCHORS`` of a video, None if the tower is to compute nearly all patches.

    Args:
        frames: uint8 (T, H, W, 3) on the CPU.
        patch_size: of the tower, in pixels; what is left at the right and at the bottom counts not.
        threshold: mean squared difference, in units of uint8's values, up to which patches match.

    Returns:
        int16 (T, P), rising along T.
    """
    patches = _patches(frames.numpy(), patch_size)
    num_frames, num_places = patches.shape[:2]
    anchors = np.empty((num_frames, num_places), np.int16)
    # Sums over a patch's values, in place of means.
    limit = np.float32(threshold * patches[0, 0].size)
    current = patches[0].copy()
    is_textured = np.zeros(num_places, bool)
    for number, frame in enumerate(patches):
        if number % GROUP_FRAMES == 0:
            is_new = np.ones(num_places, bool)
        else:
            is_new = _squared(frame - current) > limit
            matching = ~is_new[is_textured]
            if len(matching) > MIN_TEXTURED * num_places and matching.mean() < MIN_MATCHING:
                is_new[:] = True
        if is_new.all():
            is_textured = _moved(frame) > threshold
        current[is_new] = frame[is_new]
        anchors[number] = np.where(is_new, number, anchors[number - 1])
    found = torch.from_numpy(anchors)
    return found if computed_patches(found).float().mean() <= MAX_COMPUTED else None


def anchors_of_videos(
    videos: list[torch.Tensor], patch_size: int, threshold: float
) -> list[torch.Tensor]:
    """Return ``PATCH_ANCHORS`` of each video, [] if the tower is to compute nearly all patches.

    Args:
        videos: uint8 (T, H, W, 3) each.
        patch_size: as :func:`patch_anchors` takes it.
        threshold: likewise.
    """
    found = [patch_anchors(frames, patch_size, threshold) for frames in videos]
    if all(anchors is None for anchors in found):
        return []
    return [
        _own_anchors(frames, patch_size) if anchors is None else anchors
        for frames, anchors in zip(videos, found, strict=True)
    ]


def count_patches(item: Mapping[str, Any], patch_size: int) -> tuple[int, int] | None:
    """Return how many patches a video has, and how many of them the tower computes.

    Args:
        item: the video's fields.
        patch_size: of the tower.

    Returns:
        None for a video that went stock's way.
    """
    if VIDEO_FRAMES not in item:
        return None
    num_different, height, width, _ = item[VIDEO_FRAMES].data.shape
    num_frames = len(item[FRAME_OF].data) if FRAME_OF in item else num_different
    num_places = (height // patch_size) * (width // patch_size)
    num_computed = num_different * num_places
    if PATCH_ANCHORS in item:
        num_computed = int(computed_patches(item[PATCH_ANCHORS].data).sum())
    return num_frames * num_places, num_computed


def _own_anchors(frames: torch.Tensor, patch_size: int) -> torch.Tensor:
    num_frames, height, width, _ = frames.shape
    numbers = torch.arange(num_frames, dtype=torch.int16)[:, None]
    return numbers.repeat(1, (height // patch_size) * (width // patch_size))


def _patches(frames: NDArray[np.uint8], patch_size: int) -> NDArray[np.float32]:
    """Return pooled patches, (T, P, s, s, 3)."""
    rows, columns = frames.shape[1] // patch_size, frames.shape[2] // patch_size
    pool = _POOL if patch_size % _POOL == 0 else 1
    side = patch_size // pool
    patches = np.empty((len(frames), rows, columns, side, side, 3), np.float32)
    size = (columns * side, rows * side)
    for frame, of_frame in zip(frames, patches, strict=True):
        shown = frame[: rows * patch_size, : columns * patch_size]
        pooled = cv2.resize(shown, size, interpolation=cv2.INTER_AREA) if pool > 1 else shown
        of_frame[:] = pooled.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return patches.reshape(len(frames), rows * columns, side, side, 3)


def _squared(differences: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return sums of squares, (P,)."""
    flat = differences.reshape(len(differences), -1)
    squared: NDArray[np.float32] = np.einsum("pk,pk->p", flat, flat)
    return squared


def _moved(patches: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean squared difference to the patches moved by a pooled pixel, across or down,
    whichever is larger, (P,).
    """
    across = patches[:, :, 1:] - patches[:, :, :-1]
    down = patches[:, 1:] - patches[:, :-1]
    larger: NDArray[np.float32] = np.maximum(_squared(across), _squared(down))
    return larger / across[0].size
