"""Pixels of computed places alone: what is sent, and the frames that the tower gets of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scissor_vllm.frontend.computed_places import computed_places
from scissor_vllm.patch_merging import call_lengths, computed_patches, square_grid
from scissor_vllm.retention import RETENTION, RETENTION_RATIO, RetainedCounts
from scissor_vllm.video_fields import (
    NUM_VIDEO_TOKENS,
    PATCH_ANCHORS,
    VIDEO_FRAMES,
    VIDEO_PLACES,
)
from scissor_vllm.worker.computed_places import ComputedPlaces
from scissor_vllm.worker.video_pixels import VideoPixels, take_video_pixels
from tests.test_patch_anchors import PATCH, demo, fixed_camera, item_of, panned
from tests.test_pixels import Processors

__all__ = ["demo"]

SHAPES = [
    # Frames of a place, its side, rows and columns of places, and pixels beyond the last place.
    (1, 14, (5, 5), (0, 0)),
    (1, 7, (4, 4), (6, 3)),
    (2, 8, (3, 7), (0, 0)),
]
NUM_STEPS = 9


def made_up(grid: tuple[int, int]) -> torch.Tensor:
    """Anchors of groups of the lengths that the tower knows, half of the places replaced."""
    generator = torch.Generator().manual_seed(3)
    num_places = grid[0] * grid[1]
    anchors = torch.arange(NUM_STEPS)[:, None].repeat(1, num_places)
    first = 0
    for length in call_lengths(NUM_STEPS, 6):
        for number in range(first + 1, first + length):
            still = torch.rand(num_places, generator=generator) < 0.5
            anchors[number] = torch.where(still, anchors[number - 1], number)
        first += length
    return anchors.short()


def place_of(frames: torch.Tensor, step: int, place: int, shape: tuple[Any, ...]) -> torch.Tensor:
    num_frames, side, (_, columns), _ = shape
    row, column = divmod(place, columns)
    return frames[
        step * num_frames : (step + 1) * num_frames,
        row * side : (row + 1) * side,
        column * side : (column + 1) * side,
    ]


def made_frames(shape: tuple[Any, ...]) -> torch.Tensor:
    num_frames, side, (rows, columns), (below, right) = shape
    size = (NUM_STEPS * num_frames, rows * side + below, columns * side + right, 3)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(1)).byte()


@pytest.mark.parametrize("shape", SHAPES)
def test_computed_places_are_sent_frame_by_frame(shape: tuple[Any, ...]) -> None:
    num_frames, side, grid, _ = shape
    frames, anchors = made_frames(shape), made_up(grid)
    places = computed_places(frames, anchors, side, num_frames)
    expected = [
        place_of(frames, step, place, shape)
        for step, place in computed_patches(anchors, grid).nonzero().tolist()
    ]
    assert len(expected) < anchors.numel()
    assert torch.equal(places, torch.stack(expected))


def check_frames(shape: tuple[Any, ...], device: torch.device) -> None:
    num_frames, side, grid, _ = shape
    frames, anchors = made_frames(shape), made_up(grid)
    computed = computed_patches(anchors, grid)
    sent = ComputedPlaces(computed_places(frames, anchors, side, num_frames), anchors, grid)
    assert len(sent) == NUM_STEPS
    # Calls of whole groups, of one frame, and one that begins within a group.
    for first, end in ((0, NUM_STEPS), (0, 3), (4, 5), (7, NUM_STEPS)):
        made = sent.frames(first, end, device)
        assert made.device.type == device.type
        made = made.cpu()
        assert made.shape == ((end - first) * num_frames, grid[0] * side, grid[1] * side, 3)
        for step in range(first, end):
            for place in range(anchors.shape[1]):
                origin = step if computed[step, place] else int(anchors[step, place])
                assert torch.equal(
                    place_of(made, step - first, place, shape),
                    place_of(frames, origin, place, shape),
                )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_place_that_was_not_sent_has_the_pixels_of_its_anchor(shape: tuple[Any, ...]) -> None:
    check_frames(shape, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu_a_place_that_was_not_sent_has_its_anchors_pixels(shape: tuple[Any, ...]) -> None:
    check_frames(shape, torch.device("cuda"))


def test_the_tower_gets_the_same_computed_patches_as_of_frames(demo: Processors) -> None:
    video = fixed_camera(14)
    sent, whole = item_of(demo, video, 0.1), item_of(demo, video, 0.5)
    assert VIDEO_FRAMES not in sent
    anchors = sent[PATCH_ANCHORS].data
    assert sent[VIDEO_PLACES].data.nbytes < 0.7 * whole[VIDEO_FRAMES].data.nbytes

    def taken(item: Any) -> VideoPixels:
        fields = {name: elem.data[None] for name, elem in item.items()}
        (pixels,) = take_video_pixels(fields, torch.float32)
        assert VIDEO_PLACES not in fields
        return pixels

    frames, places = taken(whole), taken(sent)
    assert len(places) == len(frames) == 14
    first = 0
    for pixels, in_call in places.split(6):
        computed = computed_patches(in_call, square_grid(in_call.shape[1]))
        expected = frames.whole()[first : first + len(in_call)]
        side = int(computed.shape[1] ** 0.5)
        mask = computed.view(-1, 1, side, side)
        mask = mask.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).expand_as(pixels)
        assert torch.equal(pixels[mask], expected[mask])
        first += len(in_call)
    assert first == len(anchors)


def test_beside_a_video_that_merges_another_sends_every_place(demo: Processors) -> None:
    videos = [fixed_camera(8), panned(8, 3)]
    items = demo.run(demo.ours, {"video": videos}, retention_ratio=0.1)["video"]
    assert [VIDEO_FRAMES in item for item in items] == [False, False]
    assert len(items[1][VIDEO_PLACES].data) == items[1][PATCH_ANCHORS].data.numel()


def test_a_video_that_keeps_all_of_its_tokens_is_sent_whole(demo: Processors) -> None:
    num_tokens = int(item_of(demo, fixed_camera(8), 0.1)[NUM_VIDEO_TOKENS].data)
    items = demo.ours.info.parse_mm_data({"video": [fixed_camera(8)]})
    for num_retained in (num_tokens, num_tokens - 1):
        counts = RetainedCounts((num_tokens,), (num_retained,), 0.1)
        kwargs = {RETENTION_RATIO: 0.1, RETENTION: counts}
        processed = demo.ours._apply_hf_processor_main(items, kwargs)
        assert PATCH_ANCHORS in processed
        assert (VIDEO_FRAMES in processed) == (num_retained == num_tokens)
        assert (VIDEO_PLACES in processed) == (num_retained < num_tokens)
