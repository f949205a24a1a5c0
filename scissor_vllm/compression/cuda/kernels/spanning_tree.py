"""The maximum spanning tree of components by Boruvka's rounds, and its cut at K components.

Each round hooks every component to the one at the other end of its strongest edge. The weights
between any two components are held as a dense matrix where it fits; elsewhere each round goes
through all pairs of runs.
"""

import triton
import triton.language as tl

from scissor_vllm.compression.cuda.kernels.layout import (
    AT_NUM_COMPONENTS,
    AT_RETAINED,
    AT_TOKENS,
    NO_EDGE_KEY,
    NO_EDGE_WEIGHT,
    edge_key,
    nodes_of,
    run_ends,
)
from scissor_vllm.compression.cuda.kernels.union_find import find_root, union


@triton.jit(do_not_specialize=["size"])
def number_parts_kernel(
    label, link, tau_at, number, node_of, part, num_parts_at, shape, size, block: tl.constexpr
):
    """Number the components by their roots, in one program: of each node, and the root of each.

    Also write how many of them fit into ``size``.
    """
    num_tokens = tl.load(shape + AT_TOKENS)
    tau = tl.load(tau_at)
    count = tl.zeros((), tl.int32)
    for start in range(0, num_tokens, block):
        node = start + tl.arange(0, block)
        inside = node < num_tokens
        is_root = inside & (tl.load(label + node, mask=inside, other=-1) == node)
        is_root = is_root & run_ends(link, node, num_tokens, tau)
        place = count + tl.cumsum(is_root.to(tl.int32), 0) - 1
        tl.store(number + node, place, mask=is_root)
        tl.store(node_of + place, node, mask=is_root & (place < size))
        count += tl.sum(is_root.to(tl.int32), 0)
    tl.store(num_parts_at, tl.minimum(count, size))
    tl.debug_barrier()
    for start in range(0, num_tokens, block):
        node = start + tl.arange(0, block)
        inside = node < num_tokens
        root = tl.load(label + node, mask=inside, other=0)
        tl.store(part + node, tl.load(number + root, mask=inside, other=0), mask=inside)


@triton.jit
def no_weights_kernel(weights, num_parts_at, block: tl.constexpr):
    """Empty the weights between any two parts."""
    num = tl.load(num_parts_at).to(tl.int64)
    cell = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    tl.store(weights + cell, tl.full((block,), NO_EDGE_WEIGHT, tl.int32), mask=cell < num * num)


@triton.jit
def mirror_weights_kernel(weights, num_parts_at, tile: tl.constexpr):
    """Give the weight of part i to part j and that of j to i the larger of both."""
    num = tl.load(num_parts_at)
    top = tl.program_id(0) * tile
    left = tl.program_id(1) * tile
    if (left >= top) & (left < num):
        row = top + tl.arange(0, tile)
        column = left + tl.arange(0, tile)
        above = weights + row[:, None].to(tl.int64) * num + column[None, :]
        below = weights + column[:, None].to(tl.int64) * num + row[None, :]
        in_above = (row[:, None] < num) & (column[None, :] < num)
        in_below = (column[:, None] < num) & (row[None, :] < num)
        upper = tl.load(above, mask=in_above, other=NO_EDGE_WEIGHT)
        lower = tl.load(below, mask=in_below, other=NO_EDGE_WEIGHT)
        larger = tl.maximum(upper, tl.trans(lower))
        tl.store(above, larger, mask=in_above)
        tl.store(below, tl.trans(larger), mask=in_below)


