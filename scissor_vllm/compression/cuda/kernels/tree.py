"""The groups that a tree's lowest merges leave, and the means of their rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "size", "num_joined", "steps"])
def roots_kernel(
    parent, rank, root, is_root, num_tokens, size, num_joined, steps, block: tl.constexpr
):
    """Find the lowest token of each token's group after the lowest merges of a tree."""
    first = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, block)
    token = first + lane
    inside = (lane < size) & (token < num_tokens)
    is_joined = tl.load(rank + token, mask=inside, other=0) < num_joined
    label = tl.where(is_joined, tl.load(parent + token, mask=inside, other=0), token)
    tl.store(root + token, label, mask=inside)
    tl.store(is_root + token, (label == token).to(tl.int32), mask=inside)
    tl.debug_barrier()
    for _ in range(steps):
        label = tl.load(root + token, mask=inside, other=0)
        label = tl.load(root + label, mask=inside, other=0)
        tl.debug_barrier()
        tl.store(root + token, label, mask=inside)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["width"])
def group_means_kernel(rows, order, begin, out, width, at_once: tl.constexpr, block: tl.constexpr):
    """Average a group's rows in float64; values that are not finite count as zero."""
    group = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    first = tl.load(begin + group)
    last = tl.load(begin + group + 1)
    total = tl.zeros((block,), tl.float64)
    for start in range(first, last, at_once):
        member = start + tl.arange(0, at_once)
        token = tl.load(order + member, mask=member < last, other=0).to(tl.int64)
        at = rows + token[:, None] * width + column[None, :]
        value = tl.load(at, mask=(member < last)[:, None] & inside[None, :], other=0.0)
        value = value.to(tl.float64)
        value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
        total += tl.sum(value, 0)
    mean = (total / (last - first).to(tl.float64)).to(tl.float32)
    tl.store(out + group.to(tl.int64) * width + column, mean.to(out.dtype.element_ty), mask=inside)
