"""M-RoPE positions that travel with a video's rows, and the representative members of rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

from scissor_vllm import compress
from scissor_vllm.compression import CompressedTokens, get_compressor
from scissor_vllm.compression.members import member_means, representative_members
from scissor_vllm.models.patch_grid import PatchGridModel
from scissor_vllm.video_fields import VIDEO_TEXT
from scissor_vllm.vllm_compat import place_without_waiting
from scissor_vllm.worker.pinned import copy_in_threads, to_device
from scissor_vllm.worker.positions import (
    CarriedPositions,
    VideoPlace,
    WholeVideo,
    carried_positions,
    place_on_device,
    placed,
    runs_of,
    uncompressed,
    with_positions,
)

TEXT, VIDEO, IMAGE = 1, 7, 8


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def nearest_member(tokens: torch.Tensor, compressed: CompressedTokens, row: int) -> int | None:
    """The plain rule, one row at a time."""
    flat = tokens.flatten(0, 1).double()
    members = [i for i in range(len(flat)) if int(compressed.assignment[i]) == row]
    if not members:
        return None
    to = compressed.tokens[row].double()
    return max(members, key=lambda i: (float(torch.cosine_similarity(flat[i], to, dim=0)), -i))


@pytest.mark.parametrize("method", ["scc", "uniform", "random", "l2norm", "uniform+merge"])
@pytest.mark.parametrize("num_retained", [1, 5, 23, 60])
def test_a_row_has_the_position_of_its_nearest_member(method: str, num_retained: int) -> None:
    tokens = seeded(5, 12, 16)
    compressed = get_compressor(method)(tokens, num_retained)
    members = representative_members(tokens, compressed).tolist()
    expected = [nearest_member(tokens, compressed, row) for row in range(num_retained)]
    assert [m for m, e in zip(members, expected, strict=True) if e is not None] == [
        e for e in expected if e is not None
    ]


def test_a_row_without_members_has_the_position_of_the_row_before_it() -> None:
    tokens = seeded(1, 4, 8)
    rows = torch.cat([seeded(1, 8), tokens[0, 2:3], seeded(1, 8), tokens[0, 1:2]])
    compressed = CompressedTokens(rows, torch.tensor([-1, 3, 1, 1]))
    assert representative_members(tokens, compressed).tolist() == [0, 2, 2, 1]


def test_of_equally_near_members_the_first_gives_the_position() -> None:
    tokens = seeded(1, 1, 8).expand(3, 4, 8)
    assert representative_members(tokens, compress(tokens, num_retained=1)).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_come_through_the_encoders_cache_exactly(dtype: torch.dtype) -> None:
    rows = seeded(6, 16).to(dtype)
    positions = torch.tensor([[0, 257, 4099, 70001, 1 << 20, 3]] * 3) + torch.arange(3)[:, None]
    place = VideoPlace(num_rows=6, first_pad=70003, num_pads=300, end=1 << 21)
    cached = with_positions(rows, positions, place)
    carried = carried_positions(cached[2:5].clone(), 16)
    assert carried is not None
    assert (carried.first_row, carried.place) == (2, place)
    assert torch.equal(carried.positions, positions[:, 2:5])
    assert torch.equal(cached[:, :16], rows)
    assert carried_positions(rows, 16) is None


def rows_of(first: int, *times: int, num_rows: int | None = None) -> CarriedPositions:
    num_rows = num_rows or first + len(times)
    place = VideoPlace(num_rows, first_pad=0, num_pads=num_rows, end=40)
    return CarriedPositions(first, torch.tensor([times] * 3), place)


PROMPT = [TEXT, TEXT, VIDEO, VIDEO, VIDEO, TEXT, IMAGE, TEXT, VIDEO, VIDEO, TEXT]
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 42, 43, 44, 45, 46, 85]] * 3)


def place(carried: list[CarriedPositions], num_computed: int) -> tuple[list[int], int]:
    positions, delta = placed(POSITIONS, carried, runs_of(VIDEO, PROMPT), num_computed)
    return positions[0].tolist(), delta


def test_rows_are_counted_from_the_token_before_their_video() -> None:
    positions, delta = place([rows_of(0, 0, 10, 39), rows_of(0, 5, 7)], 0)
    assert positions == [0, 1, 2, 12, 41, 42, 43, 44, 50, 52, 85]
    assert delta == 86 - len(PROMPT)


@pytest.mark.parametrize("num_computed", [3, 2])
def test_a_part_of_a_video_goes_to_its_own_place(num_computed: int) -> None:
    # A draft model's rows begin one later than is said.
    positions, _ = place([rows_of(1, 10, 39)], num_computed)
    assert positions == [0, 1, 2, 12, 41, 42, 43, 44, 45, 46, 85]


def test_text_after_a_video_continues_after_the_whole_video() -> None:
    for carried in ([rows_of(0, 0, 0, 0)], [rows_of(0, 0, 0, 39)], []):
        positions, delta = place(carried, 0)
        assert positions[5:8] == [42, 43, 44]
        assert delta == 86 - len(PROMPT)


def test_a_prompt_that_ends_in_a_video_goes_on_behind_the_whole_video() -> None:
    positions = torch.tensor([[0, 1, 2]] * 3)
    _, delta = placed(positions, [rows_of(0, 0, 1)], [(1, 3)], 0)
    assert delta == 1 + 40 - 3


def test_rows_without_a_matching_run_change_no_position() -> None:
    positions, _ = place([rows_of(0, 1, 2, 3, 4)], 0)
    assert positions == POSITIONS[0].tolist()


def feature(modality: str, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None, modality=modality, identifier="", mm_position=PlaceholderRange(offset, length)
    )


def test_an_uncompressed_prompt_has_all_tokens_of_its_videos() -> None:
    features = [feature("image", 6, 1), feature("video", 2, 3), feature("video", 8, 2)]
    videos = {1: WholeVideo.of([VIDEO] * 6, VIDEO), 2: WholeVideo.of([VIDEO] * 4, VIDEO)}
    full = uncompressed(PROMPT, features, videos)
    assert full.tokens == [
        *(TEXT, TEXT, *[VIDEO] * 6, TEXT, IMAGE, TEXT),
        *(*[VIDEO] * 4, TEXT),
    ]
    places = [place.mm_position for place in full.features]
    assert [(place.offset, place.length) for place in places] == [(9, 1), (2, 6), (11, 4)]
    assert full.kept.tolist() == [0, 1, 2, 4, 6, 8, 9, 10, 11, 13, 15]
    assert [full.tokens[i] for i in full.kept] == PROMPT


def test_text_within_a_video_is_kept_and_says_where_it_begins() -> None:
    # Two frames of two tokens, a text before each; both kept tokens lie in the second frame.
    prompt = [TEXT, 3, VIDEO, VIDEO, 4, TEXT]
    whole = WholeVideo.of([3, VIDEO, VIDEO, 4], VIDEO)
    assert uncompressed(prompt, [feature("video", 1, 4)], {0: whole}).tokens == prompt
    video = WholeVideo.of([3, VIDEO, VIDEO, 4, VIDEO, VIDEO], VIDEO)
    full = uncompressed(prompt, [feature("video", 1, 4)], {0: video})
    assert full.kept.tolist() == [0, 1, 2, 4, 5, 7]
    place = VideoPlace(num_rows=4, first_pad=1, num_pads=2, end=9)
    rows = CarriedPositions(0, torch.tensor([[0, 3, 4, 5]] * 3), place)
    positions = torch.tensor([[0, 1, 2, 4, 5, 10]] * 3)
    for num_computed in (0, 1):
        moved, _ = placed(positions, [rows], runs_of(VIDEO, prompt), num_computed)
        assert moved[0].tolist() == [0, 1, 4, 5, 6, 10]


def test_what_is_not_compared_is_averaged_over_the_same_members() -> None:
    values = seeded(6, 4)
    assignment = torch.tensor([1, 0, 1, -1, 1, -1])
    means = member_means(values, assignment, torch.tensor([1, 2, 5]))
    assert torch.allclose(means[0], values[1])
    assert torch.allclose(means[1], values[[0, 2, 4]].mean(0))
    assert torch.equal(means[2], values[5])


class RopeOfOneRequest:
    """What vLLM's V2 runner keeps of a request's positions."""

    def __init__(self, positions: torch.Tensor) -> None:
        self.positions = positions.int()

    def read_prefill_positions(self, req_idx: int, length: int) -> torch.Tensor:
        return self.positions[:, :length]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 11])
def test_the_v2_runner_gets_values_and_positions_of_every_chunk(
    dtype: torch.dtype, chunk: int
) -> None:
    width = 16
    model: Any = object.__new__(PatchGridModel)
    vision = SimpleNamespace(out_hidden_size=width)
    model.config = SimpleNamespace(video_token_id=VIDEO, vision_config=vision)
    values = {2: seeded(3, width).to(dtype), 6: seeded(1, width).to(dtype)}
    values[8] = values[2][:2]
    cached = {
        2: with_positions(values[2], torch.tensor([[0, 10, 39]] * 3), VideoPlace(3, 0, 3, 40)),
        6: values[6],
        8: with_positions(values[8], torch.tensor([[5, 7]] * 3), VideoPlace(2, 0, 2, 40)),
    }
    features = [
        feature("image" if offset == 6 else "video", offset, len(rows))
        for offset, rows in cached.items()
    ]
    rope = RopeOfOneRequest(POSITIONS)

    class Pruner(MultiModalPruner):
        """vLLM's class stays as it is."""

    place_without_waiting(Pruner)
    pruner = Pruner(model, rope, SimpleNamespace(mm_features={"request": features}), width)
    for begin in range(0, len(PROMPT), chunk):
        end = min(begin + chunk, len(PROMPT))
        parts = {
            offset: slice(max(begin - offset, 0), min(end - offset, len(rows)))
            for offset, rows in cached.items()
            if offset < end and offset + len(rows) > begin
        }
        batch: Any = SimpleNamespace(
            req_ids=["request"],
            idx_mapping_np=np.array([0]),
            prefill_len_np=np.array([len(PROMPT)]),
            num_computed_prefill_tokens_np=np.array([begin]),
            num_scheduled_tokens=np.array([end - begin]),
        )
        gathered = [cached[offset][part] for offset, part in parts.items()]
        cleaned = pruner.recompute(gathered, batch, None)
        for rows, (offset, part) in zip(cleaned, parts.items(), strict=True):
            assert torch.equal(rows, values[offset][part])
        for rows, expected_rows in zip(pruner.strip(gathered), cleaned, strict=True):
            assert torch.equal(rows, expected_rows)
    assert rope.positions[0].tolist() == [0, 1, 2, 12, 41, 42, 43, 44, 50, 52, 85]


