"""Average linkage in windows: the textbook tree, exact budgets, and the same groups on any device.

Laws of the kernels that need no GPU are in ``interpreted_kernels.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from scissor_vllm import CompressedTokens
from scissor_vllm.compression import linkage as linkage_module
from scissor_vllm.compression.linkage import (
    MAX_WINDOW_TOKENS,
    AverageLinkage,
    compress_by_linkage,
    cut,
    linkage_tree,
    warm_up_shapes,
)
from tests import oracle
from tests.test_compress import DEGENERATE, GENERIC, clips, laws, make_clip, num_threads

UNDECIDED = 1e-5
"""Heights closer than this may come in either order: unit vectors are rounded."""

EXPONENTS = st.sampled_from([0.0, 0.2, 0.5, 1.0])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with num_threads(1):
        yield


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def slow_groups(flat: np.ndarray, num_groups: int, exponent: float) -> tuple[list[int], float]:
    """Return each token's group and the least difference between a merge and the next best.

    The closest pair of groups is joined, one pair at a time; distances are means of all pairs'.
    """
    distance = 1 - oracle.cosines(flat, flat)
    groups = [[i] for i in range(len(flat))]
    margin = np.inf
    for _ in range(len(flat) - num_groups):
        heights = {}
        for i, a in enumerate(groups):
            for j in range(i + 1, len(groups)):
                b = groups[j]
                weight = (len(a) * len(b) / (len(a) + len(b))) ** exponent
                heights[i, j] = distance[np.ix_(a, b)].mean() * weight
        ordered = sorted(heights.items(), key=lambda item: item[1])
        if len(ordered) > 1:
            margin = min(margin, ordered[1][1] - ordered[0][1])
        i, j = ordered[0][0]
        groups[i] += groups.pop(j)
    group_of = {token: number for number, group in enumerate(groups) for token in group}
    return [group_of[token] for token in range(len(flat))], margin


@laws(60)
@given(clip=clips(GENERIC, max_frames=1, max_size=40, min_width=3), data=st.data())
def test_one_window_is_scipys_average_linkage(clip: np.ndarray, data: st.DataObject) -> None:
    assume(clip.shape[1] > 1)
    flat = clip[0].astype(np.float64)
    k = data.draw(st.integers(1, len(flat)))
    distance = 1 - oracle.cosines(flat, flat)
    expected = linkage(distance[np.triu_indices(len(flat), 1)].clip(min=0), "average")
    assume(expected[0, 2] > UNDECIDED)
    tree = linkage_tree(torch.from_numpy(clip))
    heights = tree.height.sort().values[:-1].numpy()
    np.testing.assert_allclose(heights, expected[:, 2], atol=UNDECIDED)
    assume(np.diff(expected[:, 2]).min(initial=np.inf) > 2 * UNDECIDED)
    groups = cut(tree, torch.from_numpy(clip), k).assignment.numpy()
    assert partition(groups) == partition(fcluster(expected, k, "maxclust"))


@laws(40)
@given(clip=clips(GENERIC, max_frames=5, max_size=8, min_width=3), data=st.data())
def test_the_threshold_is_the_mean_cosine_of_the_last_groups_that_were_joined(
    clip: np.ndarray, data: st.DataObject
) -> None:
    num_tokens = clip.shape[0] * clip.shape[1]
    assume(num_tokens > 1)
    method, tokens = AverageLinkage(), torch.from_numpy(clip)
    k = data.draw(st.integers(-(-len(clip) // 4), num_tokens - 1))
    assume(k < num_tokens)
    out, finer = method(tokens, k), method(tokens, k + 1)
    before, after = finer.assignment.numpy(), out.assignment.numpy()
    [joined] = [row for row in range(k) if len(set(before[after == row])) == 2]
    a, b = (np.flatnonzero(before == row) for row in sorted(set(before[after == joined])))
    cosine = oracle.cosines(*[clip.reshape(num_tokens, -1).astype(np.float64)] * 2)
    expected = min(1.0, cosine[np.ix_(a, b)].mean())
    assert out.similarity_threshold == pytest.approx(expected, abs=UNDECIDED)
    assert method(tokens, num_tokens).similarity_threshold is None


@laws(40)
@given(
    clip=clips(GENERIC, max_frames=1, max_size=14, min_width=3), data=st.data(), exponent=EXPONENTS
)
def test_one_window_joins_the_closest_pair_first(
    clip: np.ndarray, data: st.DataObject, exponent: float
) -> None:
    k = data.draw(st.integers(1, clip.shape[1]))
    expected, margin = slow_groups(clip[0].astype(np.float64), k, exponent)
    assume(margin > UNDECIDED)
    out = compress_by_linkage(torch.from_numpy(clip), k, ward_exponent=exponent)
    assert partition(out.assignment.numpy()) == partition(np.array(expected))


@laws(80)
@given(
    clip=clips([*GENERIC, *DEGENERATE], max_frames=9), data=st.data(),
    window=st.integers(1, 5), exponent=EXPONENTS,
)  # fmt: skip
def test_rows_are_the_means_of_their_tokens(
    clip: np.ndarray, data: st.DataObject, window: int, exponent: float
) -> None:
    tokens = torch.from_numpy(clip)
    num_tokens = clip.shape[0] * clip.shape[1]
    k = data.draw(st.integers(1, num_tokens))
    out = compress_by_linkage(tokens, k, window_frames=window, ward_exponent=exponent)
    assignment = out.assignment.numpy()
    assert sorted(set(assignment)) == list(range(k))
    flat = clip.reshape(num_tokens, -1).astype(np.float64)
    means = np.array([flat[assignment == row].mean(axis=0) for row in range(k)])
    np.testing.assert_allclose(out.tokens.double(), means, rtol=1e-6, atol=1e-38)


@laws(80)
@given(clip=clips([*GENERIC, *DEGENERATE], max_frames=9), data=st.data(), window=st.integers(1, 5))
def test_rows_are_pictures_in_the_order_of_places(
    clip: np.ndarray, data: st.DataObject, window: int
) -> None:
    num_frames, per_frame = clip.shape[:2]
    num_tokens = num_frames * per_frame
    k = data.draw(st.one_of(st.integers(1, num_tokens), st.just(num_tokens)))
    assignment = compress_by_linkage(torch.from_numpy(clip), k, window_frames=window).assignment
    if k == num_tokens:
        assert torch.equal(assignment, torch.arange(k))
        return
    num_windows = -(-num_frames // window)
    # As many pictures as frames hold a window's rows, but for a row more in each window.
    length = min(window, num_frames)
    frames_of_rows = Fraction(length * (k - num_windows), num_tokens)
    picture = -(-length // max(1, math.ceil(frames_of_rows)))
    keys = []
    for row in range(k):
        members = np.flatnonzero(assignment.numpy() == row).tolist()
        by_place = sorted(members, key=lambda token: (token % per_frame, token))
        middle = by_place[(len(members) - 1) // 2]
        frame = middle // per_frame
        keys.append((frame // window, frame % window // picture, middle % per_frame))
    assert keys == sorted(keys)


@laws(60)
@given(clip=clips([*GENERIC, *DEGENERATE], max_frames=9), data=st.data(), window=st.integers(1, 5))
def test_no_row_joins_two_windows_while_there_are_rows_enough(
    clip: np.ndarray, data: st.DataObject, window: int
) -> None:
    num_windows = -(-len(clip) // window)
    k = data.draw(st.integers(num_windows, clip.shape[0] * clip.shape[1]))
    out = compress_by_linkage(torch.from_numpy(clip), k, window_frames=window)
    of_token = np.arange(clip.shape[0] * clip.shape[1]) // clip.shape[1] // window
    for row in range(k):
        assert len(set(of_token[out.assignment.numpy() == row])) == 1


@pytest.mark.parametrize("k", [1, 2, 3])
def test_with_fewer_rows_than_windows_runs_of_windows_share_a_row(k: int) -> None:
    tokens = torch.from_numpy(make_clip("gaussian", 14, 5, 8, seed=1))
    out = compress_by_linkage(tokens, k, window_frames=4)
    expected = np.arange(14 * 5) // 20 * k // 4
    assert out.assignment.tolist() == expected.tolist()


@laws(12)
@given(clip=clips([*GENERIC, *DEGENERATE], max_frames=6, max_size=6), exponent=EXPONENTS)
def test_a_tree_cut_at_any_budget_is_the_method_at_that_budget(
    clip: np.ndarray, exponent: float
) -> None:
    tokens = torch.from_numpy(clip)
    tree = linkage_tree(tokens, ward_exponent=exponent)
    method = AverageLinkage(ward_exponent=exponent)
    kept = method.tree(tokens)
    assert kept.nbytes == method.tree_bytes(clip.shape[0] * clip.shape[1])
    coarser: np.ndarray | None = None
    for k in range(1, clip.shape[0] * clip.shape[1] + 1):
        out = cut(tree, tokens, k)
        again = compress_by_linkage(tokens, k, ward_exponent=exponent)
        by_kept_tree = method.cut(kept, tokens, k)
        for other in (again, by_kept_tree):
            assert torch.equal(out.assignment, other.assignment)
            assert torch.equal(out.tokens, other.tokens)
        finer = out.assignment.numpy()
        if coarser is not None and k > tree.num_windows:
            # Each group of the finer cut lies in one of the coarser.
            assert len(set(zip(finer, coarser, strict=True))) == k
        coarser = finer


@pytest.mark.parametrize("num_frames", [3, 5, 6, 8])
def test_a_kept_trees_ranks_are_aligned_as_kernels_are_compiled_for(
    num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def cut(tree: linkage_module.LinkageTree, *args: Any) -> CompressedTokens:
        seen.append(tree.rank)
        return plain_cut(tree, *args)

    plain_cut = linkage_module.cut
    monkeypatch.setattr(linkage_module, "cut", cut)
    tokens = torch.randn(num_frames, 1, 8)
    method = AverageLinkage()
    method.cut(method.tree(tokens), tokens, 2)
    assert [rank.data_ptr() % 16 for rank in seen] == [0]


def test_windows_that_a_gpu_joins_at_once_are_bounded_and_aligned() -> None:
    part_tokens = pytest.importorskip("scissor_vllm.compression.cuda.linkage").part_tokens
    for size in range(1, MAX_WINDOW_TOKENS + 1):
        num_windows, rest = divmod(part_tokens(size), size)
        assert rest == 0
        assert num_windows % 4 == 0
        assert 4 <= num_windows <= 1 << 14
        assert num_windows * size <= 1 << 16
        assert num_windows * size**2 * 4 <= 1 << 28


def test_copies_are_joined_before_all_others() -> None:
    few = torch.from_numpy(make_clip("gaussian", 1, 6, 16, seed=2))[0]
    tokens = few[torch.arange(40) % 6].view(4, 10, 16)
    out = compress_by_linkage(tokens, 6)
    assert partition(out.assignment.numpy()) == partition(np.arange(40) % 6)
    torch.testing.assert_close(out.tokens[out.assignment], tokens.flatten(0, 1))


@pytest.mark.parametrize("kind", ["still", "black", "copies", "one-hot"])
def test_stills_and_copies_are_no_slower_than_twice_random_tokens(kind: str) -> None:
    shape = (4, 100, 64)
    random = torch.from_numpy(make_clip("gaussian", *shape, seed=3))
    other = {
        "still": random[:1].expand(4, -1, -1),
        "black": torch.ones(shape),
        "copies": random.flatten(0, 1)[torch.arange(400) * 7 % 50].view(shape),
        "one-hot": torch.eye(64)[torch.arange(400) * 7 % 64].view(shape),
    }[kind]

    def fastest(tokens: torch.Tensor) -> float:
        times = []
        for _ in range(5):
            begin = time.process_time()
            compress_by_linkage(tokens, 40)
            times.append(time.process_time() - begin)
        return min(times)

    assert fastest(other) < 2 * fastest(random)


def test_a_frame_of_too_many_tokens_is_more_than_one_window() -> None:
    tokens = torch.zeros(2, MAX_WINDOW_TOKENS + 2, 1)
    tree = linkage_tree(tokens)
    assert tree.window_tokens == MAX_WINDOW_TOKENS // 2 + 1
    assert tree.num_windows == 4


def test_settings_out_of_range_are_a_value_error() -> None:
    tokens = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="window_frames must be an int of 1 or more, got 0"):
        linkage_tree(tokens, window_frames=0)
    with pytest.raises(ValueError, match=r"ward_exponent must lie in \[0, 1\], got 1.5"):
        linkage_tree(tokens, ward_exponent=1.5)
    with pytest.raises(ValueError, match="the tree has 6 tokens and the video 3"):
        cut(linkage_tree(tokens), tokens[:1], 1)


# --- CUDA -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["gaussian", "clustered", "duplicates", "nearly equal", "zeros"])
def test_cuda_makes_the_same_groups_to_the_last_bit(kind: str, exponent: float) -> None:
    tokens = torch.from_numpy(make_clip(kind, 9, 120, 96, seed=4)).bfloat16()
    on_cpu = linkage_tree(tokens, ward_exponent=exponent)
    on_gpu = linkage_tree(tokens.cuda(), ward_exponent=exponent)
    assert torch.equal(on_gpu.parent.cpu(), on_cpu.parent)
    assert torch.equal(on_gpu.height.cpu(), on_cpu.height)
    for k in (1, 3, 108, 540, 1080):
        expected, on_cuda = cut(on_cpu, tokens, k), cut(on_gpu, tokens.cuda(), k)
        assert torch.equal(on_cuda.assignment.cpu(), expected.assignment)
        torch.testing.assert_close(on_cuda.tokens.cpu(), expected.tokens)


@pytest.mark.gpu
def test_a_served_call_does_not_synchronize_with_the_host() -> None:
    tokens = torch.from_numpy(make_clip("clustered", 9, 120, 96, seed=4)).bfloat16().cuda()
    expected = compress_by_linkage(tokens, 108)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = compress_by_linkage(tokens, 108)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.assignment, expected.assignment)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["alike", "still", "black", "copies", "one-hot"])
def test_on_cuda_copies_and_ties_are_no_slower_than_twice_random_tokens(kind: str) -> None:
    shape = (32, 196, 1024)
    random = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(5))
    number = torch.arange(32 * 196, device="cuda").view(32, 196) * 7
    other = {
        "alike": 1 + 1e-4 * random,
        "still": random[:1].expand(shape),
        "black": torch.ones(shape, device="cuda"),
        "copies": random.flatten(0, 1)[number % 50],
        "one-hot": torch.eye(1024, device="cuda")[number % 1024],
    }[kind]

    def fastest(tokens: torch.Tensor) -> float:
        times = []
        for _ in range(9):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            compress_by_linkage(tokens, 627)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return min(times)

    assert fastest(other) < 2 * fastest(random)


@pytest.mark.gpu
def test_after_warm_up_no_shape_waits_for_a_compiler() -> None:
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    for num_frames, per_frame, ratio in warm_up_shapes(8192, device):
        shape = num_frames, per_frame, 64
        kept = int(num_frames * per_frame * ratio)
        compress_by_linkage(torch.randn(shape, dtype=dtype, device=device), kept)
    torch.cuda.synchronize()
    for shape in ((3, 7, 64), (15, 169, 64), (1, 1, 64), (5, 1023, 64), (2, 4095, 64)):
        tokens = torch.randn(shape, dtype=dtype, device=device)
        begin = time.perf_counter()
        compress_by_linkage(tokens, max(1, shape[0] * shape[1] // 10))
        torch.cuda.synchronize()
        # A compilation takes a second.
        assert time.perf_counter() - begin < 0.4, shape
