"""Graphs of a tower's layers: every run has what the launches one by one have."""

from __future__ import annotations

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
