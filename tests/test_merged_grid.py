"""Tokens that take an anchor's values in Qwen-VL's towers: a slow plain oracle, and what stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import ir
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from scissor_vllm.frontend.computed_places import computed_places
from scissor_vllm.frontend.patch_anchors import patch_anchors
from scissor_vllm.models.patch_grid import GridVideo, PatchGridModel
from scissor_vllm.patch_merging import computed_patches
from scissor_vllm.plugin import register
from scissor_vllm.video_fields import FRAME_SIZE, PATCH_ANCHORS, VIDEO_IDENTITY, VIDEO_PLACES
from scissor_vllm.worker.computed_places import ComputedPlaces
from scissor_vllm.worker.patches import PatchShape
from scissor_vllm.worker.video_pixels import VideoPixels
from tests.families import Media, build_qwen2_5_vl, build_qwen3_vl, changed_by
from tests.interpreter import run_interpreted
from tests.tiny_models.qwen2_vl import build_qwen2_vl

STILL, MOVING = Media(280, 220, 16, 5, shift=0), Media(280, 220, 16, 6, shift=9)
"""A camera that stands still, and one that moves."""
BUILDERS = {"qwen2_5_vl": build_qwen2_5_vl, "qwen3_vl": build_qwen3_vl}


def made_up_anchors(num_frames: int, num_tokens: int, seed: int, joined: float) -> torch.Tensor:
    """Anchors as pixels give them: a token's own frame, or the last own one of its group of 4."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.arange(num_frames)[:, None].repeat(1, num_tokens)
    for frame in range(num_frames):
        if frame % 4:
            joins = torch.rand(num_tokens, generator=generator) < joined
            anchors[frame] = torch.where(joins, anchors[frame - 1], anchors[frame])
    return anchors


# The tower.


