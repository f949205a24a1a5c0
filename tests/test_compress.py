"""compress and the compressors: hand-worked clips, the slow oracle, and the laws for any input."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scissor_vllm.compression.similarity
from scissor_vllm import compress, num_retained_tokens
from scissor_vllm.compression import CompressedTokens, get_compressor
from tests import oracle

SIMILARITY = scissor_vllm.compression.similarity

# Differences of cosines below this may be decided either way in float32.
UNDECIDED = 3e-6
# Largest distance of a reported threshold above the exact breakpoint.
ABOVE_BREAKPOINT = 1e-4


def laws(max_examples: int) -> settings:
    """Return settings for as many examples, or as many as the profile has if that is fewer."""
    return settings(
        deadline=None,
        derandomize=True,
        max_examples=min(max_examples, settings.default.max_examples),  # type: ignore[union-attr]
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: with thousands of tiny products threads only wait for each other."""
    with num_threads(1):
        yield


# --- clips ----------------------------------------------------------------------------------------


def make_clip(kind: str, num_frames: int, size: int, width: int, seed: int) -> np.ndarray:
    """Return float32 tokens (num_frames, size, width) of the named kind."""
    rng = np.random.default_rng(seed)
    shape = (num_frames, size, width)
    noise = rng.standard_normal(shape)
    lengths = rng.uniform(0.2, 5, (num_frames, size, 1))
    if kind == "gaussian":
        clip = noise
    elif kind == "one direction":  # every cosine high, as in a real vision tower
        clip = noise * rng.uniform(0.05, 0.5) + 1
    elif kind == "clustered":
        prototypes = rng.standard_normal((rng.integers(1, 6), width))
        chosen = rng.integers(len(prototypes), size=shape[:2])
        clip = (prototypes[chosen] + rng.choice([0.05, 0.2, 0.5]) * noise) * lengths
    elif kind == "duplicates":
        prototypes = rng.standard_normal((max(1, num_frames * size // 3), width))
        clip = prototypes[rng.integers(len(prototypes), size=shape[:2])]
    elif kind == "constant frames":
        clip = np.broadcast_to(rng.standard_normal((num_frames, 1, width)), shape)
    elif kind == "constant":
        clip = np.broadcast_to(rng.standard_normal(width), shape)
    elif kind == "zeros":
        clip = np.zeros(shape)
    elif kind == "some zeros":
        clip = noise * (rng.random((num_frames, size, 1)) < 0.6)
    elif kind == "one-hot":
        clip = np.eye(width)[rng.integers(width, size=shape[:2])]
        clip = clip * rng.integers(1, 4, (num_frames, size, 1))
    elif kind == "anti-parallel":
        axes = rng.standard_normal((rng.integers(1, 4), width))
        signs = rng.choice([-1, 1], (num_frames, size, 1))
        clip = axes[rng.integers(len(axes), size=shape[:2])] * signs * lengths
    elif kind == "nearly equal":  # cosines apart by the last bits of float32
        clip = rng.standard_normal(width) + noise * 10.0 ** rng.uniform(-7, -2)
    elif kind == "huge and tiny":
        clip = noise / np.abs(noise).max(-1, keepdims=True)
        clip = clip * 10.0 ** rng.uniform(-38, 38, (num_frames, size, 1))
    elif kind == "huge":
        clip = noise / np.abs(noise).max(-1, keepdims=True) * 3e38
    elif kind == "tiny":
        clip = noise / np.abs(noise).max(-1, keepdims=True) * 1e-38
    else:
        raise ValueError(kind)
    return np.ascontiguousarray(clip, dtype=np.float32)


GENERIC = ["gaussian", "one direction", "clustered"]
DEGENERATE = [
    "duplicates", "constant frames", "constant", "zeros", "some zeros", "one-hot", "anti-parallel",
    "nearly equal", "huge and tiny", "huge", "tiny",
]  # fmt: skip


def clips(
    kinds: list[str], max_frames: int = 5, max_size: int = 8, max_width: int = 8, min_width: int = 1
) -> st.SearchStrategy[np.ndarray]:
    return st.builds(
        make_clip,
        st.sampled_from(kinds),
        st.integers(1, max_frames),
        st.integers(1, max_size),
        st.integers(min_width, max_width),
        st.integers(0, 2**32 - 1),
    )


def clear_threshold(clip: np.ndarray, quantile: float) -> float:
    """Return a threshold midway between two neighbouring cosines of tokens that share a frame."""
    cosines = {-0.999, 0.999}
    for frame in clip.astype(np.float64):
        cosines.update(oracle.cosines(frame, frame)[np.triu_indices(len(frame), 1)].tolist())
    values = sorted(v for v in cosines if -0.999 <= v <= 0.999)
    at = min(int(quantile * (len(values) - 1)), len(values) - 2)
    return (values[at] + values[at + 1]) / 2


def clustered(num_frames: int, size: int, width: int, num_clusters: int, seed: int) -> torch.Tensor:
    """Return tokens around well separated prototypes: cosine above 0.9 inside, below 0.5 across."""
    rng = np.random.default_rng(seed)
    prototypes = rng.standard_normal((num_clusters, width))
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    chosen = rng.integers(num_clusters, size=(num_frames, size))
    noise = rng.standard_normal((num_frames, size, width)) * 0.15 / np.sqrt(width)
    lengths = rng.uniform(0.5, 2, (num_frames, size, 1))
    return torch.from_numpy(((prototypes[chosen] + noise) * lengths).astype(np.float32))


def at_angles(*frames: list[float]) -> torch.Tensor:
    """Return unit vectors of the plane, one for each angle in degrees, (T, P, 2)."""
    radians = np.deg2rad(np.array(frames, dtype=np.float64))
    return torch.from_numpy(np.stack([np.cos(radians), np.sin(radians)], -1).astype(np.float32))


def cos_degrees(angle: float) -> float:
    return float(np.cos(np.deg2rad(angle)))


# --- comparisons ----------------------------------------------------------------------------------


def assert_is(out: CompressedTokens, expected: oracle.Result, clip: np.ndarray) -> None:
    """Assert the same rows, in the same order, from the same tokens."""
    assert out.tokens.shape == expected.tokens.shape
    assert out.assignment.tolist() == expected.assignment.tolist()
    # A row is as exact as the largest of its averaged values.
    flat = np.abs(clip.reshape(-1, clip.shape[-1]).astype(np.float64))
    for k, row in enumerate(expected.tokens):
        members = flat[expected.assignment == k]
        scale = max(members.max(initial=0), np.abs(row).max())
        np.testing.assert_allclose(out.tokens[k].double().numpy(), row, rtol=0, atol=1e-4 * scale)


def found_threshold(out: CompressedTokens) -> float:
    assert out.similarity_threshold is not None
    return out.similarity_threshold


def assert_same(out: CompressedTokens, other: CompressedTokens) -> None:
    """Assert bitwise equal results."""
    assert torch.equal(out.tokens, other.tokens)
    assert out.tokens.dtype == other.tokens.dtype
    assert torch.equal(out.assignment, other.assignment)
    assert out.similarity_threshold == other.similarity_threshold


def assert_equivalent(out: CompressedTokens, other: CompressedTokens) -> None:
    """Assert equal decisions, and rows that differ by rounding only."""
    assert torch.equal(out.assignment, other.assignment)
    torch.testing.assert_close(out.tokens, other.tokens, rtol=1e-5, atol=1e-6)
    assert out.similarity_threshold == pytest.approx(other.similarity_threshold, abs=1e-5)


def assert_well_formed(out: CompressedTokens, tokens: torch.Tensor) -> None:
    num_tokens, width = tokens.shape[0] * tokens.shape[1], tokens.shape[2]
    num_rows = len(out.tokens)
    assert out.tokens.shape == (num_rows, width)
    assert 1 <= num_rows <= num_tokens
    assert out.tokens.dtype == tokens.dtype
    assert out.tokens.device == tokens.device
    assert out.tokens.isfinite().all()
    assert out.assignment.shape == (num_tokens,)
    assert out.assignment.dtype == torch.int64
    assert out.assignment.device == tokens.device
    assert out.assignment.min() >= 0
    assert out.assignment.max() < num_rows
    assert type(out.similarity_threshold) is float
    assert -1 <= found_threshold(out) <= 1


# --- hand-worked clips: the oracle and the package give the same known answer ---------------------


class Worked:
    """A method's answer on a clip, as plain lists."""

    def __init__(self, out: oracle.Result | CompressedTokens) -> None:
        self.rows = [[float(value) for value in row] for row in out.tokens]
        self.assignment = [int(k) for k in out.assignment]


def assert_rows(out: Worked, rows: list[list[float]]) -> None:
    np.testing.assert_allclose(np.array(out.rows), np.array(rows), rtol=0, atol=1e-6)


Method = Callable[[torch.Tensor, float], Worked]
BudgetMethod = Callable[[torch.Tensor, int], Worked]


def by_oracle(tokens: torch.Tensor, tau: float) -> Worked:
    return Worked(oracle.scc(tokens.numpy(), tau))


def by_package(tokens: torch.Tensor, tau: float) -> Worked:
    return Worked(compress(tokens, similarity_threshold=tau))


def budget_by_oracle(tokens: torch.Tensor, k: int) -> Worked:
    return Worked(oracle.scc_budget(tokens.numpy(), k))


def budget_by_package(tokens: torch.Tensor, k: int) -> Worked:
    return Worked(compress(tokens, num_retained=k))


both = pytest.mark.parametrize("method", [by_oracle, by_package])
both_budgets = pytest.mark.parametrize("method", [budget_by_oracle, budget_by_package])


@both
def test_representatives_are_plain_means_and_each_step_counts_its_own_members(
    method: Method,
) -> None:
    clip = torch.tensor([[[1.0, 0], [3, 0]], [[8, 0], [0, 1]]])
    out = method(clip, 0.9)
    # Spatial: (2, 0); (8, 0), (0, 1). Temporal: (5, 0), not the mean 4 of the three tokens.
    assert out.rows == [[(5 + 1 + 3 + 8) / 4, 0], [0, 1]]
    assert out.assignment == [0, 0, 0, 1]


@both
def test_an_edge_needs_a_cosine_strictly_above_the_threshold(method: Method) -> None:
    clip = torch.tensor([[[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, -1]]])  # cosines 1/2, 0, -1/2
    assert len(method(clip, 0.5).rows) == 3
    assert len(method(clip, 0.499).rows) == 2
    assert len(method(clip[:, ::2], 0.0).rows) == 2
    assert len(method(clip[:, ::2], -0.001).rows) == 1
    assert len(method(clip[:, 1:], -0.5).rows) == 2
    assert len(method(clip[:, 1:], -0.501).rows) == 1


@both
def test_frames_too_are_joined_only_strictly_above_the_threshold(method: Method) -> None:
    clip = torch.tensor([[[1.0, 0, 0, 0]], [[1, 1, 1, 1]]])
    assert len(method(clip, 0.5).rows) == 2
    assert len(method(clip, 0.499).rows) == 1


@both
def test_at_threshold_one_nothing_merges_not_even_equal_tokens(method: Method) -> None:
    clip = torch.tensor([[[0.0, 2], [0, 2]], [[0, 4], [3, 0]]])
    out = method(clip, 1.0)
    assert len(out.rows) == 4
    assert out.assignment == [0, 0, 0, 3]
    assert out.rows == [[0, (2 + 2 + 2 + 4) / 4], [0, 2], [0, 4], [3, 0]]


@both
def test_opposite_tokens_stay_apart_at_threshold_minus_one(method: Method) -> None:
    clip = torch.tensor([[[0.0, 2], [0, -2]]])
    assert method(clip, -1.0).rows == [[0, 2], [0, -2]]


@both
def test_a_zero_token_is_similar_to_no_token_not_even_itself(method: Method) -> None:
    clip = torch.tensor([[[0.0, 0], [0, 2], [0, 0]], [[0, 0], [0, 4], [5, 0]]])
    out = method(clip, 0.0)
    assert out.rows == [[0, 0], [0, 3], [0, 0], [0, 0], [5, 0]]
    assert out.assignment == [0, 1, 0, 0, 1, 4]


@both
def test_a_zero_token_has_cosine_zero_with_all(method: Method) -> None:
    clip = torch.tensor([[[0.0, 0], [0, 2], [3, 0]]])
    assert len(method(clip, -0.1).rows) == 1


@both
def test_equal_cosines_go_to_the_lowest_row(method: Method) -> None:
    clip = torch.tensor([[[2.0, 0], [0, 2], [0, 0]]])
    out = method(clip, 0.5)
    assert out.assignment == [0, 1, 0]
    assert_rows(out, [[4 / 3, 0], [0, 2], [0, 0]])


@both
def test_components_are_chains_of_edges_not_cliques(method: Method) -> None:
    clip = at_angles([0, 20, 40, 60, 80, 100])
    assert len(method(clip, cos_degrees(25)).rows) == 1
    assert len(method(clip, cos_degrees(15)).rows) == 6


@both
def test_order_is_by_the_lowest_member_of_highest_degree(method: Method) -> None:
    # Node 0 is an end of the chain 20°, 0°, 40° that node 2 is the middle of; node 1 stands alone.
    for clip in (at_angles([0, 150, 20, 40]), at_angles([0], [150], [20], [40])):
        assert method(clip, cos_degrees(25)).assignment == [1, 0, 1, 1]
    # With two of highest degree the lower one counts.
    for clip in (at_angles([0, 20, 150, 40, 60]), at_angles([0], [20], [150], [40], [60])):
        assert method(clip, cos_degrees(25)).assignment == [0, 0, 1, 0, 0]


@both
def test_a_degree_counts_edges_strictly_above_the_threshold(method: Method) -> None:
    # Nodes 0 and 2 are joined; nodes 1 and 2 have cosine 1/2 exactly, which is no edge and must
    # not make node 2 the one of highest degree.
    nodes = torch.tensor([[0.0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    for clip in (nodes[None], nodes[:, None]):
        assert method(clip, 0.5).assignment == [0, 1, 0]


@both
def test_the_temporal_step_numbers_representatives_in_spatial_order(method: Method) -> None:
    # The one frame's components come out as 150°, then 20°: so do the rows.
    clip = at_angles([0, 150, 20, 40], [20, 20, 20, 300])
    assert method(clip, cos_degrees(25)).assignment == [1, 0, 1, 1, 1, 1, 1, 2]


@both
def test_tokens_go_to_the_nearest_representative_not_to_their_own_component(method: Method) -> None:
    # The chain 0° … 80° has its mean at 40°; the token at 80° is closer to the one at 110°.
    clip = at_angles([0, 20, 40, 60, 80, 110])
    out = method(clip, cos_degrees(25))
    assert out.assignment == [0, 0, 0, 0, 1, 1]
    chain, alone = clip[0, :5].double(), clip[0, 5].double()
    first = (chain.mean(0) + chain[:4].sum(0)) / 5
    second = (alone + alone + chain[4]) / 3
    assert_rows(out, [first.tolist(), second.tolist()])


@both
def test_a_single_frame_takes_the_temporal_step_too(method: Method) -> None:
    # Eight tokens in a ring around a ninth: neighbours are linked, the ninth is linked to none,
    # but the ring's mean has the ninth's direction.
    turn = np.deg2rad(45 * np.arange(8))
    tilt = np.deg2rad(30)
    ring = np.stack(
        [np.sin(tilt) * np.cos(turn), np.sin(tilt) * np.sin(turn), np.cos(tilt) + 0 * turn], -1
    )
    clip = np.concatenate([ring, [[0, 0, 1.0]]])[None].astype(np.float32)
    assert len(method(torch.from_numpy(clip), 0.9).rows) == 1


@both
def test_the_spatial_step_never_links_across_frames(method: Method) -> None:
    # 20° and 40° would be linked, but their frames' means are at 10° and 50°.
    out = method(at_angles([0, 20], [40, 60]), cos_degrees(25))
    assert out.assignment == [0, 0, 1, 1]
    assert len(method(at_angles([0, 20, 40, 60]), cos_degrees(25)).rows) == 1


# The count is 3 from 0.7433 on, 1 from 0.7657, 2 from 0.7809, 3 from 0.8321: a bisection for 3 ends
# at 0.8321, where other tokens share a row.
NOT_MONOTONE = torch.tensor([[[1.0, 5], [5, 4], [4, 0]], [[5, 0], [5, 5], [0, 4]]])


@both_budgets
def test_a_budget_takes_the_smallest_threshold_where_the_count_is_not_monotone(
    method: BudgetMethod,
) -> None:
    counts = [num for _, num in oracle.count_by_threshold(NOT_MONOTONE.numpy())]
    assert counts == [1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert oracle.scc(NOT_MONOTONE.numpy(), 0.84).assignment.tolist() == [0, 1, 2, 2, 1, 0]
    assert method(NOT_MONOTONE, 3).assignment == [2, 0, 1, 1, 0, 2]


def test_the_threshold_found_is_the_smallest_where_the_count_is_not_monotone() -> None:
    smallest = oracle.smallest_threshold(NOT_MONOTONE.numpy(), 3)
    assert smallest == pytest.approx(0.7433, abs=1e-4)
    threshold = found_threshold(compress(NOT_MONOTONE, num_retained=3))
    assert smallest - 1e-6 <= threshold <= smallest + ABOVE_BREAKPOINT + 1e-6


@both_budgets
def test_a_budget_between_two_counts_makes_the_strongest_merges_left(method: BudgetMethod) -> None:
    # One frame's pair lies 48° apart in one plane, the other frame's ends lie 47° and 46.5° from
    # the pair's mean in the plane across. While the pair is joined its mean joins the ends; from
    # cos 48° on all four are apart. So no threshold leaves 2 or 3.
    pair = [[np.sin(np.deg2rad(a)), 0, np.cos(np.deg2rad(a))] for a in (-24, 24)]
    ends = [[0, np.sin(np.deg2rad(a)), np.cos(np.deg2rad(a))] for a in (47, -46.5)]
    clip = torch.tensor([pair, ends], dtype=torch.float32)
    counts = [num for start, num in oracle.count_by_threshold(clip.numpy()) if start > 0]
    assert counts[0] == 4
    assert max(num for start, num in oracle.count_by_threshold(clip.numpy()) if start <= 0) == 1
    # First the pair is merged again (48°), then the end at 46.5° with it (51.0°).
    assert method(clip, 3).assignment == [0, 0, 1, 2]
    assert method(clip, 2).assignment == [0, 0, 1, 0]


@both_budgets
def test_equal_merges_are_taken_by_the_lower_pair(method: BudgetMethod) -> None:
    # Below cosine 0.7071 all are one, at it and above they are three.
    for shape in ((1, 3, 2), (3, 1, 2)):
        clip = torch.tensor([[1.0, 0], [0, 1], [1, 1]]).reshape(shape)
        out = method(clip, 2)
        assert out.assignment == [0, 1, 0]
        assert_rows(out, [[1, 0.5], [0, 1]])


@both_budgets
def test_a_budget_of_equal_tokens_gives_every_token_to_the_first_row(method: BudgetMethod) -> None:
    for k in (1, 2, 5, 6):
        out = method(torch.full((2, 3, 4), 2.0), k)
        assert out.rows == [[2.0] * 4] * k
        assert out.assignment == [0] * 6


@both_budgets
def test_parallel_tokens_of_any_length_are_equally_near(method: BudgetMethod) -> None:
    # Integers, so exactly parallel; the means' float32 cosines differ in the last bits.
    rng = np.random.default_rng(0)
    for _ in range(10):
        directions = rng.integers(1, 10, (1, 1, 5))
        lengths = rng.integers(1, 1000, (2, 6, 1))
        clip = torch.from_numpy((directions * lengths).astype(np.float32))
        for k in (1, 3, 7, 12):
            assert method(clip, k).assignment == [0] * 12


@both_budgets
def test_a_budget_of_all_tokens_keeps_each_as_it_is(method: BudgetMethod) -> None:
    clip = at_angles([0, 70], [140, 210])
    out = method(clip, 4)
    assert out.assignment == [0, 1, 2, 3]
    assert_rows(out, clip.reshape(4, 2).tolist())


def test_the_oracles_step_function_is_its_count_everywhere() -> None:
    for kind in (*GENERIC, *DEGENERATE):
        clip = make_clip(kind, 3, 5, 4, seed=7)
        pieces = oracle.count_by_threshold(clip)
        ends = [start for start, _ in pieces[1:]] + [1.0]
        for (start, num), end in zip(pieces, ends, strict=True):
            assert oracle.count(clip, start) == num
            if end - start > 1e-9:
                assert oracle.count(clip, (start + end) / 2) == num


# --- the paper's form is the oracle's -------------------------------------------------------------


@laws(200)
@given(clip=clips([*GENERIC, *DEGENERATE]), quantile=st.floats(0, 1))
def test_threshold_form_is_the_oracles(clip: np.ndarray, quantile: float) -> None:
    tau = clear_threshold(clip, quantile)
    expected = oracle.scc(clip, tau)
    assume(expected.margin > UNDECIDED)
    out = compress(torch.from_numpy(clip), similarity_threshold=tau)
    assert_is(out, expected, clip)
    assert out.similarity_threshold == tau


@laws(40)
@given(
    clip=clips(GENERIC, max_frames=8, max_size=24, max_width=16, min_width=2),
    tau=st.floats(0.2, 0.98),
)
def test_threshold_form_is_the_oracles_on_larger_clips(clip: np.ndarray, tau: float) -> None:
    expected = oracle.scc(clip, tau)
    assume(expected.margin > UNDECIDED)
    assert_is(compress(torch.from_numpy(clip), similarity_threshold=tau), expected, clip)


# --- a budget is exact ----------------------------------------------------------------------------


# Clips on both sides of the size up to which every threshold is tried.
any_clips = st.one_of(
    clips([*GENERIC, *DEGENERATE]), clips([*GENERIC, *DEGENERATE], max_frames=6, max_size=50)
)


@laws(120)
@given(clip=any_clips, data=st.data())
def test_a_budget_leaves_exactly_k_rows_of_any_input(clip: np.ndarray, data: st.DataObject) -> None:
    tokens = torch.from_numpy(clip)
    k = data.draw(st.integers(1, clip.shape[0] * clip.shape[1]))
    out = compress(tokens, num_retained=k)
    assert_well_formed(out, tokens)
    assert len(out.tokens) == k


@laws(120)
@given(clip=any_clips, data=st.data())
def test_a_budget_is_the_papers_form_or_the_papers_form_leaves_more(
    clip: np.ndarray, data: st.DataObject
) -> None:
    tokens = torch.from_numpy(clip)
    k = data.draw(st.integers(1, clip.shape[0] * clip.shape[1]))
    out = compress(tokens, num_retained=k)
    paper = compress(tokens, similarity_threshold=found_threshold(out))
    assert len(paper.tokens) >= k
    if len(paper.tokens) == k:
        assert_same(out, paper)


@laws(120)
@given(clip=clips(GENERIC, max_frames=6, max_size=10, min_width=2), data=st.data())
def test_a_budgets_threshold_is_the_smallest_that_leaves_enough(
    clip: np.ndarray, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, clip.shape[0] * clip.shape[1]))
    pieces = oracle.count_by_threshold(clip)
    starts = np.array([start for start, _ in pieces])
    smallest = next(start for start, num in pieces if num >= k)
    # Not where two breakpoints, one of them decisive, are one to float32.
    near = starts[starts <= smallest + ABOVE_BREAKPOINT]
    assume((np.diff(near) > 1e-5).all())
    threshold = found_threshold(compress(torch.from_numpy(clip), num_retained=k))
    assert smallest - 1e-6 <= threshold <= smallest + ABOVE_BREAKPOINT + 1e-6
    # The step that it was reported from is the step that it lies in.
    assert oracle.count(clip, threshold) == oracle.count(clip, smallest)


@laws(150)
@given(
    clip=st.one_of(
        clips(GENERIC, max_frames=6, max_size=10, min_width=2),
        clips(GENERIC, max_frames=5, max_size=40, max_width=16, min_width=2),
    ),
    data=st.data(),
)
def test_a_budgets_rows_are_the_oracles(clip: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, clip.shape[0] * clip.shape[1]))
    out = compress(torch.from_numpy(clip), num_retained=k)
    tau = found_threshold(out)
    paper = oracle.scc(clip, tau)
    assume(paper.margin > UNDECIDED)
    assert len(paper.tokens) >= k
    expected = oracle.scc_budget(clip, k, tau)
    assume(expected.margin > UNDECIDED)
    assert_is(out, expected, clip)


@laws(150)
@given(
    clip=st.one_of(
        clips(GENERIC, max_frames=10, max_size=8, min_width=2),
        clips(GENERIC, max_frames=7, max_size=30, max_width=16, min_width=2),
    ),
    window=st.integers(1, 8), data=st.data(),
)  # fmt: skip
def test_with_windows_the_rows_are_the_oracles(
    clip: np.ndarray, window: int, data: st.DataObject
) -> None:
    num_frames = len(clip)
    k = data.draw(st.integers(1, num_frames * clip.shape[1]))
    out = compress(torch.from_numpy(clip), num_retained=k, temporal_window=window)
    tau, used = found_threshold(out), max(window, -(-num_frames // k))
    by_threshold = oracle.scc(clip, tau, used)
    assume(by_threshold.margin > UNDECIDED)
    assert len(by_threshold.tokens) >= k
    expected = oracle.scc_budget(clip, k, tau, used)
    assume(expected.margin > UNDECIDED)
    assert_is(out, expected, clip)
    paper = compress(torch.from_numpy(clip), similarity_threshold=tau, temporal_window=used)
    assert_is(paper, by_threshold, clip)


@pytest.mark.parametrize("num_retained", [3, 24, 200])
def test_windows_as_long_as_the_video_change_nothing(num_retained: int) -> None:
    tokens = torch.from_numpy(make_clip("clustered", 8, 30, 16, seed=2))
    whole = compress(tokens, num_retained=num_retained)
    for window in (8, 100):
        assert_same(whole, compress(tokens, num_retained=num_retained, temporal_window=window))
    pairs = compress(tokens, num_retained=num_retained, temporal_window=2)
    assert not torch.equal(pairs.assignment, whole.assignment)


def test_a_window_is_a_number_of_frames() -> None:
    tokens = torch.randn(4, 5, 6)
    with pytest.raises(ValueError, match="temporal_window must be 1 frame or more, got 0"):
        compress(tokens, num_retained=3, temporal_window=0)
    with pytest.raises(TypeError, match=r"temporal_window must be an int, got 2\.5"):
        compress(tokens, num_retained=3, temporal_window=2.5)  # type: ignore[arg-type]


@laws(60)
@given(clip=clips([*GENERIC, *DEGENERATE]), ratio=st.sampled_from([0.01, 0.1, 0.35, 0.5, 0.99, 1]))
def test_a_ratio_is_the_budget_that_num_retained_tokens_gives(
    clip: np.ndarray, ratio: float
) -> None:
    tokens = torch.from_numpy(clip)
    k = num_retained_tokens(clip.shape[0] * clip.shape[1], ratio)
    assert_same(compress(tokens, retention_ratio=ratio), compress(tokens, num_retained=k))


def test_a_ratio_is_exact_for_decimals() -> None:
    tokens = torch.from_numpy(make_clip("gaussian", 5, 6, 8, seed=0))
    assert len(compress(tokens, retention_ratio=0.1).tokens) == 3


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_elements", "num_frames", "size"),
    [(64, 4, 9), pytest.param(64, 1, 30, marks=pytest.mark.slow), (1000, 5, 26)],
)
@pytest.mark.parametrize("kind", [*GENERIC, "constant", "constant frames", "some zeros", "one-hot"])
def test_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str, block_elements: int, num_frames: int, size: int
) -> None:
    num_tokens = num_frames * size
    tokens = torch.from_numpy(make_clip(kind, num_frames, size, 16, seed=num_tokens))
    tau = clear_threshold(tokens.numpy(), 0.9)
    budgets = (1, 3, num_tokens // 10, num_tokens // 2, num_tokens - 1, num_tokens)

    def results() -> list[CompressedTokens]:
        by_budget = [compress(tokens, num_retained=k) for k in budgets]
        in_windows = [compress(tokens, num_retained=k, temporal_window=3) for k in budgets]
        return [compress(tokens, similarity_threshold=tau), *by_budget, *in_windows]

    whole = results()
    monkeypatch.setattr(SIMILARITY, "BLOCK_ELEMENTS", block_elements)
    for a, b in zip(whole, results(), strict=True):
        assert_equivalent(a, b)


def test_blocks_give_the_oracles_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SIMILARITY, "BLOCK_ELEMENTS", 64)
    for seed in range(6):
        clip = make_clip("clustered", 4, 15, 12, seed=seed)
        tau = clear_threshold(clip, 0.8)
        expected = oracle.scc(clip, tau)
        assert expected.margin > UNDECIDED
        assert_is(compress(torch.from_numpy(clip), similarity_threshold=tau), expected, clip)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return out


@pytest.mark.parametrize("shape", [(1, 400, 8), (4, 100, 8), (400, 1, 8)])
def test_no_tensor_is_larger_than_a_block(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(SIMILARITY, "BLOCK_ELEMENTS", 10_000)
    tokens = torch.from_numpy(make_clip("clustered", *shape, seed=5))
    with LargestTensor() as largest:
        compress(tokens, similarity_threshold=0.999)
        compress(tokens, num_retained=300)
    assert largest.num_elements <= 10_000


def test_with_windows_only_tokens_of_one_are_compared() -> None:
    num_frames, size, width, window = 64, 16, 4, 2
    tokens = torch.from_numpy(make_clip("clustered", num_frames, size, width, seed=5))
    num_tokens = num_frames * size

    def largest_tensor(temporal_window: int | None) -> int:
        with LargestTensor() as largest:
            compress(tokens, similarity_threshold=0.9, temporal_window=temporal_window)
            compress(tokens, num_retained=100, temporal_window=temporal_window)
            compress(tokens, num_retained=num_tokens // 2, temporal_window=temporal_window)
        return largest.num_elements

    # The cosines inside frames, the spatial step's, are held at once.
    assert largest_tensor(window) <= num_tokens * size
    assert largest_tensor(None) > 32 * num_tokens * size


class NumOperations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_search_over_equal_tokens_does_not_visit_each_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 1, 32, generator=generator)
    tokens = one + 0.01 * torch.randn(8, 49, 32, generator=generator)
    # A look at one interval of thresholds takes about 400 operations; there are hundreds.
    with NumOperations() as operations:
        compress(tokens, retention_ratio=0.25)
    assert operations.count < 5000


def test_a_real_grid_is_the_oracles() -> None:
    tokens = clustered(8, 196, 64, num_clusters=24, seed=0)
    clip = tokens.numpy()
    for tau in (0.7, 0.8, 0.93):
        expected = oracle.scc(clip, tau)
        assert expected.margin > UNDECIDED
        out = compress(tokens, similarity_threshold=tau)
        assert_is(out, expected, clip)
    assert len(compress(tokens, similarity_threshold=0.8).tokens) == 24


@pytest.mark.parametrize("k", [1, 10, 24, 157, 549, 1568])
def test_a_budget_of_a_real_grid_is_the_oracles(k: int) -> None:
    tokens = clustered(8, 196, 64, num_clusters=24, seed=0)
    clip = tokens.numpy()
    out = compress(tokens, num_retained=k)
    assert_well_formed(out, tokens)
    assert len(out.tokens) == k
    tau = found_threshold(out)
    assert oracle.count(clip, tau) >= k
    for below in np.linspace(tau - 0.2, tau - 2 * ABOVE_BREAKPOINT, 8):
        assert below < -1 or oracle.count(clip, below) < k
    expected = oracle.scc_budget(clip, k, tau)
    if expected.margin > UNDECIDED:
        assert_is(out, expected, clip)
    if k == 24:
        paper = compress(tokens, similarity_threshold=0.8)
        assert torch.equal(out.assignment, paper.assignment)


@laws(30)
@given(
    kind=st.sampled_from(GENERIC),
    num_frames=st.integers(4, 6),
    size=st.integers(33, 40),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_just_below_a_larger_clips_threshold_fewer_are_left(
    kind: str, num_frames: int, size: int, seed: int, data: st.DataObject
) -> None:
    clip = make_clip(kind, num_frames, size, 16, seed)
    k = data.draw(st.integers(2, num_frames * size - 1))
    threshold = found_threshold(compress(torch.from_numpy(clip), num_retained=k))
    # The breakpoint that it was reported from is the nearest of those below.
    frames = clip.astype(np.float64)
    representatives, _, _ = oracle.spatial_step(frames, threshold)
    breaks = oracle.spanning_weights(representatives)
    for frame in frames:
        breaks += oracle.spanning_weights(frame)
    below = sorted((b for b in breaks if b <= threshold + 1e-7), reverse=True)
    assume(len(below) > 1 and below[0] - below[1] > 4e-6)
    assert threshold - below[0] <= ABOVE_BREAKPOINT + 1e-6
    assert oracle.count(clip, threshold + 1e-7) >= k
    assert oracle.count(clip, below[0] - 2e-6) < k


def test_no_edge_of_long_chains_is_missed() -> None:
    # Each frame is an arc in a plane of its own, its tokens shuffled: each is joined to the two
    # beside it alone, so one edge missed among 4.6 million pairs would break a chain.
    rng = np.random.default_rng(0)
    num_frames, size = 24, 440
    steps = np.where(rng.random((num_frames, size)) < 0.03, 1.0, 0.6)
    angles = np.deg2rad(rng.permuted(steps.cumsum(axis=1), axis=1))
    planes = np.zeros((num_frames, size, num_frames, 2), dtype=np.float32)
    frame = np.arange(num_frames)
    planes[frame, :, frame] = np.stack([np.cos(angles), np.sin(angles)], -1)
    clip = planes.reshape(num_frames, size, 2 * num_frames)
    num_chains = num_frames + int((steps[:, 1:] == 1.0).sum())
    assert oracle.count(clip, cos_degrees(0.8)) == num_chains
    out = compress(torch.from_numpy(clip), similarity_threshold=cos_degrees(0.8))
    assert len(out.tokens) == num_chains


# --- rows -----------------------------------------------------------------------------------------


@laws(100)
@given(clip=clips([*GENERIC, *DEGENERATE]), data=st.data())
def test_rows_lie_between_the_least_and_the_largest_token(
    clip: np.ndarray, data: st.DataObject
) -> None:
    tokens = torch.from_numpy(clip)
    k = data.draw(st.integers(1, clip.shape[0] * clip.shape[1]))
    tau = data.draw(st.floats(-1, 1))
    flat = tokens.flatten(0, 1).double()
    slack = 1e-5 * flat.abs().amax(0)
    for out in (compress(tokens, num_retained=k), compress(tokens, similarity_threshold=tau)):
        assert_well_formed(out, tokens)
        rows = out.tokens.double()
        assert (rows <= flat.amax(0) + slack).all()
        assert (rows >= flat.amin(0) - slack).all()


@pytest.mark.parametrize("num_frames", [32, 160])
def test_rows_of_a_long_still_video_are_the_token_it_repeats(num_frames: int) -> None:
    token = torch.tensor([0.1, 0.7, 1.3, 3.3])
    out = compress(token.expand(num_frames, 196, 4), similarity_threshold=0.9)
    assert len(out.tokens) == 1
    torch.testing.assert_close(out.tokens[0], token, rtol=1e-4, atol=0)


@laws(60)
@given(clip=clips(GENERIC, min_width=2), data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_order_of_the_features_does_not_matter(
    clip: np.ndarray, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, clip.shape[0] * clip.shape[1]))
    out = compress(torch.from_numpy(clip), num_retained=k)
    margin = oracle.scc_budget(clip, k, found_threshold(out)).margin
    assume(margin > UNDECIDED)
    columns = torch.from_numpy(np.random.default_rng(seed).permutation(clip.shape[-1]))
    shuffled = compress(torch.from_numpy(clip)[..., columns], num_retained=k)
    assert torch.equal(shuffled.assignment, out.assignment)
    torch.testing.assert_close(shuffled.tokens, out.tokens[:, columns], rtol=1e-5, atol=1e-5)


@laws(60)
@given(clip=clips([*GENERIC, "some zeros"]), data=st.data(), exponent=st.integers(-100, 100))
def test_scale_of_the_tokens_does_not_matter(
    clip: np.ndarray, data: st.DataObject, exponent: int
) -> None:
    k = data.draw(st.integers(1, clip.shape[0] * clip.shape[1]))
    tokens = torch.from_numpy(clip)
    out = compress(tokens, num_retained=k)
    scaled = compress(tokens * 2.0**exponent, num_retained=k)
    assert torch.equal(scaled.assignment, out.assignment)
    torch.testing.assert_close(scaled.tokens * 2.0**-exponent, out.tokens, rtol=1e-6, atol=0)
    assert scaled.similarity_threshold == out.similarity_threshold


# --- no global state affects a call, and a call changes none --------------------------------------


def small_clip() -> torch.Tensor:
    return torch.from_numpy(make_clip("clustered", 4, 12, 16, seed=11))


def some_results(tokens: torch.Tensor) -> list[CompressedTokens]:
    return [
        compress(tokens, similarity_threshold=0.7),
        compress(tokens, retention_ratio=0.1),
        compress(tokens, num_retained=7),
        compress(tokens, num_retained=31),
    ]


def test_two_calls_give_bitwise_the_same() -> None:
    for tokens in (small_clip(), clustered(4, 150, 32, num_clusters=20, seed=1)):
        for a, b in zip(some_results(tokens), some_results(tokens), strict=True):
            assert_same(a, b)


def test_global_generators_are_neither_read_nor_advanced() -> None:
    tokens = small_clip()
    before = torch.random.get_rng_state()
    try:
        torch.manual_seed(1)
        seeded = torch.random.get_rng_state()
        first = some_results(tokens)
        assert torch.equal(torch.random.get_rng_state(), seeded)
        torch.manual_seed(2)
        second = some_results(tokens)
    finally:
        torch.random.set_rng_state(before)
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_input_is_not_written_to(dtype: torch.dtype) -> None:
    tokens = small_clip().to(dtype)
    copy, version = tokens.clone(), tokens._version
    for out in some_results(tokens):
        out.tokens.zero_()  # nor does the output share its memory
    assert torch.equal(tokens, copy)
    assert tokens._version == version


def test_a_budget_of_all_tokens_shares_no_memory_with_the_input() -> None:
    tokens = small_clip()
    copy = tokens.clone()
    compress(tokens, num_retained=48).tokens.zero_()
    get_compressor("uniform")(tokens, 48).tokens.zero_()
    assert torch.equal(tokens, copy)


def test_gradients_are_left_alone() -> None:
    tokens = small_clip().requires_grad_()
    expected = some_results(small_clip())
    for out, plain in zip(some_results(tokens), expected, strict=True):
        assert not out.tokens.requires_grad
        assert torch.equal(out.tokens, plain.tokens)
        assert torch.equal(out.assignment, plain.assignment)
    assert tokens.requires_grad
    assert tokens.grad is None
    assert torch.is_grad_enabled()


def test_inference_mode_gives_the_same() -> None:
    expected = some_results(small_clip())
    with torch.inference_mode():
        inside = some_results(small_clip())
    for a, b in zip(expected, inside, strict=True):
        assert_same(a, b)


def test_memory_layout_does_not_matter() -> None:
    tokens = small_clip()
    padded = torch.full((4, 12, 32), float("nan"))
    padded[..., ::2] = tokens
    layouts = {
        "transposed": tokens.transpose(0, 1).contiguous().transpose(0, 1),
        "features first": tokens.movedim(-1, 0).contiguous().movedim(0, -1),
        "every other column": padded[..., ::2],
        "a slice of a longer clip": torch.cat([tokens, tokens])[:4],
    }
    expected = some_results(tokens)
    for layout in layouts.values():
        assert torch.equal(layout, tokens)
        for a, b in zip(expected, some_results(layout), strict=True):
            assert_equivalent(a, b)


def test_expanded_input_is_as_good_as_its_copy() -> None:
    for expanded in (
        small_clip()[:1].expand(3, 12, 16),
        small_clip()[:, :1].expand(4, 5, 16),
        torch.ones(1).expand(2, 3, 4),
    ):
        for k in (1, 2, 5):
            assert_same(
                compress(expanded, num_retained=k), compress(expanded.clone(), num_retained=k)
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gaussian", "clustered", "duplicates", "constant", "some zeros"])
def test_half_precision_is_computed_in_float32_and_cast(dtype: torch.dtype, kind: str) -> None:
    for seed in range(3):
        half = torch.from_numpy(make_clip(kind, 4, 12, 16, seed=seed)).to(dtype)
        for a, b in zip(some_results(half), some_results(half.float()), strict=True):
            assert a.tokens.dtype == dtype
            assert torch.equal(a.tokens, b.tokens.to(dtype))
            assert torch.equal(a.assignment, b.assignment)
            assert a.similarity_threshold == b.similarity_threshold


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    tokens = small_clip().to(dtype)
    for out in some_results(tokens):
        assert_well_formed(out, tokens)


def test_half_precision_of_largest_numbers_stays_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tokens = torch.full((3, 4, 5), torch.finfo(dtype).max, dtype=dtype)
        for k in (1, 5, 12):
            out = compress(tokens, num_retained=k)
            torch.testing.assert_close(out.tokens, tokens.reshape(12, 5)[:k])


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
        assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device() == torch.device(device)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_does_not_matter(precision: str) -> None:
    tokens = small_clip()
    expected = some_results(tokens)
    with matmul_precision(precision):
        reduced = some_results(tokens)
    for a, b in zip(expected, reduced, strict=True):
        assert_equivalent(a, b)


def test_number_of_threads_does_not_matter() -> None:
    tokens = clustered(4, 150, 32, num_clusters=20, seed=1)
    by_threads = []
    for number in (1, 2, 3):
        with num_threads(number):
            by_threads.append(some_results(tokens))
    for others in by_threads[1:]:
        for a, b in zip(by_threads[0], others, strict=True):
            assert_equivalent(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block_elements", [1 << 20, 200])
def test_default_dtype_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block_elements: int
) -> None:
    monkeypatch.setattr(SIMILARITY, "BLOCK_ELEMENTS", block_elements)
    tokens = small_clip()
    expected = some_results(tokens)
    with default_dtype(dtype):
        inside = some_results(tokens)
    for a, b in zip(expected, inside, strict=True):
        assert_same(a, b)


def test_default_device_does_not_matter() -> None:
    tokens = small_clip()
    expected = some_results(tokens)
    with default_device("meta"):
        inside = some_results(tokens)
    for a, b in zip(expected, inside, strict=True):
        assert_same(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", GENERIC)
def test_cuda_gives_what_the_cpu_gives(kind: str) -> None:
    num_compared = 0
    for seed in range(8):
        clip = make_clip(kind, 5, 24, 32, seed=seed)
        tokens = torch.from_numpy(clip)
        for precision in ("highest", "medium"):
            with matmul_precision(precision):
                for k in (1, 5, 12, 42, 119):
                    out = compress(tokens.cuda(), num_retained=k)
                    assert_well_formed(out, tokens.cuda())
                    expected = compress(tokens, num_retained=k)
                    tau = found_threshold(expected)
                    assert out.similarity_threshold == pytest.approx(tau, abs=1e-5)
                    if oracle.scc_budget(clip, k, tau).margin < 1e-5:
                        continue
                    num_compared += 1
                    assert torch.equal(out.assignment.cpu(), expected.assignment)
                    torch.testing.assert_close(out.tokens.cpu(), expected.tokens)
    assert num_compared > 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_oracles_rows_of_a_real_grid() -> None:
    tokens = clustered(8, 196, 64, num_clusters=24, seed=0)
    expected = oracle.scc(tokens.numpy(), 0.8)
    for out in (
        compress(tokens.cuda(), similarity_threshold=0.8),
        compress(tokens.cuda(), num_retained=24),
    ):
        assert out.assignment.cpu().tolist() == expected.assignment.tolist()
        np.testing.assert_allclose(out.tokens.cpu().double().numpy(), expected.tokens, atol=1e-4)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"similarity_threshold": 0.9, "num_retained": 2},
        {"similarity_threshold": 0.9, "retention_ratio": 0.5},
        {"retention_ratio": 0.5, "num_retained": 2},
        {"similarity_threshold": 0.9, "retention_ratio": 0.5, "num_retained": 2},
    ],
)
def test_one_way_of_saying_how_many_is_required(arguments: dict[str, Any]) -> None:
    names = "similarity_threshold|retention_ratio|num_retained"
    with pytest.raises(ValueError, match=names):
        compress(small_clip(), **arguments)


@pytest.mark.parametrize("shape", [(), (4,), (4, 8), (2, 3, 4, 8), (0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_tokens_of_another_shape_are_a_value_error(shape: tuple[int, ...]) -> None:
    received = re.escape(str(shape))
    with pytest.raises(ValueError, match=received):
        compress(torch.ones(shape), similarity_threshold=0.9)
    with pytest.raises(ValueError, match=received):
        compress(torch.ones(shape), num_retained=1)


@pytest.mark.parametrize("num_retained", [0, -1, 49, 10**9])
def test_a_budget_outside_one_to_all_is_a_value_error(num_retained: int) -> None:
    with pytest.raises(ValueError, match=str(num_retained)) as error:
        compress(small_clip(), num_retained=num_retained)
    assert "48" in str(error.value)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_ratio_outside_zero_to_one_is_a_value_error(ratio: float) -> None:
    with pytest.raises(ValueError, match="retention_ratio"):
        compress(small_clip(), retention_ratio=ratio)


@pytest.mark.parametrize("tau", [-1.0001, 1.0001, 90, float("nan"), float("inf"), float("-inf")])
def test_a_threshold_that_is_no_cosine_is_a_value_error(tau: float) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tau))):
        compress(small_clip(), similarity_threshold=tau)


@pytest.mark.parametrize("tau", [-1.0, 1.0, -1, 0, 1])
def test_thresholds_from_minus_one_to_one_are_taken(tau: float) -> None:
    assert compress(small_clip(), similarity_threshold=tau).similarity_threshold == tau


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_tokens_that_are_not_floating_are_a_type_error(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=re.escape(str(dtype))):
        compress(torch.ones(2, 3, 4, dtype=dtype), similarity_threshold=0.9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", [{"similarity_threshold": 0.9}, {"num_retained": 5}])
def test_values_that_are_not_finite_are_counted_in_a_value_error(
    dtype: torch.dtype, how: dict[str, Any]
) -> None:
    tokens = small_clip().to(dtype)
    tokens[0, 3, 2] = float("nan")
    tokens[1, 0, 0] = float("inf")
    tokens[3, 11, 15] = float("-inf")
    with pytest.raises(ValueError, match=r"\b3\b.*finite"):
        compress(tokens, **how)


# --- compressors by name --------------------------------------------------------------------------


@laws(60)
@given(clip=clips([*GENERIC, *DEGENERATE]), data=st.data())
def test_scc_by_name_is_compress(clip: np.ndarray, data: st.DataObject) -> None:
    tokens = torch.from_numpy(clip)
    k = data.draw(st.integers(1, clip.shape[0] * clip.shape[1]))
    assert_same(get_compressor("scc")(tokens, k), compress(tokens, num_retained=k))


@laws(200)
@given(
    num_frames=st.integers(1, 12), size=st.integers(1, 40), data=st.data(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_uniform_keeps_evenly_spaced_tokens_as_they_are(
    num_frames: int, size: int, data: st.DataObject, dtype: torch.dtype
) -> None:
    num_tokens = num_frames * size
    k = data.draw(st.integers(1, num_tokens))
    # Distinct in every dtype, so a row tells which token it is.
    numbers = torch.arange(num_tokens)
    tokens = torch.stack([numbers // 32, numbers % 32], -1).to(dtype).reshape(num_frames, size, 2)
    out = get_compressor("uniform")(tokens, k)

    assert type(out) is type(compress(tokens, num_retained=k))
    assert out.tokens.shape == (k, 2)
    assert out.tokens.dtype == dtype
    assert out.similarity_threshold is None
    assert out.assignment.dtype == torch.int64
    kept = (out.assignment >= 0).nonzero().flatten()
    assert out.assignment[kept].tolist() == list(range(k))
    assert (out.assignment == -1).sum() == num_tokens - k
    assert torch.equal(out.tokens, tokens.flatten(0, 1)[kept])
    assert kept[0] == 0
    gaps = torch.diff(kept)
    if k > 1:
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1
        # What is left behind the last one is no larger than a gap: the whole clip is covered.
        assert num_tokens - kept[-1] <= gaps.max() + 1


def test_compressors_take_no_budget_beyond_the_tokens() -> None:
    for name in ("scc", "uniform"):
        for k in (0, 49):
            with pytest.raises(ValueError, match=str(k)):
                get_compressor(name)(small_clip(), k)


@pytest.mark.parametrize("name", ["", "SCC", "tome", "scissor"])
def test_an_unknown_compressor_is_a_value_error_that_lists_the_known(name: str) -> None:
    with pytest.raises(ValueError, match="scc") as error:
        get_compressor(name)
    assert "uniform" in str(error.value)
    assert repr(name) in str(error.value)


def test_autocast_does_not_reach_the_similarities() -> None:
    tokens = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(5))
    plain = compress(tokens, num_retained=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = compress(tokens, num_retained=20)
    assert torch.equal(under.assignment, plain.assignment)
    assert torch.equal(under.tokens, plain.tokens)
