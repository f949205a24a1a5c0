"""Work inside each frame: usable rows, cosines, and the maximum spanning tree in Prim's order."""

import triton
import triton.language as tl

from scissor_vllm.compression.cuda.kernels.layout import (
    AT_APART,
    AT_BLOCK_ROWS,
    AT_FRAMES,
    AT_PER_FRAME,
    AT_RETAINED,
    AT_TOKENS,
    AT_WINDOW,
    NO_EDGE_KEY,
    WORD,
)
from scissor_vllm.compression.similarity import NO_EDGE, ONE

_NO_EDGE = tl.constexpr(NO_EDGE)
_ONE = tl.constexpr(ONE)
_NEAR_ROWS = tl.constexpr(8)
_LANE_BITS = tl.constexpr(12)
_LANE_MASK = tl.constexpr((1 << 12) - 1)


@triton.jit
def snapped(cosine):
    """Return cosines in [-1, 1]; values within the resolution of 1 become 1."""
    return tl.where(cosine > _ONE, 1.0, tl.maximum(cosine, -1.0))


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_frames", "per_frame", "window", "block_rows", "apart", "retained",
        "threshold", "width",
    ]
)  # fmt: skip
def rows_kernel(
    tokens,
    rows,
    length,
    largest,
    shape,
    tau_at,
    num_tokens,
    num_frames,
    per_frame,
    window,
    block_rows,
    apart,
    retained,
    threshold,
    width,
    least,
    most,
    block: tl.constexpr,
):
    """Copy a row with its length and largest magnitude, as zeros if that is out of range.

    The first program writes the video's shape and the threshold for the kernels that follow.
    """
    row = tl.program_id(0)
    if row == 0:
        tl.store(shape + AT_TOKENS, num_tokens)
        tl.store(shape + AT_FRAMES, num_frames)
        tl.store(shape + AT_PER_FRAME, per_frame)
        tl.store(shape + AT_WINDOW, window)
        tl.store(shape + AT_BLOCK_ROWS, block_rows)
        tl.store(shape + AT_APART, apart)
        tl.store(shape + AT_RETAINED, retained)
        tl.store(tau_at, threshold)
    at = row.to(tl.int64) * width
    top = tl.zeros((block,), tl.float32)
    squares = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        value = tl.load(tokens + at + column, mask=column < width, other=0.0).to(tl.float32)
        # A maximum or a comparison may drop NaN.
        top = tl.where(value == value, tl.maximum(top, tl.abs(value)), float("inf"))
        squares += value * value
    size = tl.max(top, 0)
    usable = (size >= least) & (size <= most)
    tl.store(largest + row, size)
    tl.store(length + row, tl.where(usable, tl.sqrt(tl.sum(squares, 0)), 0.0))
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        value = tl.load(tokens + at + column, mask=column < width, other=0.0)
        tl.store(rows + at + column, tl.where(usable, value, 0.0), mask=column < width)


@triton.jit(do_not_specialize=["per_frame"])
def cosines_kernel(product, cosine, per_frame, block: tl.constexpr):
    """Make cosines (T, P, P) of dot products, symmetric to the last bit, one program a row."""
    frame = tl.program_id(0) // per_frame
    row = tl.program_id(0) % per_frame
    square = frame.to(tl.int64) * per_frame * per_frame
    column = tl.arange(0, block)
    inside = column < per_frame
    across = tl.load(product + square + row * per_frame + column, mask=inside, other=0.0)
    down = tl.load(product + square + column * per_frame + row, mask=inside, other=0.0)
    squares = tl.load(product + square + column * (per_frame + 1), mask=inside, other=0.0)
    row_square = tl.load(product + square + row * (per_frame + 1))
    unit = tl.where(squares > 0, 1 / tl.sqrt(squares), 0.0)
    row_unit = tl.where(row_square > 0, 1 / tl.sqrt(row_square), 0.0)
    value = snapped(tl.maximum(across, down) * (row_unit * unit))
    value = tl.where(column == row, _NO_EDGE, value)
    tl.store(cosine + square + row * per_frame + column, value, mask=inside)


@triton.jit
def _link_key(weight, token, lane):
    """Return what orders the edges of a token: by weight, then by lower and higher node.

    The last bit tells which of the two is not in the tree.
    """
    bits = weight.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    edge = (tl.minimum(token, lane) << _LANE_BITS) | tl.maximum(token, lane)
    tie = (edge * 2 + (lane > token).to(tl.int32)).to(tl.int64)
    return (ordered.to(tl.int64) << 32) | (tie ^ WORD)


@triton.jit(do_not_specialize=["per_frame"])
def prim_kernel(cosine, order, link, per_frame, block: tl.constexpr):
    """Order a frame's tokens as Prim's algorithm adds them, with the weight that adds each."""
    frame = tl.program_id(0)
    square = cosine + frame.to(tl.int64) * per_frame * per_frame
    first = frame * per_frame
    lane = tl.arange(0, block)
    inside = lane < per_frame
    outside_tree = inside & (lane != 0)
    # Each step reads a row that the step before chose, so all rows are loaded into the cache.
    touched = tl.zeros((), tl.float32)
    for start in range(0, per_frame, _NEAR_ROWS):
        near = start + tl.arange(0, _NEAR_ROWS)[:, None]
        at = square + near * per_frame + lane[None, :]
        rows = tl.load(at, mask=(near < per_frame) & inside[None, :], other=0.0)
        touched += tl.sum(tl.sum(rows, 1), 0)
    tl.store(order + first, first)
    # The sum is never this large; unused reads would be removed.
    tl.store(link + first, tl.where(touched > 1e30, 0.0, -float("inf")))
    row = tl.load(square + lane, mask=inside, other=_NO_EDGE)
    keys = tl.where(outside_tree, _link_key(row, 0, lane), NO_EDGE_KEY)
    for place in range(1, per_frame):
        top = tl.max(keys, 0)
        tie = ((top & WORD) ^ WORD).to(tl.int32)
        higher = (tie >> 1) & _LANE_MASK
        token = tl.where((tie & 1) == 1, higher, tie >> (_LANE_BITS + 1))
        row = tl.load(square + token * per_frame + lane, mask=inside, other=_NO_EDGE)
        outside_tree = outside_tree & (lane != token)
        link_keys = _link_key(row, token, lane)
        keys = tl.where(outside_tree, tl.maximum(keys, link_keys), NO_EDGE_KEY)
        ordered = (top >> 32).to(tl.int32)
        weight = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(order + first + place, first + token)
        tl.store(link + first + place, weight)
