"""The methods beside SCC: exactly K rows of any input, and the rule of each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from vllm.multimodal.video_prune import evs, vidcom2

import scissor_vllm.compression.similarity
from scissor_vllm import compress
from scissor_vllm.compression import METHODS, CompressedTokens, get_compressor
from tests import oracle
from tests.test_compress import (
    DEGENERATE,
    GENERIC,
    UNDECIDED,
    LargestTensor,
    any_clips,
    assert_is,
    assert_same,
    clips,
    laws,
    make_clip,
    num_threads,
)

SELECTORS = ["uniform", "random", "l2norm", "floc", "k-center", "evs", "vidcom2"]
MERGERS = [
    *("scc", "scc-no-merge", "scc-spatial", "scc-temporal", "scc-windows"),
    *("average-linkage", "kitoke"),
]
WITH_MERGE = [f"{name}+merge" for name in SELECTORS]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with num_threads(1):
        yield


def budgets(tokens: torch.Tensor | np.ndarray) -> st.SearchStrategy[int]:
    return st.integers(1, tokens.shape[0] * tokens.shape[1])


def kept_tokens(out: CompressedTokens) -> list[int]:
    """Return the numbers of the tokens that a selecting method kept."""
    return [int(i) for i in (out.assignment >= 0).nonzero().flatten()]


def random_clip(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- all methods ----------------------------------------------------------------------------------


def test_the_names() -> None:
    assert sorted(METHODS) == sorted([*SELECTORS, *WITH_MERGE, *MERGERS])


@pytest.mark.parametrize("name", METHODS)
@laws(40)
@given(clip=any_clips, data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_budget_of_any_input_is_exact(
    name: str, clip: np.ndarray, data: st.DataObject, dtype: torch.dtype
) -> None:
    tokens = torch.from_numpy(clip).to(dtype)
    # What overflows in half precision is no longer finite.
    tokens = tokens.nan_to_num(posinf=torch.finfo(dtype).max, neginf=torch.finfo(dtype).min)
    k = data.draw(budgets(clip))
    out = get_compressor(name)(tokens, k)
    assert out.tokens.shape == (k, clip.shape[2])
    assert out.tokens.dtype == dtype
    assert out.tokens.isfinite().all()
    assert out.assignment.shape == (clip.shape[0] * clip.shape[1],)
    assert out.assignment.dtype == torch.int64
    if name in SELECTORS:
        kept = kept_tokens(out)
        assert out.assignment[kept].tolist() == list(range(k))
        assert torch.equal(out.tokens, tokens.flatten(0, 1)[kept])
    else:
        assert out.assignment.min() >= 0
        assert out.assignment.max() < k
    assert_same(out, get_compressor(name)(tokens.clone(), k))


@pytest.mark.parametrize("name", METHODS)
def test_the_input_is_left_as_it_is(name: str) -> None:
    for k in (1, 5, 48):
        tokens = random_clip(6, 8, 4).requires_grad_()
        out = get_compressor(name)(tokens, k)
        assert not out.tokens.requires_grad
        out.tokens.zero_()
        assert torch.equal(tokens.detach(), random_clip(6, 8, 4))


@pytest.mark.parametrize("name", METHODS)
def test_global_generators_are_neither_read_nor_advanced(name: str) -> None:
    state = torch.random.get_rng_state()
    first = get_compressor(name)(random_clip(6, 8, 4), 7)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        assert_same(first, get_compressor(name)(random_clip(6, 8, 4), 7))


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_outside_one_to_all_is_a_value_error(name: str) -> None:
    for k in (0, 49, -1):
        with pytest.raises(ValueError, match=rf"num_retained must lie in 1..48.*got {k}"):
            get_compressor(name)(random_clip(6, 8, 4), k)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("uniform", "random")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_a_value_error(name: str, value: float) -> None:
    tokens = random_clip(6, 8, 4)
    tokens[3, 2, 1] = value
    with pytest.raises(ValueError, match="got 1 of 192 values NaN or infinite"):
        get_compressor(name)(tokens, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_gives_what_the_cpu_gives(name: str, dtype: torch.dtype) -> None:
    tokens = random_clip(6, 40, 64).to(dtype)
    for k in (3, 24, 100, 239):
        on_cpu = get_compressor(name)(tokens, k)
        on_gpu = get_compressor(name)(tokens.cuda(), k)
        assert on_gpu.tokens.is_cuda
        if name.startswith("vidcom2"):
            # vLLM compares scores of a few bits: a last bit decides between neighbours.
            assert on_gpu.tokens.shape == on_cpu.tokens.shape
            continue
        assert torch.equal(on_gpu.assignment.cpu(), on_cpu.assignment)
        torch.testing.assert_close(on_gpu.tokens.cpu(), on_cpu.tokens, rtol=1e-2, atol=1e-3)


# --- selection ------------------------------------------------------------------------------------


def test_random_keeps_as_many_of_each_part_as_chance_would() -> None:
    tokens = random_clip(32, 100, 2)
    kept = np.array(kept_tokens(get_compressor("random")(tokens, 800)))
    # Of 800 draws without replacement, 200 +- 11 fall into a quarter.
    by_quarter = np.bincount(kept // 800, minlength=4)
    assert np.abs(by_quarter - 200).max() < 50
    by_column = np.bincount(kept % 10, minlength=10)
    assert np.abs(by_column - 80).max() < 40
    gaps = np.diff(kept)
    assert gaps.max() > 8  # Evenly spaced ones are 4 apart.


@laws(60)
@given(num_frames=st.integers(1, 20), per_frame=st.integers(1, 30), data=st.data())
def test_random_keeps_for_a_larger_budget_what_it_keeps_for_a_smaller_one(
    num_frames: int, per_frame: int, data: st.DataObject
) -> None:
    tokens = torch.zeros(num_frames, per_frame, 1)
    smaller, larger = sorted([data.draw(budgets(tokens)), data.draw(budgets(tokens))])
    select = get_compressor("random")
    assert set(kept_tokens(select(tokens, smaller))) <= set(kept_tokens(select(tokens, larger)))


def test_random_chooses_otherwise_for_another_shape() -> None:
    select = get_compressor("random")
    chosen = {tuple(kept_tokens(select(torch.zeros(t, 400 // t, 1), 40))) for t in (1, 4, 10, 400)}
    assert len(chosen) == 4


@laws(100)
@given(clip=clips([*GENERIC, *DEGENERATE]), data=st.data())
def test_l2norm_keeps_the_longest_and_of_equals_the_first(
    clip: np.ndarray, data: st.DataObject
) -> None:
    k = data.draw(budgets(clip))
    # Small integers: their squares are exact, and many are equal.
    flat = clip.reshape(-1, clip.shape[2]).astype(np.float64)
    flat = np.rint(flat / max(np.abs(flat).max(), 1e-300) * 9)
    squares = (flat**2).sum(axis=1)
    tokens = torch.from_numpy(flat.reshape(clip.shape).astype(np.float32))
    expected = sorted(range(len(flat)), key=lambda i: (-squares[i], i))[:k]
    assert kept_tokens(get_compressor("l2norm")(tokens, k)) == sorted(expected)


def test_l2norm_tells_tokens_apart_whose_squares_overflow() -> None:
    tokens = torch.tensor([[[1e38, 0.0], [3e38, 0.0], [2e38, 2e38]]])
    assert kept_tokens(get_compressor("l2norm")(tokens, 2)) == [1, 2]
    assert kept_tokens(get_compressor("l2norm")(tokens, 1)) == [1]
    assert kept_tokens(get_compressor("l2norm")(tokens * 1e-38 * 1e-38, 1)) == [1]


@laws(150)
@given(
    clip=clips([*GENERIC, *DEGENERATE], max_size=12),
    q=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_evs_keeps_what_vllms_own_keeps_at_the_rate_of_that_count(
    clip: np.ndarray, q: float, dtype: torch.dtype
) -> None:
    num_frames, per_frame, width = clip.shape
    tokens = torch.from_numpy(clip).to(dtype)
    assume(tokens.isfinite().all())
    k = evs.compute_retained_tokens_count(per_frame, num_frames, q)
    mask = evs.compute_retention_mask(tokens.reshape(-1, width), (num_frames, per_frame, 1), 1, q)
    assert kept_tokens(get_compressor("evs")(tokens, k)) == mask.nonzero().flatten().tolist()


@laws(150)
@given(clip=clips([*GENERIC, *DEGENERATE], max_size=12), data=st.data())
def test_vidcom2_keeps_what_vllms_own_keeps_at_the_rate_of_that_count(
    clip: np.ndarray, data: st.DataObject
) -> None:
    num_frames, per_frame, width = clip.shape
    k = data.draw(st.integers(num_frames, num_frames * per_frame))
    q = 1 - k / (num_frames * per_frame)
    assume(vidcom2.compute_retained_tokens_count(per_frame, num_frames, q) == k)
    tokens = torch.from_numpy(clip)
    mask = vidcom2.compute_retention_mask(
        tokens.reshape(-1, width), (num_frames, per_frame, 1), 1, q
    )
    assert kept_tokens(get_compressor("vidcom2")(tokens, k)) == mask.nonzero().flatten().tolist()


def test_evs_keeps_the_first_frame_then_what_changed() -> None:
    tokens = torch.ones(4, 6, 2)
    tokens[2:, 3] = torch.tensor([1.0, -1.0])  # changes once
    assert kept_tokens(get_compressor("evs")(tokens, 7)) == [0, 1, 2, 3, 4, 5, 15]


@pytest.mark.parametrize("num_frames", [1, 5])
def test_evs_below_a_frame_keeps_evenly_spaced_tokens_of_the_first(num_frames: int) -> None:
    tokens = random_clip(num_frames, 12, 4)
    select = get_compressor("evs")
    assert kept_tokens(select(tokens, 1)) == [0]
    assert kept_tokens(select(tokens, 4)) == [0, 3, 6, 9]
    assert kept_tokens(select(tokens, 12)) == list(range(12))


def test_vidcom2_below_a_token_a_frame_keeps_one_of_evenly_spaced_frames() -> None:
    tokens = random_clip(12, 10, 16)
    select = get_compressor("vidcom2")
    fewest = kept_tokens(select(tokens, 12))
    assert kept_tokens(select(tokens, 4)) == fewest[::3]
    assert kept_tokens(select(tokens, 1)) == fewest[:1]


def test_without_vllm_its_methods_say_so_and_the_others_work() -> None:
    code = """
