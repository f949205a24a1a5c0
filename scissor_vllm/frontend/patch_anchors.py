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

from collections.abc import Mapping
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

MIN_STILL = 0.5
"""Least share of a frame's textured patches that stand still, or all are computed."""

MIN_TEXTURED = 0.02
"""Least share of patches that must be textured to tell whether the camera moves. With fewer, the
picture is smooth, and is the same wherever the camera points."""

TEXTURE_TO_NOISE, MIN_TEXTURE = 4, 4
"""A patch is textured if moving it changes it so many times more than noise does, and by a mean
square of so many units of uint8's values."""

NOISE_QUANTILE = 0.2
"""Of the differences between a frame's patches and their anchors: the one that is noise alone."""

MAX_COMPUTED = 0.9
"""Largest share of computed patches at which merging saves more than gathering costs."""

_CERTAIN = 0.95
"""Share of matching patches above which the camera counts as still, whatever their texture."""

_POOL, _NUM_CHANNELS = 2, 3


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
    height, width = frames.shape[1:3]
    steps = frames.numpy().reshape(-1, num_frames, *frames.shape[1:])

    def anchors_of(bounds: tuple[int, int]) -> NDArray[np.int16]:
        first, end = bounds
        pictures = _Pictures(height, width, patch_size, num_merged, num_frames)
        return _group_anchors(pictures, steps[first:end], threshold) + first

    ends = accumulate(group_lengths(len(steps)), initial=0)
    groups = map_in_threads(anchors_of, list(pairwise(ends)))
    result = torch.from_numpy(np.concatenate(groups).astype(np.int16))
    grid = height // (patch_size * num_merged), width // (patch_size * num_merged)
    share = computed_patches(result, grid).float().mean()
    return result if share <= MAX_COMPUTED else None


