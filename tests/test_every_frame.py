"""Every frame keeps a row: exact K, rows in order of time, and the method's own where it can."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scissor_vllm.compression import get_compressor
from scissor_vllm.compression.every_frame import keep_every_frame
from scissor_vllm.compression.members import representative_members
from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.uniform import select_evenly

METHOD_NAMES = ("average-linkage", "scc-windows", "kitoke", "l2norm", "random+merge")


def rows_of_frames(tokens: torch.Tensor, compressed: CompressedTokens) -> list[int]:
    """Count each frame's rows one by one, by the representative member of each row."""
    counts = [0] * len(tokens)
    for member in representative_members(tokens, compressed).tolist():
        counts[member // tokens.shape[1]] += 1
    return counts


def kept(method: str, tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    compress = get_compressor(method)
    return keep_every_frame(lambda count: compress(tokens, count), tokens, num_retained)


def still(num_frames: int, per_frame: int, seed: int = 0) -> torch.Tensor:
    """Return frames that hardly differ: one stands for all of them."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.randn(1, per_frame, 16, generator=generator)
    return frame + 1e-3 * torch.randn(num_frames, per_frame, 16, generator=generator)


@pytest.mark.parametrize("method", METHOD_NAMES)
@given(
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(0, 2**31),
    st.floats(0, 1),
    st.booleans(),
)
def test_every_frame_keeps_a_row_and_k_is_exact(
    method: str, num_frames: int, per_frame: int, seed: int, share: float, is_still: bool
) -> None:
    if is_still:
        tokens = still(num_frames, per_frame, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(num_frames, per_frame, 16, generator=generator)
    num_tokens = num_frames * per_frame
    num_retained = num_frames + int(share * (num_tokens - num_frames))
    compressed = kept(method, tokens, num_retained)
    assert compressed.tokens.shape == (num_retained, 16)
    assert compressed.assignment.shape == (num_tokens,)
    assert int(compressed.assignment.max()) < num_retained
    assert min(rows_of_frames(tokens, compressed)) >= 1


def test_the_methods_own_rows_stay_where_each_frame_has_one() -> None:
    tokens = torch.randn(6, 20, 16, generator=torch.Generator().manual_seed(0))
    compress = get_compressor("average-linkage")
    own = compress(tokens, 60)
    assert min(rows_of_frames(tokens, own)) >= 1
    asked = []

    def counted(num_retained: int) -> CompressedTokens:
        asked.append(num_retained)
        return compress(tokens, num_retained)

    compressed = keep_every_frame(counted, tokens, 60)
    assert asked == [60]
    assert compressed.tokens.equal(own.tokens)
    assert compressed.assignment.equal(own.assignment)


def test_frames_alike_would_keep_no_row_and_keep_one_of_their_own_tokens() -> None:
    tokens = still(1, 12).repeat(8, 1, 1)
    num_retained = 24
    alone = get_compressor("average-linkage")(tokens, num_retained)
    assert min(rows_of_frames(tokens, alone)) == 0
    compressed = kept("average-linkage", tokens, num_retained)
    assert min(rows_of_frames(tokens, compressed)) >= 1
    members = representative_members(tokens, compressed)
    assert members.equal(members.sort().values)
    # The method's rows are means; what was added is a token as it is.
    flat = tokens.flatten(0, 1)
    is_added = torch.bincount(compressed.assignment, minlength=num_retained) == 1
    added = is_added.nonzero().flatten()
    assert len(added) >= rows_of_frames(tokens, alone).count(0)
    assert compressed.tokens[added].equal(flat[members[added]])


@pytest.mark.parametrize("method", ["average-linkage", "scc", "uniform", "l2norm"])
def test_one_row_a_frame_is_the_least(method: str) -> None:
    tokens = still(5, 9)
    assert rows_of_frames(tokens, kept(method, tokens, 5)) == [1] * 5
    with pytest.raises(ValueError, match="5 frames keep a row each, but num_retained is 4"):
        kept(method, tokens, 4)


def test_what_a_failing_method_falls_back_to_keeps_a_row_of_every_frame() -> None:
    for num_retained in range(6, 6 * 7):
        tokens = torch.randn(6, 7, 16)
        assert min(rows_of_frames(tokens, select_evenly(tokens, num_retained))) >= 1
