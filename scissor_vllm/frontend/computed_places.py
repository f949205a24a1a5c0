"""Sends the pixels of a video's computed places alone, where patches are merged in the tower.

The tower reads no other pixels. Of a fixed camera's video that is two fifths of the bytes that an
API server sends, the engine keeps while a request waits, and each worker copies to its device.
``scissor_vllm.worker.computed_places`` makes frames of them again.
"""

from __future__ import annotations

import numpy as np
import torch

from scissor_vllm.patch_merging import computed_patches


def computed_places(
    frames: torch.Tensor, anchors: torch.Tensor, side: int, num_frames: int = 1
) -> torch.Tensor:
    """Return ``VIDEO_PLACES`` of a video.

    Args:
        frames: uint8 (T * ``num_frames``, H, W, C) on the CPU, contiguous.
        anchors: its ``PATCH_ANCHORS``, (T, P).
        side: of a place in pixels; pixels beyond the last whole place are ignored.
        num_frames: number of a place's frames.

    Returns:
        uint8 (M, ``num_frames``, ``side``, ``side``, C).
    """
    pixels = frames.numpy()
    _, height, width, num_channels = pixels.shape
    grid = height // side, width // side
    frame, row, column, _ = pixels.strides
    # An element is a line of a place, which is copied at once.
    lines = np.ndarray(
        (len(anchors), *grid, num_frames, side),
        np.dtype((np.void, side * num_channels)),
        pixels.data,
        strides=(frame * num_frames, row * side, column * side, frame, row),
    )
    is_computed = computed_patches(anchors, grid).view(-1, *grid).numpy()
    places = torch.from_numpy(lines[is_computed].view(np.uint8))
    return places.view(-1, num_frames, side, side, num_channels)


def places_of_videos(
    videos: list[torch.Tensor], anchors: list[torch.Tensor], side: int, num_frames: int = 1
) -> list[torch.Tensor]:
    """Return ``VIDEO_PLACES`` of each video, see :func:`computed_places`."""
    return [
        computed_places(frames, stand, side, num_frames)
        for frames, stand in zip(videos, anchors, strict=True)
    ]
