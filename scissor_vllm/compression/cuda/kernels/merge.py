"""The last step: means of parts, the nearest of them for every token, and the merged rows."""

import triton
import triton.language as tl

from scissor_vllm.compression.similarity import RESOLUTION

_RESOLUTION = tl.constexpr(RESOLUTION)


@triton.jit
def _sum_of(
    rows,
    order,
    weight,
    first,
    last,
    column,
    inside,
    width,
    merges: tl.constexpr,
    at_once: tl.constexpr,
):
    """Return the sum of some rows' columns, weighted unless it is for a merge."""
    total = tl.zeros_like(column).to(tl.float64)
    for start in range(first, last, at_once):
        member = start + tl.arange(0, at_once)
        token = tl.load(order + member, mask=member < last, other=0).to(tl.int64)
        at = rows + token[:, None] * width + column[None, :]
        value = tl.load(at, mask=(member < last)[:, None] & inside[None, :], other=0.0)
        value = value.to(tl.float64)
        if not merges:
            value = value * tl.load(weight + token, mask=member < last, other=0.0)[:, None]
        total += tl.sum(value, 0)
    return total


@triton.jit(do_not_specialize=["num_tokens", "width", "num_out"])
def sums_kernel(
    rows,
    order,
    begin,
    weight,
    kept,
    out,
    low_at,
    num_tokens,
    width,
    num_out,
    merges: tl.constexpr,
    halves: tl.constexpr,
    few: tl.constexpr,
    members: tl.constexpr,
    block: tl.constexpr,
):
    """Add up the rows of a part in float64, so many members at once, or a few where there are few.

    For the merge these are the tokens that went to the part, and its representative counts as one
    more. Otherwise the mean is the representative; what is left of a mean in 16 bits comes after
    all means. A representative without tokens, which a defect alone can leave, is a token of the
    video, never zeros.
    """
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    first = tl.load(begin + part)
    last = tl.load(begin + part + 1)
    if last - first <= members:
        total = _sum_of(rows, order, weight, first, last, column, inside, width, merges, few)
    else:
        total = _sum_of(rows, order, weight, first, last, column, inside, width, merges, members)
    at = part.to(tl.int64) * width + column
    if merges:
        representative = tl.load(kept + at, mask=inside, other=0.0).to(tl.float64)
        mean = (total + representative) / (last - first + 1).to(tl.float64)
        tl.store(out + at, mean.to(tl.float32).to(out.dtype.element_ty), mask=inside)
    else:
        if last == first:
            stand_in = part.to(tl.int64) * num_tokens // num_parts
            token = tl.load(rows + stand_in * width + column, mask=inside, other=0.0)
            total = token.to(tl.float64)
        mean = total.to(tl.float32)
        tl.store(kept + at, mean, mask=inside)
        if halves:
            # Two numbers of 16 bits hold 16 of the 24 digits; a single token needs but one.
            high = mean.to(out.dtype.element_ty)
            tl.store(out + at, high, mask=inside)
            place = tl.load(low_at + part).to(tl.int64)
            rest = (mean - high.to(tl.float32)).to(out.dtype.element_ty)
            at = place * width + column
            low = out + num_parts.to(tl.int64) * width
            size = (num_out - num_parts).to(tl.int64) * width
            tl.store(low + at, rest, mask=inside & (at >= 0) & (at < size))


@triton.jit(do_not_specialize=["first_row", "num_tokens", "num_kept", "stride", "window_tokens"])
def nearest_kernel(
    product,
    kept_length,
    low_at,
    row_length,
    nearest,
    number_of_token,
    first_row,
    num_tokens,
    num_kept,
    stride,
    window_tokens,
    halves: tl.constexpr,
    block: tl.constexpr,
):
    """Find each row's first representative whose cosine is within the resolution of the highest.

    Only among those of its window: they are numbered in the order of their lead tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    window = (first_row + row) // window_tokens * window_tokens
    window_end = tl.minimum(window + window_tokens, num_tokens)
    begin = tl.load(number_of_token + window - 1, mask=window > 0, other=0).to(tl.int32)
    end = tl.load(number_of_token + window_end - 1).to(tl.int32)
    # Where flags say that the search failed there may be more parts, or none in a window.
    end = tl.maximum(tl.minimum(end, num_kept), 1)
    length = tl.load(row_length + first_row + row)
    row_unit = tl.where(length > 0, 1 / length, 0.0)
    at = product + row * stride
    top = tl.full((), -2.0, tl.float32)
    first = end
    for turn in tl.static_range(2):
        limit = top - _RESOLUTION
        for start in range(begin, end, block):
            column = start + tl.arange(0, block)
            inside = column < end
            value = tl.load(at + column, mask=inside, other=0.0)
            if halves:
                place = tl.load(low_at + column, mask=inside, other=-1)
                has_low = (place >= 0) & (place < stride - num_kept)
                value += tl.load(at + num_kept + place, mask=has_low, other=0.0)
            kept = tl.load(kept_length + column, mask=inside, other=1.0)
            unit = tl.where(kept > 0, 1 / kept, 0.0)
            cosine = tl.where(inside, value * (row_unit * unit), -2.0)
            if turn == 0:
                top = tl.maximum(top, tl.max(cosine, 0))
            else:
                near = tl.where(inside & (cosine >= limit), column, end)
                first = tl.minimum(first, tl.min(near, 0))
    tl.store(nearest + first_row + row, tl.minimum(first, end - 1).to(tl.int64))
