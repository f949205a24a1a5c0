"""The Triton kernels against the torch code that they stand for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from scissor_vllm import compress
from scissor_vllm.compression import components, similarity
from scissor_vllm.compression.components import (
    forest_labels,
    maximum_spanning_trees,
    threshold_labels,
)
from scissor_vllm.compression.similarity import Similarity

gpu = pytest.mark.gpu

SHAPES = [(1, 1, 4), (1, 2, 4), (3, 17, 8), (1, 129, 8), (32, 196, 64), (1, 1000, 32), (1, 5000, 8)]


def make_sets(shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).cuda()


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "kernels_for", lambda device: None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [-1.0, -0.3, 0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
@gpu
def test_components_are_those_of_torch(
    shape: tuple[int, int, int], threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Similarity(make_sets(shape))
    labels = threshold_labels(graph, threshold)
    without_kernels(monkeypatch)
    assert torch.equal(labels, threshold_labels(graph, threshold))


@pytest.mark.parametrize("shape", SHAPES)
@gpu
def test_trees_are_those_of_torch(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Similarity(make_sets(shape))
    trees = maximum_spanning_trees(graph)
    without_kernels(monkeypatch)
    expected = maximum_spanning_trees(graph)
    for name in ("weight", "left", "right"):
        assert torch.equal(getattr(trees, name), getattr(expected, name)), name


@pytest.mark.parametrize("block", [700, 20_000])
@gpu
def test_blocks_of_rows_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = make_sets((2, 300, 16))
    whole = threshold_labels(Similarity(sets), 0.4), maximum_spanning_trees(Similarity(sets))
    monkeypatch.setattr(similarity, "BLOCK_ELEMENTS", block)
    blocks = threshold_labels(Similarity(sets), 0.4), maximum_spanning_trees(Similarity(sets))
    assert torch.equal(whole[0], blocks[0])
    assert torch.equal(whole[1].left, blocks[1].left)
    assert torch.equal(whole[1].right, blocks[1].right)


@gpu
def test_joins_that_meet_are_not_lost() -> None:
    # Chains in random order, of all lengths: nearly every hook meets another.
    generator = torch.Generator().manual_seed(1)
    num_nodes = 200_000
    for length in (2, 3, 10, 1000, num_nodes):
        node = torch.arange(num_nodes)
        left = node[(node + 1) % length != 0]
        left = left[left < num_nodes - 1]
        shuffled = left[torch.randperm(len(left), generator=generator)].cuda()
        labels = forest_labels(num_nodes, shuffled, shuffled + 1)
        assert torch.equal(labels.cpu(), node // length * length), length


@gpu
def test_equal_weights_are_ordered_by_their_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    things = make_sets((1, 12, 8)).repeat(1, 30, 1)
    graph = Similarity(things)
    trees = maximum_spanning_trees(graph)
    without_kernels(monkeypatch)
    expected = maximum_spanning_trees(graph)
    assert torch.equal(trees.left, expected.left)
    assert torch.equal(trees.right, expected.right)


INTERPRETED = """
import torch

from scissor_vllm.compression import components, kernels, products
from scissor_vllm.compression.components import (
    by_lowest_node,
    maximum_spanning_trees,
    threshold_labels,
)
from scissor_vllm.compression.products import Products
from scissor_vllm.compression.similarity import Similarity

generator = torch.Generator().manual_seed(0)


def results():
    generator.manual_seed(0)
    found = []
    for shape, threshold in (((1, 5, 4), 0.2), ((2, 33, 8), 0.3), ((1, 140, 8), 0.5)):
        graph = Similarity(torch.randn(shape, generator=generator))
        trees = maximum_spanning_trees(graph)
        found += [threshold_labels(graph, threshold), trees.left, trees.right, trees.weight]
    rows = Products.of_rows(torch.randn(60, 16, generator=generator), torch.float32)
    joined = rows.joined(by_lowest_node(torch.arange(60) // 3 * 3, 20))
    return [*found, joined.product, joined.exponent, threshold_labels(joined.similarity(), 0.1)]


expected = results()
components.kernels_for = products.kernels_for = lambda device: kernels
for one, other in zip(expected, results(), strict=True):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
assert threshold_labels(Similarity(torch.ones(1, 9, 2)), 0.9).tolist() == [0] * 9
print("the same")
"""


def test_interpreted_on_the_cpu_they_give_what_torch_gives() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert run.stdout.strip() == "the same", run.stderr


def make_video(num_things: int, noise: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    things = torch.randn(num_things, 256, generator=generator)
    shown = things[torch.randint(0, num_things, (12, 100), generator=generator)]
    return (shown + noise * torch.randn(shown.shape, generator=generator)).bfloat16()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7])
@gpu
def test_bfloat16_gives_what_the_cpu_gives(seed: int, noise: float) -> None:
    tokens = make_video(60, noise, seed)
    for kept in (1, 12, 60, 120, 600, 1200):
        cpu, cuda = compress(tokens, num_retained=kept), compress(tokens.cuda(), num_retained=kept)
        assert torch.equal(cpu.assignment, cuda.assignment.cpu()), kept
        assert torch.allclose(cpu.tokens.float(), cuda.tokens.cpu().float(), atol=2e-2)
        assert abs((cpu.similarity_threshold or 0) - (cuda.similarity_threshold or 0)) < 1e-5
    for threshold in (0.2, 0.5, 0.8, 1.0):
        cpu = compress(tokens, similarity_threshold=threshold)
        cuda = compress(tokens.cuda(), similarity_threshold=threshold)
        assert torch.equal(cpu.assignment, cuda.assignment.cpu()), threshold


@gpu
def test_a_found_threshold_gives_the_same_again_in_bfloat16() -> None:
    tokens = make_video(60, 0.5, 9).cuda()
    for kept in (20, 100, 333, 1000):
        found = compress(tokens, num_retained=kept)
        again = compress(tokens, similarity_threshold=found.similarity_threshold)
        assert len(again.tokens) >= kept
        if len(again.tokens) == kept:
            assert torch.equal(again.assignment, found.assignment)


@gpu
def test_magnitudes_at_the_ends_of_bfloat16_are_compressed() -> None:
    tokens = make_video(20, 0.2, 3)
    for scale in (2.0**-120, 2.0**-60, 2.0**60, 2.0**120):
        plain = compress(tokens.cuda(), num_retained=50)
        scaled = compress((tokens * scale).cuda(), num_retained=50)
        assert torch.equal(plain.assignment, scaled.assignment)
    mixed = tokens.clone()
    mixed[::2] *= 2.0**100
    mixed[1::2] *= 2.0**-100
    cpu, cuda = compress(mixed, num_retained=50), compress(mixed.cuda(), num_retained=50)
    assert torch.equal(cpu.assignment, cuda.assignment.cpu())
