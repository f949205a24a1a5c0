"""Shared layout of host and kernels: indices of small device tensors, flags, limits, edge keys."""

import triton
import triton.language as tl

TOKENS, FRAMES, PER_FRAME, WINDOW, BLOCK_ROWS, APART, RETAINED = range(7)
"""Indices of a video's ``shape``, int32: N, T, P, frames of a window, rows of a block of products,
1 if only products inside windows are held, and K. Kernels read them from the device, so one CUDA
graph serves all shapes."""

NUM_SHAPE = 8

LOW, HIGH, MOVED, STEPS, MIDDLE, INTERVAL, NUM_INTERVALS, NUM_COMPONENTS, FLAGS = range(9)
"""Indices of the state of a search, int64. Low, high and middle count wide intervals."""

NUM_STATE = 9

THRESHOLD, NUM_JOINED, OUTCOME_FLAGS = range(3)
"""Indices of the outcome of a search, float64: the threshold (see ``summary_kernel``), the parts of
more than one token, and the flags."""

NOT_FINITE, OUT_OF_RANGE, SEARCHING, TOO_MANY, TOO_FEW = 1, 2, 4, 8, 16
"""Flags: a token is not finite, a token is too large or too small, the search is not over, there
are more components than the dense weights hold, fewer than K parts were left (a defect)."""

MAX_PER_FRAME = 1 << 12
"""Two tokens of a frame and a weight share 64 bits, and a program holds a row of a frame."""

MAX_TOKENS = 1 << 18
"""Two nodes of an edge and its weight share 64 bits."""

NO_KEY = -(1 << 63)
"""Below the key of every edge."""

NO_WEIGHT = -(1 << 31)
"""Below the weight of every edge, in units."""

NODE_BITS = tl.constexpr(18)
EDGE_BITS = tl.constexpr(36)
NODE_MASK = tl.constexpr((1 << 18) - 1)
EDGE_MASK = tl.constexpr((1 << 36) - 1)
WEIGHT_UNIT = tl.constexpr(2.0**26)
WORD = tl.constexpr((1 << 32) - 1)
AT_TOKENS, AT_FRAMES = tl.constexpr(TOKENS), tl.constexpr(FRAMES)
AT_PER_FRAME, AT_WINDOW = tl.constexpr(PER_FRAME), tl.constexpr(WINDOW)
AT_BLOCK_ROWS, AT_APART = tl.constexpr(BLOCK_ROWS), tl.constexpr(APART)
AT_RETAINED = tl.constexpr(RETAINED)
AT_LOW, AT_HIGH, AT_MOVED = tl.constexpr(LOW), tl.constexpr(HIGH), tl.constexpr(MOVED)
AT_STEPS, AT_MIDDLE = tl.constexpr(STEPS), tl.constexpr(MIDDLE)
AT_INTERVAL, AT_NUM_INTERVALS = tl.constexpr(INTERVAL), tl.constexpr(NUM_INTERVALS)
AT_NUM_COMPONENTS, AT_FLAGS = tl.constexpr(NUM_COMPONENTS), tl.constexpr(FLAGS)
IS_NOT_FINITE, IS_OUT_OF_RANGE = tl.constexpr(NOT_FINITE), tl.constexpr(OUT_OF_RANGE)
IS_SEARCHING, IS_TOO_MANY = tl.constexpr(SEARCHING), tl.constexpr(TOO_MANY)
IS_TOO_FEW = tl.constexpr(TOO_FEW)
NO_EDGE_KEY = tl.constexpr(NO_KEY)
NO_EDGE_WEIGHT = tl.constexpr(NO_WEIGHT)


@triton.jit
def edge_key(weight, lower, higher):
    """Return an edge as int64: ordered by weight in units, equal weights by the lower nodes."""
    edge = ((lower << NODE_BITS) | higher) ^ EDGE_MASK
    return (weight.to(tl.int64) << EDGE_BITS) | edge


@triton.jit
def nodes_of(key):
    """Return an edge's lower and higher node."""
    edge = (key & EDGE_MASK) ^ EDGE_MASK
    return edge >> NODE_BITS, edge & NODE_MASK


@triton.jit
def weights_of(keys, at, inside):
    """Return the weights of edges as cosines, float64."""
    key = tl.load(keys + at, mask=inside, other=0)
    return (key >> EDGE_BITS).to(tl.float64) / WEIGHT_UNIT


@triton.jit
def run_ends(link, position, num_tokens, tau):
    """Return whether runs end at these positions: the next link is not above the threshold."""
    follows = position + 1 < num_tokens
    return tl.load(link + position + 1, mask=follows, other=-float("inf")) <= tau
