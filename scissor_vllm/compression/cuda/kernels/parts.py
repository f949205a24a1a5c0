"""Components become parts in the paper's order: by the lowest token of highest degree."""

import triton
import triton.language as tl

from scissor_vllm.compression.cuda.kernels.layout import (
    AT_FLAGS,
    AT_PER_FRAME,
    AT_RETAINED,
    AT_TOKENS,
    IS_TOO_FEW,
    WORD,
    run_ends,
)
from scissor_vllm.compression.similarity import NO_EDGE

_NO_EDGE = tl.constexpr(NO_EDGE)


@triton.jit
def lead_tokens_kernel(cosine, order, run_of, run_lead, tau_at, shape, block: tl.constexpr):
    """Find each run's lowest token of highest degree."""
    position = tl.program_id(0)
    num_tokens = tl.load(shape + AT_TOKENS)
    if position < num_tokens:
        per_frame = tl.load(shape + AT_PER_FRAME)
        tau = tl.load(tau_at)
        token = tl.load(order + position)
        lane = tl.arange(0, block)
        row = cosine + token.to(tl.int64) * per_frame
        value = tl.load(row + lane, mask=lane < per_frame, other=_NO_EDGE)
        degree = tl.sum(((value > tau) & (lane < per_frame)).to(tl.int64), 0)
        key = (degree << 32) | (num_tokens - token).to(tl.int64)
        tl.atomic_max(run_lead + tl.load(run_of + position), key, sem="relaxed")


@triton.jit
def lead_runs_kernel(
    run_lead, label, degree, part_lead, part_runs, link, tau_at, shape, block: tl.constexpr
):
    """Find each part's first run of highest degree."""
    num_tokens = tl.load(shape + AT_TOKENS)
    node = tl.program_id(0) * block + tl.arange(0, block)
    inside = node < num_tokens
    ends = inside & run_ends(link, node, num_tokens, tl.load(tau_at))
    behind = tl.load(run_lead + node, mask=ends, other=0) & WORD
    root = tl.load(label + node, mask=ends, other=0)
    key = (tl.load(degree + node, mask=ends, other=0).to(tl.int64) << 32) | behind
    tl.atomic_max(part_lead + root, key, mask=ends, sem="relaxed")
    tl.atomic_add(part_runs + root, tl.full((block,), 1, tl.int32), mask=ends, sem="relaxed")


@triton.jit
def rank_runs_kernel(
    run_lead, rank_of_token, rank, node_of, link, tau_at, shape, block: tl.constexpr
):
    """Number the runs in the paper's order, for edges of equal weight."""
    num_tokens = tl.load(shape + AT_TOKENS)
    node = tl.program_id(0) * block + tl.arange(0, block)
    inside = node < num_tokens
    ends = inside & run_ends(link, node, num_tokens, tl.load(tau_at))
    token = num_tokens - (tl.load(run_lead + node, mask=ends, other=0) & WORD)
    position = tl.load(rank_of_token + token, mask=ends, other=1) - 1
    tl.store(rank + node, position.to(tl.int32), mask=ends)
    tl.store(node_of + position, node, mask=ends)


@triton.jit
def mark_leads_kernel(
    lead, label, is_lead, link, tau_at, shape, roots: tl.constexpr, block: tl.constexpr
):
    """Mark the lead tokens of runs, or of parts, whose keys are at their roots."""
    num_tokens = tl.load(shape + AT_TOKENS)
    node = tl.program_id(0) * block + tl.arange(0, block)
    inside = node < num_tokens
    marks = inside & run_ends(link, node, num_tokens, tl.load(tau_at))
    if roots:
        marks = marks & (tl.load(label + node, mask=inside, other=-1) == node)
    behind = tl.load(lead + node, mask=marks, other=0) & WORD
    tl.store(is_lead + num_tokens - behind, tl.full((block,), 1, tl.int32), mask=marks)


@triton.jit(do_not_specialize=["capacity"])
def parts_kernel(
    order,
    run_of,
    run_size,
    label,
    part_lead,
    part_runs,
    number_of_token,
    part,
    weight,
    shape,
    capacity,
    block: tl.constexpr,
):
    """Write each token's part, in the paper's order, and its weight in the part's mean of means.

    Places from N up to the workspace's capacity get a part behind all others.
    """
    num_tokens = tl.load(shape + AT_TOKENS)
    position = tl.program_id(0) * block + tl.arange(0, block)
    inside = position < num_tokens
    token = tl.load(order + position, mask=inside, other=0)
    node = tl.load(run_of + position, mask=inside, other=0)
    root = tl.load(label + node, mask=inside, other=0)
    lead = num_tokens - (tl.load(part_lead + root, mask=inside, other=1) & WORD)
    number = tl.load(number_of_token + lead, mask=inside, other=1) - 1
    size = tl.load(run_size + node, mask=inside, other=1).to(tl.float64)
    runs = tl.load(part_runs + root, mask=inside, other=1).to(tl.float64)
    tl.store(part + token, number.to(tl.int32), mask=inside)
    tl.store(weight + token, 1.0 / (size * runs), mask=inside)
    padding = (position >= num_tokens) & (position < capacity)
    tl.store(part + position, tl.full((block,), 0x7FFFFFFF, tl.int32), mask=padding)


@triton.jit(do_not_specialize=["size"])
def joined_parts_kernel(begin, low_at, size, block: tl.constexpr):
    """Number the parts of more than one token, in one program; write -1 for others.

    Behind the last part stands how many there are.
    """
    count = tl.zeros((), tl.int32)
    for start in range(0, size, block):
        part = start + tl.arange(0, block)
        inside = part < size
        first = tl.load(begin + part, mask=inside, other=0)
        last = tl.load(begin + part + 1, mask=inside, other=0)
        joined = (last > first + 1).to(tl.int32)
        place = count + tl.cumsum(joined, 0) - 1
        tl.store(low_at + part, tl.where(joined == 1, place, -1), mask=inside)
        count += tl.sum(joined, 0)
    tl.store(low_at + size, count)


@triton.jit
def summary_kernel(outcome, state, tau_at, number, num_joined, shape):
    """Write what the host reads of a search: threshold, joined parts and flags.

    The threshold is NaN where it means nothing, and infinite where fewer than K parts were left,
    which is a defect that whoever reads it later reports.
    """
    flags = tl.load(state + AT_FLAGS)
    num_parts = tl.load(number + tl.load(shape + AT_TOKENS) - 1)
    flags |= tl.where(num_parts < tl.load(shape + AT_RETAINED), IS_TOO_FEW, 0)
    tau = tl.load(tau_at).to(tl.float64)
    tau = tl.where(flags == 0, tau, float("nan"))
    tau = tl.where((flags & IS_TOO_FEW) != 0, float("inf"), tau)
    tl.store(outcome, tau)
    tl.store(outcome + 1, tl.load(num_joined).to(tl.float64))
    tl.store(outcome + 2, flags.to(tl.float64))