@triton.jit
def grow_kernel(
    weights, label, up, best, kept, num_parts_at, go, next_go, ticket, block: tl.constexpr
):
    """Do one round with the weights between any two components.

    Each program finds the strongest edge of one component; the last program to end hooks them all.
    """
    row = tl.program_id(0)
    num = tl.load(num_parts_at)
    if (tl.load(go) != 0) & (row < num):
        row_label = tl.load(label + row)
        top = tl.full((), NO_EDGE_KEY, tl.int64)
        for start in range(0, num, block):
            column = start + tl.arange(0, block)
            inside = column < num
            at = weights + row.to(tl.int64) * num + column
            weight = tl.load(at, mask=inside, other=NO_EDGE_WEIGHT)
            column_label = tl.load(label + column, mask=inside, other=row_label)
            lower = tl.minimum(row, column).to(tl.int64)
            higher = tl.maximum(row, column).to(tl.int64)
            key = edge_key(weight, lower, higher)
            known = inside & (column_label != row_label) & (weight != NO_EDGE_WEIGHT)
            top = tl.maximum(top, tl.max(tl.where(known, key, NO_EDGE_KEY), 0))
        tl.atomic_max(best + row_label, top, sem="relaxed")
        if tl.atomic_add(ticket, 1) == num - 1:
            grows = tl.zeros((), tl.int32)
            for start in range(0, num, block):
                node = start + tl.arange(0, block)
                inside = node < num
                # Other multiprocessors wrote these: not from this one's L1 cache.
                key = tl.load(best + node, mask=inside, other=NO_EDGE_KEY, cache_modifier=".cg")
                chosen = inside & (key != NO_EDGE_KEY)
                left, right = nodes_of(key)
                left = tl.load(label + left, mask=chosen, other=0)
                right = tl.load(label + right, mask=chosen, other=0)
                beyond = tl.where(left == node, right, left)
                same = tl.load(best + beyond, mask=chosen, other=NO_EDGE_KEY, cache_modifier=".cg")
                hooks = chosen & ((beyond < node) | (same != key))
                tl.store(up + node, beyond, mask=hooks)
                tl.store(kept + node, key, mask=hooks)
                grows = tl.maximum(grows, tl.max(hooks.to(tl.int32), 0))
            tl.debug_barrier()
            for start in range(0, num, block):
                node = start + tl.arange(0, block)
                active = node < num
                before = tl.load(label + node, mask=active, other=0)
                tl.store(label + node, find_root(up, before, active, True), mask=active)
                tl.store(best + node, tl.full((block,), NO_EDGE_KEY, tl.int64), mask=active)
            tl.store(ticket, 0)
            tl.store(next_go, grows)


@triton.jit
def hook_kernel(best, label, up, kept, node_of, go, next_go, shape, block: tl.constexpr):
    """Hook every component to the one at the other end of its strongest edge.

    Of two that choose the same edge the lower stays. Each one that is hooked keeps its edge.
    """
    if tl.load(go) != 0:
        node = tl.program_id(0) * block + tl.arange(0, block)
        inside = node < tl.load(shape + AT_TOKENS)
        is_root = inside & (tl.load(label + node, mask=inside, other=-1) == node)
        key = tl.load(best + node, mask=is_root, other=NO_EDGE_KEY)
        grows = is_root & (key != NO_EDGE_KEY)
        left, right = nodes_of(key)
        left = tl.load(node_of + left, mask=grows, other=0)
        right = tl.load(node_of + right, mask=grows, other=0)
        left = tl.load(label + left, mask=grows, other=0)
        right = tl.load(label + right, mask=grows, other=0)
        beyond = tl.where(left == node, right, left)
        unlike = tl.load(best + beyond, mask=grows, other=NO_EDGE_KEY) != key
        hooks = grows & ((beyond < node) | unlike)
        tl.store(up + node, beyond, mask=hooks)
        tl.store(kept + node, key, mask=hooks)
        if tl.max(hooks.to(tl.int32), 0) > 0:
            tl.atomic_max(next_go, 1, sem="relaxed")


@triton.jit
def flatten_kernel(best, label, up, go, shape, block: tl.constexpr):
    """Give every node the root of its component, and forget the strongest edges."""
    if tl.load(go) != 0:
        node = tl.program_id(0) * block + tl.arange(0, block)
        active = node < tl.load(shape + AT_TOKENS)
        before = tl.load(label + node, mask=active, other=0)
        tl.store(label + node, find_root(up, before, active, False), mask=active)
        tl.store(best + node, tl.full((block,), NO_EDGE_KEY, tl.int64), mask=active)


@triton.jit(do_not_specialize=["num_keys"])
def cut_kernel(
    keys, state, node_of, parent, shape, tied_at, num_keys, tied: tl.constexpr, block: tl.constexpr
):
    """Make the strongest merges until K components are left, if weights are tied or are not."""
    num_cut = tl.load(state + AT_NUM_COMPONENTS) - tl.load(shape + AT_RETAINED)
    num_cut = tl.where(tl.load(tied_at) == tied, num_cut, 0)
    edge = tl.program_id(0) * block + tl.arange(0, block)
    active = (edge < num_cut) & (edge < num_keys)
    key = tl.load(keys + edge, mask=active, other=0)
    active = active & (key != NO_EDGE_KEY)
    left, right = nodes_of(key)
    left = tl.load(node_of + left, mask=active, other=0)
    right = tl.load(node_of + right, mask=active, other=0)
    union(parent, left, right, active)