INTERPRETED = """
import math
import torch
from bench.tower import make_tower
from bench.qwen_tower import TOWERS
from scissor_vllm.patch_merging import computed_patches, nearest_probes, probe_grid, probe_places
from scissor_vllm.worker import row_placement
from scissor_vllm.worker.merged_grid import (
    Layout, MergedTokens, MergingTower, why_not_merging,
)
from scissor_vllm.worker.merged_patches import moves_of, placed, probe_weights
from tests.test_merged_grid import made_up_anchors

ROWS, COLUMNS, FRAMES = 10, 14, 6  # 5 x 7 tokens; windows of 3 x 3 are cut at the edges.
P = ROWS * COLUMNS // 4
small = dict(depth=4, hidden_size=48, intermediate_size=60, num_heads=2, out_hidden_size=20,
             patch_size=2)
settings = {
    "qwen2.5-vl": dict(small, fullatt_block_indexes=[2], window_size=12),
    "qwen3-vl": dict(small, num_position_embeddings=49, deepstack_visual_indexes=[0, 2]),
    "qwen2-vl": dict(depth=4, embed_dim=48, num_heads=2, hidden_size=20, mlp_ratio=2, patch_size=2),
}


def linear(module, x):
    y = x @ module.weight.double().T
    return y if module.bias is None else y + module.bias.double()


def norm(module, x):
    weight = module.weight.double()
    if getattr(module, "bias", None) is None:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, module.bias.double(), 1e-6)


def turned(x, cos, sin):
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def oracle(tower, name, patches, anchors):
    # All patches of all frames have values; those of tokens that are not computed are filled in
    # anew before each use, one by one, in float64. Patches stand token by token, row by row.
    computed, lattice = computed_patches(anchors, (5, 7)), probe_places((5, 7))
    cells = nearest_probes((5, 7))
    weights = probe_weights(
        (anchors != torch.arange(FRAMES)[:, None])[:, lattice], probe_grid((5, 7))
    ).double()

    def filled(values):  # (T, P, ...)
        values = values.clone()
        for frame in range(FRAMES):
            change = torch.stack([
                values[frame, probe] - values[anchors[frame, probe], probe] for probe in lattice
            ]).flatten(1)
            for place in range(P):
                if not computed[frame, place]:
                    moved = (weights[frame, cells[place]] @ change).view_as(values[0, 0])
                    values[frame, place] = values[anchors[frame, place], place] + moved
        return values

    token_row, token_column = torch.arange(5)[:, None].expand(5, 7), torch.arange(7).expand(5, 7)
    part = torch.arange(2)
    row = (token_row[..., None, None] * 2 + part[:, None]).expand(5, 7, 2, 2).reshape(P, 4)
    column = (token_column[..., None, None] * 2 + part).expand(5, 7, 2, 2).reshape(P, 4)
    # A quarter of a head turns with the row and with the column each.
    size = 24
    angle = 10000.0 ** -(torch.arange(0, size // 2, 2).double() / (size // 2))
    angles = torch.cat([row[..., None] * angle, column[..., None] * angle], dim=-1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]

    hidden = tower.patch_embed(patches).double().view(FRAMES, P, 4, 48)
    if name == "qwen3-vl":
        hidden = hidden + tower.fast_pos_embed_interpolate([[1, ROWS, COLUMNS]]).double().view(
            P, 4, 48
        )
    windows = (token_row // 3 * 3 + token_column // 3).flatten()
    outputs = []
    for number, block in enumerate(tower.blocks):
        parts = linear(block.attn.qkv, norm(block.norm1, hidden)).view(FRAMES, P, 4, 3, 2, size)
        queries, keys, values = parts.unbind(3)
        keys, values = filled(keys), filled(values)
        queries, keys = turned(queries, cos, sin), turned(keys, cos, sin)
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (queries, keys, values))
        scores = q @ k.transpose(-1, -2) / math.sqrt(size)
        if name == "qwen2.5-vl" and number != 2:
            of_patch = windows.repeat_interleave(4)
            scores = scores.masked_fill(of_patch[:, None] != of_patch, -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(FRAMES, P, 4, 48)
        hidden = hidden + linear(block.attn.proj, attended)
        x, mlp = norm(block.norm2, hidden), block.mlp
        if name == "qwen2-vl":
            wide = linear(mlp.fc1, x)
            hidden = hidden + linear(mlp.fc2, wide * torch.sigmoid(1.702 * wide))
        elif name == "qwen2.5-vl":
            gate, up = linear(mlp.gate_up_proj, x).chunk(2, dim=-1)
            hidden = hidden + linear(mlp.down_proj, torch.nn.functional.silu(gate) * up)
        else:
            wide = torch.nn.functional.gelu(linear(mlp.linear_fc1, x), approximate="tanh")
            hidden = hidden + linear(mlp.linear_fc2, wide)
            if number in (0, 2):
                merger = tower.deepstack_merger_list[len(outputs)]
                wide = linear(merger.linear_fc1, norm(merger.norm, hidden.flatten(2)))
                outputs.append(linear(merger.linear_fc2, torch.nn.functional.gelu(wide)))
    merger = tower.merger
    if name != "qwen3-vl":
        wide = linear(merger.mlp[0], norm(merger.ln_q, hidden).flatten(2))
        last = linear(merger.mlp[2], torch.nn.functional.gelu(wide))
    else:
        wide = linear(merger.linear_fc1, norm(merger.norm, hidden).flatten(2))
        last = linear(merger.linear_fc2, torch.nn.functional.gelu(wide))
    return filled(torch.cat([last, *outputs], dim=-1)).float()


generator = torch.Generator().manual_seed(3)
for name, (make_config, make) in TOWERS.items():
    config = make_config(**settings[name])
    tower = make_tower(config, torch.device("cpu"), torch.float32, make=make)
    assert why_not_merging(tower) is None
    merging = MergingTower(tower)
    for weight in tower.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
    for module in tower.modules():
        # As vLLM does where it packs no weights.
        module.cpu_linear = torch.nn.functional.linear
    grid = (FRAMES, ROWS, COLUMNS)
    patches = torch.randn(math.prod(grid), 24, generator=generator)
    with torch.inference_mode():
        stock = tower(patches, grid_thw=[list(grid)]).view(FRAMES, P, -1)
        for joined in (0.0, 0.4, 0.9, 1.0):
            anchors = made_up_anchors(FRAMES, P, 2, joined)
            expected = oracle(tower, name, patches, anchors)
            found = merging.encode(patches, grid, anchors)
            difference = (found - expected).abs().max()
            assert difference < 1e-4, (name, joined, difference)
            assert torch.allclose(found, stock, atol=1e-4) == (joined == 0), (name, joined)
            # A frame group by itself gives the same.
            rest = patches[4 * ROWS * COLUMNS :]
            alone = merging.encode(rest, (2, ROWS, COLUMNS), anchors[4:] - 4)
            assert torch.allclose(alone, found[4:], atol=1e-5)
        # The kernels, interpreted, on rows of part of a layer's output of two frames.
        layout = Layout.of(tower, (2, ROWS, COLUMNS))
        anchors = made_up_anchors(2, P, 2, 0.6)
        merged = MergedTokens.of(anchors, layout, torch.device("cpu"), torch.float32)
        for placement, size in ((merged.patches, 4), (merged.tokens, 1)):
            num_rows = len(merged.computed) * size
            rows = torch.randn(num_rows, 144, generator=generator)[:, 48:]
            changes = row_placement.row_differences(rows, placement.probes)
            of_frame, of_anchors = rows[placement.probes]
            assert torch.equal(changes, of_frame - of_anchors)
            moves = torch.bmm(
                placement.weights, changes.view(*placement.weights.shape[:2], -1)
            ).view(-1, 96)
            by_kernels = row_placement.place_rows(
                rows, placement.row_of_place, moves, placement.move_of_place
            )
            assert torch.allclose(by_kernels, placed(rows, placement), atol=1e-6)
        # Keys are placed and queries and keys rotated by one kernel, heads of 24.
        projected = torch.randn(len(merged.patch_numbers), 3 * 48, generator=generator)
        queries, rest = projected.split([48, 96], dim=1)
        keys, values = placed(rest, merged.patches).view(-1, 2, 2, 24).unbind(1)
        rotate, (cos, sin) = tower.blocks[0].attn.apply_rotary_emb, layout.rotations
        own = merged.patch_numbers
        expected_parts = (
            rotate(queries.reshape(1, -1, 2, 24), cos[own], sin[own])[0],
            rotate(keys[None], cos, sin)[0],
            values,
        )
        parts = row_placement.place_rotated(
            projected, merged.patches.row_of_place, moves_of(rest, merged.patches),
            merged.patches.move_of_place, own, layout.rotations, 2,
        )
        for part, expected_part in zip(parts, expected_parts, strict=True):
            assert torch.allclose(part, expected_part, atol=1e-5)
        # Frames that are equal: each has the tokens that it has alone.
        still = patches[: ROWS * COLUMNS].repeat(FRAMES, 1)
        exact = tower(still, grid_thw=[list(grid)]).view(FRAMES, P, -1)
        anchors = made_up_anchors(FRAMES, P, 2, 1.0)
        assert computed_patches(anchors, (5, 7)).float().mean() < 0.5
        assert torch.allclose(merging.encode(still, grid, anchors), exact, atol=1e-5)
        assert torch.equal(tower(patches, grid_thw=[list(grid)]).view_as(stock), stock)

    # What is not supported says so.
    assert "got Linear" in why_not_merging(torch.nn.Linear(2, 2))
    attention = tower.blocks[1].attn
    attention.attn.fp8_enabled, kept = True, attention.attn.fp8_enabled
    tower.blocks[0].attn.attn.fp8_enabled = True
    assert "got fp8" in why_not_merging(tower)
    tower.blocks[0].attn.attn.fp8_enabled = attention.attn.fp8_enabled = kept
    tower.blocks[1].do_not_compile = False
    assert "not compiled" in why_not_merging(tower)
    tower.blocks[1].do_not_compile = True
    assert why_not_merging(tower) is None
    attention.__class__ = type("Other", (type(attention),), {})
    assert "other ones" in why_not_merging(tower)
print("the same")
"""