import sys
sys.modules["vllm"] = None
import torch
from scissor_vllm.compression import METHODS, get_compressor
for name in METHODS:
    try:
        assert len(get_compressor(name)(torch.ones(3, 4, 2), 5).tokens) == 5
    except ImportError as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    names = ["evs", "vidcom2", "evs+merge", "vidcom2+merge"]
    lines = run.stdout.splitlines()
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        assert f"method {name!r} is vLLM's own" in line
        assert "install a vLLM" in line


# --- the merge ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELECTORS)
@laws(40)
@given(clip=clips(GENERIC, min_width=2), data=st.data())
def test_with_the_merge_each_token_goes_to_the_nearest_that_was_kept(
    name: str, clip: np.ndarray, data: st.DataObject
) -> None:
    tokens, k = torch.from_numpy(clip), data.draw(budgets(clip))
    kept = get_compressor(name)(tokens, k).tokens.double().numpy()
    rows, assignment, margin = oracle.merge(clip.reshape(-1, clip.shape[2]).astype(float), kept)
    assume(margin > UNDECIDED)
    out = get_compressor(f"{name}+merge")(tokens, k)
    assert_is(out, oracle.Result(rows, assignment, 0.0, margin), clip)


def test_the_merge_is_a_mean_with_the_kept_token_counted_twice() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [0.0, 5.0]]])
    out = get_compressor("uniform+merge")(tokens, 2)
    torch.testing.assert_close(out.tokens, torch.tensor([[5 / 3, 0], [0, 7 / 3]]))
    assert out.assignment.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", WITH_MERGE)
