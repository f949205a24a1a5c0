"""Distances of the tokens of a window, the same to the last bit on any device.

Unit vectors are rounded to integers, so their products are exact in any order of summation. Kernels
must be launched with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from scissor_vllm.compression.linkage import DISTANCE_BITS, UNIT_BITS

_UNIT = tl.constexpr(2.0**UNIT_BITS)
_ONE = tl.constexpr(2.0**DISTANCE_BITS)
_GRID = tl.constexpr(2.0**-DISTANCE_BITS)
_ROUND_64 = tl.constexpr(1.5 * 2.0**52)
"""Adding and subtracting it rounds a float64 to an integer, halves to even."""
_ROUND_32 = tl.constexpr(1.5 * 2.0**23)
_LOW = tl.constexpr(128.0)
"""The lower seven bits of a unit's integer; the upper eleven fit float16 too."""


@triton.jit(do_not_specialize=["width"])
def units_kernel(rows, high, low, scale, width, block: tl.constexpr):
    """Round a row's unit vector to integers, in two parts that are exact in float16.

    A row that is zero, or not finite, becomes zero. ``scale`` is one over the integers' length.
    """
    row = tl.program_id(0).to(tl.int64)
    square = tl.zeros((block,), tl.float64)
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        value = tl.load(rows + row * width + column, mask=column < width, other=0.0)
        value = value.to(tl.float64)
        square += value * value
    norm = tl.sqrt(tl.sum(square, 0))
    usable = (norm > 0) & (norm < float("inf"))
    factor = _UNIT / tl.where(usable, norm, 1.0)
    square = tl.zeros((block,), tl.float64)
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        inside = column < width
        value = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float64)
        value = tl.where(usable, value, 0.0)
        unit = (value * factor + _ROUND_64) - _ROUND_64
        square += unit * unit
        unit = unit.to(tl.float32)
        upper = (unit * (1 / _LOW) + _ROUND_32) - _ROUND_32
        tl.store(high + row * width + column, upper.to(tl.float16), mask=inside)
        tl.store(low + row * width + column, (unit - upper * _LOW).to(tl.float16), mask=inside)
    length = tl.sqrt(tl.sum(square, 0))
    tl.store(scale + row, tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0))


@triton.jit(do_not_specialize=["num_tokens", "size"])
def distances_kernel(
    high, low, scale, distance, num_tokens, size, width, tile: tl.constexpr, depth: tl.constexpr
):
    """Compute a tile of a window's distances, and its mirror.

    Of up to 4096 columns all sums of products are integers below 2^24: exact in any order.
    """
    if tl.program_id(1) >= tl.program_id(0):
        first = tl.program_id(2).to(tl.int64) * size
        row = tl.program_id(0) * tile + tl.arange(0, tile)
        column = tl.program_id(1) * tile + tl.arange(0, tile)
        has_row = (row < size) & (first + row < num_tokens)
        has_column = (column < size) & (first + column < num_tokens)
        row_at = (first + row)[:, None] * width
        column_at = (first + column)[None, :] * width
        upper = tl.zeros((tile, tile), tl.float32)
        mixed = tl.zeros((tile, tile), tl.float32)
        lower = tl.zeros((tile, tile), tl.float32)
        for start in range(0, width, depth):
            at = start + tl.arange(0, depth)
            by_row = has_row[:, None] & (at < width)[None, :]
            by_column = (at < width)[:, None] & has_column[None, :]
            row_high = tl.load(high + row_at + at[None, :], mask=by_row, other=0.0)
            row_low = tl.load(low + row_at + at[None, :], mask=by_row, other=0.0)
            column_high = tl.load(high + column_at + at[:, None], mask=by_column, other=0.0)
            column_low = tl.load(low + column_at + at[:, None], mask=by_column, other=0.0)
            upper = tl.dot(row_high, column_high, upper)
            mixed = tl.dot(row_high, column_low, mixed)
            mixed = tl.dot(row_low, column_high, mixed)
            lower = tl.dot(row_low, column_low, lower)
        product = upper.to(tl.float64) * (_LOW * _LOW) + mixed.to(tl.float64) * _LOW
        product = product + lower.to(tl.float64)
        row_scale = tl.load(scale + first + row, mask=has_row, other=0.0)
        column_scale = tl.load(scale + first + column, mask=has_column, other=0.0)
        cosine = product * (row_scale[:, None] * column_scale[None, :])
        grid = _ONE - ((cosine * _ONE + _ROUND_64) - _ROUND_64)
        value = (tl.where(grid > 0, grid, 0.0) * _GRID).to(tl.float32)
        zeros = (row_scale == 0)[:, None] & (column_scale == 0)[None, :]
        same = row[:, None] == column[None, :]
        value = tl.where(zeros | same, 0.0, value)
        both = has_row[:, None] & has_column[None, :]
        base = distance + tl.program_id(2).to(tl.int64) * size * size
        tl.store(base + row[:, None] * size + column[None, :], value, mask=both)
        tl.store(base + column[None, :] * size + row[:, None], value, mask=both)
