"""The rival methods' rules, each against a slow form of its objective."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from bench.compress import make_tokens
from scissor_vllm.compression import get_compressor
from scissor_vllm.compression.linkage import distances
from scissor_vllm.compression.rivals import (
    KERNEL_SHARE,
    compress_by_kitoke,
    cover_eagerly,
    cover_lazily,
    draw_by_rarity,
)
from tests import oracle
from tests.test_compress import DEGENERATE, GENERIC, clips, laws, make_clip, num_threads

UNDECIDED = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with num_threads(1):
        yield


def kept_tokens(name: str, clip: np.ndarray, k: int) -> list[int]:
    out = get_compressor(name)(torch.from_numpy(clip), k)
    return [int(i) for i in (out.assignment >= 0).nonzero().flatten()]


# --- k-center -------------------------------------------------------------------------------------


@laws(60)
@given(clip=clips(GENERIC, min_width=3), data=st.data())
def test_k_center_adds_the_token_furthest_from_all_before(
    clip: np.ndarray, data: st.DataObject
) -> None:
    flat = clip.reshape(-1, clip.shape[2]).astype(np.float64)
    k = data.draw(st.integers(1, len(flat)))
    distance = 1 - oracle.cosines(flat, flat)
    chosen = [0]
    while len(chosen) < k:
        left = [i for i in range(len(flat)) if i not in chosen]
        ordered = sorted(left, key=lambda i: -distance[i, chosen].min())
        if len(ordered) > 1:
            first, second = (distance[i, chosen].min() for i in ordered[:2])
            assume(first - second > UNDECIDED)
        chosen.append(ordered[0])
    assert kept_tokens("k-center", clip, k) == sorted(chosen)


@laws(30)
@given(clip=clips(["gaussian", "clustered"], max_frames=2, max_size=4, min_width=3))
def test_k_center_keeps_a_needle(clip: np.ndarray) -> None:
    flat = clip.reshape(-1, clip.shape[2])
    assume(len(flat) > 2)
    flat[1:] = flat[0] + 0.01 * np.abs(flat[1:])
    flat[-1] = -flat[0]
    assert kept_tokens("k-center", clip, 2) == [0, len(flat) - 1]


# --- FLoC -----------------------------------------------------------------------------------------


@laws(60)
@given(clip=clips(GENERIC, min_width=3), data=st.data())
def test_floc_adds_the_token_of_largest_gain(clip: np.ndarray, data: st.DataObject) -> None:
    flat = clip.reshape(-1, clip.shape[2]).astype(np.float64)
    k = data.draw(st.integers(1, len(flat)))
    cosine = oracle.cosines(flat, flat)

    def covered(chosen: list[int]) -> float:
        return float(cosine[:, chosen].max(axis=1).sum())

    chosen: list[int] = []
    while len(chosen) < k:
        left = [i for i in range(len(flat)) if i not in chosen]
        gains = sorted(((covered([*chosen, i]), -i) for i in left), reverse=True)
        if len(gains) > 1:
            assume(gains[0][0] - gains[1][0] > UNDECIDED * len(flat))
        chosen.append(-gains[0][1])
    assert kept_tokens("floc", clip, k) == sorted(chosen)


@pytest.mark.parametrize("kind", ["random", "black", "copies", "one-hot"])
def test_floc_on_a_gpu_chooses_what_a_cpu_does(kind: str) -> None:
    similarities = 1 - distances(make_tokens(kind, (4, 25, 120), seed=0).flatten(0, 1))
    assert torch.equal(cover_eagerly(similarities, 40), cover_lazily(similarities, 40))
    assert torch.equal(cover_eagerly(similarities, 100), cover_lazily(similarities, 100))


def test_floc_shares_its_budget_out_by_the_blocks_lengths() -> None:
    clip = make_clip("gaussian", 80, 2, 8, seed=1)
    kept = np.array(kept_tokens("floc", clip, 50))
    # Blocks of 32, 32 and 16 frames.
    assert np.bincount(kept // 64).tolist() == [20, 20, 10]


# --- KiToke ---------------------------------------------------------------------------------------


def slow_chances(flat: np.ndarray, k: int) -> np.ndarray:
    """Return each token's chance: min(1, c / density), c found by halving."""
    square = ((flat[:, None] - flat[None]) ** 2).sum(axis=2)
    density = np.exp(-square / (KERNEL_SHARE * np.sort(square, axis=None)[(square.size - 1) // 2]))
    weight = 1 / density.sum(axis=1)
    low, high = 0.0, k / weight.min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * weight).sum() < k else (low, middle)
    return np.minimum(1, high * weight)


@laws(60)
@given(clip=clips(["gaussian", "clustered"], min_width=3), data=st.data())
def test_kitoke_keeps_what_is_certain_and_as_many_as_chances_add_up_to(
    clip: np.ndarray, data: st.DataObject
) -> None:
    flat = clip.reshape(-1, clip.shape[2]).astype(np.float64)
    assume(len(flat) > 2)
    k = data.draw(st.integers(1, len(flat) - 1))
    chance = slow_chances(flat, k)
    kept, _ = draw_by_rarity(torch.from_numpy(clip), k)
    drawn = np.isin(np.arange(len(flat)), kept.numpy())
    assert drawn.sum() == k
    assert drawn[chance > 1 - 1e-9].all()
    # Systematic sampling: the draws up to any token differ from their chances' sum by less than 1.
    assert np.abs(np.cumsum(drawn) - np.cumsum(chance)).max() < 1 + 1e-6


@laws(60)
@given(clip=clips([*GENERIC, *DEGENERATE]), data=st.data())
def test_kitoke_rows_are_means_of_their_tokens_by_rarity(
    clip: np.ndarray, data: st.DataObject
) -> None:
    flat = clip.reshape(-1, clip.shape[2]).astype(np.float64)
    k = data.draw(st.integers(1, len(flat)))
    out = compress_by_kitoke(torch.from_numpy(clip), k)
    assignment = out.assignment.numpy()
    assert sorted(set(assignment)) == list(range(k))
    for row in range(k):
        group = flat[assignment == row]
        scale = np.abs(group).max(axis=0)
        assert (out.tokens[row].numpy() <= group.max(axis=0) + 1e-6 * scale).all()
        assert (out.tokens[row].numpy() >= group.min(axis=0) - 1e-6 * scale).all()


def test_kitoke_draws_the_rare_and_merges_inside_scenes() -> None:
    generator = np.random.default_rng(5)
    clip = np.zeros((8, 20, 16), dtype=np.float32)
    clip[:4] = generator.standard_normal(16)
    clip[4:] = generator.standard_normal(16)
    clip += 0.01 * generator.standard_normal(clip.shape).astype(np.float32)
    clip[1, 7] = generator.standard_normal(16)
    out = compress_by_kitoke(torch.from_numpy(clip), 8)
    assignment = out.assignment.numpy()
    needle = assignment[27]
    assert (assignment == needle).sum() == 1
    torch.testing.assert_close(out.tokens[needle], torch.from_numpy(clip[1, 7]))
    assert not set(assignment[:80]) & set(assignment[80:])


def test_kitoke_draws_otherwise_for_other_tokens() -> None:
    clips_of_a_shape = [make_clip("gaussian", 4, 20, 8, seed) for seed in range(4)]
    drawn = {
        tuple(compress_by_kitoke(torch.from_numpy(clip), 8).assignment.tolist())
        for clip in clips_of_a_shape
    }
    assert len(drawn) == 4
