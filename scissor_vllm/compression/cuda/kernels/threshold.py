"""The search for a budget's threshold: one program reads a count and makes the next guess.

Between two neighbouring links of all frames the spatial step does not change: an *interval*. Wide
intervals, those in which thresholds are told apart, are searched; the others are passed over. The
count of components may fall from one interval to the next, so the search ends in an interval whose
count it has seen, or in the last, which keeps every token.
"""

import triton
import triton.language as tl

from scissor_vllm.compression.cuda.kernels.layout import (
    AT_FLAGS,
    AT_FRAMES,
    AT_HIGH,
    AT_INTERVAL,
    AT_LOW,
    AT_MIDDLE,
    AT_MOVED,
    AT_NUM_COMPONENTS,
    AT_NUM_INTERVALS,
    AT_RETAINED,
    AT_STEPS,
    AT_TOKENS,
    IS_NOT_FINITE,
    IS_OUT_OF_RANGE,
    IS_SEARCHING,
    IS_TOO_FEW,
    IS_TOO_MANY,
    weights_of,
)
from scissor_vllm.compression.cuda.kernels.union_find import count_components
from scissor_vllm.compression.similarity import RESOLUTION

_RESOLUTION = tl.constexpr(RESOLUTION)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=["capacity"])
def check_kernel(largest, link, state, shape, capacity, least, most, block: tl.constexpr):
    """Flag tokens that are not usable, and pad the links up to the workspace's capacity."""
    num_tokens = tl.load(shape + AT_TOKENS)
    flags = tl.zeros((), tl.int64)
    for start in range(0, num_tokens, block):
        token = start + tl.arange(0, block)
        value = tl.load(largest + token, mask=token < num_tokens, other=0.0).to(tl.float32)
        finite = value <= _LARGEST
        flags |= tl.where(tl.min(finite.to(tl.int32), 0) == 0, IS_NOT_FINITE, 0)
        usable = (value == 0) | ((value >= least) & (value <= most))
        flags |= tl.where(tl.min(usable.to(tl.int32), 0) == 0, IS_OUT_OF_RANGE, 0)
    tl.store(state + AT_FLAGS, flags)
    for start in range(num_tokens, capacity, block):
        place = start + tl.arange(0, block)
        padding = tl.full((block,), float("inf"), tl.float32)
        tl.store(link + place, padding, mask=place < capacity)


@triton.jit
def _bounds(sorted_link, interval, num_frames, num_breaks):
    """Return the start and the end of intervals, float64; the last has no end."""
    starts = (interval > 0) & (interval <= num_breaks)
    start = tl.load(sorted_link + num_frames - 1 + interval, mask=starts, other=-1.0)
    ends = interval < num_breaks
    end = tl.load(sorted_link + num_frames + interval, mask=ends, other=float("inf"))
    return start.to(tl.float64), end.to(tl.float64)


@triton.jit
def intervals_kernel(interval, sorted_link, state, shape, block: tl.constexpr):
    """List the wide intervals whose spatial step leaves at least K, in one program.

    The temporal step only joins: an interval with fewer spatial components is out.
    """
    num_frames = tl.load(shape + AT_FRAMES)
    num_breaks = tl.load(shape + AT_TOKENS) - num_frames
    first = tl.maximum(tl.load(shape + AT_RETAINED) - num_frames, 0)
    count = tl.zeros((), tl.int32)
    for begin in range(first, num_breaks + 1, block):
        number = begin + tl.arange(0, block)
        inside = number <= num_breaks
        start, end = _bounds(sorted_link, number, num_frames, num_breaks)
        is_wide = inside & (end - start > _RESOLUTION)
        place = count + tl.cumsum(is_wide.to(tl.int32), 0) - 1
        tl.store(interval + place, number, mask=is_wide)
        count += tl.sum(is_wide.to(tl.int32), 0)
    tl.store(state + AT_NUM_INTERVALS, count.to(tl.int64))


@triton.jit
def _below(value):
    """Return the largest float32 below a float64 value."""
    near = value.to(tl.float32)
    bits = near.to(tl.int32, bitcast=True)
    lower = tl.where(near > 0, bits - 1, tl.where(near < 0, bits + 1, -2147483647))
    return tl.where(near.to(tl.float64) < value, near, lower.to(tl.float32, bitcast=True))


@triton.jit
def _bracket(low, high, moved, below, above, guessed, count, num_retained, wanted):
    """Return the bracket after the count of the guess: ends, the end that moved, and balances.

    The Illinois rule: the balance of an end that stays in place twice counts half. ``wanted`` is K
    as float64.
    """
    enough = count >= num_retained
    counted = count.to(tl.float64)
    above_kept = tl.where(moved == 2, above * 0.5, above)
    below_kept = tl.where(moved == 1, below * 0.5, below)
    above_new = tl.log((counted + 0.5) / wanted)
    below_new = tl.log((wanted + 0.5) / tl.maximum(counted, 1.0))
    above = tl.where(enough, above_new, above_kept)
    below = tl.where(enough, below_kept, below_new)
    high = tl.where(enough, guessed, high)
    low = tl.where(enough, low, guessed + 1)
    moved = tl.where(enough, moved * 0 + 1, moved * 0 + 2)
    return low, high, moved, below, above


