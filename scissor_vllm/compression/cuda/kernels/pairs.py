"""The passes over all pairs of runs: lengths of runs, then the cosines between them.

A run is a spatial component at a threshold: neighbours in Prim's order. Its *node* is the position
of its last token. The cosine of two runs' means needs only the sum of their tokens' dot products.
"""

import triton
import triton.language as tl

from scissor_vllm.compression.cuda.kernels.frames import snapped
from scissor_vllm.compression.cuda.kernels.layout import (
    AT_APART,
    AT_BLOCK_ROWS,
    AT_FRAMES,
    AT_PER_FRAME,
    AT_TOKENS,
    AT_WINDOW,
    NO_EDGE_KEY,
    WEIGHT_UNIT,
    edge_key,
    run_ends,
)
from scissor_vllm.compression.cuda.kernels.union_find import union

UNION, STRONGEST, BETWEEN, DEGREE = range(4)
"""What ``pairs_kernel`` does with cosines: join runs above the threshold, raise each component's
strongest outgoing edge, raise the weights between components, or count neighbours."""

_UNION, _STRONGEST = tl.constexpr(UNION), tl.constexpr(STRONGEST)
_BETWEEN, _DEGREE = tl.constexpr(BETWEEN), tl.constexpr(DEGREE)
_MOST = tl.constexpr((1 << 31) - 1)


@triton.jit
def runs_kernel(
    product,
    order,
    link,
    unit,
    parent,
    run_of,
    run_size,
    tau_at,
    go,
    shape,
    block: tl.constexpr,
    rows: tl.constexpr,
):
    """Find the runs of all frames: node and size, and one over the length of their sum.

    Some rows of a frame are an item of work; each program takes every so many-th item.
    """
    if tl.load(go) != 0:
        tau = tl.load(tau_at)
        per_frame = tl.load(shape + AT_PER_FRAME)
        num_chunks = (per_frame + rows - 1) // rows
        num_items = tl.load(shape + AT_FRAMES) * num_chunks
        for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
            frame = item // num_chunks
            first = frame * per_frame
            square = product + frame.to(tl.int64) * per_frame * per_frame
            lane = tl.arange(0, block)
            inside = lane < per_frame
            column = square + tl.load(order + first + lane, mask=inside, other=0) - first
            place = item % num_chunks * rows
            last = tl.minimum(place + rows, per_frame)
            node_at = place + tl.arange(0, rows)
            tl.store(parent + first + node_at, first + node_at, mask=node_at < per_frame)
            while tl.load(link + first + place, mask=place < last, other=-float("inf")) > tau:
                place += 1
            while place < last:
                begin = place
                row = (tl.load(order + first + place) - first) * per_frame
                total = tl.load(column + row, mask=inside, other=0.0)
                place += 1
                while (
                    tl.load(link + first + place, mask=place < per_frame, other=-float("inf")) > tau
                ):
                    row = (tl.load(order + first + place) - first) * per_frame
                    total += tl.load(column + row, mask=inside, other=0.0)
                    place += 1
                member = (lane >= begin) & (lane < place)
                square_sum = tl.sum(tl.where(member, total, 0.0), 0)
                node = first + place - 1
                tl.store(unit + node, tl.where(square_sum > 0, 1 / tl.sqrt(square_sum), 0.0))
                tl.store(run_size + node, place - begin)
                tl.store(run_of + first + lane, tl.zeros_like(lane) + node, mask=member)


@triton.jit
def _add_in_run(value, starts, next_value, next_starts):
    return tl.where(next_starts != 0, next_value, value + next_value), starts | next_starts


