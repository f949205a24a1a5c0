"""Decides from pixels which patches of a video need not be encoded again.

A patch takes the values of its anchor if its pixels hardly differ from the anchor's: from those of
the patch that was computed, not of the frame before, so that slow changes do not add up. Noise of
a sensor or of a codec is averaged over 2 x 2 pixels first.

A frame in which the camera moved, or much of the picture, is encoded whole. What tells that the
camera moved are textured patches, those that would differ from themselves moved by two pixels by
far more than the frame's noise. Smooth ones, such as a sky, match by chance. This test does not
depend on the threshold: with a higher one, only things that move would count as textured.

Where a token has several patches or several frames, as Qwen-VL's have, they are computed or left
out together. One of them that differs is enough. Such a token is a place; elsewhere a patch is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from scissor_vllm.frontend.frame_transport import map_in_threads
from scissor_vllm.patch_merging import computed_patches, computed_share, group_lengths
from scissor_vllm.video_fields import FRAME_OF, PATCH_ANCHORS, VIDEO_FRAMES

MIN_MATCHING = 0.75
"""Least share of a frame's patches that match their anchors, or all are computed. Where much of the
picture moves, values of what stands still change with it, by more than the probes tell."""

MAX_COMPUTED = 0.9
"""Largest share of computed patches at which merging saves more than gathering costs."""

_POOL = 2
_MAX_COMPILED = 10
"""Functions that are compiled together, at most."""


def patch_anchors(
    frames: torch.Tensor,
    patch_size: int,
    threshold: float,
    *,
    num_merged: int = 1,
    num_frames: int = 1,
) -> torch.Tensor | None:
    """Return ``PATCH_ANCHORS`` of a video, None if the tower would compute nearly all patches.

    Args:
        frames: uint8 (T * ``num_frames``, H, W, 3) on the CPU.
        patch_size: of the tower, in pixels; pixels beyond the last whole place are ignored.
        threshold: largest mean squared difference of 8-bit pixels at which patches match.
        num_merged: number of a place's patches in each direction.
        num_frames: number of a place's frames.

    Returns:
        int16 (T, P), ascending along T.
    """
    group_anchors = compiled_comparison()
    side = patch_size * num_merged
    grid = frames.shape[1] // side, frames.shape[2] // side
    steps = frames.numpy().reshape(-1, num_frames, *frames.shape[1:])

    def anchors_of(bounds: tuple[int, int]) -> NDArray[np.int16]:
        first, end = bounds
        pictures, patch_side = _pooled(steps[first:end], patch_size)
        anchors: NDArray[np.int16] = group_anchors(
            pictures, patch_side, *grid, num_merged, np.float32(threshold), MIN_MATCHING
        )
        return anchors + np.int16(first)

    ends = accumulate(group_lengths(len(steps)), initial=0)
    groups = map_in_threads(anchors_of, list(pairwise(ends)))
    result = torch.from_numpy(np.concatenate(groups))
    share = computed_patches(result, grid).float().mean()
    return result if share <= MAX_COMPUTED else None


@cache
def compiled_comparison() -> Callable[..., NDArray[np.int16]]:
    """Return the compiled loops of :func:`patch_anchors`.

    Compiling takes seconds the first time on a machine. Later processes read the code from disk.
    """
    # Numba takes a fifth of a second to be imported, and only videos that may merge need it.
    from scissor_vllm.frontend.patch_change import group_anchors

    frames, threshold = np.zeros((2, 1, 2, 6), np.uint8), np.float32(0)
    for _ in range(_MAX_COMPILED):
        # A function whose code cannot be written to disk is compiled all the same.
        with suppress(OSError):
            group_anchors(frames, 1, 1, 1, 1, threshold, MIN_MATCHING)
            break
    return group_anchors


def _pooled(steps: NDArray[np.uint8], patch_size: int) -> tuple[NDArray[np.uint8], int]:
    """Return frames whose noise is averaged, and a patch's lines in them.

    Args:
        steps: (t, n, H, W, 3).
        patch_size: in pixels; frames of patches of odd sides are returned as they are.

    Returns:
        uint8 (t, n, H', W' * 3), contiguous.
    """
    if patch_size % _POOL:
        return np.ascontiguousarray(steps).reshape(*steps.shape[:3], -1), patch_size
    rows, columns = (length // _POOL for length in steps.shape[2:4])
    even = np.ascontiguousarray(steps[:, :, : rows * _POOL, : columns * _POOL])
    pooled = np.empty((*steps.shape[:2], rows, columns * steps.shape[4]), np.uint8)
    # All frames are one picture, one above the other.
    cv2.resize(
        even.reshape(-1, *even.shape[3:]),
        (columns, pooled[..., 0].size),
        dst=pooled.reshape(-1, columns, steps.shape[4]),
        interpolation=cv2.INTER_AREA,
    )
    return pooled, patch_size // _POOL


def anchors_of_videos(
    videos: list[torch.Tensor],
    patch_size: int,
    threshold: float,
    *,
    num_merged: int = 1,
    num_frames: int = 1,
) -> list[torch.Tensor]:
    """Return ``PATCH_ANCHORS`` of each video, [] if the tower is to compute nearly all patches.

    Args:
        videos: uint8 (T * ``num_frames``, H, W, 3) each.
        patch_size: as :func:`patch_anchors` takes it.
        threshold: likewise.
        num_merged: likewise.
        num_frames: likewise.
    """
    anchors_or_none = [
        patch_anchors(frames, patch_size, threshold, num_merged=num_merged, num_frames=num_frames)
        for frames in videos
    ]
    if all(anchors is None for anchors in anchors_or_none):
        return []
    side = patch_size * num_merged
    return [
        _own_anchors(frames[::num_frames], side) if anchors is None else anchors
        for frames, anchors in zip(videos, anchors_or_none, strict=True)
    ]


def encoded_share(fields: Mapping[str, Any], index: int) -> float:
    """Return the share of a video's tokens that the tower computes, nearly.

    Frames that repeat the previous one are left out, and so are merged patches.

    Args:
        fields: of a batch, a list of each field.
        index: of the video.
    """
    share = 1.0
    if PATCH_ANCHORS in fields:
        share = computed_share(fields[PATCH_ANCHORS][index])
    if FRAME_OF in fields:
        frame_of = fields[FRAME_OF][index]
        share *= (int(frame_of[-1]) + 1) / len(frame_of)
    return share


def count_patches(item: Mapping[str, Any], patch_size: int) -> tuple[int, int] | None:
    """Return how many patches a video has, and how many of them the tower computes.

    Args:
        item: the video's fields.
        patch_size: of the tower.

    Returns:
        None for a video that went stock's way.
    """
    if PATCH_ANCHORS in item:
        anchors = item[PATCH_ANCHORS].data
        num_different, num_places = anchors.shape
        num_computed = int(computed_patches(anchors).sum())
    elif VIDEO_FRAMES in item:
        num_different, height, width, _ = item[VIDEO_FRAMES].data.shape
        num_places = (height // patch_size) * (width // patch_size)
        num_computed = num_different * num_places
    else:
        return None
    num_frames = len(item[FRAME_OF].data) if FRAME_OF in item else num_different
    return num_frames * num_places, num_computed


def _own_anchors(frames: torch.Tensor, side: int) -> torch.Tensor:
    num_frames, height, width, _ = frames.shape
    numbers = torch.arange(num_frames, dtype=torch.int16)[:, None]
    return numbers.repeat(1, (height // side) * (width // side))