def test_the_merge_of_all_tokens_leaves_each_as_it_is(name: str) -> None:
    tokens = random_clip(3, 5, 8)
    out = get_compressor(name)(tokens, 15)
    assert out.assignment.tolist() == list(range(15))
    torch.testing.assert_close(out.tokens, tokens.flatten(0, 1))


@laws(60)
@given(clip=clips([*GENERIC, *DEGENERATE], max_size=40), data=st.data())
def test_scc_is_its_representatives_and_the_merge(clip: np.ndarray, data: st.DataObject) -> None:
    tokens, k = torch.from_numpy(clip), data.draw(budgets(clip))
    representatives = get_compressor("scc-no-merge")(tokens, k)
    expected = compress(tokens, num_retained=k)
    assert representatives.similarity_threshold == expected.similarity_threshold
    flat = clip.reshape(-1, clip.shape[2]).astype(np.float64)
    rows, assignment, margin = oracle.merge(flat, representatives.tokens.double().numpy())
    assume(margin > UNDECIDED)
    assert_is(expected, oracle.Result(rows, assignment, 0.0, margin), clip)


@laws(60)
@given(clip=clips([*GENERIC, "duplicates"], max_frames=30, max_size=1), data=st.data())
def test_with_a_token_a_frame_a_representative_is_the_mean_of_its_tokens(
    clip: np.ndarray, data: st.DataObject
) -> None:
    k = data.draw(budgets(clip))
    out = get_compressor("scc-no-merge")(torch.from_numpy(clip), k)
    for row in range(k):
        members = clip[out.assignment.numpy() == row, 0].astype(np.float64)
        np.testing.assert_allclose(out.tokens[row].double(), members.mean(axis=0), atol=1e-5)


