"""Average linkage of a window's tokens: copies, nearest groups, and the rounds that join pairs.

A group is known by its lowest token's number in the window. The sums of distances between groups
are a matrix of the window; only rows and columns of groups are valid. Arithmetic is that of
``compression/linkage.py`` to the last bit: float32 products and sums, none of them fused. Kernels
must be launched with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from scissor_vllm.compression.linkage import COPY, INDEX_BITS

_COPY = tl.constexpr(COPY)
_INDEX_BITS = tl.constexpr(INDEX_BITS)
_INDEX_MASK = tl.constexpr((1 << INDEX_BITS) - 1)
_NO_KEY = tl.constexpr(0x7F80_0000 << INDEX_BITS)
"""The key of an infinite height."""


@triton.jit(do_not_specialize=["num_tokens", "size"])
def copies_kernel(
    distance, first_copy, num_tokens, size, at_once: tl.constexpr, block: tl.constexpr
):
    """Find the first copy of each token."""
    window = tl.program_id(1).to(tl.int64)
    first = window * size
    row = tl.program_id(0) * at_once + tl.arange(0, at_once)
    lane = tl.arange(0, block)
    has_row = (row < size) & (first + row < num_tokens)
    inside = (lane < size) & (first + lane < num_tokens)
    at = window * size * size + row[:, None] * size + lane[None, :]
    value = tl.load(distance + at, mask=has_row[:, None] & inside[None, :], other=2.0)
    lowest = tl.min(tl.where(value <= _COPY, lane[None, :], block), 1)
    tl.store(first_copy + first + row, lowest, mask=has_row)


@triton.jit(do_not_specialize=["num_tokens", "size", "steps"])
def join_copies_kernel(
    first_copy, parent, height, count, num_tokens, size, steps, block: tl.constexpr
):
    """Join a window's copies, and count them; counts were zero."""
    first = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, block)
    inside = (lane < size) & (first + lane < num_tokens)
    for _ in range(steps):
        label = tl.load(first_copy + first + lane, mask=inside, other=0)
        label = tl.load(first_copy + first + label, mask=inside, other=0)
        tl.debug_barrier()
        tl.store(first_copy + first + lane, label, mask=inside)
        tl.debug_barrier()
    label = tl.load(first_copy + first + lane, mask=inside, other=0)
    tl.store(parent + first + lane, first + label, mask=inside)
    tl.store(height + first + lane, tl.where(label < lane, 0.0, float("inf")), mask=inside)
    tl.atomic_add(count + first + label, tl.full((block,), 1, tl.int32), mask=inside, sem="relaxed")


@triton.jit
def _weight(single, together, row_count, column_count, weighs: tl.constexpr):
    """Return the factor that makes a height of a sum of distances, see ``PairWeights``."""
    factor = tl.load(single + row_count) * tl.load(single + column_count)
    if weighs:
        factor = factor * tl.load(together + row_count + column_count)
    return factor