@triton.jit
def _product_row(row, num_tokens, block_rows, base, is_apart):
    """Return where a row's product with column 0 is, which need not exist, and the row's length."""
    block = (row // block_rows).to(tl.int64)
    before = block * block_rows
    in_window = tl.minimum(num_tokens - before, block_rows)
    length = tl.where(is_apart, in_window, num_tokens - before)
    triangle = before * num_tokens - before * block_rows * (block - 1) // 2
    offset = tl.where(is_apart, before * block_rows, triangle - base)
    return offset + (row - before) * length - before, length


@triton.jit
def _columns_begin(block: tl.constexpr, use: tl.constexpr):
    """Return the columns' state before the first row: see ``_columns_after``."""
    if use == _STRONGEST:
        columns = tl.full((block,), NO_EDGE_KEY, tl.int64)
    elif use == _UNION:
        columns = tl.full((block,), -1, tl.int32)
    else:
        columns = tl.zeros((block,), tl.int32)
    return columns


@triton.jit
def _columns_after(
    columns, value, is_pair, node, column, column_label, column_rank, parent, label, rank, best,
    degree, num_parts, tau, block: tl.constexpr, use: tl.constexpr,
):  # fmt: skip
    """Use the cosines ``value`` of a row's run with the columns' runs; return the columns' state.

    The state is each column's strongest edge, its node whose union waits, or its neighbours.
    """
    if use == _STRONGEST:
        row_label = tl.load(label + node)
        row_rank = tl.load(rank + node).to(tl.int64)
        lower = tl.minimum(row_rank, column_rank)
        higher = tl.maximum(row_rank, column_rank)
        key = edge_key(tl.floor(value * WEIGHT_UNIT), lower, higher)
        key = tl.where(is_pair & (column_label != row_label), key, NO_EDGE_KEY)
        top = tl.max(key, 0)
        if top > tl.load(best + row_label):
            tl.atomic_max(best + row_label, top, sem="relaxed")
        columns = tl.maximum(columns, key)
    elif use == _BETWEEN:
        row_label = tl.load(label + node)
        weight = tl.floor(value * WEIGHT_UNIT).to(tl.int32)
        known = is_pair & (column_label != row_label)
        known = known & (tl.maximum(column_label, row_label) < num_parts)
        cell = best + row_label.to(tl.int64) * num_parts + column_label
        before = tl.load(cell, mask=known, other=_MOST)
        tl.atomic_max(cell, weight, mask=known & (weight > before), sem="relaxed")
    elif use == _DEGREE:
        above = is_pair & (value > tau)
        num_above = tl.sum(above.to(tl.int32), 0)
        if num_above > 0:
            tl.atomic_add(degree + node, num_above, sem="relaxed")
            columns += above.to(tl.int32)
    else:
        # A union is slow: one for each column waits until a second one comes.
        above = is_pair & (value > tau)
        if tl.max((above & (columns >= 0)).to(tl.int32), 0) > 0:
            union(parent, tl.maximum(columns, 0), column, columns >= 0)
            columns = tl.full((block,), -1, tl.int32)
        columns = tl.where(above, node, columns)
    return columns


@triton.jit
def _columns_end(columns, column, column_label, ends, parent, best, degree, use: tl.constexpr):
    """Write the columns' state after the last row."""
    if use == _STRONGEST:
        before = tl.load(best + column_label, mask=ends, other=0)
        tl.atomic_max(best + column_label, columns, mask=ends & (columns > before), sem="relaxed")
    if use == _DEGREE:
        tl.atomic_add(degree + column, columns, mask=columns > 0, sem="relaxed")
    if use == _UNION:
        union(parent, tl.maximum(columns, 0), column, columns >= 0)


@triton.jit
def _frames_of(pair, first_frame, window):
    """Return the frame of the rows and the frame of the columns of a pair of frames."""
    row_frame = (first_frame + pair // window).to(tl.int32)
    return row_frame, row_frame // window * window + (pair % window).to(tl.int32)


@triton.jit
def _visit_pairs(
    item, store, link, unit, parent, label, rank, best, degree, tau, shape, base, first_frame,
    num_parts_at, block: tl.constexpr, rows: tl.constexpr, use: tl.constexpr,
    aligned: tl.constexpr,
):  # fmt: skip
    """Visit the cosines of runs that begin in some rows of a frame with those of another frame.

    The other frame is of the same window and not before it.
    """
    num_tokens = tl.load(shape + AT_TOKENS)
    per_frame = tl.load(shape + AT_PER_FRAME)
    window = tl.load(shape + AT_WINDOW)
    block_rows = tl.load(shape + AT_BLOCK_ROWS)
    is_apart = tl.load(shape + AT_APART) != 0
    num_chunks = (per_frame + rows - 1) // rows
    row_frame, column_frame = _frames_of(item // num_chunks, first_frame, window)
    if (column_frame >= row_frame) & (column_frame * per_frame < num_tokens):
        first_row = row_frame * per_frame
        lane = tl.arange(0, block)
        inside = lane < (per_frame // 4 * 4 if aligned else per_frame)
        column = column_frame * per_frame + lane
        starts = tl.load(link + column, mask=inside, other=-float("inf")) <= tau
        ends = inside & run_ends(link, column, num_tokens, tau)
        has_runs = tl.sum(ends.to(tl.int32), 0) < per_frame
        column_unit = tl.load(unit + column, mask=ends, other=0.0)
        num_parts = tl.load(num_parts_at)
        column_label = tl.load(label + column, mask=ends, other=-1)
        column_rank = tl.load(rank + column, mask=ends, other=0).to(tl.int64)
        columns = _columns_begin(block, use)
        place = (item % num_chunks).to(tl.int32) * rows
        last = tl.minimum(place + rows, per_frame)
        while tl.load(link + first_row + place, mask=place < last, other=-float("inf")) > tau:
            place += 1
        offset, stride = _product_row(first_row + place, num_tokens, block_rows, base, is_apart)
        offset += column_frame * per_frame
        if aligned:
            # So that four products are read at once.
            offset = offset // 4 * 4
            stride = stride // 4 * 4
        row = store + offset + lane
        total = tl.zeros((block,), tl.float32)
        # Rows are read ahead of their use; the frame's last row stands in for those after it.
        reads = inside & ((tl.zeros_like(lane) + place) < last)
        current = tl.load(row, mask=reads, other=0.0)
        row += tl.where(place + 1 < per_frame, stride, 0)
        following = tl.load(row, mask=reads, other=0.0)
        going = place < last
        while going:
            row += tl.where(place + 2 < per_frame, stride, 0)
            after = tl.load(row, mask=inside, other=0.0)
            total += current
            current = following
            following = after
            node = first_row + place
            place += 1
            next_link = tl.load(
                link + first_row + place, mask=place < per_frame, other=-float("inf")
            )
            if next_link <= tau:
                if has_runs:
                    total, _ = tl.associative_scan((total, starts.to(tl.int32)), 0, _add_in_run)
                value = snapped(total * (tl.load(unit + node) * column_unit))
                columns = _columns_after(
                    columns, value, ends & (column > node), node, column, column_label,
                    column_rank, parent, label, rank, best, degree, num_parts, tau, block, use,
                )  # fmt: skip
                total = tl.zeros((block,), tl.float32)
                going = place < last
        _columns_end(columns, column, column_label, ends, parent, best, degree, use)


@triton.jit(do_not_specialize=["base", "first_frame", "num_frames"])
def pairs_kernel(
    store,
    link,
    unit,
    parent,
    label,
    rank,
    best,
    degree,
    tau_at,
    go,
    shape,
    base,
    first_frame,
    num_frames,
    num_parts_at,
    block: tl.constexpr,
    rows: tl.constexpr,
    use: tl.constexpr,
    aligned: tl.constexpr,
):
    """Visit the cosines of all pairs of runs of a block of products.

    Some rows of a frame with one other frame are an item of work; each program takes every so
    many-th item. The block's products begin with ``first_frame``; ``num_frames`` 0 means all.
    """
    if tl.load(go) != 0:
        per_frame = tl.load(shape + AT_PER_FRAME)
        num_rows = tl.where(num_frames == 0, tl.load(shape + AT_FRAMES), num_frames)
        num_chunks = (per_frame + rows - 1) // rows
        num_items = num_rows.to(tl.int64) * tl.load(shape + AT_WINDOW) * num_chunks
        tau = tl.load(tau_at)
        for item in range(tl.program_id(0).to(tl.int64), num_items, tl.num_programs(0)):
            _visit_pairs(
                item,
                store,
                link,
                unit,
                parent,
                label,
                rank,
                best,
                degree,
                tau,
                shape,
                base,
                first_frame,
                num_parts_at,
                block,
                rows,
                use,
                aligned,
            )