# --- SCC with a step left out ---------------------------------------------------------------------


def linked(clip: np.ndarray, sets: list[list[int]], k: int) -> oracle.Result:
    """Return k rows by single linkage, slowly: the strongest edges inside a set first."""
    flat = clip.reshape(-1, clip.shape[2]).astype(np.float64)
    cosine = np.full((len(flat), len(flat)), -np.inf)
    for members in sets:
        cosine[np.ix_(members, members)] = oracle.cosines(flat[members], flat[members])
    pairs = [pair for pair in oracle.strongest_first(cosine) if cosine[pair] > -np.inf]
    partition, last, tau, margin = oracle.Partition(len(flat)), np.inf, -1.0, np.inf
    for pair in pairs:
        if partition.find(pair[0]) == partition.find(pair[1]):
            continue
        if partition.num_sets == k:
            tau = cosine[pair]
            others = [abs(cosine[other] - tau) for other in pairs if other != pair]
            margin = min(last - tau, min(others, default=np.inf))
            break
        last = cosine[pair]
        partition.union(*pair)
    groups = oracle.in_order(partition.sets(), cosine, tau)
    rows, assignment, merge_margin = oracle.merge(flat, oracle.means(flat, groups))
    margin = min(margin, merge_margin) * oracle.mean_margin(flat, groups)
    return oracle.Result(rows, assignment, float(tau), margin)


