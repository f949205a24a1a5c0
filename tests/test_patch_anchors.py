"""Patches that take an anchor's values: a plain oracle, and the fields that reach the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.frontend.patch_anchors import (
    MAX_COMPUTED,
    MIN_MATCHING,
    compiled_comparison,
    count_patches,
    patch_anchors,
)
from scissor_vllm.frontend.patch_change import (
    MIN_STILL,
    MIN_TEXTURE,
    MIN_TEXTURED,
    NOISE_QUANTILE,
    TEXTURE_TO_NOISE,
)
from scissor_vllm.patch_merging import (
    CALL_FRAMES,
    GROUP_FRAMES,
    call_lengths,
    computed_patches,
    group_lengths,
)
from scissor_vllm.plugin import register
from scissor_vllm.retention import RetentionReport
from scissor_vllm.settings import TowerMerging
from scissor_vllm.video_fields import (
    FRAME_OF,
    NUM_ENCODED_TOKENS,
    NUM_RETAINED,
    NUM_VIDEO_TOKENS,
    PATCH_ANCHORS,
    VIDEO_FRAMES,
    VIDEO_IDENTITY,
)
from scissor_vllm.worker.video_pixels import VideoPixels, take_video_pixels
from tests.families import build_llava_next_video
from tests.test_pixels import Processors
from tests.test_tower import RecordingTower, make_compression

PATCH, SIDE, THRESHOLD = 8, 176, 40.0
NUM_PLACES = (SIDE // PATCH) ** 2

Frames = npt.NDArray[np.uint8]


def texture(seed: int, height: int = SIDE, width: int = SIDE) -> npt.NDArray[np.float64]:
    """A picture whose every patch differs from itself two pixels on."""
    rng = np.random.default_rng(seed)
    cells = rng.uniform(30, 220, (height // 4 + 1, width // 4 + 1, 3))
    return cells.repeat(4, 0).repeat(4, 1)[:height, :width]


def fixed_camera(num_frames: int, noise: float = 3, seed: int = 0) -> Frames:
    """A still picture with a sensor's noise, and a square that crosses it."""
    rng = np.random.default_rng(seed)
    frames = np.repeat(texture(seed)[None], num_frames, 0)
    for number, frame in enumerate(frames):
        frame[60:90, 5 * number : 5 * number + 30] = 250 - 3 * number
    return (frames + rng.normal(scale=noise, size=frames.shape)).clip(0, 255).astype(np.uint8)


def panned(num_frames: int, step: int, sky: float = 0.0) -> Frames:
    """A camera that pans over a picture, the upper part of which is smooth."""
    wide = texture(1, SIDE, SIDE + step * num_frames)
    wide[: int(sky * SIDE)] = 120
    return np.stack([wide[:, step * n : step * n + SIDE] for n in range(num_frames)]).astype(
        np.uint8
    )


def zoomed(num_frames: int) -> Frames:
    """A camera that zooms into a picture."""
    picture = texture(2)
    frames = []
    for number in range(num_frames):
        places = (np.arange(SIDE) / (1 + 0.03 * number)).astype(int)
        frames.append(picture[places][:, places])
    return np.stack(frames).astype(np.uint8)


def group_begins(num_frames: int) -> npt.NDArray[np.int64]:
    """The first frame of each frame's group."""
    lengths = group_lengths(num_frames)
    return np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)