def test_of_two_videos_without_a_token_between_them_the_second_stays_evenly_spaced() -> None:
    model: Any = object.__new__(PatchGridModel)
    model.config = SimpleNamespace(vision_config=SimpleNamespace(out_hidden_size=4))
    rows = with_positions(seeded(2, 4), torch.tensor([[3, 5]] * 3), VideoPlace(2, 0, 2, 9))
    positions = torch.tensor([[0, 1, 2, 10, 11, 19]] * 3, dtype=torch.int32)
    features = [feature("video", 1, 2), feature("video", 3, 2)]
    values = model.place_carried(positions, features, [rows, rows], 0, 6)
    assert [value.shape for value in values] == [(2, 4), (2, 4)]
    assert positions[0].tolist() == [0, 4, 6, 10, 11, 19]


class CountedLayouts(PatchGridModel):
    """Counts the layouts that are made."""

    place_fields = ("video_grid_thw", VIDEO_TEXT, "second_per_grid_ts")

    def __init__(self) -> None:
        self.num_made = 0
        self.config = SimpleNamespace(
            video_token_id=VIDEO, vision_config=SimpleNamespace(spatial_merge_size=2)
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _whole_positions(self, tokens: list[int], features: Any) -> tuple[torch.Tensor, int]:
        self.num_made += 1
        seconds = features[0].data["second_per_grid_ts"].data
        return torch.arange(len(tokens)).repeat(3, 1) + int(100 * seconds), 0


def test_videos_of_one_shape_and_text_share_their_positions_and_no_others_do() -> None:
    model = CountedLayouts()
    grid, text = torch.tensor([2, 4, 4]), torch.zeros(2, 0, dtype=torch.int64)
    seconds = torch.tensor(0.25, dtype=torch.bfloat16)
    known = {"video_grid_thw": grid, VIDEO_TEXT: text, "second_per_grid_ts": seconds}
    first = model._layout(known)
    assert first.positions[0, 0] == 25
    assert first.end == 33
    assert first.video.tokens == [VIDEO] * 8
    assert model._layout({name: value.clone() for name, value in known.items()}) is first
    assert model.num_made == 1
    for name, other in (
        ("video_grid_thw", torch.tensor([4, 4, 2])),
        (VIDEO_TEXT, torch.tensor([[3], [4]])),
        ("second_per_grid_ts", torch.tensor(0.5, dtype=torch.bfloat16)),
    ):
        assert model._layout({**known, name: other}) is not first
    assert model.num_made == 4


def test_the_last_layouts_are_kept() -> None:
    model = CountedLayouts()
    text, seconds = torch.zeros(2, 0, dtype=torch.int64), torch.tensor(1.0)
    for num_frames in [*range(1, 40), 39, 38]:
        grid = torch.tensor([num_frames, 2, 2])
        model._layout({"video_grid_thw": grid, VIDEO_TEXT: text, "second_per_grid_ts": seconds})
    assert model.num_made == 39
    assert len(model._layouts) == 16


@pytest.mark.gpu
def test_on_a_gpu_positions_are_placed_without_waiting_and_as_on_a_cpu() -> None:
    rows, carried = seeded(5, 16).bfloat16(), torch.randint(0, 99, (3, 5))
    place = VideoPlace(5, 0, 5, 100)
    positions = torch.arange(9, dtype=torch.int32).repeat(3, 1)
    on_gpu = positions.cuda()
    place_on_device(positions, with_positions(rows, carried, place), 16, begin=2, first_row=0)
    rows, carried = rows.cuda(), carried.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wide = with_positions(rows, carried, place)
        place_on_device(on_gpu, wide[1:], 16, begin=2, first_row=1)
        place_on_device(on_gpu, wide[:1], 16, begin=2, first_row=0)
        moved = to_device(torch.arange(1 << 22), torch.device("cuda:0"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_gpu.cpu(), positions)
    assert torch.equal(moved.cpu(), torch.arange(1 << 22))


@pytest.mark.parametrize("shape", [(0, 3), (), (7,), (31, 100_003)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64])
def test_values_of_any_size_are_copied_in_threads(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scissor_vllm.worker.pinned.threads_per_video", lambda: 4)
    values = torch.randint(0, 200, shape).to(dtype)
    with torch.inference_mode():
        into = torch.zeros_like(values)
        copy_in_threads(into, values)
        assert torch.equal(into, values)
        copy_in_threads(into, values.flip(0) if values.dim() else values)
    assert torch.equal(into, values.flip(0) if values.dim() else values)
