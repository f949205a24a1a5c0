"""Triton kernels for the graph steps on a CUDA device: no host synchronisation inside them.

Each does what the torch code in ``components.py`` does, with the same result; where there is no
Triton, that code runs on the GPU too.
"""

import torch
import triton
import triton.language as tl

from scissor_vllm.compression.similarity import ONE

_ROWS, _COLUMNS = 16, 128
_EDGES = 128
_WIDE = 1024


@triton.jit
def _union(parent, one, other, active):
    """Join the trees of two vectors of nodes: the higher root is hooked to the lower.

    A hook that meets another one goes on with the root that it displaced, so no join is lost. A
    parent is never above its child, so a tree's root is its lowest node.
    """
    while tl.max(active.to(tl.int32)) > 0:
        up = tl.load(parent + one, mask=active, other=0)
        while tl.max((active & (up != one)).to(tl.int32)) > 0:
            one = tl.where(active, up, one)
            up = tl.load(parent + one, mask=active, other=0)
        up = tl.load(parent + other, mask=active, other=0)
        while tl.max((active & (up != other)).to(tl.int32)) > 0:
            other = tl.where(active, up, other)
            up = tl.load(parent + other, mask=active, other=0)
        active = active & (one != other)
        high = tl.maximum(one, other)
        low = tl.minimum(one, other)
        before = tl.atomic_min(parent + high, low, mask=active)
        active = active & (before != high)
        one = tl.where(active, before, one)
        other = tl.where(active, low, other)


@triton.jit
def _union_edges(parent, left, right, num_edges, block: tl.constexpr):
    edge = tl.program_id(0) * block + tl.arange(0, block)
    active = edge < num_edges
    one = tl.load(left + edge, mask=active, other=0).to(tl.int32)
    other = tl.load(right + edge, mask=active, other=0).to(tl.int32)
    _union(parent, one, other, active)


@triton.jit
def _union_above(
    parent,
    cosines,
    unit,
    threshold,
    one_above,
    size,
    num_rows,
    first_row,
    first_node,
    rows: tl.constexpr,
    columns: tl.constexpr,
    has_unit: tl.constexpr,
):
    which = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)[:, None]
    column = tl.program_id(1) * columns + tl.arange(0, columns)[None, :]
    inside = (row < num_rows) & (column < size) & (column > row + first_row)
    if tl.max(tl.max(inside.to(tl.int32), 1), 0) > 0:
        at = cosines + which * num_rows * size + row.to(tl.int64) * size + column
        value = tl.load(at, mask=inside, other=-2.0)
        if has_unit:
            scale_row = tl.load(unit + row, mask=row < num_rows, other=0.0)
            scale_column = tl.load(unit + column, mask=column < size, other=0.0)
            value = value * (scale_row * scale_column)
            value = tl.where(value > one_above, 1.0, tl.maximum(value, -1.0))
        above = inside & (value > threshold)
        first = first_node + which.to(tl.int32) * size
        one = tl.reshape(
            tl.broadcast_to(first + first_row + row, (rows, columns)), (rows * columns,)
        )
        other = tl.reshape(tl.broadcast_to(first + column, (rows, columns)), (rows * columns,))
        _union(parent, one, other, tl.reshape(above, (rows * columns,)))


@triton.jit
def _join_rows(source, joined, order, first, count, weight, width, block: tl.constexpr):
    part = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    begin = tl.load(first + part)
    total = tl.zeros((block,), tl.float32)
    for member in range(0, tl.load(count + part)):
        row = tl.load(order + begin + member)
        value = tl.load(source + row * width + column, mask=inside, other=0.0)
        total += tl.load(weight + row) * value
    tl.store(joined + part.to(tl.int64) * width + column, total, mask=inside)


