"""Triton kernels of ``row_placement.py``. Each program handles one row."""

import triton
import triton.language as tl


# A kernel for each remainder of a number by 16 would be compiled while serving.
@triton.jit(do_not_specialize=["num_pairs"])
def subtract_rows(
    rows, pairs, differences, stride, num_pairs, width: tl.constexpr, block: tl.constexpr
):
    """Store the difference of a pair of rows."""
    pair = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    row = tl.load(pairs + pair).to(tl.int64)
    other = tl.load(pairs + num_pairs + pair).to(tl.int64)
    values = tl.load(rows + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    values -= tl.load(rows + other * stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(differences + pair * width + columns, values.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def place_row(
    rows,
    row_of_place,
    moves,
    move_of_place,
    at_places,
    stride,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Store the row of a place, plus its move if there is one."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    row = tl.load(row_of_place + place).to(tl.int64)
    values = tl.load(rows + row * stride + columns, mask=inside, other=0.0)
    move = tl.load(move_of_place + place).to(tl.int64)
    if move >= 0:
        added = tl.load(moves + move * width + columns, mask=inside, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) + added).to(rows.dtype.element_ty)
    tl.store(at_places + place * width + columns, values, mask=inside)
