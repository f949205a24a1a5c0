"""Compiled loops that compare the frames of a group, see ``patch_anchors``.

Compiled, they take less than half of numpy's time and hold no interpreter lock. With numpy a frame
was dozens of short calls, and each of them waited for the lock while other threads of a server
decoded videos: with four threads at once that took longer than one thread alone.

Sums are those of integers, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])

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

_CERTAIN = 0.95
"""Share of matching patches above which the camera counts as still, whatever their texture."""

_CHANNELS = 3


def _compiled(function: Function) -> Function:
    """Compile a function at its first call.

    The code is kept on disk, beside this file or in the user's cache, where one can be written.
    """
    try:
        compiled: Function = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # No such folder.
        compiled = njit(nogil=True)(function)
    return compiled


@_compiled
def group_anchors(frames, side, rows, columns, num_merged, threshold, min_matching):
    """Return the anchors of a group's places, counted from its first frame.

    Args:
        frames: uint8 (T, n, H, W * 3), contiguous; n frames are a place's.
        side: lines and columns of a patch.
        rows: of places; lines beyond them are ignored.
        columns: likewise.
        num_merged: number of a place's patches in each direction.
        threshold: float32, largest mean squared difference at which patches match.
        min_matching: least share of matching patches, or all are new.

    Returns:
        int16 (T, rows * columns).
    """
    num_steps, num_frames = frames.shape[:2]
    grid = num_frames, rows * num_merged, columns * num_merged
    num_patches = num_frames * grid[1] * grid[2]
    anchors = np.zeros((num_steps, rows * columns), np.int16)
    current = frames[0].copy()
    sums = np.empty(grid, np.int32)
    change = np.empty(grid, np.float32)
    texture = np.empty(grid, np.float32)
    is_new = np.empty((rows, columns), np.bool_)
    num_values = np.float32(side * side * _CHANNELS)
    for number in range(1, num_steps):
        step = frames[number]
        for frame in range(num_frames):
            _sum_differences(step[frame], current[frame], side, sums[frame])
        num_matching = 0
        for place, total in np.ndenumerate(sums):
            change[place] = np.float32(total) / num_values
            num_matching += change[place] <= threshold
        matching = num_matching / num_patches
        has_moved = matching < min_matching
        if not has_moved and matching <= _CERTAIN:
            for frame in range(num_frames):
                _put_texture(current[frame], side, texture[frame])
            has_moved = _camera_moves(change, texture)
        if has_moved:
            anchors[number] = number
            current[:] = step
            continue
        is_new[:] = False
        for (_, row, column), value in np.ndenumerate(change):
            if value > threshold:
                is_new[row // num_merged, column // num_merged] = True
        for (row, column), new in np.ndenumerate(is_new):
            place = row * columns + column
            anchors[number, place] = number if new else anchors[number - 1, place]
            if new:
                _copy_place(step, current, row, column, side * num_merged)
    return anchors


@_compiled
def _camera_moves(change, texture):
    """Return whether most textured patches changed as moved ones would.

    Args:
        change: float32, mean square of each patch's difference to its anchor.
        texture: float32, the same of the anchor to itself, moved.
    """
    noise = _noise(change)
    bound = np.float32(max(TEXTURE_TO_NOISE * noise, MIN_TEXTURE))
    num_textured = num_still = 0
    for place, value in np.ndenumerate(texture):
        if value > bound:
            num_textured += 1
            num_still += change[place] < value / np.float32(2)
    if num_textured / texture.size < MIN_TEXTURED:
        return False
    return num_still / num_textured < MIN_STILL


@_compiled
def _noise(change):
    """Return ``np.quantile(change, NOISE_QUANTILE)``, as numpy rounds it in float32."""
    ordered = np.sort(change.copy().reshape(-1))
    position = np.float32(NOISE_QUANTILE) * np.float32(len(ordered) - 1)
    index = int(position)
    low, high = ordered[index], ordered[min(index + 1, len(ordered) - 1)]
    share = position - np.float32(index)
    gap = high - low
    if share < 0.5:
        return low + gap * share
    return high - gap * (np.float32(1) - share)


@_compiled
def _sum_differences(first, second, side, sums):
    """Write the squared differences of two frames (H, W * 3), summed over each patch, to sums."""
    rows, columns = sums.shape
    width = side * _CHANNELS
    line_sums = np.empty(columns * width, np.int32)
    for row in range(rows):
        line_sums[:] = 0
        for line in range(row * side, (row + 1) * side):
            for x in range(columns * width):
                difference = np.int32(first[line, x]) - np.int32(second[line, x])
                line_sums[x] += difference * difference
        for column in range(columns):
            sums[row, column] = line_sums[column * width : (column + 1) * width].sum()


@_compiled
def _put_texture(frame, side, texture):
    """Write each patch's mean squared difference to itself moved by a pixel, across or down,
    whichever is larger, to texture (rows, columns).

    Args:
        frame: uint8 (H, W * 3).
        side: lines and columns of a patch.
        texture: float32.
    """
    rows, columns = texture.shape
    width = side * _CHANNELS
    num_values = np.float32((side - 1) * side * _CHANNELS)
    across = np.empty(columns * width, np.int32)
    down = np.empty(columns * width, np.int32)
    for row in range(rows):
        across[:] = 0
        down[:] = 0
        last = (row + 1) * side - 1
        for line in range(row * side, last + 1):
            for x in range(columns * width - _CHANNELS):
                difference = np.int32(frame[line, x + _CHANNELS]) - np.int32(frame[line, x])
                across[x] += difference * difference
            if line < last:
                for x in range(columns * width):
                    difference = np.int32(frame[line + 1, x]) - np.int32(frame[line, x])
                    down[x] += difference * difference
        for column in range(columns):
            begin, end = column * width, (column + 1) * width
            # The last pixel of a patch's line has no next one.
            largest = max(across[begin : end - _CHANNELS].sum(), down[begin:end].sum())
            texture[row, column] = np.float32(largest) / num_values


@_compiled
def _copy_place(source, target, row, column, side):
    """Copy a place's pixels (n, H, W * 3)."""
    width = side * _CHANNELS
    for frame in range(len(source)):
        for line in range(row * side, (row + 1) * side):
            for x in range(column * width, (column + 1) * width):
                target[frame, line, x] = source[frame, line, x]