def test_the_towers_give_what_plain_ones_give_token_by_token() -> None:
    run = run_interpreted(INTERPRETED)
    assert run.stdout.strip().splitlines()[-1:] == ["the same"], run.stderr


# What the engine gets.


class Processor:
    """A tiny model's processor."""

    def __init__(self, folder: Path, **config: Any) -> None:
        register()
        model_config = ModelConfig(model=str(folder), dtype="float32", **config)
        self._processor: Any = MULTIMODAL_REGISTRY.create_processor(model_config)

    def items(self, *videos: Media, ratio: float) -> list[Any]:
        """Return the fields of videos that go to the engine."""
        processor = self._processor
        prompt = processor.info.get_tokenizer().encode(
            processor.dummy_inputs.get_dummy_text({"video": len(videos)})
        )
        data = {"video": [(video.pixels(), video.metadata()) for video in videos]}
        inputs = ProcessorInputs(
            prompt,
            processor.info.parse_mm_data(data),
            hf_processor_mm_kwargs={"retention_ratio": ratio},
        )
        result = processor.apply(inputs, TimingContext(enabled=False))
        return list(result["mm_kwargs"]["video"])

    def count(self, item: Any) -> tuple[int, int]:
        """Return how many patches a video has, and how many of them are computed."""
        counts = self._processor._count_patches(item)
        assert counts is not None
        return counts