@triton.jit(do_not_specialize=["line_steps"])
def steer_kernel(
    state,
    balance,
    tau_at,
    go,
    again,
    interval,
    link,
    sorted_link,
    parent,
    shape,
    line_steps,
    begins: tl.constexpr,
    block: tl.constexpr,
):
    """Take the count of a guess, unless the search begins, and make the next guess."""
    if begins | (tl.load(go) != 0):
        num_tokens = tl.load(shape + AT_TOKENS)
        num_frames = tl.load(shape + AT_FRAMES)
        num_retained = tl.load(shape + AT_RETAINED)
        wanted = num_retained.to(tl.float64)
        guessed = tl.load(state + AT_MIDDLE)
        if begins:
            low = tl.zeros((), tl.int64)
            high = tl.load(state + AT_NUM_INTERVALS) - 1
            moved = tl.zeros((), tl.int64)
            steps = tl.zeros((), tl.int64)
            below = tl.log(wanted)
            above = tl.log((num_tokens.to(tl.float64) + 0.5) / wanted)
        else:
            low = tl.load(state + AT_LOW)
            high = tl.load(state + AT_HIGH)
            moved = tl.load(state + AT_MOVED)
            steps = tl.load(state + AT_STEPS) + 1
            below = tl.load(balance)
            above = tl.load(balance + 1)
            count = count_components(link, parent, num_tokens, tl.load(tau_at), block)
            low, high, moved, below, above = _bracket(
                low, high, moved, below, above, guessed, count, num_retained, wanted
            )
        share = tl.where(steps < line_steps, below / (below + above), below * 0 + 0.5)
        middle = low + (share * (high - low).to(tl.float64)).to(tl.int64)
        # After the end of the search the guess stays the final one.
        middle = tl.maximum(tl.minimum(middle, high - 1), low)
        number = tl.load(interval + middle)
        _, end = _bounds(sorted_link, number, num_frames, num_tokens - num_frames)
        # Weights within the resolution of the end count as equal to it.
        tau = tl.where(end < 2.0, _below(end - _RESOLUTION), float("inf"))
        tl.store(state + AT_LOW, low)
        tl.store(state + AT_HIGH, high)
        tl.store(state + AT_MOVED, moved)
        tl.store(state + AT_STEPS, steps)
        tl.store(state + AT_MIDDLE, middle)
        tl.store(state + AT_INTERVAL, number.to(tl.int64))
        tl.store(balance, below)
        tl.store(balance + 1, above)
        tl.store(tau_at, tau)
        tl.store(go, (low < high).to(tl.int32))
        # The components may be those of another guess.
        is_other = (low < high) | (guessed != middle)
        tl.store(again, 1 if begins else is_other.to(tl.int32))


@triton.jit
def _count_above(keys, num_edges, weight, block: tl.constexpr):
    """Return how many edges weigh more than ``weight``."""
    num_above = tl.zeros((), tl.int32)
    for first in range(0, num_edges, block):
        edge = first + tl.arange(0, block)
        inside = edge < num_edges
        above = inside & (weights_of(keys, edge, inside) > weight)
        num_above += tl.sum(above.to(tl.int32), 0)
    return num_above


@triton.jit(do_not_specialize=["most_components"])
def place_kernel(
    state,
    guess_at,
    tau_at,
    go,
    keys,
    sorted_link,
    link,
    parent,
    shape,
    most_components,
    margin,
    tied_at,
    by_token: tl.constexpr,
    block: tl.constexpr,
):
    """Place the threshold in the interval that the search ended in, and set the flags.

    Also tell whether equal weights are on both sides of the cut, and not in the paper's order.
    Edges that are ordered by token are in it where no two tokens of a frame are joined: each is
    then its own run.
    """
    num_tokens = tl.load(shape + AT_TOKENS)
    num_frames = tl.load(shape + AT_FRAMES)
    num_breaks = num_tokens - num_frames
    num_retained = tl.load(shape + AT_RETAINED)
    interval = tl.load(state + AT_INTERVAL).to(tl.int32)
    count = count_components(link, parent, num_tokens, tl.load(guess_at), block)
    # With more components than fit, not all weights are known: see the flag.
    num_edges = tl.minimum(count - 1, most_components)
    num_cut = tl.maximum(count - num_retained, 0)
    at_least, end = _bounds(sorted_link, interval, num_frames, num_breaks)
    end = tl.minimum(end - _RESOLUTION, 1.0)
    has_next = num_cut < num_edges
    strongest_left = weights_of(keys, num_cut, has_next)
    start = tl.where(has_next, tl.maximum(at_least, strongest_left), at_least)
    num_above = _count_above(keys, num_edges, start + _RESOLUTION, block)
    weakest = weights_of(keys, num_above - 1, num_above > 0)
    end = tl.where(num_above > 0, tl.minimum(end, weakest), end)
    tau = (start + tl.minimum((end - start) * 0.5, margin)).to(tl.float32)
    exact = tau.to(tl.float64)
    tau = tl.where((exact >= start) & (exact < end), tau, start.to(tl.float32))
    last_made = weights_of(keys, num_cut - 1, has_next & (num_cut > 0))
    tied = has_next & (num_cut > 0) & (last_made == strongest_left)
    if by_token:
        tied = tied & (interval < num_breaks)
    flags = tl.load(state + AT_FLAGS) & (IS_NOT_FINITE | IS_OUT_OF_RANGE)
    flags |= tl.where(tl.load(go) != 0, IS_SEARCHING, 0)
    flags |= tl.where(count > most_components, IS_TOO_MANY, 0)
    flags |= tl.where(count < num_retained, IS_TOO_FEW, 0)
    # Where the search goes on, the runs may be those of another guess, and have no order.
    is_final = (flags & (IS_SEARCHING | IS_TOO_MANY | IS_TOO_FEW)) == 0
    tl.store(tied_at, (tied & is_final).to(tl.int32))
    tl.store(state + AT_FLAGS, flags)
    tl.store(state + AT_NUM_COMPONENTS, count.to(tl.int64))
    tl.store(tau_at, tau)
