"""Triton kernels of SCC on a CUDA device; ``gpu.py`` tells their order.

Tokens of a frame stand in the order in which Prim's algorithm adds them to the frame's maximum
spanning tree. Each token but a frame's first has a *link*: the weight of the edge that adds it. At
any threshold the frame's components are then runs of neighbours: a run ends where the next link is
not above the threshold. A run is known by the position of its last token, its *node*.
"""

import triton
import triton.language as tl

from scissor_vllm.compression.similarity import NO_EDGE, ONE, RESOLUTION

UNION, STRONGEST, BETWEEN, DEGREE = range(4)
"""What ``pairs`` does with the cosines of pairs of runs."""

BEGIN, STEP, NEXT = 0, 1, 2
"""What ``steer`` does."""

LOW, HIGH, MOVED, STEPS, MIDDLE, NUM_COMPONENTS, FLAGS = range(7)
"""Places in the state of a search, int64."""

NUM_STATES = 7

NOT_FINITE, OUT_OF_RANGE, SEARCHING, TOO_NARROW, TOO_MANY = 1, 2, 4, 8, 16
"""Bits of the flags that end in the state."""

MAX_PER_FRAME = 1 << 12
"""Two tokens of a frame and a weight share 64 bits, and a kernel holds a row of a frame."""

MAX_NODES = 1 << 18
"""An edge's two nodes and its weight share 64 bits."""

NO_KEY = -(1 << 63)
"""Below the key of every edge."""

NO_WEIGHT = -(1 << 31)
"""Below the weight of every edge, in units."""

_UNION, _STRONGEST = tl.constexpr(UNION), tl.constexpr(STRONGEST)
_BETWEEN, _DEGREE = tl.constexpr(BETWEEN), tl.constexpr(DEGREE)
_MOST = tl.constexpr((1 << 31) - 1)
_LEAST = tl.constexpr(NO_WEIGHT)
_BEGIN, _STEP = tl.constexpr(BEGIN), tl.constexpr(STEP)
_LOW, _HIGH, _MOVED, _STEPS = (tl.constexpr(place) for place in (LOW, HIGH, MOVED, STEPS))
_MIDDLE, _NUM_COMPONENTS = tl.constexpr(MIDDLE), tl.constexpr(NUM_COMPONENTS)
_FLAGS = tl.constexpr(FLAGS)
_NOT_FINITE, _OUT_OF_RANGE = tl.constexpr(NOT_FINITE), tl.constexpr(OUT_OF_RANGE)
_SEARCHING, _TOO_NARROW = tl.constexpr(SEARCHING), tl.constexpr(TOO_NARROW)
_TOO_MANY = tl.constexpr(TOO_MANY)
_NEAR_ROWS = tl.constexpr(8)
_LANE_BITS = tl.constexpr(12)
_LANE_MASK = tl.constexpr((1 << 12) - 1)
_NODE_BITS = tl.constexpr(18)
_EDGE_BITS = tl.constexpr(36)
_NODE_MASK = tl.constexpr((1 << 18) - 1)
_EDGE_MASK = tl.constexpr((1 << 36) - 1)
_WEIGHT_UNIT = tl.constexpr(2.0**26)
_NO_KEY = tl.constexpr(NO_KEY)
_NO_EDGE = tl.constexpr(NO_EDGE)
_ONE, _RESOLUTION = tl.constexpr(ONE), tl.constexpr(RESOLUTION)
_WORD = tl.constexpr((1 << 32) - 1)


@triton.jit
def _root(parent, node, active, others_write: tl.constexpr):
    """Return the root of each node's tree, nodes that are not active as they are."""
    # What another multiprocessor writes meanwhile may be old in this one's own cache.
    cache: tl.constexpr = ".cg" if others_write else ""
    up = tl.load(parent + node, mask=active, other=0, cache_modifier=cache)
    while tl.max((active & (up != node)).to(tl.int32), 0) > 0:
        node = tl.where(active, up, node)
        up = tl.load(parent + node, mask=active, other=0, cache_modifier=cache)
    return node


@triton.jit
def _union(parent, one, other, active):
    """Join the trees of two vectors of nodes: the higher root is hooked to the lower.

    A hook that meets another one goes on with the root that it displaced, so no join is lost. A
    parent is never above its child, so a tree's root is its lowest node.
    """
    while tl.max(active.to(tl.int32)) > 0:
        one = _root(parent, one, active, False)
        other = _root(parent, other, active, False)
        active = active & (one != other)
        high = tl.maximum(one, other)
        low = tl.minimum(one, other)
        before = tl.atomic_min(parent + high, low, mask=active, sem="relaxed")
        active = active & (before != high)
        one = tl.where(active, before, one)
        other = tl.where(active, low, other)


@triton.jit
def _edge_key(weight, lower, higher):
    """Return an edge as a number: by weight in units, of equal ones the first by its nodes."""
    edge = ((lower << _NODE_BITS) | higher) ^ _EDGE_MASK
    return (weight.to(tl.int64) << _EDGE_BITS) | edge


@triton.jit
def _nodes_of(key):
    """Return an edge's lower and higher node."""
    edge = (key & _EDGE_MASK) ^ _EDGE_MASK
    return edge >> _NODE_BITS, edge & _NODE_MASK


@triton.jit
def _add_in_run(value, starts, next_value, next_starts):
    return tl.where(next_starts != 0, next_value, value + next_value), starts | next_starts


@triton.jit
def _snapped(cosine):
    return tl.where(cosine > _ONE, 1.0, tl.maximum(cosine, -1.0))