@pytest.fixture(scope="module", params=BUILDERS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    BUILDERS[request.param](folder)
    return folder


def test_anchors_of_tokens_go_with_a_video_up_to_the_ratio(tiny: Path) -> None:
    processor = Processor(tiny, mm_processor_kwargs={"tower_merging_max_ratio": 0.25})
    merged = {r: processor.items(STILL, ratio=r)[0] for r in (1.0, 0.5, 0.25, 0.1)}
    assert [ratio for ratio, item in merged.items() if PATCH_ANCHORS in item] == [0.25, 0.1]
    item = merged[0.1]
    num_frames, rows, columns = item["video_grid_thw"].data.tolist()
    height, width = item[FRAME_SIZE].data.tolist()
    frames = merged[0.5]["pixel_values_videos"].data.view(-1, height, width, 3)
    expected = patch_anchors(frames, height // rows, 40.0, num_merged=2, num_frames=2)
    assert expected is not None
    anchors = item[PATCH_ANCHORS].data
    assert torch.equal(anchors, expected)
    assert anchors.shape == (num_frames, rows // 2 * (columns // 2))
    computed = computed_patches(anchors, (rows // 2, columns // 2))
    assert processor.count(item) == (num_frames * rows * columns, 4 * int(computed.sum()))
    assert computed.float().mean() < 0.8
    assert "pixel_values_videos" not in item
    places = computed_places(frames, anchors, height // rows * 2, 2)
    assert torch.equal(item[VIDEO_PLACES].data, places)
    assert processor.count(merged[0.5])[0] == processor.count(merged[0.5])[1]
    identities = {r: merged[r][VIDEO_IDENTITY].data.tolist() for r in (0.5, 0.25, 0.1)}
    assert identities[0.5] != identities[0.25] == identities[0.1]


def test_the_tower_gets_the_same_computed_patches_as_of_frames(tiny: Path) -> None:
    processor = Processor(tiny, mm_processor_kwargs={"tower_merging_max_ratio": 0.1})
    (sent,), (whole,) = (processor.items(STILL, ratio=ratio) for ratio in (0.1, 0.5))
    num_frames, rows, columns = sent["video_grid_thw"].data.tolist()
    frame_size = tuple(sent[FRAME_SIZE].data.tolist())
    anchors, grid = sent[PATCH_ANCHORS].data, (rows // 2, columns // 2)
    shape = PatchShape(frame_size[0] // rows, num_frames=2, num_merged=2)
    frames = whole["pixel_values_videos"].data.view(num_frames, rows * columns, -1)
    video = VideoPixels(
        ComputedPlaces(sent[VIDEO_PLACES].data, anchors, grid),
        anchors=anchors,
        model_device=torch.device("cpu"),
        frame_shape=(rows * columns, -1),
    )
    first = 0
    for pixels, in_call in video.split(num_frames):
        of_frames = frames[first : first + len(pixels)]
        made, expected = (
            shape.patches_of(part.flatten(0, 1), frame_size, None, torch.float32)
            for part in (pixels, of_frames)
        )
        computed = computed_patches(in_call, grid).flatten()
        tokens = made.view(len(computed), -1), expected.view(len(computed), -1)
        assert torch.equal(tokens[0][computed], tokens[1][computed])
        assert not torch.equal(*tokens)
        first += len(pixels)
    assert first == num_frames


def test_a_moving_camera_has_no_anchors_alone_and_its_own_beside_a_still_one(tiny: Path) -> None:
    processor = Processor(tiny, mm_processor_kwargs={"tower_merging_max_ratio": 0.25})
    assert PATCH_ANCHORS not in processor.items(MOVING, ratio=0.1)[0]
    still, moving = processor.items(STILL, MOVING, ratio=0.1)
    alone = processor.items(STILL, ratio=0.1)[0]
    assert torch.equal(still[PATCH_ANCHORS].data, alone[PATCH_ANCHORS].data)
    anchors = moving[PATCH_ANCHORS].data
    assert (anchors == torch.arange(len(anchors))[:, None]).all()
    without = Processor(tiny)
    assert PATCH_ANCHORS not in without.items(STILL, ratio=0.1)[0]


# Through the engine.


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(
    "build",
    [
        *(pytest.param(build, id=name) for name, build in BUILDERS.items()),
        pytest.param(build_qwen2_vl, id="qwen2_vl", marks=pytest.mark.slow),
    ],
)
def test_an_engine_merges_up_to_its_ratio_and_nothing_else_changes(
    build: Callable[[Path], Any], tmp_path: Path
) -> None:
    build(tmp_path)
    changed = changed_by({"tower_merging_max_ratio": 0.25}, tmp_path, (STILL, MOVING))
    assert changed == [(STILL, 0.25), (STILL, 0.1)]


class RecordedModel(PatchGridModel):
    """Records by which way frames are encoded, instead of encoding them."""

    def __init__(self, replaces_attention: bool) -> None:
        self.calls: list[torch.Tensor | None] = []
        self._replaces_attention = replaces_attention
        self._num_tower_ranks = 1
        vision = SimpleNamespace(out_hidden_size=8, spatial_merge_size=2)
        self.config = SimpleNamespace(vision_config=vision)
        self.__setattr__("video_compression", self)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def keeps_all(self, videos: Any, counts: list[int]) -> bool:
        return counts == [20]

    def compressed(self, pixels: Any, count: int, encode: Any, width: int) -> Any:
        rows = torch.cat([encode(*call) for call in pixels.split(3)])
        return rows[:, : count // 5], None

    def _encode_merged(self, video: Any, pixels: Any, anchors: torch.Tensor) -> torch.Tensor:
        self.calls.append(anchors)
        return pixels

    def _patches(self, rows: torch.Tensor, video: Any) -> torch.Tensor:
        return rows

    def _parse_and_validate_video_input(self, pixel_values_videos: Any, video_grid_thw: Any) -> Any:
        return pixel_values_videos

    def _process_video_input(self, pixels: Any) -> list[torch.Tensor]:
        self.calls.append(None)
        return [pixels]


@pytest.mark.parametrize(
    ("replaces_attention", "num_retained", "is_replaced"),
    [(True, 10, True), (True, 20, False), (False, 10, False)],
)
def test_on_a_gpu_compressed_videos_of_which_nothing_is_merged_have_the_faster_attention(
    replaces_attention: bool, num_retained: int, is_replaced: bool
) -> None:
    model: Any = RecordedModel(replaces_attention)
    pixels = VideoPixels(torch.randn(5, 4, 8), tokens_per_frame=1)
    grid = {"video_grid_thw": torch.tensor([5, 2, 2])}
    rows = model._encoded(GridVideo(pixels, grid, None, None), num_retained)
    assert len(rows) == num_retained
    assert len(model.calls) == 2
    for anchors, num_frames in zip(model.calls, (3, 2), strict=True):
        if is_replaced:
            assert torch.equal(anchors, torch.arange(num_frames)[:, None].expand(-1, 1))
        else:
            assert anchors is None


class NormsOfModel(RecordedModel):
    """Records which kernels the tower's norms have, in place of anchors."""

    _encode_merged = PatchGridModel._encode_merged

    def _merging(self) -> Any:
        def encode(patches: torch.Tensor, grid: tuple[int, ...], _: torch.Tensor) -> torch.Tensor:
            self.calls.append(ir.ops.rms_norm.get_priority()[0])
            return patches.view(grid[0], -1, patches.shape[-1])

        return SimpleNamespace(encode=encode)

    def _process_video_input(self, pixels: Any) -> list[torch.Tensor]:
        self.calls.append(ir.ops.rms_norm.get_priority()[0])
        return [pixels]


@pytest.mark.parametrize("replaces_attention", [True, False])
@pytest.mark.parametrize(
    ("num_retained", "compiles_tower", "kernels"),
    [(10, False, "vllm_c"), (20, False, "native"), (10, True, "native")],
)
def test_in_a_server_that_compiles_compressed_videos_alone_have_fused_norms(
    num_retained: int,
    compiles_tower: bool,
    kernels: str,
    replaces_attention: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm = ir.ops.rms_norm
    monkeypatch.setattr(norm.impls["vllm_c"], "supported", True)
    model: Any = NormsOfModel(replaces_attention)
    model._compiles_tower = compiles_tower
    pixels = VideoPixels(torch.randn(5, 4, 8), tokens_per_frame=1)
    grid = {"video_grid_thw": torch.tensor([5, 2, 2])}
    with norm.set_priority(["native"]):
        model._encoded(GridVideo(pixels, grid, None, None), num_retained)
    assert model.calls == [kernels] * 2


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "qwen2-vl"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_on_a_gpu_leaving_tokens_out_adds_no_rounding_of_its_own(name: str, share: float) -> None:
    from bench.qwen_tower import FULL, TOWERS, random_patches
    from bench.tower import draw_anchors, make_tower
    from scissor_vllm.worker.merged_grid import MergingTower, why_not_merging

    make_config, make = TOWERS[name]
    config = make_config(**{**FULL[name], "depth": 8})
    device = torch.device("cuda")
    tower = make_tower(config, device, torch.bfloat16, make=make)
    exact = make_tower(config, device, torch.float32, make=make)
    exact.load_state_dict({name: w.float() for name, w in tower.state_dict().items()})
    assert why_not_merging(tower) is None
    grid = (5, 12, 20)
    patches = random_patches(config, grid, device).bfloat16()
    anchors = draw_anchors(5, 60, share, grid=(6, 10))
    assert (computed_patches(anchors, (6, 10)).float().mean() < 1) == (share < 1)
    with torch.inference_mode():
        expected = MergingTower(exact).encode(patches.float(), grid, anchors)
        stock = exact(patches.float(), grid_thw=[list(grid)]).view_as(expected)
        whole = tower(patches, grid_thw=[list(grid)]).float().view_as(expected)
        merging = MergingTower(tower)
        tokens = merging.encode(patches, grid, anchors)
        again = merging.encode(patches, grid, anchors)
    assert torch.equal(tokens, again)
    if share == 1:
        assert (expected - stock).norm() < 1e-3 * stock.norm()
    rounding = (whole - stock).norm() / stock.norm()
    error = (tokens.float() - expected).norm() / expected.norm()
    assert rounding < 0.1
    assert error < 1.5 * rounding


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "size"), [(16, 80), (16, 72)])
def test_on_a_gpu_rows_are_placed_and_rotated_as_on_the_cpu(
    dtype: torch.dtype, heads: int, size: int
) -> None:
    from scissor_vllm.worker.merged_grid import Layout, MergedTokens, Parts
    from scissor_vllm.worker.merged_patches import moves_of, placed
    from scissor_vllm.worker.row_placement import place_rotated

    num_frames, rows, columns = 5, 12, 20
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(num_frames * rows * columns, size // 2, generator=generator) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    order = torch.randperm(60, generator=generator)
    layouts = [
        Layout(
            (6, 10),
            4,
            order.to(device),
            Parts.of(torch.full((num_frames,), 60), 4, device),
            Parts.of(torch.tensor([16] * 3 + [12]).repeat(num_frames), 4, device),
            (cos.to(device), sin.to(device)),
            None,
        )
        for device in map(torch.device, ("cpu", "cuda"))
    ]
    anchors = made_up_anchors(num_frames, 60, 1, 0.6)
    cpu, cuda = (
        MergedTokens.of(anchors, layout, layout.rotations[0].device, dtype) for layout in layouts
    )
    projected = torch.randn(len(cpu.patch_numbers), 3 * heads * size, generator=generator).to(dtype)
    queries, rest = projected.split([heads * size, 2 * heads * size], dim=1)
    keys, values = placed(rest, cpu.patches).view(-1, 2, heads, size).unbind(1)

    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.float()[:, None], sin.float()[:, None]
        one, other = x.float().chunk(2, dim=-1)
        return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)

    numbers = cpu.patch_numbers
    expected = (
        turned(queries.view(-1, heads, size), cos[numbers], sin[numbers]),
        turned(keys, cos, sin),
        values.float(),
    )
    on_device = projected.cuda()
    placement = cuda.patches
    parts = place_rotated(
        on_device,
        placement.row_of_place,
        moves_of(on_device[:, heads * size :], placement),
        placement.move_of_place,
        cuda.patch_numbers,
        (cos.cuda(), sin.cuda()),
        heads,
    )
    for part, plain in zip(parts, expected, strict=True):
        assert torch.allclose(part.float().cpu(), plain, atol=0.06, rtol=0.02)
    tokens = torch.randn(len(cpu.computed), 5000, generator=generator).to(dtype)
    whole = placed(tokens.cuda(), cuda.tokens).cpu()
    assert torch.allclose(whole.float(), placed(tokens, cpu.tokens).float(), atol=0.06, rtol=0.02)