def uneven(seed: int) -> Frames:
    """Patches of all contrasts and noises: whether the camera stands still is a near thing."""
    rng = np.random.default_rng(seed)

    def pooled() -> npt.NDArray[np.float64]:
        return rng.standard_normal((SIDE // 2, SIDE // 2, 3)).repeat(2, 0).repeat(2, 1)

    def of_patches(highest: float) -> npt.NDArray[np.float64]:
        values = rng.uniform(0, highest, (SIDE // PATCH, SIDE // PATCH, 1))
        return values.repeat(PATCH, 0).repeat(PATCH, 1)

    picture = 128 + of_patches(rng.uniform(1, 5)) * pooled()
    frames = [picture + of_patches(6) * pooled() for _ in range(GROUP_FRAMES)]
    return np.stack(frames).clip(0, 255).round().astype(np.uint8)


def oracle(frames: Frames) -> npt.NDArray[np.int64]:
    """The definition, place by place in float64."""
    blocks = frames.reshape(len(frames), SIDE // 2, 2, SIDE // 2, 2, 3)
    pooled = np.floor(blocks.mean((2, 4)) + 0.5)
    size = PATCH // 2
    columns = SIDE // PATCH

    def patch(frame: int, place: int) -> npt.NDArray[np.float64]:
        row, column = divmod(place, columns)
        return pooled[
            frame, row * size : (row + 1) * size, column * size : (column + 1) * size
        ].astype(float)

    anchors = np.zeros((len(frames), NUM_PLACES), int)
    for frame, begin in enumerate(group_begins(len(frames))):
        if frame == begin:
            anchors[frame] = frame
            continue
        change, moved = np.zeros((2, NUM_PLACES))
        for place in range(NUM_PLACES):
            anchor = patch(anchors[frame - 1, place], place)
            change[place] = ((patch(frame, place) - anchor) ** 2).mean()
            moved[place] = max((np.diff(anchor, axis=axis) ** 2).mean() for axis in (0, 1))
        matches = change <= THRESHOLD
        noise = float(np.quantile(change, NOISE_QUANTILE))
        textured = moved > max(TEXTURE_TO_NOISE * noise, MIN_TEXTURE)
        told = textured.mean() >= MIN_TEXTURED
        stands = not told or (change < moved / 2)[textured].mean() >= MIN_STILL
        if matches.mean() < MIN_MATCHING or (matches.mean() <= 0.95 and not stands):
            matches[:] = False
        anchors[frame] = np.where(matches, anchors[frame - 1], frame)
    return anchors


def test_anchors_are_those_of_the_definition() -> None:
    cut = np.concatenate([fixed_camera(6), fixed_camera(5, seed=9)])
    for frames in (fixed_camera(9), cut, fixed_camera(5, noise=0), fixed_camera(35)):
        anchors = patch_anchors(torch.from_numpy(frames), PATCH, THRESHOLD)
        assert anchors is not None
        assert anchors.dtype == torch.int16
        assert np.array_equal(anchors.numpy(), oracle(frames))


def test_a_camera_counts_as_still_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scissor_vllm.frontend.patch_anchors.MAX_COMPUTED", 1.0)
    num_still = 0
    for seed in range(24):
        frames = uneven(seed)
        anchors = patch_anchors(torch.from_numpy(frames), PATCH, THRESHOLD)
        assert anchors is not None
        assert np.array_equal(anchors.numpy(), oracle(frames)), seed
        num_still += int((anchors[1] == 0).any())
    assert 4 < num_still < 20


def test_without_a_folder_for_compiled_code_the_loops_are_compiled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from scissor_vllm.frontend import patch_change

    def without_folder(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(patch_change, "njit", without_folder)
    assert patch_change._compiled(len) == (len, {"nogil": True})


def test_code_that_cannot_be_written_to_disk_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from scissor_vllm.frontend import patch_change

    compiled = patch_change.group_anchors
    failures = [OSError(28, "No space left on device"), OSError(30, "Read-only file system")]

    def group_anchors(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return compiled(*args)

    monkeypatch.setattr(patch_change, "group_anchors", group_anchors)
    assert compiled_comparison.__wrapped__() is group_anchors
    assert not failures


@pytest.mark.parametrize(
    "frames",
    [panned(8, 1), panned(8, 3), panned(8, 3, sky=0.6), panned(8, 21, sky=0.6), zoomed(8)],
    ids=["slow pan", "pan", "pan below a sky", "fast pan below a sky", "zoom"],
)
def test_where_the_camera_moves_every_patch_is_computed(frames: Frames) -> None:
    assert patch_anchors(torch.from_numpy(frames), PATCH, THRESHOLD) is None


@pytest.mark.parametrize("noise", [0, 2, 5])
def test_what_stands_still_is_computed_once_a_group_through_a_sensors_noise(noise: float) -> None:
    frames = torch.from_numpy(fixed_camera(16, noise))
    anchors = patch_anchors(frames, PATCH, THRESHOLD)
    assert anchors is not None
    share = computed_patches(anchors).float().mean()
    assert 1 / GROUP_FRAMES < share < 0.45
    begins = torch.from_numpy(group_begins(16))
    assert len(begins.unique()) == 3
    assert (begins[anchors.long()] == begins[:, None]).all()
    assert (anchors.diff(dim=0) >= 0).all()
    # The square's edges stand for themselves.
    moving = (anchors == torch.arange(16)[:, None]).view(16, 22, 22)[1:4, 8:11, 1:4]
    assert moving.float().mean() > 0.4


@pytest.mark.parametrize("threshold", [20.0, 40.0, 80.0])
def test_a_background_of_little_contrast_stands_still_at_any_threshold(threshold: float) -> None:
    frames = (110 + 0.1 * (fixed_camera(8, noise=0).astype(float) - 110)).astype(np.uint8)
    for number, frame in enumerate(frames):
        frame[20:100, 9 * number : 9 * number + 60] = texture(number, 80, 60)
    anchors = patch_anchors(torch.from_numpy(frames), PATCH, threshold)
    assert anchors is not None
    assert computed_patches(anchors).float().mean() < 0.6


def test_slow_changes_do_not_add_up() -> None:
    still = texture(4).clip(60, 200)
    steps = np.stack([still + 4 * number for number in range(GROUP_FRAMES)]).astype(np.uint8)
    anchors = patch_anchors(torch.from_numpy(steps), PATCH, THRESHOLD)
    # 4 a frame is within the threshold of 6.3, 8 is not.
    assert anchors is not None
    assert (anchors[:, 0] == torch.arange(GROUP_FRAMES) // 2 * 2).all()


@pytest.mark.parametrize(("share", "merges"), [(0.1, True), (0.4, False)])
def test_a_still_camera_is_merged_unless_much_of_the_picture_moves(
    share: float, merges: bool
) -> None:
    frames = fixed_camera(8, noise=0)
    rows = int(share * SIDE)
    for number, frame in enumerate(frames):
        frame[:rows] = texture(20 + number, rows, SIDE)
    anchors = patch_anchors(torch.from_numpy(frames), PATCH, THRESHOLD)
    assert (anchors is not None) is merges


def test_a_video_with_little_to_leave_out_is_computed_whole() -> None:
    frames = fixed_camera(8)
    frames[:, :, 16:] = panned(8, 9)[:, :, 16:]
    assert patch_anchors(torch.from_numpy(frames), PATCH, THRESHOLD) is None
    assert patch_anchors(torch.from_numpy(frames[:1]), PATCH, THRESHOLD) is None
    assert MAX_COMPUTED < 1


# What the engine gets.


@pytest.fixture(scope="module")
def demo() -> Processors:
    register()
    settings = {"tower_merging_max_ratio": 0.25}
    return Processors(demo_model_path(), mm_processor_kwargs=settings)


def item_of(processors: Processors, video: Any, ratio: float) -> Any:
    (item,) = processors.run(processors.ours, {"video": [video]}, retention_ratio=ratio)["video"]
    return item


def test_anchors_go_with_a_video_up_to_the_ratio(demo: Processors) -> None:
    video = fixed_camera(8)
    merged = {ratio: item_of(demo, video, ratio) for ratio in (1.0, 0.5, 0.26, 0.25, 0.1)}
    assert [ratio for ratio, item in merged.items() if PATCH_ANCHORS in item] == [0.25, 0.1]
    expected = patch_anchors(merged[0.5][VIDEO_FRAMES].data, PATCH, THRESHOLD)
    assert expected is not None
    assert torch.equal(merged[0.1][PATCH_ANCHORS].data, expected)
    assert PATCH_ANCHORS not in item_of(demo, panned(8, 3), 0.1)
    identities = {r: merged[r][VIDEO_IDENTITY].data.numpy().tobytes() for r in (0.5, 0.25, 0.1)}
    assert identities[0.5] != identities[0.25] == identities[0.1]
    numbers = [int(merged[ratio][NUM_RETAINED].data) for ratio in (1.0, 0.25)]
    assert numbers[0] == 4 * numbers[1]
    share = float(computed_patches(expected).float().mean())
    encoded = {ratio: int(item[NUM_ENCODED_TOKENS].data) for ratio, item in merged.items()}
    assert encoded[1.0] == encoded[0.5] == numbers[0]
    assert encoded[0.1] == pytest.approx(share * numbers[0], rel=0.05)


def test_frames_that_repeat_are_left_out_first(demo: Processors) -> None:
    video = fixed_camera(8)[[0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 7]]
    item = item_of(demo, video, 0.1)
    assert len(item[FRAME_OF].data) == 11
    assert len(item[PATCH_ANCHORS].data) == 8
    num_patches, num_computed = count_patches(item, PATCH) or (0, 0)
    assert num_patches == 11 * NUM_PLACES
    assert num_computed == computed_patches(item[PATCH_ANCHORS].data).sum()
    encoded, num_tokens = (int(item[name].data) for name in (NUM_ENCODED_TOKENS, NUM_VIDEO_TOKENS))
    assert encoded == pytest.approx(num_tokens * num_computed / num_patches, rel=0.05)
    # Without merging repeats alone are left out.
    item = item_of(demo, video, 0.5)
    assert int(item[NUM_ENCODED_TOKENS].data) == num_tokens * 8 // 11


def test_beside_a_video_that_merges_another_names_its_own_patches(demo: Processors) -> None:
    videos = [fixed_camera(8), panned(8, 3)]
    items = demo.run(demo.ours, {"video": videos}, retention_ratio=0.1)["video"]
    assert computed_patches(items[0][PATCH_ANCHORS].data).float().mean() < MAX_COMPUTED
    assert (items[1][PATCH_ANCHORS].data == torch.arange(8)[:, None]).all()


def test_the_report_tells_patches_where_some_were_left_out() -> None:
    report = RetentionReport()
    report.add(0.1, 100, 10)
    assert "num_video_patches" not in (report.as_response() or {})
    report.add_patches(40, 40)
    assert "num_video_patches" not in (report.as_response() or {})
    report.add_patches(400, 100)
    told = report.as_response() or {}
    assert (told["num_video_patches"], told["num_computed_video_patches"]) == (440, 140)


def test_a_tower_that_merges_nothing_ends_the_start(tmp_path: Path) -> None:
    register()
    build_llava_next_video(tmp_path)
    settings = {"tower_merging_max_ratio": 0.25}
    config = ModelConfig(model=str(tmp_path), dtype="float32", mm_processor_kwargs=settings)
    with pytest.raises(ValueError, match="tower_merging_max_ratio cannot be set for this model"):
        MULTIMODAL_REGISTRY.create_processor(config)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tower_merging_max_ratio": 1.0}, ValueError, "below 1, got 1.0"),
        ({"tower_merging_max_ratio": -0.1}, ValueError, "must be 0 or more"),
        ({"tower_merging_max_ratio": float("nan")}, ValueError, "got nan"),
        ({"tower_merging_max_ratio": "0.1"}, TypeError, "must be a number, got '0.1'"),
        ({"tower_merging_max_ratio": True}, TypeError, "must be a number, got True"),
        ({"tower_merging_threshold": 0}, ValueError, "above 0, got 0"),
        ({"tower_merging_threshold": float("inf")}, ValueError, "above 0, got inf"),
    ],
)
def test_settings_out_of_range_are_named(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TowerMerging.from_mm_processor_kwargs(settings)


def test_by_default_no_ratio_merges() -> None:
    merging = TowerMerging.from_mm_processor_kwargs(None)
    assert not any(merging.applies_to(ratio) for ratio in (0.001, 0.1, 1.0))


# What the tower gets.


def made_up(num_frames: int) -> torch.Tensor:
    """Every patch joins the first of its group."""
    begins = torch.from_numpy(group_begins(num_frames)).to(torch.int16)
    return begins[:, None].repeat(1, NUM_PLACES)


def test_blocks_and_their_groups_are_the_fewest_that_fit_and_balanced() -> None:
    assert group_lengths(16) == [5, 5, 6]
    assert group_lengths(32) == [5, 5, 6, 5, 5, 6]
    assert group_lengths(33) == [5, 5, 6, 5, 6, 6]
    for num_frames in range(1, 300):
        blocks = call_lengths(num_frames, CALL_FRAMES)
        assert blocks == call_lengths(num_frames, 10**6)
        lengths = iter(group_lengths(num_frames))
        groups = [[next(lengths) for _ in range(-(-block // GROUP_FRAMES))] for block in blocks]
        assert [*lengths] == []
        assert [*map(sum, groups)] == blocks
        for parts, whole, most in (
            (blocks, num_frames, CALL_FRAMES),
            *zip(groups, blocks, [GROUP_FRAMES] * len(blocks), strict=True),
        ):
            assert sum(parts) == whole
            assert len(parts) == -(-whole // most)
            assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize("num_frames", [1, 5, 18, 32, 33, 100])
@pytest.mark.parametrize("most", [GROUP_FRAMES, 13, 20, 31, CALL_FRAMES, 41])
def test_no_group_lies_in_two_calls_of_the_tower(num_frames: int, most: int) -> None:
    anchors = made_up(num_frames)
    video = VideoPixels(torch.arange(float(num_frames)).view(-1, 1, 1, 1), anchors=anchors)
    calls = list(video.split(most))
    # Longer calls have no graph.
    assert max(len(call[0]) for call in calls) <= min(most, CALL_FRAMES)
    first = 0
    for pixels, *named in calls:
        expected = anchors[first : first + len(pixels)]
        assert (torch.cat(named or [torch.zeros(1, 1)]) + first == expected).all()
        assert (pixels.flatten() == torch.arange(first, first + len(pixels))).all()
        first += len(pixels)
    assert first == num_frames


def test_calls_have_few_lengths_so_that_graphs_are_used_again() -> None:
    for merged, lengths in (
        (made_up(128), [32, 32, 32, 32]),
        (made_up(100), [25, 25, 25, 25]),
        (None, [41, 41, 18]),
    ):
        num_frames = 100 if merged is None else len(merged)
        video = VideoPixels(torch.zeros(num_frames, 1, 1, 1), anchors=merged)
        assert [len(call[0]) for call in video.split(41)] == lengths
    assert call_lengths(32, 20) == [16, 16]


def test_a_group_longer_than_a_call_is_cut_and_each_call_computes_its_first_frame() -> None:
    video = VideoPixels(torch.arange(10.0).view(10, 1, 1, 1), anchors=made_up(10))
    calls = list(video.split(3))
    assert [len(call[0]) for call in calls] == [2, 3, 2, 3]
    assert all((call[1] == 0).all() for call in calls)
    # Nothing to leave out in a call.
    assert all(len(call) == 1 for call in video.split(1))


def test_a_video_that_keeps_all_of_its_tokens_is_encoded_whole() -> None:
    pixels = torch.randn(8, 3, 2, 2)
    compression, tower = make_compression(), RecordingTower()
    video = VideoPixels(pixels, anchors=made_up(8))
    calls = []

    def encode(*call: torch.Tensor) -> torch.Tensor:
        calls.append(len(call))
        return tower(call[0])

    compression.compressed(video, 32, encode)
    compression.compressed(video, 3, encode)
    assert calls == [1, 2]


def test_anchors_reach_the_tower_of_each_video_of_a_batch() -> None:
    shown = torch.zeros(2, 8, 4, 4, 3, dtype=torch.uint8)
    fields = {
        "video_frames": shown,
        "pixel_normalization": torch.ones(2, 2, 3),
        "video_patch_anchors": torch.stack([made_up(8), torch.zeros_like(made_up(8))]),
    }
    videos = take_video_pixels(fields, torch.float32)
    assert [video.anchors is not None for video in videos] == [True, True]
    assert fields == {}
