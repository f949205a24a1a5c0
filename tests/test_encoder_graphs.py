"""Graphs of a tower's layers: every run has what the launches one by one have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from scissor_vllm.patch_merging import computed_patches

pytestmark = pytest.mark.gpu

NUM_FRAMES, NUM_PLACES = 16, 729


@pytest.fixture(scope="module")
def tower() -> Any:
    from bench.tower import SO400M, make_tower

    return make_tower(SO400M, torch.device("cuda"), torch.bfloat16)


def pixels_of(seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (NUM_FRAMES, 3, 384, 384)
    return torch.randn(shape, device="cuda", generator=generator).bfloat16()


def relative_difference(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    return float((tokens.float() - expected.float()).norm() / expected.float().norm())


@contextmanager
def waiting_is_an_error(is_checked: bool = True) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error" if is_checked else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_merged_patches_have_the_same_tokens_up_to_rounding(tower: Any) -> None:
    from bench.tower import draw_anchors
    from scissor_vllm.worker.merged_encoder import merging_encoder
    from scissor_vllm.worker.siglip import graphs_of

    graphs = graphs_of(tower)
    with torch.inference_mode():
        for seed, share in enumerate([0.5, 0.5, 0.5, 0.4, 0.4, 0.5, 0.8, 0.8, 0.4, 0.51, 0.49]):
            anchors = draw_anchors(NUM_FRAMES, NUM_PLACES, share, seed)
            assert computed_patches(anchors).float().mean() < 1
            pixels = pixels_of(seed)
            with merging_encoder(tower, anchors, graphs):
                tokens = tower(pixels).clone()
            with merging_encoder(tower, anchors):
                expected = tower(pixels)
            assert tokens.isfinite().all()
            # The number of rows chooses the kernel of a matrix product, and so its rounding.
            assert relative_difference(tokens, expected) < 0.01, seed


def test_whole_frames_have_the_tokens_of_single_launches_to_the_bit(tower: Any) -> None:
    from bench.tower import draw_anchors
    from scissor_vllm.worker.merged_encoder import merging_encoder
    from scissor_vllm.worker.siglip import fused_encoder, graphs_of

    graphs = graphs_of(tower)
    assert graphs is not None
    with torch.inference_mode():
        for seed, num_frames in enumerate([16, 16, 16, 5, 5, 5, 16]):
            pixels = pixels_of(seed)[:num_frames]
            with waiting_is_an_error(seed in (2, 5)), fused_encoder(tower, graphs) as is_on:
                assert is_on
                tokens = tower(pixels).clone()
            with fused_encoder(tower):
                expected = tower(pixels)
            assert torch.equal(tokens, expected), seed
            # Merged frames have the same buffers.
            anchors = draw_anchors(NUM_FRAMES, NUM_PLACES, 0.5, seed)
            with merging_encoder(tower, anchors, graphs):
                tower(pixels_of(seed))
    kinds = {key: kind.graph is not None for key, kind in graphs._kinds.items()}
    assert kinds["whole", 16, 16 * NUM_PLACES]
    assert kinds["whole", 5, 5 * NUM_PLACES]


def test_neither_the_plan_nor_the_launches_wait_for_the_device(tower: Any) -> None:
    from bench.tower import draw_anchors
    from scissor_vllm.worker.merged_encoder import merging_encoder
    from scissor_vllm.worker.siglip import graphs_of

    graphs = graphs_of(tower)
    anchors = draw_anchors(NUM_FRAMES, NUM_PLACES, 0.5)
    with torch.inference_mode():
        for number in range(4):
            pixels = pixels_of(number)
            with waiting_is_an_error(number > 1), merging_encoder(tower, anchors, graphs):
                tower(pixels)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "qwen2-vl"])
def test_of_qwen_each_run_has_the_tokens_of_single_launches(name: str) -> None:
    from bench.qwen_tower import FULL, TOWERS, random_patches
    from bench.tower import draw_anchors, make_tower
    from scissor_vllm.worker.merged_grid import MAX_GRAPH_PATCHES, MergingTower

    make_config, make = TOWERS[name]
    config = make_config(**{**FULL[name], "depth": 8})
    tower = make_tower(config, torch.device("cuda"), torch.bfloat16, make=make)
    by_graph, by_launches = MergingTower(tower, MAX_GRAPH_PATCHES), MergingTower(tower)
    assert by_graph._graphs is not None
    with torch.inference_mode():
        for seed, (grid, share) in enumerate(
            [((8, 12, 20), 0.5)] * 3 + [((6, 16, 12), 0.4)] * 3 + [((8, 12, 20), 0.8)] * 3
        ):
            frames, rows, columns = grid
            tokens_of_frame = (rows // 2, columns // 2)
            anchors = draw_anchors(frames, rows * columns // 4, share, seed // 3, tokens_of_frame)
            generator = torch.Generator("cuda").manual_seed(seed)
            patches = random_patches(config, grid, torch.device("cuda")).bfloat16()
            patches = (
                patches + torch.randn(patches.shape, device="cuda", generator=generator).bfloat16()
            )
            with waiting_is_an_error(seed % 3 == 2):
                tokens = by_graph.encode(patches, grid, anchors).clone()
                expected = by_launches.encode(patches, grid, anchors)
            assert tokens.isfinite().all()
            assert relative_difference(tokens, expected) < 0.01, seed
    kinds = by_graph._graphs._kinds.values()
    assert [kind.graph is not None for kind in kinds] == [True] * len(kinds)
