"""Patches that take an anchor's values in SigLIP's tower: a slow plain oracle, and what stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from scissor_vllm.patch_merging import (
    PROBE_STEP,
    computed_patches,
    nearest_probes,
    probe_grid,
    probe_places,
)
from scissor_vllm.worker.merged_patches import MergedPatches, probe_weights
from tests.families import (
    Media,
    Question,
    ask,
    build_llava_onevision,
    changed_by,
    largest_difference,
)
from tests.interpreter import run_interpreted

SIDE = 8
NUM_PLACES = SIDE * SIDE


def made_up_anchors(num_frames: int, seed: int, joined: float, group: int = 4) -> torch.Tensor:
    """Anchors as pixels give them: a patch's own frame, or the last own one of its group."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.arange(num_frames)[:, None].repeat(1, NUM_PLACES)
    for frame in range(num_frames):
        if frame % group:
            joins = torch.rand(NUM_PLACES, generator=generator) < joined
            anchors[frame] = torch.where(joins, anchors[frame - 1], anchors[frame])
    return anchors


def test_the_lattice_is_spread_over_the_grid_and_each_place_has_its_nearest() -> None:
    square = [(side, side) for side in (4, 7, 8, 14, 22, 27)]
    for grid in (*square, (15, 27), (4, 23), (1, 9), (2, 1), (1, 1)):
        probes, nearest = probe_places(grid), nearest_probes(grid)
        assert len(probes) == math.prod(probe_grid(grid))
        assert nearest.min() == 0
        assert nearest.max() == len(probes) - 1
        places = torch.arange(math.prod(grid))
        rows, columns = places // grid[1], places % grid[1]
        apart = torch.maximum(
            (rows - rows[probes[nearest]]).abs(), (columns - columns[probes[nearest]]).abs()
        )
        assert apart.max() <= PROBE_STEP
        assert (nearest[probes] == torch.arange(len(probes))).all()


