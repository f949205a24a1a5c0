"""A slow, plain oracle of semantic connected components: float64, every threshold is tried.

Tests compare the package with this file. So it shares no code with the package, and is simple
rather than fast: it takes a few hundred tokens. Tokens are numpy arrays (T, P, D).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass
class Result:
    """The compression of T x P tokens: K rows, and the row of each token."""

    tokens: Floats  # (K, D)
    assignment: NDArray[np.int64]  # (T*P,)
    threshold: float
    # Distance to another result in units of cosine: the least distance of any edge from the
    # threshold, and of any token's best representative from its second best. At about 1e-6 a
    # float32 computation may decide differently.
    margin: float


class Partition:
    """Disjoint sets of the numbers 0..n-1."""

    def __init__(self, n: int) -> None:
        self.parent = list(range(n))
        self.num_sets = n

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            i = self.parent[i]
        return i

    def union(self, i: int, j: int) -> bool:
        """Join i and j; return whether they were in different sets."""
        i, j = self.find(i), self.find(j)
        if i == j:
            return False
        self.parent[max(i, j)] = min(i, j)
        self.num_sets -= 1
        return True

    def sets(self) -> list[list[int]]:
        """The sets, each as its members in ascending order."""
        members: dict[int, list[int]] = {}
        for i in range(len(self.parent)):
            members.setdefault(self.find(i), []).append(i)
        return list(members.values())


def cosines(x: Floats, y: Floats) -> Floats:
    """Return the cosine of every row of x with every row of y; a zero row has cosine 0 with all.

    Cosines are rounded to twelve decimals, so values that are equal in exact arithmetic are equal.
    """

    def unit(rows: Floats) -> Floats:
        length = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
        return rows / np.where(length == 0, 1, length)

    return np.clip(np.round(unit(x) @ unit(y).T, 12), -1, 1)


def upper_pairs(cosine: Floats) -> list[tuple[int, int]]:
    """Every pair (i, j) with i < j."""
    return [(i, j) for i in range(len(cosine)) for j in range(i + 1, len(cosine))]


def components(cosine: Floats, tau: float) -> Partition:
    """The partition into connected components where an edge is a cosine strictly above tau."""
    partition = Partition(len(cosine))
    for i, j in np.argwhere(np.triu(cosine > tau, 1)).tolist():
        partition.union(i, j)
    return partition


def in_order(sets: list[list[int]], cosine: Floats, tau: float) -> list[list[int]]:
    """The sets by the lowest-numbered node among their members of highest degree."""
    edges = cosine > tau
    np.fill_diagonal(edges, False)
    degree = edges.sum(axis=1)

    def key(members: list[int]) -> int:
        highest = max(degree[i] for i in members)
        return min(i for i in members if degree[i] == highest)

    return sorted(sets, key=key)


def means(x: Floats, sets: list[list[int]]) -> Floats:
    """The plain mean of each set's rows."""
    return np.array([x[members].mean(axis=0) for members in sets])


def spatial_step(tokens: Floats, tau: float) -> tuple[Floats, NDArray[np.int64], float]:
    """The representatives of all frames, in order, the frame of each, and the step's margin."""
    representatives, frame_of, margin = [], [], np.inf
    for number, frame in enumerate(tokens):
        cosine = cosines(frame, frame)
        sets = in_order(components(cosine, tau).sets(), cosine, tau)
        representatives.append(means(frame, sets))
        frame_of += [number] * len(sets)
        margin = min(margin, edge_margin(cosine, tau) * mean_margin(frame, sets))
    return np.concatenate(representatives), np.array(frame_of), margin


def merge(
    tokens: Floats, representatives: Floats, window_of: tuple[ArrayLike, ArrayLike] | None = None
) -> tuple[Floats, NDArray[np.int64], float]:
    """Return rows, assignment and margin after each token joined its most similar representative.

    If windows are given, the representative is of the token's window.
    """
    cosine = cosines(tokens, representatives)
    if window_of is not None:
        cosine[np.not_equal.outer(*map(np.asarray, window_of))] = -2
    assignment = cosine.argmax(axis=1)  # the first of equals
    rows = []
    for k, representative in enumerate(representatives):
        assigned = tokens[assignment == k]
        rows.append((representative + assigned.sum(axis=0)) / (len(assigned) + 1))
    margin = np.inf
    if len(representatives) > 1:
        best = np.sort(cosine, axis=1)
        nonzero = tokens.any(axis=1)  # a zero token's cosines are all 0, without rounding
        margin = float((best[:, -1] - best[:, -2])[nonzero].min(initial=np.inf))
    return np.array(rows), assignment, margin


