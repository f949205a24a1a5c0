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


@triton.jit(do_not_specialize=["num_places"])
def place_rotated_row(
    projected,
    row_of_place,
    moves,
    move_of_place,
    place_of_row,
    cosines,
    sines,
    keys_and_values,
    queries,
    stride,
    num_places,
    heads: tl.constexpr,
    half: tl.constexpr,
    heads_block: tl.constexpr,
    half_block: tl.constexpr,
    block: tl.constexpr,
):
    """Store the rotated key and the value of a place, or the rotated query of a row behind them.

    A row holds the query, the key and the value. The key is rounded before it is rotated, as it is
    where both are separate.
    """
    program = tl.program_id(0).to(tl.int64)
    width = 2 * heads * half
    head, pair = tl.arange(0, heads_block)[:, None], tl.arange(0, half_block)[None, :]
    within = (head < heads) & (pair < half)
    low = head * 2 * half + pair
    if program < num_places:
        row = tl.load(row_of_place + program).to(tl.int64)
        move = tl.load(move_of_place + program).to(tl.int64)
        key = projected + row * stride + width
        first = tl.load(key + low, mask=within, other=0.0)
        second = tl.load(key + low + half, mask=within, other=0.0)
        columns = tl.arange(0, block)
        inside = columns < width
        value = tl.load(key + width + columns, mask=inside, other=0.0)
        if move >= 0:
            added = moves + move * 2 * width
            change = tl.load(added + low, mask=within, other=0.0).to(tl.float32)
            first = (first.to(tl.float32) + change).to(projected.dtype.element_ty)
            change = tl.load(added + low + half, mask=within, other=0.0).to(tl.float32)
            second = (second.to(tl.float32) + change).to(projected.dtype.element_ty)
            moved = tl.load(added + width + columns, mask=inside, other=0.0).to(tl.float32)
            value = (value.to(tl.float32) + moved).to(projected.dtype.element_ty)
        place = program
        stored = keys_and_values + program * 2 * width
        tl.store(stored + width + columns, value, mask=inside)
    else:
        row = program - num_places
        place = tl.load(place_of_row + row).to(tl.int64)
        first = tl.load(projected + row * stride + low, mask=within, other=0.0)
        second = tl.load(projected + row * stride + low + half, mask=within, other=0.0)
        stored = queries + row * width
    angle = place * half + pair
    cosine = tl.load(cosines + angle, mask=pair < half, other=0.0).to(tl.float32)
    sine = tl.load(sines + angle, mask=pair < half, other=0.0).to(tl.float32)
    first, second = first.to(tl.float32), second.to(tl.float32)
    tl.store(
        stored + low, (first * cosine - second * sine).to(projected.dtype.element_ty), mask=within
    )
    tl.store(
        stored + low + half,
        (second * cosine + first * sine).to(projected.dtype.element_ty),
        mask=within,
    )
