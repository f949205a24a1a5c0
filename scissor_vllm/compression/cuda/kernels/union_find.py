"""A forest of nodes that programs join at the same time: roots, unions and counts."""

import triton
import triton.language as tl

from scissor_vllm.compression.cuda.kernels.layout import AT_TOKENS, run_ends


@triton.jit
def find_root(parent, node, active, others_write: tl.constexpr):
    """Return the root of each node's tree; inactive nodes as they are."""
    # The L1 cache may hold an old value of what another multiprocessor writes meanwhile.
    cache: tl.constexpr = ".cg" if others_write else ""
    up = tl.load(parent + node, mask=active, other=0, cache_modifier=cache)
    while tl.max((active & (up != node)).to(tl.int32), 0) > 0:
        node = tl.where(active, up, node)
        up = tl.load(parent + node, mask=active, other=0, cache_modifier=cache)
    return node


@triton.jit
def union(parent, left, right, active):
    """Join the trees of two vectors of nodes: the higher root is hooked to the lower.

    A hook that meets another hook goes on with the root that it displaced, so no join is lost. A
    parent is never above its child, so a tree's root is its lowest node.
    """
    while tl.max(active.to(tl.int32)) > 0:
        left = find_root(parent, left, active, False)
        right = find_root(parent, right, active, False)
        active = active & (left != right)
        high = tl.maximum(left, right)
        low = tl.minimum(left, right)
        before = tl.atomic_min(parent + high, low, mask=active, sem="relaxed")
        active = active & (before != high)
        left = tl.where(active, before, left)
        right = tl.where(active, low, right)


@triton.jit
def count_components(link, parent, num_tokens, tau, block: tl.constexpr):
    """Return the number of components of runs, in one program."""
    count = tl.zeros((), tl.int32)
    for start in range(0, num_tokens, block):
        node = start + tl.arange(0, block)
        inside = node < num_tokens
        is_root = tl.load(parent + node, mask=inside, other=-1) == node
        count += tl.sum((is_root & inside & run_ends(link, node, num_tokens, tau)).to(tl.int32), 0)
    return count


@triton.jit
def find_roots_kernel(parent, label, shape, block: tl.constexpr):
    """Write the component of each node, its lowest node."""
    node = tl.program_id(0) * block + tl.arange(0, block)
    active = node < tl.load(shape + AT_TOKENS)
    tl.store(label + node, find_root(parent, node, active, False), mask=active)