@laws(80)
@given(clip=clips(GENERIC, min_width=2, max_size=12), data=st.data())
def test_spatial_only_is_single_linkage_inside_frames(
    clip: np.ndarray, data: st.DataObject
) -> None:
    num_frames, per_frame, _ = clip.shape
    k = data.draw(st.integers(num_frames, num_frames * per_frame))
    frames = [list(range(t * per_frame, (t + 1) * per_frame)) for t in range(num_frames)]
    expected = linked(clip, frames, k)
    assume(expected.margin > UNDECIDED)
    out = get_compressor("scc-spatial")(torch.from_numpy(clip), k)
    assert_is(out, expected, clip)
    assert out.similarity_threshold == pytest.approx(expected.threshold, abs=1e-5)


@laws(80)
@given(clip=clips(GENERIC, min_width=2, max_size=12), data=st.data())
def test_temporal_only_is_single_linkage_of_all_tokens(
    clip: np.ndarray, data: st.DataObject
) -> None:
    k = data.draw(budgets(clip))
    expected = linked(clip, [list(range(clip.shape[0] * clip.shape[1]))], k)
    assume(expected.margin > UNDECIDED)
    out = get_compressor("scc-temporal")(torch.from_numpy(clip), k)
    assert_is(out, expected, clip)
    assert out.similarity_threshold == pytest.approx(expected.threshold, abs=1e-5)


@laws(40)
@given(clip=clips(["gaussian"], min_width=4, max_size=12), data=st.data())
def test_temporal_only_looks_at_no_position(clip: np.ndarray, data: st.DataObject) -> None:
    num_tokens = clip.shape[0] * clip.shape[1]
    k = data.draw(budgets(clip))
    assume(linked(clip, [list(range(num_tokens))], k).margin > UNDECIDED)
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(num_tokens)
    shuffled = clip.reshape(num_tokens, -1)[order].reshape(clip.shape)
    method = get_compressor("scc-temporal")
    rows = method(torch.from_numpy(clip), k).tokens
    others = method(torch.from_numpy(shuffled), k).tokens
    distances = (rows[:, None] - others[None]).norm(dim=2)
    assert distances.min(dim=1).values.max() < 1e-5
    assert distances.min(dim=0).values.max() < 1e-5


@laws(60)
@given(
    num_frames=st.integers(2, 20), per_frame=st.integers(1, 6), data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_spatial_only_with_fewer_rows_than_frames_joins_consecutive_frames(
    num_frames: int, per_frame: int, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, num_frames - 1))
    clip = make_clip("gaussian", num_frames, per_frame, 16, seed)
    flat = clip.reshape(-1, 16).astype(np.float64)
    runs = [np.flatnonzero(np.arange(num_frames) * k // num_frames == run) for run in range(k)]
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    means = np.array([clip[run].astype(np.float64).mean(axis=(0, 1)) for run in runs])
    rows, assignment, margin = oracle.merge(flat, means)
    assume(margin > UNDECIDED)
    out = get_compressor("scc-spatial")(torch.from_numpy(clip), k)
    assert_is(out, oracle.Result(rows, assignment, 0.0, margin), clip)


# --- size -----------------------------------------------------------------------------------------


# These hold the similarities of a window or block of frames, of a bounded number of tokens.
@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("average-linkage", "floc", "floc+merge")]
)
def test_no_tensor_is_larger_than_a_block(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tokens = torch.from_numpy(make_clip("clustered", 4, 100, 8, seed=5))
    method = get_compressor(name)
    whole = [method(tokens, k) for k in (20, 300)]
    monkeypatch.setattr(scissor_vllm.compression.similarity, "BLOCK_ELEMENTS", 10_000)
    with LargestTensor() as largest:
        blocks = [method(tokens, k) for k in (20, 300)]
    assert largest.num_elements <= 10_000
    for a, b in zip(whole, blocks, strict=True):
        assert torch.equal(a.assignment, b.assignment)
        torch.testing.assert_close(a.tokens, b.tokens, rtol=1e-5, atol=1e-6)