@triton.jit
def _join_columns(
    source, joined, order, first, count, weight, width, num_parts, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * block + tl.arange(0, block)
    inside = part < num_parts
    begin = tl.load(first + part, mask=inside, other=0)
    members = tl.load(count + part, mask=inside, other=0)
    total = tl.zeros((block,), tl.float32)
    for member in range(0, tl.max(members, 0)):
        active = member < members
        column = tl.load(order + begin + member, mask=active, other=0)
        value = tl.load(source + row * width + column, mask=active, other=0.0)
        total += tl.load(weight + column, mask=active, other=0.0) * value
    tl.store(joined + row * num_parts + part, total, mask=inside)


@triton.jit
def _find_roots(parent, labels, num_nodes, block: tl.constexpr):
    node = tl.program_id(0) * block + tl.arange(0, block)
    active = node < num_nodes
    root = tl.load(parent + node, mask=active, other=0)
    up = tl.load(parent + root, mask=active, other=0)
    while tl.max((active & (up != root)).to(tl.int32)) > 0:
        root = tl.where(active, up, root)
        up = tl.load(parent + root, mask=active, other=0)
    tl.store(labels + node, root.to(tl.int64), mask=active)


@triton.jit
def _strongest(
    cosines,
    labels,
    weight,
    other,
    size,
    num_rows,
    first_row,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    which = tl.program_id(1).to(tl.int64)
    own = tl.load(labels + which * size + first_row + row)
    at = cosines + which * num_rows * size + row.to(tl.int64) * size
    best = tl.full((block,), -float("inf"), tl.float32)
    where = tl.zeros((block,), tl.int32)
    for start in range(0, size, block):
        column = start + tl.arange(0, block)
        inside = column < size
        value = tl.load(at + column, mask=inside, other=-float("inf"))
        label = tl.load(labels + which * size + column, mask=inside, other=own)
        value = tl.where(inside & (label != own), value, -float("inf"))
        better = value > best
        best = tl.where(better, value, best)
        where = tl.where(better, column, where)
    top = tl.max(best, 0)
    # Each lane holds its first of the highest, so the lowest of these is the row's first.
    first = tl.min(tl.where(best == top, where, size), 0)
    out = which * num_rows + row
    tl.store(weight + out, top)
    tl.store(other + out, first.to(tl.int64))


def new_forest(num_nodes: int, device: torch.device) -> torch.Tensor:
    """Return the forest in which every node is a tree, (num_nodes,) int32 parents."""
    return torch.arange(num_nodes, dtype=torch.int32, device=device)


def union_edges(forest: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Join the trees at the ends of edges (left, right), int64, in place."""
    if len(left):
        grid = (triton.cdiv(len(left), _EDGES),)
        _union_edges[grid](forest, left, right, len(left), block=_EDGES)


def union_above(
    forest: torch.Tensor,
    cosines: torch.Tensor,
    threshold: float,
    first_row: int,
    first_node: int,
    unit: torch.Tensor | None = None,
) -> None:
    """Join the trees of pairs whose cosine is above the threshold, in place.

    Args:
        forest: parents of all nodes.
        cosines: (sets, rows, n) float32, contiguous; those above the diagonal are looked at.
        threshold: a float32 value.
        first_row: number of the first row in its set.
        first_node: number of the first set's first node.
        unit: (n,) float32 if the cosines of the one set are still to be multiplied by these, of
            row and column.
    """
    num_sets, num_rows, size = cosines.shape
    grid = (triton.cdiv(num_rows, _ROWS), triton.cdiv(size, _COLUMNS), num_sets)
    _union_above[grid](
        forest,
        cosines,
        cosines if unit is None else unit,
        threshold,
        ONE,
        size,
        num_rows,
        first_row,
        first_node,
        rows=_ROWS,
        columns=_COLUMNS,
        has_unit=unit is not None,
    )


def join_both(
    products: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    first: torch.Tensor,
    count: torch.Tensor,
) -> torch.Tensor:
    """Return the products of weighted sums of groups, (parts, parts) float32.

    Args:
        products: (n, n) float32, contiguous.
        weight: (n,) float32.
        order: (n,) int64, the rows by part.
        first: (parts,) int64, where each part begins among them.
        count: (parts,) int64, how many they are.
    """
    size, num_parts = len(products), len(count)
    rows = torch.empty((num_parts, size), dtype=torch.float32, device=products.device)
    _join_rows[(num_parts, triton.cdiv(size, _WIDE))](
        products, rows, order, first, count, weight, size, block=_WIDE
    )
    joined = torch.empty((num_parts, num_parts), dtype=torch.float32, device=products.device)
    _join_columns[(num_parts, triton.cdiv(num_parts, _WIDE))](
        rows, joined, order, first, count, weight, size, num_parts, block=_WIDE
    )
    return joined


def roots(forest: torch.Tensor) -> torch.Tensor:
    """Return the root of every node's tree, its lowest node, (num_nodes,) int64."""
    labels = torch.empty(len(forest), dtype=torch.int64, device=forest.device)
    _find_roots[(triton.cdiv(len(forest), _WIDE),)](forest, labels, len(forest), block=_WIDE)
    return labels


def strongest_outgoing(
    cosines: torch.Tensor, labels: torch.Tensor, first_row: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's highest cosine to a node of another label, and the first such node.

    Args:
        cosines: (sets, rows, n) float32, contiguous.
        labels: (sets, n) int64, contiguous.
        first_row: number of the first row in its set.

    Returns:
        (sets, rows) float32, -inf where there is none, and (sets, rows) int64.
    """
    num_sets, num_rows, size = cosines.shape
    weight = torch.empty((num_sets, num_rows), dtype=torch.float32, device=cosines.device)
    other = torch.empty((num_sets, num_rows), dtype=torch.int64, device=cosines.device)
    block = min(_WIDE, triton.next_power_of_2(size))
    _strongest[(num_rows, num_sets)](
        cosines, labels, weight, other, size, num_rows, first_row, block=block
    )
    return weight, other