def scc(tokens: ArrayLike, tau: float, window: int | None = None) -> Result:
    """Return the paper's result at a threshold, which determines the number of rows."""
    return two_steps(tokens, tau, None, window)


def scc_budget(
    tokens: ArrayLike, k: int, tau: float | None = None, window: int | None = None
) -> Result:
    """Return exactly k rows: the smallest threshold with k or more, then the strongest merges.

    A caller that knows the threshold passes it as tau.
    """
    return two_steps(tokens, smallest_threshold(tokens, k) if tau is None else tau, k, window)


def two_steps(frames: ArrayLike, tau: float, k: int | None, window: int | None = None) -> Result:
    """Return both steps' result at tau; with a k, temporal merges continue until k are left.

    Tokens of different windows are neither joined nor merged.
    """
    tokens = np.asarray(frames, dtype=np.float64)
    x, frame_of, margin = spatial_step(tokens, tau)
    cosine = cosines(x, x)
    windows = frame_of // (window or len(tokens))
    cosine[windows[:, None] != windows] = -2
    partition = components(cosine, tau)
    margin = min(margin, edge_margin(cosine, tau))
    if k is not None:
        if partition.num_sets < k:
            raise ValueError(f"threshold {tau} leaves {partition.num_sets} components, below {k}")
        weight = np.inf
        for i, j in strongest_first(cosine):
            if cosine[i, j] > tau or partition.find(i) == partition.find(j):
                continue
            if partition.num_sets == k:
                margin = min(margin, weight - cosine[i, j])
                break
            weight = cosine[i, j]
            partition.union(i, j)
    sets = in_order(partition.sets(), cosine, tau)
    flat = tokens.reshape(-1, tokens.shape[-1])
    window_of = (
        np.repeat(np.arange(len(tokens)) // (window or len(tokens)), tokens.shape[1]),
        [windows[members[0]] for members in sets],
    )
    rows, assignment, merge_margin = merge(flat, means(x, sets), window_of)
    margin = min(margin, merge_margin) * mean_margin(x, sets)
    return Result(rows, assignment, tau, margin)


def count(tokens: ArrayLike, tau: float) -> int:
    """Return the number of components that the two steps leave at tau."""
    x, _, _ = spatial_step(np.asarray(tokens, dtype=np.float64), tau)
    return components(cosines(x, x), tau).num_sets


def strongest_first(cosine: Floats) -> list[tuple[int, int]]:
    """Every pair by cosine descending; among equals the lower (i, j)."""
    return sorted(upper_pairs(cosine), key=lambda pair: (-cosine[pair], pair))


def spanning_weights(x: Floats) -> list[float]:
    """The weights of a maximum spanning tree: the thresholds at which the components change."""
    cosine = cosines(x, x)
    partition = Partition(len(x))
    return [float(cosine[pair]) for pair in strongest_first(cosine) if partition.union(*pair)]


def count_by_threshold(frames: ArrayLike) -> list[tuple[float, int]]:
    """The step function of `count` on [-1, 1]: pairs (start, count), each up to the next start.

    Exhaustive: the spatial partition changes only at spanning weights of a frame; between two of
    these the representatives stay, and the count changes only at their spanning weights.
    """
    tokens = np.asarray(frames, dtype=np.float64)
    breaks_found = {-1.0}
    for frame in tokens:
        breaks_found.update(spanning_weights(frame))
    breaks = sorted(breaks_found)
    pieces = []
    for start, end in zip(breaks, [*breaks[1:], np.inf], strict=True):
        x, _, _ = spatial_step(tokens, start)
        weights = spanning_weights(x)
        for tau in [start, *sorted({w for w in weights if start < w < end})]:
            pieces.append((float(tau), 1 + sum(w <= tau for w in weights)))
    return pieces


def smallest_threshold(tokens: ArrayLike, k: int) -> float:
    """The smallest threshold at which the two steps leave k components or more."""
    return next(start for start, num in count_by_threshold(tokens) if num >= k)


def edge_margin(cosine: Floats, tau: float) -> float:
    """The least distance of a pair's cosine from tau."""
    return float(np.abs(cosine[np.triu_indices(len(cosine), 1)] - tau).min(initial=np.inf))


def mean_margin(x: Floats, sets: list[list[int]]) -> float:
    """Return the least ratio, in [0, 1], of a mean's length to its members' length.

    If members cancel, their mean and its cosines are mostly rounding errors.
    """
    least = 1.0
    for members in sets:
        length = np.linalg.norm(x[members], axis=1).mean()
        if length > 0:
            least = min(least, float(np.linalg.norm(x[members].mean(axis=0)) / length))
    return least