def _group_anchors(
    pictures: _Pictures, steps: NDArray[np.uint8], threshold: float
) -> NDArray[np.int16]:
    """Return the anchors of a group's places, counted from its first frame, (t, P)."""
    anchors = np.empty((len(steps), pictures.num_places), np.int16)
    current = pictures.of(steps[0])
    anchors[0] = 0
    for number, frames in enumerate(steps[1:], 1):
        step = pictures.of(frames)
        change = pictures.means(cv2.absdiff(step, current))
        is_new = pictures.any_of_places(change > threshold)
        if _has_moved(change, threshold, pictures, current):
            is_new[:] = True
        if is_new.all():
            current = step
        else:
            pictures.copy_places(step, is_new, current)
        anchors[number] = np.where(is_new.reshape(-1), number, anchors[number - 1])
    return anchors


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
    if VIDEO_FRAMES not in item:
        return None
    num_different, height, width, _ = item[VIDEO_FRAMES].data.shape
    num_frames = len(item[FRAME_OF].data) if FRAME_OF in item else num_different
    num_places = (height // patch_size) * (width // patch_size)
    num_computed = num_different * num_places
    if PATCH_ANCHORS in item:
        num_computed = int(computed_patches(item[PATCH_ANCHORS].data).sum())
    return num_frames * num_places, num_computed


def _own_anchors(frames: torch.Tensor, side: int) -> torch.Tensor:
    num_frames, height, width, _ = frames.shape
    numbers = torch.arange(num_frames, dtype=torch.int16)[:, None]
    return numbers.repeat(1, (height // side) * (width // side))


def _has_moved(
    change: NDArray[np.float32],
    threshold: float,
    pictures: _Pictures,
    anchors: NDArray[np.uint8],
) -> bool:
    """Return whether the camera has moved, or much of the picture.

    The camera has if most textured patches changed as moved ones would.
    """
    matching = (change <= threshold).mean()
    if not MIN_MATCHING <= matching <= _CERTAIN:
        return bool(matching < MIN_MATCHING)
    texture = pictures.texture(anchors)
    noise = float(_noise(change.reshape(-1)))
    is_textured = texture > max(TEXTURE_TO_NOISE * noise, MIN_TEXTURE)
    if is_textured.mean() < MIN_TEXTURED:
        return False
    is_still = change[is_textured] < texture[is_textured] / 2
    return bool(is_still.mean() < MIN_STILL)


def _noise(change: NDArray[np.float32]) -> np.float32:
    """Return ``np.quantile(change, NOISE_QUANTILE)``, in a tenth of its time."""
    position = np.float32(NOISE_QUANTILE) * np.float32(len(change) - 1)
    index = int(position)
    last = min(index + 1, len(change) - 1)
    ordered = np.partition(change, (index, last))
    low, high, share = ordered[index], ordered[last], position - index
    step = high - low
    return low + step * share if share < 0.5 else high - step * (1 - share)


class _Pictures:
    """Compares the pooled frames of a place, one above the other in one picture (H, W, 3).

    A picture stays in a core's cache, and its lines are compared as they lie in memory. Sums over
    patches are those of integers, so their order does not matter.
    """

    def __init__(
        self, height: int, width: int, patch_size: int, num_merged: int, num_frames: int
    ) -> None:
        side = patch_size * num_merged
        rows, columns = height // side, width // side
        self._crop = slice(rows * side), slice(columns * side)
        is_pooled = patch_size % _POOL == 0
        self._side = patch_size // _POOL if is_pooled else patch_size
        self._size = columns * num_merged * self._side, rows * num_merged * self._side
        """Columns and lines of a frame."""
        self._places = num_frames, rows, num_merged, columns, num_merged
        self._patches = num_frames * rows * num_merged, columns * num_merged
        self._ones = np.ones(self._side, np.float32)
        self.num_places = rows * columns

    def of(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the picture of frames (n, H, W, 3)."""
        width, height = self._size
        picture = np.empty((len(frames) * height, width, _NUM_CHANNELS), np.uint8)
        for frame, part in zip(
            frames, picture.reshape(-1, height, *picture.shape[1:]), strict=True
        ):
            shown = frame[self._crop]
            if shown.shape == part.shape:
                part[:] = shown
            else:
                cv2.resize(shown, self._size, dst=part, interpolation=cv2.INTER_AREA)
        return picture

    def means(self, differences: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mean square of each patch, (rows, columns) of patches."""
        means = self._sums(differences)
        means /= self._side**2 * _NUM_CHANNELS
        return means

    def texture(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return each patch's mean squared difference to itself moved by a pooled pixel, across or
        down, whichever is larger, (rows, columns) of patches.
        """
        rows, columns = self._patches
        across, down = np.zeros((2, *picture.shape), np.uint8)
        across[:, :-1] = cv2.absdiff(picture[:, 1:], picture[:, :-1])
        down[:-1] = cv2.absdiff(picture[1:], picture[:-1])
        # The last pixel of a patch's line has no next one, and its last line none.
        across.reshape(len(across), columns, self._side, -1)[:, :, -1] = 0
        down.reshape(rows, self._side, -1)[:, -1] = 0
        largest: NDArray[np.float32] = np.maximum(self._sums(across), self._sums(down))
        largest /= (self._side - 1) * self._side * _NUM_CHANNELS
        return largest

    def any_of_places(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return whether any patch of a place has its flag, (rows, columns) of places."""
        of_places: NDArray[np.bool_] = np.logical_or.reduce(
            flags.reshape(self._places), axis=(0, 2, 4)
        )
        return of_places

    def copy_places(
        self, source: NDArray[np.uint8], places: NDArray[np.bool_], target: NDArray[np.uint8]
    ) -> None:
        """Copy the pixels of some places (rows, columns)."""
        mask = cv2.resize(
            places.astype(np.uint8), self._size, interpolation=cv2.INTER_NEAREST_EXACT
        )
        cv2.copyTo(source, np.tile(mask, (self._places[0], 1)), target)

    def _sums(self, differences: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return sums of squares over each patch, (rows, columns) of patches."""
        rows, columns = self._patches
        squares: NDArray[np.float32] = differences.astype(np.float32)
        squares *= squares
        # Products with ones are the fastest sums; a single larger one would start threads.
        lines: NDArray[np.float32] = self._ones @ squares.reshape(rows, self._side, -1)
        sums: NDArray[np.float32] = np.einsum("rcv->rc", lines.reshape(rows, columns, -1))
        return sums