@triton.jit
def _store_nearest(
    sums, count, nearest, least, others_least, single, together, groups, num_groups, row, has_row,
    size, weighs: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Find the nearest groups of the groups ``row`` among ``groups``.

    Pointers are to the window's data. Rows without ``has_row`` are not stored.
    """
    row_count = tl.load(count + row, mask=has_row, other=0)
    own_factor = tl.load(single + row_count)
    best = tl.full(row.shape, _NO_KEY, tl.int64)
    second = tl.full(row.shape, float("inf"), tl.float32)
    for start in range(0, num_groups, chunk):
        which = start + tl.arange(0, chunk)
        column = tl.load(groups + which, mask=which < num_groups, other=0)
        column_count = tl.load(count + column)
        is_pair = (
            has_row[:, None] & (which < num_groups)[None, :] & (column[None, :] != row[:, None])
        )
        height = tl.load(sums + row[:, None] * size + column[None, :], mask=is_pair, other=0.0)
        factor = own_factor[:, None] * tl.load(single + column_count)[None, :]
        if weighs:
            factor = factor * tl.load(together + row_count[:, None] + column_count[None, :])
        height = tl.where(is_pair, height * factor, float("inf"))
        key = height.to(tl.int32, bitcast=True).to(tl.int64) << _INDEX_BITS
        key = key | (column[None, :] ^ row[:, None]).to(tl.int64)
        here = tl.min(key, 1)
        second_here = tl.min(tl.where(key == here[:, None], float("inf"), height), 1)
        worse = tl.maximum(best, here) >> _INDEX_BITS
        second = tl.minimum(second, worse.to(tl.int32).to(tl.float32, bitcast=True))
        second = tl.minimum(second, second_here)
        best = tl.minimum(best, here)
    tl.store(nearest + row, (best & _INDEX_MASK).to(tl.int32) ^ row, mask=has_row)
    best_height = (best >> _INDEX_BITS).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(least + row, best_height, mask=has_row)
    tl.store(others_least + row, second, mask=has_row)


@triton.jit(do_not_specialize=["num_tokens", "size"])
def list_groups_kernel(count, groups, num_groups, num_tokens, size, block: tl.constexpr):
    """List a window's groups, and count them."""
    first = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, block)
    inside = (lane < size) & (first + lane < num_tokens)
    is_group = tl.load(count + first + lane, mask=inside, other=0) > 0
    place = tl.cumsum(is_group.to(tl.int32), 0) - 1
    tl.store(groups + first + place, lane, mask=is_group)
    tl.store(num_groups + tl.program_id(0), tl.sum(is_group.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_tokens", "size"])
def first_nearest_kernel(
    sums, count, nearest, least, others_least, single, together, groups, num_groups, num_tokens,
    size, weighs: tl.constexpr, at_once: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Make sums of distances by copies' counts, and find all groups' nearest."""
    window = tl.program_id(1).to(tl.int64)
    first = window * size
    sums += window * size * size
    groups += first
    count += first
    number = tl.load(num_groups + window)
    which = tl.program_id(0) * at_once + tl.arange(0, at_once)
    has_row = which < number
    row = tl.load(groups + which, mask=has_row, other=0)
    if number < tl.minimum(size, num_tokens - first):
        row_count = tl.load(count + row, mask=has_row, other=0)
        for start in range(0, number, chunk):
            turn = start + tl.arange(0, chunk)
            column = tl.load(groups + turn, mask=turn < number, other=0)
            pairs = row_count[:, None] * tl.load(count + column)[None, :]
            at = sums + row[:, None] * size + column[None, :]
            changed = has_row[:, None] & (turn < number)[None, :] & (pairs > 1)
            total = tl.load(at, mask=changed, other=0.0) * pairs.to(tl.float32)
            tl.store(at, total, mask=changed)
        tl.debug_barrier()
    _store_nearest(
        sums, count, nearest + first, least + first, others_least + first, single, together,
        groups, number, row, has_row, size, weighs, chunk,
    )  # fmt: skip


@triton.jit
def _add_rows(
    sums, nearest, groups, listed, num_left, number, size, at_once: tl.constexpr,
    chunk: tl.constexpr,
):  # fmt: skip
    """Add to the listed groups' rows those of their nearest, by the groups before this round."""
    for start in range(0, num_left, at_once):
        turn = start + tl.arange(0, at_once)
        has_row = turn < num_left
        row = tl.load(listed + turn, mask=has_row, other=0)
        partner = tl.load(nearest + row, mask=has_row, other=0)
        for begin in range(0, number, chunk):
            which = begin + tl.arange(0, chunk)
            column = tl.load(groups + which, mask=which < number, other=0)
            both = has_row[:, None] & (which < number)[None, :]
            at = sums + row[:, None] * size + column[None, :]
            beside = sums + partner[:, None] * size + column[None, :]
            total = tl.load(at, mask=both, other=0.0) + tl.load(beside, mask=both, other=0.0)
            tl.store(at, total, mask=both)


@triton.jit
def _add_columns(
    sums, count, nearest, groups, listed, is_mutual, num_left, number, size,
    at_once: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Add up columns of the listed groups' rows, and write the rows to their columns.

    Between two joined groups the sum comes from the lower one's row.
    """
    for start in range(0, num_left, at_once):
        turn = start + tl.arange(0, at_once)
        has_row = turn < num_left
        row = tl.load(listed + turn, mask=has_row, other=0)
        for begin in range(0, number, chunk):
            which = begin + tl.arange(0, chunk)
            column = tl.load(groups + which, mask=which < number, other=0)
            is_group = (which < number) & (tl.load(count + column) > 0)
            is_left = is_group & (tl.load(is_mutual + column) != 0)
            partner = tl.load(nearest + column, mask=is_left, other=0)
            both = has_row[:, None] & is_group[None, :]
            two = both & is_left[None, :]
            at = sums + row[:, None] * size
            total = tl.load(at + column[None, :], mask=both, other=0.0)
            total += tl.load(at + partner[None, :], mask=two, other=0.0)
            higher = column[None, :] > row[:, None]
            tl.store(at + column[None, :], total, mask=two & higher)
            mirrored = both & (column[None, :] != row[:, None])
            mirrored = mirrored & (higher | (is_left == 0)[None, :])
            tl.store(sums + column[None, :] * size + row[:, None], total, mask=mirrored)


@triton.jit
def _add_pairs(
    sums, count, nearest, groups, listed, is_mutual, num_left, number, size,
    at_once: tl.constexpr, chunk: tl.constexpr, few_rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Add up the sums of distances of paired groups: ``few`` whole rows at once, or tiles."""
    if num_left <= few_rows:
        _add_rows(sums, nearest, groups, listed, num_left, number, size, few_rows, block)
    else:
        _add_rows(sums, nearest, groups, listed, num_left, number, size, at_once, chunk)
    tl.debug_barrier()
    if num_left <= few_rows:
        _add_columns(
            sums, count, nearest, groups, listed, is_mutual, num_left, number, size, few_rows, block
        )
    else:
        _add_columns(
            sums, count, nearest, groups, listed, is_mutual, num_left, number, size, at_once, chunk
        )
    tl.debug_barrier()


@triton.jit
def _renew_nearest(
    sums, count, nearest, least, others_least, single, together, groups, number, listed, num_stale,
    size, weighs: tl.constexpr, at_once: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Find the nearest of the listed groups."""
    for start in range(0, num_stale, at_once):
        turn = start + tl.arange(0, at_once)
        row = tl.load(listed + turn, mask=turn < num_stale, other=0)
        _store_nearest(
            sums, count, nearest, least, others_least, single, together, groups, number, row,
            turn < num_stale, size, weighs, chunk,
        )  # fmt: skip


@triton.jit
def _pair_groups(
    count, nearest, least, parent, height, listed, is_mutual, first, lane, inside,
    block: tl.constexpr,
):  # fmt: skip
    """Pair groups that are each other's nearest: their parents, heights and counts.

    Return counts and nearest groups before the round, the lower groups of pairs, the groups that
    remain, and the number of pairs. The lower groups are listed.
    """
    num_members = tl.load(count + lane, mask=inside, other=0)
    is_group = num_members > 0
    near = tl.load(nearest + lane, mask=is_group, other=0)
    back = tl.load(nearest + near, mask=is_group, other=-1)
    mutual = is_group & (back == lane)
    left = mutual & (lane < near)
    num_left = tl.sum(left.to(tl.int32), 0)
    tl.store(listed + tl.cumsum(left.to(tl.int32), 0) - 1, lane, mask=left)
    tl.store(is_mutual + lane, mutual.to(tl.int32), mask=inside)
    tl.store(parent + first + near, first + lane, mask=left)
    tl.store(height + near, tl.load(least + lane, mask=left, other=0.0), mask=left)
    joined = num_members + tl.load(count + near, mask=left, other=0)
    tl.debug_barrier()
    tl.store(count + lane, joined, mask=left)
    tl.store(count + near, tl.zeros((block,), tl.int32), mask=left)
    return num_members, near, left, is_group & ((mutual == 0) | left), num_left


@triton.jit
def _follow_nearest(
    sums, count, nearest, least, others_least, single, together, groups, listed, is_mutual,
    num_members, near, left, remains, num_left, lane, size, weighs: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """List the groups that remain, and those whose nearest must be found again; return how many.

    A group whose nearest was joined keeps the joined group, if all others stay further.
    """
    follows = remains & (left == 0)
    follows = follows & (tl.load(is_mutual + near, mask=follows, other=0) != 0)
    near_left = follows & (tl.load(count + near, mask=follows, other=0) == 0)
    near = tl.where(near_left, tl.load(nearest + near, mask=near_left, other=0), near)
    total = tl.load(sums + lane * size + near, mask=follows, other=0.0)
    near_count = tl.load(count + near, mask=follows, other=0)
    total = total * _weight(single, together, num_members, near_count, weighs)
    total = tl.where(follows, total, tl.load(least + lane, mask=remains, other=0.0))
    bound = tl.load(others_least + lane, mask=remains, other=0.0)
    # A round without a pair: rounding let a height fall below the least. All are found again.
    again = tl.where(num_left == 0, 1, 0)
    stale = remains & (left | (total >= bound) | (again + tl.zeros((block,), tl.int32) > 0))
    num_stale = tl.sum(stale.to(tl.int32), 0)
    tl.debug_barrier()
    tl.store(nearest + lane, near, mask=follows)
    tl.store(least + lane, total, mask=follows)
    tl.store(listed + tl.cumsum(stale.to(tl.int32), 0) - 1, lane, mask=stale)
    tl.store(groups + tl.cumsum(remains.to(tl.int32), 0) - 1, lane, mask=remains)
    return num_stale


@triton.jit(do_not_specialize=["num_tokens", "size"])
def join_groups_kernel(
    sums, count, nearest, least, others_least, parent, height, groups, listed, is_mutual,
    num_groups, single, together, num_tokens, size,
    weighs: tl.constexpr, at_once: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Join a window's groups until one is left, in one program.

    A round joins all pairs of groups that are each other's nearest. Then it finds the nearest of
    the new groups, and of those whose nearest was joined and may no longer be the nearest. Where
    few groups change, the program reads whole rows at once: rounds that join one pair are common.
    """
    few_rows: tl.constexpr = at_once * chunk // block
    window = tl.program_id(0).to(tl.int64)
    first = window * size
    sums += window * size * size
    count += first
    nearest += first
    least += first
    others_least += first
    height += first
    groups += first
    listed += first
    is_mutual += first
    lane = tl.arange(0, block)
    inside = lane < tl.minimum(size, num_tokens - first).to(tl.int32)
    number = tl.load(num_groups + window)
    while number > 1:
        num_members, near, left, remains, num_left = _pair_groups(
            count, nearest, least, parent, height, listed, is_mutual, first, lane, inside, block
        )
        _add_pairs(
            sums, count, nearest, groups, listed, is_mutual, num_left, number, size,
            at_once, chunk, few_rows, block,
        )  # fmt: skip
        num_stale = _follow_nearest(
            sums, count, nearest, least, others_least, single, together, groups, listed, is_mutual,
            num_members, near, left, remains, num_left, lane, size, weighs, block,
        )  # fmt: skip
        number -= num_left
        tl.debug_barrier()
        if num_stale <= few_rows:
            _renew_nearest(
                sums, count, nearest, least, others_least, single, together, groups, number,
                listed, num_stale, size, weighs, few_rows, block,
            )  # fmt: skip
        else:
            _renew_nearest(
                sums, count, nearest, least, others_least, single, together, groups, number,
                listed, num_stale, size, weighs, at_once, chunk,
            )  # fmt: skip
        tl.debug_barrier()