@pytest.mark.parametrize("joined", [0.0, 0.5, 0.9, 1.0])
def test_every_place_has_a_computed_row_of_its_own_place(joined: float) -> None:
    anchors = made_up_anchors(9, 1, joined)
    merged = MergedPatches.of(anchors, torch.device("cpu"), torch.float32)
    is_computed = computed_patches(anchors)
    assert len(merged.computed) == is_computed.sum() == merged.query_ends[-1]
    stands = merged.computed[merged.row_of_place].view(9, NUM_PLACES)
    assert (stands % NUM_PLACES == torch.arange(NUM_PLACES)).all()
    expected = torch.where(is_computed, torch.arange(9)[:, None], anchors)
    assert (stands // NUM_PLACES == expected).all()
    assert ((merged.move_of_place >= 0).view(9, -1) == ~is_computed).all()
    assert merged.query_ends.diff().tolist() == is_computed.sum(dim=1).tolist()


def test_a_probe_counts_with_its_neighbours_and_a_frame_without_probes_does_not_move() -> None:
    has_anchor = torch.tensor([[True] * 9, [False] * 9, [True] + [False] * 8])
    weights = probe_weights(has_anchor)
    assert torch.allclose(weights[0].sum(dim=1), torch.ones(9))
    assert weights[0, 0, 0] == weights[0, 0].max()
    assert weights[0, 0, 2] == 0
    assert (weights[1] == 0).all()
    # Far from the only one with an anchor, it alone counts.
    assert (weights[2, :, 0] == 1).all()
    assert (weights[2, :, 1:] == 0).all()


INTERPRETED = """
import math
import torch
from transformers import SiglipVisionConfig
from bench.tower import make_tower
from scissor_vllm.patch_merging import computed_patches, nearest_probes, probe_places
from scissor_vllm.worker import row_placement
from scissor_vllm.worker.merged_encoder import merges_patches, merging_encoder
from scissor_vllm.worker.merged_patches import MergedPatches, placed, probe_weights
from tests.test_merged_tower import NUM_PLACES, SIDE, made_up_anchors

config = SiglipVisionConfig(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3,
    image_size=4 * SIDE, patch_size=4, hidden_act="gelu_pytorch_tanh", vision_use_head=False,
)
tower = make_tower(config, torch.device("cpu"), torch.float32)
assert merges_patches(tower)
assert not merges_patches(torch.nn.Linear(2, 2))
generator = torch.Generator().manual_seed(3)
for weight in tower.parameters():
    weight.data = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
for module in tower.modules():
    # As vLLM does where it packs no weights.
    module.cpu_linear = torch.nn.functional.linear
pixels = torch.randn(9, 3, 4 * SIDE, 4 * SIDE, generator=generator)


def oracle(anchors):
    # All patches of all frames have values; those that are not computed are filled in anew before
    # each use, one by one, in float64.
    num_frames = len(anchors)
    computed, lattice = computed_patches(anchors), probe_places((SIDE, SIDE))
    cells = nearest_probes((SIDE, SIDE))
    weights = probe_weights((anchors != torch.arange(num_frames)[:, None])[:, lattice]).double()

    def filled(values):
        values = values.clone()
        for frame in range(num_frames):
            change = torch.stack([
                values[frame, probe] - values[anchors[frame, probe], probe] for probe in lattice
            ])
            for place in range(NUM_PLACES):
                if not computed[frame, place]:
                    moved = weights[frame, cells[place]] @ change
                    values[frame, place] = values[anchors[frame, place], place] + moved
        return values

    model = tower.vision_model
    hidden = model.embeddings(pixels).double()
    heads = config.num_attention_heads

    def linear(module, x):
        return x @ module.weight.double().T + module.bias.double()

    def norm(module, x):
        weight, bias = module.weight.double(), module.bias.double()
        return torch.nn.functional.layer_norm(x, (48,), weight, bias, config.layer_norm_eps)

    for layer in model.encoder.layers:
        queries, keys, values = linear(
            layer.self_attn.qkv_proj, norm(layer.layer_norm1, hidden)
        ).chunk(3, dim=-1)
        queries, keys, values = (
            part.view(num_frames, NUM_PLACES, heads, -1).transpose(1, 2)
            for part in (queries, filled(keys), filled(values))
        )
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(48 / heads)
        attended = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        hidden = hidden + linear(layer.self_attn.out_proj, attended)
        widened = linear(layer.mlp.fc1, norm(layer.layer_norm2, hidden))
        hidden = hidden + linear(
            layer.mlp.fc2, torch.nn.functional.gelu(widened, approximate="tanh")
        )
    return norm(model.post_layernorm, filled(hidden)).float()


def merged(anchors):
    with torch.inference_mode(), merging_encoder(tower, anchors):
        return tower(pixels)


with torch.inference_mode():
    stock = tower(pixels)
for joined in (0.0, 0.4, 0.9, 1.0):
    anchors = made_up_anchors(9, 2, joined)
    expected = oracle(anchors)
    found = merged(anchors)
    assert torch.allclose(found, expected, atol=2e-5), (joined, (found - expected).abs().max())
    assert torch.allclose(found, stock, atol=2e-5) == (joined == 0), joined
    assert torch.equal(merged(anchors), found)
    # A frame group by itself gives the same.
    alone = made_up_anchors(9, 2, joined)[4:8] - 4
    with torch.inference_mode(), merging_encoder(tower, alone):
        assert torch.allclose(tower(pixels[4:8]), found[4:8], atol=2e-5)
    # The kernels, interpreted, and the fused layers.
    patches = MergedPatches.of(anchors, torch.device("cpu"), torch.float32)
    rows = torch.randn(len(patches.computed), 96, generator=generator)[:, 32:]
    changes = row_placement.row_differences(rows, patches.probes)
    moves = torch.bmm(patches.weights, changes).flatten(0, 1)
    by_kernels = row_placement.place_rows(rows, patches.row_of_place, moves, patches.move_of_place)
    assert torch.allclose(by_kernels, placed(rows, patches), atol=1e-6)
with torch.inference_mode():
    assert torch.equal(tower(pixels), stock)
print("the same")
"""


def test_the_tower_gives_what_a_plain_one_gives_place_by_place() -> None:
    run = run_interpreted(INTERPRETED)
    assert run.stdout.strip().splitlines()[-1:] == ["the same"], run.stderr


# Through the engine.


@pytest.mark.usefixtures("engines")
def test_an_engine_merges_up_to_its_ratio_and_nothing_else_changes(tmp_path: Path) -> None:
    build_llava_onevision(tmp_path)
    # A camera that stands still, and one that moves.
    still, moving = Media(320, 320, 12, 5, shift=0), Media(320, 320, 12, 6, shift=9)
    changed = changed_by({"tower_merging_max_ratio": 0.25}, tmp_path, (still, moving))
    assert changed == [(still, 0.25), (still, 0.1)]


@pytest.mark.usefixtures("engines")
def test_features_that_are_kept_know_whether_patches_were_merged(tmp_path: Path) -> None:
    build_llava_onevision(tmp_path)
    still = Media(320, 320, 12, 5, shift=0)
    rounds = [[Question((still,), ratio)] for ratio in (0.5, 0.25, 0.5, 0.1, 0.25)]
    options: dict[str, Any] = {
        "max_model_len": 4096,
        "max_num_batched_tokens": 4096,
        "enable_prefix_caching": False,
    }
    settings = {"tower_merging_max_ratio": 0.25}
    kept, fresh = (
        [
            answers[0]
            for answers in ask(
                tmp_path,
                rounds,
                mm_processor_kwargs=settings | {"video_feature_cache_gb": size},
                **options,
            )
        ]
        for size in (0.1, 0)
    )
    for cached, encoded in zip(kept, fresh, strict=True):
        assert largest_difference(cached, encoded) < 1e-4


@pytest.mark.gpu
def test_on_a_gpu_leaving_patches_out_adds_no_rounding_of_its_own() -> None:
    from bench.tower import SO400M, draw_anchors, make_tower
    from scissor_vllm.worker.merged_encoder import merging_encoder
    from scissor_vllm.worker.siglip import fused_encoder

    device = torch.device("cuda")
    tower = make_tower(SO400M, device, torch.bfloat16)
    exact = make_tower(SO400M, device, torch.float32)
    exact.load_state_dict({name: w.float() for name, w in tower.state_dict().items()})
    generator = torch.Generator(device).manual_seed(0)
    shape = (8, 3, SO400M.image_size, SO400M.image_size)
    pixels = torch.randn(shape, device=device, generator=generator).bfloat16()
    anchors = draw_anchors(8, 729, 0.5)
    errors = []
    with torch.inference_mode():
        for context in (fused_encoder, lambda model: merging_encoder(model, anchors)):
            with context(tower):
                tokens = tower(pixels).float()
            # Of the float32 tower the layers are vLLM's own where nothing is left out.
            if context is fused_encoder:
                expected = exact(pixels.float())
            else:
                with context(exact):
                    expected = exact(pixels.float())
            errors.append(float((tokens - expected).norm() / expected.norm()))
    whole, merged = errors
    assert merged < 1.5 * whole
    assert merged < 0.05