@triton.jit
def _ends(link, position, num_tokens, tau):
    """Return whether runs end at these positions."""
    follows = position + 1 < num_tokens
    return tl.load(link + position + 1, mask=follows, other=-float("inf")) <= tau


@triton.jit(do_not_specialize=["width"])
def usable_rows_kernel(tokens, rows, length, largest, width, least, most, block: tl.constexpr):
    """Copy a row with its length and largest magnitude, as zeros if that is out of range."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * width
    top = tl.zeros((block,), tl.float32)
    squares = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        value = tl.load(tokens + at + column, mask=column < width, other=0.0).to(tl.float32)
        # Neither maximum nor comparison may lose what is not a number.
        top = tl.where(value == value, tl.maximum(top, tl.abs(value)), float("inf"))
        squares += value * value
    size = tl.max(top, 0)
    usable = (size >= least) & (size <= most)
    tl.store(largest + row, size)
    tl.store(length + row, tl.where(usable, tl.sqrt(tl.sum(squares, 0)), 0.0))
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        value = tl.load(tokens + at + column, mask=column < width, other=0.0)
        tl.store(rows + at + column, tl.where(usable, value, 0.0), mask=column < width)


@triton.jit(do_not_specialize=["num_tokens"])
def check_kernel(largest, state, num_tokens, least, most, block: tl.constexpr):
    flags = tl.zeros((), tl.int64)
    for start in range(0, num_tokens, block):
        token = start + tl.arange(0, block)
        value = tl.load(largest + token, mask=token < num_tokens, other=0.0).to(tl.float32)
        finite = value <= 3.4028234663852886e38
        flags |= tl.where(tl.min(finite.to(tl.int32), 0) == 0, _NOT_FINITE, 0)
        inside = (value == 0) | ((value >= least) & (value <= most))
        flags |= tl.where(tl.min(inside.to(tl.int32), 0) == 0, _OUT_OF_RANGE, 0)
    tl.store(state + _FLAGS, flags)


@triton.jit(do_not_specialize=["per_frame"])
def cosines_kernel(product, cosine, per_frame, block: tl.constexpr):
    row = tl.program_id(0)
    square = tl.program_id(1).to(tl.int64) * per_frame * per_frame
    column = tl.arange(0, block)
    inside = column < per_frame
    across = tl.load(product + square + row * per_frame + column, mask=inside, other=0.0)
    down = tl.load(product + square + column * per_frame + row, mask=inside, other=0.0)
    squares = tl.load(product + square + column * (per_frame + 1), mask=inside, other=0.0)
    own = tl.load(product + square + row * (per_frame + 1))
    unit = tl.where(squares > 0, 1 / tl.sqrt(squares), 0.0)
    own_unit = tl.where(own > 0, 1 / tl.sqrt(own), 0.0)
    value = _snapped(tl.maximum(across, down) * (own_unit * unit))
    value = tl.where(column == row, _NO_EDGE, value)
    tl.store(cosine + square + row * per_frame + column, value, mask=inside)


@triton.jit
def _link_key(weight, token, lane):
    """Return what orders the edges of a token: by weight, then by lower and higher node.

    The last bit tells which of the two is not in the tree.
    """
    bits = weight.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    edge = (tl.minimum(token, lane) << _LANE_BITS) | tl.maximum(token, lane)
    tie = (edge * 2 + (lane > token).to(tl.int32)).to(tl.int64)
    return (ordered.to(tl.int64) << 32) | (tie ^ _WORD)


@triton.jit(do_not_specialize=["per_frame"])
def prim_kernel(cosine, order, link, per_frame, block: tl.constexpr):
    frame = tl.program_id(0)
    square = cosine + frame.to(tl.int64) * per_frame * per_frame
    first = frame * per_frame
    lane = tl.arange(0, block)
    inside = lane < per_frame
    outside_tree = inside & (lane != 0)
    # Each step waits for a row that the last one chose: have all of them near.
    touched = tl.zeros((), tl.float32)
    for start in range(0, per_frame, _NEAR_ROWS):
        near = start + tl.arange(0, _NEAR_ROWS)[:, None]
        at = square + near * per_frame + lane[None, :]
        rows = tl.load(at, mask=(near < per_frame) & inside[None, :], other=0.0)
        touched += tl.sum(tl.sum(rows, 1), 0)
    tl.store(order + first, first)
    # It is never this large; without use the rows would not be read.
    tl.store(link + first, tl.where(touched > 1e30, 0.0, -float("inf")))
    row = tl.load(square + lane, mask=inside, other=_NO_EDGE)
    keys = tl.where(outside_tree, _link_key(row, 0, lane), _NO_KEY)
    for place in range(1, per_frame):
        top = tl.max(keys, 0)
        tie = ((top & _WORD) ^ _WORD).to(tl.int32)
        higher = (tie >> 1) & _LANE_MASK
        token = tl.where((tie & 1) == 1, higher, tie >> (_LANE_BITS + 1))
        row = tl.load(square + token * per_frame + lane, mask=inside, other=_NO_EDGE)
        outside_tree = outside_tree & (lane != token)
        link_keys = _link_key(row, token, lane)
        keys = tl.where(outside_tree, tl.maximum(keys, link_keys), _NO_KEY)
        ordered = (top >> 32).to(tl.int32)
        weight = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(order + first + place, first + token)
        tl.store(link + first + place, weight)


@triton.jit
def _product_row(row, num_tokens, block_rows, base, apart: tl.constexpr):
    """Return where a row's product with column 0 is, which need not exist, and the row's length."""
    block = (row // block_rows).to(tl.int64)
    before = block * block_rows
    if apart:
        length = tl.minimum(num_tokens - before, block_rows)
        offset = before * block_rows
    else:
        length = num_tokens - before
        offset = before * num_tokens - block_rows * block_rows * (block * (block - 1) // 2) - base
    return offset + (row - before) * length - before, length


@triton.jit(do_not_specialize=["per_frame"])
def lengths_kernel(
    product,
    order,
    link,
    unit,
    parent,
    run_of,
    run_size,
    tau_at,
    go,
    per_frame,
    block: tl.constexpr,
    rows: tl.constexpr,
):
    """Find the runs of a frame: node and size, one over the length of their sum."""
    if tl.load(go) != 0:
        tau = tl.load(tau_at)
        first = tl.program_id(0) * per_frame
        square = product + tl.program_id(0).to(tl.int64) * per_frame * per_frame
        lane = tl.arange(0, block)
        inside = lane < per_frame
        column = square + tl.load(order + first + lane, mask=inside, other=0) - first
        place = tl.program_id(1) * rows
        last = tl.minimum(place + rows, per_frame)
        own = place + tl.arange(0, rows)
        tl.store(parent + first + own, first + own, mask=own < per_frame)
        while tl.load(link + first + place, mask=place < last, other=-float("inf")) > tau:
            place += 1
        while place < last:
            begin = place
            row = (tl.load(order + first + place) - first) * per_frame
            total = tl.load(column + row, mask=inside, other=0.0)
            place += 1
            while tl.load(link + first + place, mask=place < per_frame, other=-float("inf")) > tau:
                row = (tl.load(order + first + place) - first) * per_frame
                total += tl.load(column + row, mask=inside, other=0.0)
                place += 1
            member = (lane >= begin) & (lane < place)
            square_sum = tl.sum(tl.where(member, total, 0.0), 0)
            node = first + place - 1
            tl.store(unit + node, tl.where(square_sum > 0, 1 / tl.sqrt(square_sum), 0.0))
            tl.store(run_size + node, place - begin)
            tl.store(run_of + first + lane, tl.zeros_like(lane) + node, mask=member)


@triton.jit(
    do_not_specialize=["num_tokens", "per_frame", "block_rows", "base", "first_frame", "window"]
)
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
    num_tokens,
    per_frame,
    block_rows,
    base,
    first_frame,
    window,
    num_parts_at,
    block: tl.constexpr,
    rows: tl.constexpr,
    use: tl.constexpr,
    apart: tl.constexpr,
    aligned: tl.constexpr,
):
    """Go through the cosines of all pairs of runs, those that begin in some rows of a frame with
    those of one frame of the same window that is not before it.
    """
    row_frame = first_frame + tl.program_id(1)
    column_frame = row_frame // window * window + tl.program_id(0)
    exists = column_frame * per_frame < num_tokens
    if (tl.load(go) != 0) & (column_frame >= row_frame) & exists:
        tau = tl.load(tau_at)
        first_row = row_frame * per_frame
        lane = tl.arange(0, block)
        inside = lane < (per_frame // 4 * 4 if aligned else per_frame)
        column = column_frame * per_frame + lane
        starts = tl.load(link + column, mask=inside, other=-float("inf")) <= tau
        ends = inside & _ends(link, column, num_tokens, tau)
        has_runs = tl.sum(ends.to(tl.int32), 0) < per_frame
        column_unit = tl.load(unit + column, mask=ends, other=0.0)
        if use == _BETWEEN:
            num_parts = tl.load(num_parts_at)
            column_label = tl.load(label + column, mask=ends, other=-1)
        if use == _STRONGEST:
            column_label = tl.load(label + column, mask=ends, other=-1)
            column_rank = tl.load(rank + column, mask=ends, other=0).to(tl.int64)
            column_best = tl.full((block,), _NO_KEY, tl.int64)
        if use == _DEGREE:
            column_degree = tl.zeros((block,), tl.int32)
        if use == _UNION:
            pending = tl.full((block,), -1, tl.int32)
        place = tl.program_id(2) * rows
        last = tl.minimum(place + rows, per_frame)
        while tl.load(link + first_row + place, mask=place < last, other=-float("inf")) > tau:
            place += 1
        offset, stride = _product_row(first_row + place, num_tokens, block_rows, base, apart)
        offset += column_frame * per_frame
        if aligned:
            # So that four are read at once.
            offset = offset // 4 * 4
            stride = stride // 4 * 4
        row = store + offset + lane
        total = tl.zeros((block,), tl.float32)
        # Rows are read ahead of their use; the frame's last stands in for those after it.
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
                value = _snapped(total * (tl.load(unit + node) * column_unit))
                pair = ends & (column > node)
                if use == _STRONGEST:
                    own = tl.load(label + node)
                    own_rank = tl.load(rank + node).to(tl.int64)
                    lower = tl.minimum(own_rank, column_rank)
                    higher = tl.maximum(own_rank, column_rank)
                    key = _edge_key(tl.floor(value * _WEIGHT_UNIT), lower, higher)
                    key = tl.where(pair & (column_label != own), key, _NO_KEY)
                    top = tl.max(key, 0)
                    if top > tl.load(best + own):
                        tl.atomic_max(best + own, top, sem="relaxed")
                    column_best = tl.maximum(column_best, key)
                elif use == _BETWEEN:
                    own = tl.load(label + node)
                    weight = tl.floor(value * _WEIGHT_UNIT).to(tl.int32)
                    known = pair & (column_label != own)
                    known = known & (tl.maximum(column_label, own) < num_parts)
                    cell = best + own.to(tl.int64) * num_parts + column_label
                    before = tl.load(cell, mask=known, other=_MOST)
                    tl.atomic_max(cell, weight, mask=known & (weight > before), sem="relaxed")
                elif use == _DEGREE:
                    above = pair & (value > tau)
                    num_above = tl.sum(above.to(tl.int32), 0)
                    if num_above > 0:
                        tl.atomic_add(degree + node, num_above, sem="relaxed")
                        column_degree += above.to(tl.int32)
                else:
                    # A join takes long: one for each column waits until a second comes.
                    above = pair & (value > tau)
                    if tl.max((above & (pending >= 0)).to(tl.int32), 0) > 0:
                        _union(parent, tl.maximum(pending, 0), column, pending >= 0)
                        pending = tl.full((block,), -1, tl.int32)
                    pending = tl.where(above, node, pending)
                total = tl.zeros((block,), tl.float32)
                going = place < last
        if use == _STRONGEST:
            before = tl.load(best + column_label, mask=ends, other=0)
            tl.atomic_max(
                best + column_label, column_best, mask=ends & (column_best > before), sem="relaxed"
            )
        if use == _DEGREE:
            tl.atomic_add(degree + column, column_degree, mask=column_degree > 0, sem="relaxed")
        if use == _UNION:
            _union(parent, tl.maximum(pending, 0), column, pending >= 0)


@triton.jit
def _num_components(link, parent, num_tokens, tau, block: tl.constexpr):
    count = tl.zeros((), tl.int32)
    for start in range(0, num_tokens, block):
        node = start + tl.arange(0, block)
        inside = node < num_tokens
        is_root = tl.load(parent + node, mask=inside, other=-1) == node
        count += tl.sum((is_root & inside & _ends(link, node, num_tokens, tau)).to(tl.int32), 0)
    return count


@triton.jit
def _below(value):
    """Return the largest float32 below the value."""
    bits = value.to(tl.int32, bitcast=True)
    lower = tl.where(value > 0, bits - 1, tl.where(value < 0, bits + 1, -2147483647))
    return lower.to(tl.float32, bitcast=True)


@triton.jit
def _interval(sorted_link, low, num_frames, num_breaks):
    """Return the length of an interval, infinite from the last break on."""
    start = tl.load(sorted_link + num_frames - 1 + low, mask=low > 0, other=-1.0)
    end = tl.load(sorted_link + num_frames + low, mask=low < num_breaks, other=float("inf"))
    return end.to(tl.float64) - start.to(tl.float64)


@triton.jit(do_not_specialize=["num_tokens", "num_frames", "line_steps"])
def steer_kernel(
    state,
    balance,
    tau_at,
    go,
    again,
    link,
    sorted_link,
    parent,
    num_tokens,
    num_frames,
    num_retained_at,
    line_steps,
    phase: tl.constexpr,
    block: tl.constexpr,
):
    """Take the count of a guess and make the next guess."""
    if (phase != _STEP) | (tl.load(go) != 0):
        low = tl.load(state + _LOW)
        high = tl.load(state + _HIGH)
        moved = tl.load(state + _MOVED)
        steps = tl.load(state + _STEPS)
        middle = tl.load(state + _MIDDLE)
        guessed = middle
        below = tl.load(balance)
        above = tl.load(balance + 1)
        num_retained = tl.load(num_retained_at)
        wanted = num_retained.to(tl.float64)
        num_breaks = (num_tokens - num_frames).to(tl.int64)
        if phase == _BEGIN:
            # The temporal step only joins: an interval with fewer spatial components is out.
            low = tl.maximum(num_retained - num_frames, 0).to(tl.int64)
            high = num_breaks
            below = tl.log(wanted)
            above = tl.log((num_tokens.to(tl.float64) + 0.5) / wanted)
            moved = moved * 0
            steps = steps * 0
        elif phase == _STEP:
            count = _num_components(link, parent, num_tokens, tl.load(tau_at), block)
            enough = count >= num_retained
            found = count.to(tl.float64)
            next_above = tl.where(
                enough,
                tl.log((found + 0.5) / wanted),
                tl.where(moved == 2, above * 0.5, above),
            )
            next_below = tl.where(
                enough,
                tl.where(moved == 1, below * 0.5, below),
                tl.log((wanted + 0.5) / tl.maximum(found, 1.0)),
            )
            above = next_above
            below = next_below
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
            moved = tl.where(enough, moved * 0 + 1, moved * 0 + 2)
            steps = steps + 1
        else:
            low = low + 1
            high = low
        if low >= high:
            # No threshold is told apart in an interval that is narrower than the resolution.
            while _interval(sorted_link, low, num_frames, num_breaks) <= _RESOLUTION:
                low += 1
            high = low
        share = tl.where(steps < line_steps, below / (below + above), below * 0 + 0.5)
        middle = low + (share * (high - low).to(tl.float64)).to(tl.int64)
        middle = tl.maximum(tl.minimum(middle, high - 1), low)
        at = tl.where(low < high, middle, low)
        end = tl.load(sorted_link + num_frames + at, mask=at < num_breaks, other=0.0)
        tau = tl.where(at < num_breaks, _below(end), float("inf"))
        tl.store(state + _LOW, low)
        tl.store(state + _HIGH, high)
        tl.store(state + _MOVED, moved)
        tl.store(state + _STEPS, steps)
        tl.store(state + _MIDDLE, middle)
        tl.store(balance, below)
        tl.store(balance + 1, above)
        tl.store(tau_at, tau)
        tl.store(go, (low < high).to(tl.int32))
        # The runs and components of the interval that was found may be those of the last guess.
        if phase == _STEP:
            tl.store(again, ((low < high) | (guessed != low)).to(tl.int32))
        else:
            tl.store(again, 1)


@triton.jit(do_not_specialize=["num_nodes"])
def find_roots_kernel(parent, label, num_nodes, block: tl.constexpr):
    node = tl.program_id(0) * block + tl.arange(0, block)
    active = node < num_nodes
    tl.store(label + node, _root(parent, node, active, False), mask=active)


@triton.jit(do_not_specialize=["num_tokens"])
def hook_kernel(best, label, up, kept, node_of, go, next_go, num_tokens, block: tl.constexpr):
    """Hook every component to the one at the other end of its strongest edge.

    Of two that choose the same edge the lower stays. Each one that is hooked keeps its edge.
    """
    if tl.load(go) != 0:
        node = tl.program_id(0) * block + tl.arange(0, block)
        inside = node < num_tokens
        is_root = inside & (tl.load(label + node, mask=inside, other=-1) == node)
        key = tl.load(best + node, mask=is_root, other=_NO_KEY)
        grows = is_root & (key != _NO_KEY)
        one, other = _nodes_of(key)
        one = tl.load(node_of + one, mask=grows, other=0)
        other = tl.load(node_of + other, mask=grows, other=0)
        one = tl.load(label + one, mask=grows, other=0)
        other = tl.load(label + other, mask=grows, other=0)
        beyond = tl.where(one == node, other, one)
        unlike = tl.load(best + beyond, mask=grows, other=_NO_KEY) != key
        hooks = grows & ((beyond < node) | unlike)
        tl.store(up + node, beyond, mask=hooks)
        tl.store(kept + node, key, mask=hooks)
        if tl.max(hooks.to(tl.int32), 0) > 0:
            tl.atomic_max(next_go, 1, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def flatten_kernel(best, label, up, go, num_tokens, block: tl.constexpr):
    """Give every node the root of its component, and forget the strongest edges."""
    if tl.load(go) != 0:
        node = tl.program_id(0) * block + tl.arange(0, block)
        active = node < num_tokens
        own = tl.load(label + node, mask=active, other=0)
        tl.store(label + node, _root(up, own, active, False), mask=active)
        tl.store(best + node, tl.full((block,), _NO_KEY, tl.int64), mask=active)


@triton.jit(do_not_specialize=["num_tokens", "size"])
def number_parts_kernel(
    label, link, tau_at, number, node_of, part, num_parts_at, num_tokens, size, block: tl.constexpr
):
    """Number the components by their roots, in one program: of each node, and the root of each.

    And how many of them there is room for.
    """
    tau = tl.load(tau_at)
    seen = tl.zeros((), tl.int32)
    for start in range(0, num_tokens, block):
        node = start + tl.arange(0, block)
        inside = node < num_tokens
        is_root = inside & (tl.load(label + node, mask=inside, other=-1) == node)
        is_root = is_root & _ends(link, node, num_tokens, tau)
        place = seen + tl.cumsum(is_root.to(tl.int32), 0) - 1
        tl.store(number + node, place, mask=is_root)
        tl.store(node_of + place, node, mask=is_root & (place < size))
        seen += tl.sum(is_root.to(tl.int32), 0)
    tl.store(num_parts_at, tl.minimum(seen, size))
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
    tl.store(weights + cell, tl.full((block,), _LEAST, tl.int32), mask=cell < num * num)


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
        one = tl.load(above, mask=in_above, other=_LEAST)
        other = tl.load(below, mask=in_below, other=_LEAST)
        larger = tl.maximum(one, tl.trans(other))
        tl.store(above, larger, mask=in_above)
        tl.store(below, tl.trans(larger), mask=in_below)


@triton.jit
def grow_kernel(
    weights, label, up, best, kept, num_parts_at, go, next_go, ticket, block: tl.constexpr
):
    """Do one of Boruvka's rounds with the weights of all pairs of components.

    Each program finds the strongest edge of one; the last to end then does the rest of the round.
    """
    row = tl.program_id(0)
    num = tl.load(num_parts_at)
    if (tl.load(go) != 0) & (row < num):
        own = tl.load(label + row)
        top = tl.full((), _NO_KEY, tl.int64)
        for start in range(0, num, block):
            column = start + tl.arange(0, block)
            inside = column < num
            at = weights + row.to(tl.int64) * num + column
            weight = tl.load(at, mask=inside, other=_LEAST)
            other = tl.load(label + column, mask=inside, other=own)
            lower = tl.minimum(row, column).to(tl.int64)
            higher = tl.maximum(row, column).to(tl.int64)
            key = _edge_key(weight, lower, higher)
            known = inside & (other != own) & (weight != _LEAST)
            top = tl.maximum(top, tl.max(tl.where(known, key, _NO_KEY), 0))
        tl.atomic_max(best + own, top, sem="relaxed")
        if tl.atomic_add(ticket, 1) == num - 1:
            grows = tl.zeros((), tl.int32)
            for start in range(0, num, block):
                node = start + tl.arange(0, block)
                inside = node < num
                # Others wrote these: not from this processor's own cache.
                key = tl.load(best + node, mask=inside, other=_NO_KEY, cache_modifier=".cg")
                chosen = inside & (key != _NO_KEY)
                one, other = _nodes_of(key)
                one = tl.load(label + one, mask=chosen, other=0)
                other = tl.load(label + other, mask=chosen, other=0)
                beyond = tl.where(one == node, other, one)
                same = tl.load(best + beyond, mask=chosen, other=_NO_KEY, cache_modifier=".cg")
                hooks = chosen & ((beyond < node) | (same != key))
                tl.store(up + node, beyond, mask=hooks)
                tl.store(kept + node, key, mask=hooks)
                grows = tl.maximum(grows, tl.max(hooks.to(tl.int32), 0))
            tl.debug_barrier()
            for start in range(0, num, block):
                node = start + tl.arange(0, block)
                active = node < num
                before = tl.load(label + node, mask=active, other=0)
                tl.store(label + node, _root(up, before, active, True), mask=active)
                tl.store(best + node, tl.full((block,), _NO_KEY, tl.int64), mask=active)
            tl.store(ticket, 0)
            tl.store(next_go, grows)


@triton.jit(do_not_specialize=["size"])
def sort_kernel(
    values,
    sorted_values,
    order,
    size,
    decreasing: tl.constexpr,
    own_block: tl.constexpr,
    block: tl.constexpr,
):
    """Sort each row by counting what comes before each value, equal ones by their place."""
    base = tl.program_id(1).to(tl.int64) * size
    values += base
    sorted_values += base
    order += base
    own_at = tl.program_id(0) * own_block + tl.arange(0, own_block)
    own = tl.load(values + own_at, mask=own_at < size, other=0)
    before = tl.zeros((own_block,), tl.int32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        value = tl.load(values + at, mask=at < size, other=0)
        first = (value[None, :] > own[:, None]) if decreasing else (value[None, :] < own[:, None])
        equal = (value[None, :] == own[:, None]) & (at[None, :] < own_at[:, None])
        first = (first | equal) & (at < size)[None, :]
        before += tl.sum(first.to(tl.int32), 1)
    tl.store(sorted_values + before, own, mask=own_at < size)
    tl.store(order + before, own_at, mask=own_at < size)


@triton.jit
def _weight_of(keys, at, inside):
    key = tl.load(keys + at, mask=inside, other=0)
    return (key >> _EDGE_BITS).to(tl.float64) / _WEIGHT_UNIT


@triton.jit(do_not_specialize=["num_tokens", "num_frames", "most_components"])
def place_kernel(
    state,
    guess_at,
    tau_at,
    go,
    keys,
    sorted_link,
    link,
    parent,
    num_tokens,
    num_frames,
    num_retained_at,
    most_components,
    margin,
    tied_at,
    by_token: tl.constexpr,
    block: tl.constexpr,
):
    """Place the threshold in the interval that was found.

    And tell whether equal weights are on both sides of the cut, and not in the paper's order. Edges
    that are ordered by token are in it where no two tokens of a frame are joined: each is then its
    own run, and has no neighbour in its frame.
    """
    low = tl.load(state + _LOW)
    num_retained = tl.load(num_retained_at)
    tau = tl.load(guess_at)
    count = _num_components(link, parent, num_tokens, tau, block)
    # Of more components than a tree was built between, not all weights are known: see the flag.
    num_edges = tl.minimum(count - 1, most_components)
    num_cut = tl.maximum(count - num_retained, 0)
    at_least = tl.load(sorted_link + num_frames - 1 + low, mask=low > 0, other=-1.0).to(tl.float64)
    is_last = low >= num_tokens - num_frames
    beyond = tl.load(sorted_link + num_frames + low, mask=is_last == 0, other=float("inf"))
    beyond = beyond.to(tl.float64)
    has_next = num_cut < num_edges
    strongest_left = _weight_of(keys, num_cut, has_next)
    start = tl.where(has_next, tl.maximum(at_least, strongest_left), at_least)
    too_narrow = beyond - start <= _RESOLUTION
    num_above = tl.zeros((), tl.int32)
    for first in range(0, num_edges, block):
        edge = first + tl.arange(0, block)
        inside = edge < num_edges
        above = inside & (_weight_of(keys, edge, inside) > start + _RESOLUTION)
        num_above += tl.sum(above.to(tl.int32), 0)
    weakest = _weight_of(keys, num_above - 1, num_above > 0)
    end = tl.minimum(beyond, 1.0)
    end = tl.where(num_above > 0, tl.minimum(end, weakest), end)
    found = (start + tl.minimum((end - start) * 0.5, margin)).to(tl.float32)
    exact = found.to(tl.float64)
    found = tl.where((exact >= start) & (exact < end), found, start.to(tl.float32))
    last_made = _weight_of(keys, num_cut - 1, has_next & (num_cut > 0))
    tied = has_next & (num_cut > 0) & (last_made == strongest_left)
    flags = tl.load(state + _FLAGS) & (_NOT_FINITE | _OUT_OF_RANGE)
    flags |= tl.where(tl.load(go) != 0, _SEARCHING, 0)
    flags |= tl.where(too_narrow, _TOO_NARROW, 0)
    flags |= tl.where(count > most_components, _TOO_MANY, 0)
    if by_token:
        tied = tied & (is_last == 0)
    # Where the search goes on, the runs may be those of another guess, and have no order.
    tl.store(tied_at, (tied & (flags == 0)).to(tl.int32))
    tl.store(state + _FLAGS, flags)
    tl.store(state + _NUM_COMPONENTS, count.to(tl.int64))
    tl.store(tau_at, found)


@triton.jit(do_not_specialize=["num_tokens"])
def cut_kernel(
    keys,
    state,
    node_of,
    parent,
    num_tokens,
    num_retained_at,
    tied_at,
    tied: tl.constexpr,
    block: tl.constexpr,
):
    """Make the strongest merges until K components are left, if weights are tied or are not."""
    num_cut = tl.load(state + _NUM_COMPONENTS) - tl.load(num_retained_at)
    num_cut = tl.where(tl.load(tied_at) == tied, num_cut, 0)
    edge = tl.program_id(0) * block + tl.arange(0, block)
    active = (edge < num_cut) & (edge < num_tokens)
    key = tl.load(keys + edge, mask=active, other=0)
    active = active & (key != _NO_KEY)
    one, other = _nodes_of(key)
    one = tl.load(node_of + one, mask=active, other=0)
    other = tl.load(node_of + other, mask=active, other=0)
    _union(parent, one, other, active)


@triton.jit(do_not_specialize=["num_tokens", "per_frame"])
def lead_tokens_kernel(
    cosine, order, run_of, run_lead, tau_at, num_tokens, per_frame, block: tl.constexpr
):
    """Find each run's lowest token of highest degree."""
    position = tl.program_id(0)
    tau = tl.load(tau_at)
    token = tl.load(order + position)
    lane = tl.arange(0, block)
    row = cosine + token.to(tl.int64) * per_frame
    value = tl.load(row + lane, mask=lane < per_frame, other=_NO_EDGE)
    degree = tl.sum(((value > tau) & (lane < per_frame)).to(tl.int64), 0)
    key = (degree << 32) | (num_tokens - token).to(tl.int64)
    tl.atomic_max(run_lead + tl.load(run_of + position), key, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def lead_runs_kernel(
    run_lead,
    label,
    degree,
    part_lead,
    part_runs,
    link,
    tau_at,
    num_tokens,
    block: tl.constexpr,
):
    """Find each part's first run of highest degree."""
    node = tl.program_id(0) * block + tl.arange(0, block)
    inside = node < num_tokens
    ends = inside & _ends(link, node, num_tokens, tl.load(tau_at))
    behind = tl.load(run_lead + node, mask=ends, other=0) & _WORD
    root = tl.load(label + node, mask=ends, other=0)
    key = (tl.load(degree + node, mask=ends, other=0).to(tl.int64) << 32) | behind
    tl.atomic_max(part_lead + root, key, mask=ends, sem="relaxed")
    tl.atomic_add(part_runs + root, tl.full((block,), 1, tl.int32), mask=ends, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def rank_runs_kernel(
    run_lead, rank_of_token, rank, node_of, link, tau_at, num_tokens, block: tl.constexpr
):
    """Number the runs in the paper's order, for edges of equal weight."""
    node = tl.program_id(0) * block + tl.arange(0, block)
    inside = node < num_tokens
    ends = inside & _ends(link, node, num_tokens, tl.load(tau_at))
    token = num_tokens - (tl.load(run_lead + node, mask=ends, other=0) & _WORD)
    position = tl.load(rank_of_token + token, mask=ends, other=1) - 1
    tl.store(rank + node, position.to(tl.int32), mask=ends)
    tl.store(node_of + position, node, mask=ends)


@triton.jit(do_not_specialize=["num_tokens"])
def mark_leads_kernel(
    lead,
    label,
    is_lead,
    link,
    tau_at,
    num_tokens,
    roots: tl.constexpr,
    block: tl.constexpr,
):
    """Mark the lead tokens of runs, or of parts, whose keys are at their roots."""
    node = tl.program_id(0) * block + tl.arange(0, block)
    inside = node < num_tokens
    marks = inside & _ends(link, node, num_tokens, tl.load(tau_at))
    if roots:
        marks = marks & (tl.load(label + node, mask=inside, other=-1) == node)
    behind = tl.load(lead + node, mask=marks, other=0) & _WORD
    tl.store(is_lead + num_tokens - behind, tl.full((block,), 1, tl.int32), mask=marks)


@triton.jit(do_not_specialize=["num_tokens"])
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
    num_tokens,
    block: tl.constexpr,
):
    """Give every token its part, numbered in the paper's order, and its weight in the part's mean
    of its runs' means.
    """
    position = tl.program_id(0) * block + tl.arange(0, block)
    inside = position < num_tokens
    token = tl.load(order + position, mask=inside, other=0)
    node = tl.load(run_of + position, mask=inside, other=0)
    root = tl.load(label + node, mask=inside, other=0)
    lead = num_tokens - (tl.load(part_lead + root, mask=inside, other=1) & _WORD)
    number = tl.load(number_of_token + lead, mask=inside, other=1) - 1
    size = tl.load(run_size + node, mask=inside, other=1).to(tl.float64)
    runs = tl.load(part_runs + root, mask=inside, other=1).to(tl.float64)
    tl.store(part + token, number.to(tl.int32), mask=inside)
    tl.store(weight + token, 1.0 / (size * runs), mask=inside)


@triton.jit(do_not_specialize=["size"])
def joined_parts_kernel(begin, low_at, size, block: tl.constexpr):
    """Number a video's parts of more than one token, in one program; of others tell -1."""
    base = tl.program_id(0).to(tl.int64) * (size + 1)
    begin += base
    low_at += base
    seen = tl.zeros((), tl.int32)
    for start in range(0, size, block):
        part = start + tl.arange(0, block)
        inside = part < size
        first = tl.load(begin + part, mask=inside, other=0)
        last = tl.load(begin + part + 1, mask=inside, other=0)
        joined = (last > first + 1).to(tl.int32)
        place = seen + tl.cumsum(joined, 0) - 1
        tl.store(low_at + part, tl.where(joined == 1, place, -1), mask=inside)
        seen += tl.sum(joined, 0)
    tl.store(low_at + size, seen)


@triton.jit
def _sum_of(
    rows,
    order,
    weight,
    first,
    last,
    column,
    inside,
    width,
    merges: tl.constexpr,
    at_once: tl.constexpr,
):
    """Return the sum of some rows' columns, weighted unless it is for a merge."""
    total = tl.zeros_like(column).to(tl.float64)
    for start in range(first, last, at_once):
        member = start + tl.arange(0, at_once)
        token = tl.load(order + member, mask=member < last, other=0).to(tl.int64)
        at = rows + token[:, None] * width + column[None, :]
        value = tl.load(at, mask=(member < last)[:, None] & inside[None, :], other=0.0)
        value = value.to(tl.float64)
        if not merges:
            value = value * tl.load(weight + token, mask=member < last, other=0.0)[:, None]
        total += tl.sum(value, 0)
    return total


@triton.jit(do_not_specialize=["num_tokens", "width", "num_out"])
def sums_kernel(
    rows,
    order,
    begin,
    weight,
    kept,
    out,
    low_at,
    num_tokens,
    width,
    num_out,
    merges: tl.constexpr,
    halves: tl.constexpr,
    few: tl.constexpr,
    members: tl.constexpr,
    block: tl.constexpr,
):
    """Add up the rows of a part in float64, so many members at once, or a few where there are few.

    Of ``num_out`` rows of each video, what is left of a mean in 16 bits comes after the
    ``num_parts`` means.
    """
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    video = tl.program_id(2).to(tl.int64)
    rows += video * num_tokens * width
    order += video * num_tokens
    weight += video * num_tokens
    begin += video * (num_parts + 1)
    low_at += video * (num_parts + 1)
    kept += video * num_parts * width
    out += video * num_out * width
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    first = tl.load(begin + part)
    last = tl.load(begin + part + 1)
    if last - first <= members:
        total = _sum_of(rows, order, weight, first, last, column, inside, width, merges, few)
    else:
        total = _sum_of(rows, order, weight, first, last, column, inside, width, merges, members)
    at = part.to(tl.int64) * width + column
    if merges:
        representative = tl.load(kept + at, mask=inside, other=0.0).to(tl.float64)
        mean = (total + representative) / (last - first + 1).to(tl.float64)
        tl.store(out + at, mean.to(tl.float32).to(out.dtype.element_ty), mask=inside)
    else:
        mean = total.to(tl.float32)
        tl.store(kept + at, mean, mask=inside)
        if halves:
            # Two numbers of 16 bits hold 16 of the 24 digits; a single token needs but one.
            high = mean.to(out.dtype.element_ty)
            tl.store(out + at, high, mask=inside)
            place = tl.load(low_at + part).to(tl.int64)
            rest = (mean - high.to(tl.float32)).to(out.dtype.element_ty)
            at = place * width + column
            low = out + num_parts.to(tl.int64) * width
            tl.store(low + at, rest, mask=inside & (at >= 0))


@triton.jit(do_not_specialize=["first_row", "num_tokens", "num_kept", "stride", "window_tokens"])
def nearest_kernel(
    product,
    kept_length,
    low_at,
    row_length,
    nearest,
    number_of_token,
    first_row,
    num_tokens,
    num_kept,
    stride,
    window_tokens,
    halves: tl.constexpr,
    block: tl.constexpr,
):
    """Find each row's first representative whose cosine is within the resolution of the highest.

    Among those of its window: they are numbered in the order of their lead tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    video = tl.program_id(1).to(tl.int64)
    product += video * tl.num_programs(0) * stride
    kept_length += video * num_kept
    low_at += video * (num_kept + 1)
    row_length += video * num_tokens + first_row
    nearest += video * num_tokens + first_row
    number_of_token += video * num_tokens
    window = (first_row + row) // window_tokens * window_tokens
    window_end = tl.minimum(window + window_tokens, num_tokens)
    begin = tl.load(number_of_token + window - 1, mask=window > 0, other=0).to(tl.int32)
    end = tl.load(number_of_token + window_end - 1).to(tl.int32)
    # Of tokens that nobody looks at the parts may be more.
    end = tl.maximum(tl.minimum(end, num_kept), 1)
    length = tl.load(row_length + row)
    own = tl.where(length > 0, 1 / length, 0.0)
    at = product + row * stride
    top = tl.full((), -2.0, tl.float32)
    first = end
    for turn in tl.static_range(2):
        limit = top - _RESOLUTION
        for start in range(begin, end, block):
            column = start + tl.arange(0, block)
            inside = column < end
            value = tl.load(at + column, mask=inside, other=0.0)
            if halves:
                place = tl.load(low_at + column, mask=inside, other=-1)
                value += tl.load(at + num_kept + place, mask=place >= 0, other=0.0)
            kept = tl.load(kept_length + column, mask=inside, other=1.0)
            unit = tl.where(kept > 0, 1 / kept, 0.0)
            cosine = tl.where(inside, value * (own * unit), -2.0)
            if turn == 0:
                top = tl.maximum(top, tl.max(cosine, 0))
            else:
                near = tl.where(inside & (cosine >= limit), column, end)
                first = tl.minimum(first, tl.min(near, 0))
    tl.store(nearest + row, tl.minimum(first, end - 1).to(tl.int64))
