"""Semantic Connected Components (SCC), from LLaVA-Scissor (arXiv 2506.21862).

Tokens are nodes, an edge joins two whose cosine is above a threshold. The components of each frame
(spatial step), then those of all frames' representatives (temporal step), leave K representatives;
every token is merged into the nearest.

The paper fixes the threshold and K follows from the video. A server must know K first: the budget
form searches the threshold and cuts the temporal step's maximum spanning tree, which holds the
components at all thresholds, so that exactly K remain. Components are exact in both: the paper's
sampling of nodes is not used.
"""

import bisect
import math
from dataclasses import dataclass
from decimal import Decimal
from numbers import Rational

import torch

from scissor_vllm.compression import similarity
from scissor_vllm.compression.components import (
    Components,
    SpanningTrees,
    degrees,
    forest_labels,
    in_order,
    maximum_spanning_trees,
    threshold_labels,
)
from scissor_vllm.compression.products import Products
from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.similarity import Similarity, most_similar
from scissor_vllm.compression.sums import sums
from scissor_vllm.compression.validation import (
    check_finite,
    check_num_retained,
    check_similarity_threshold,
    check_tokens,
)
from scissor_vllm.retention import num_retained_tokens

EXHAUSTIVE_TOKENS = 128
"""Up to this many tokens every candidate threshold is tried, from below. Above, the search halves
the candidates: the number of components is not everywhere monotone in the threshold, because the
means that the temporal step compares change with it, so a lower threshold that also leaves K may
go unseen."""

THRESHOLD_MARGIN = 1e-4
"""A found threshold is reported this far above the cosine where the result begins to hold (or half
way to where it ends, if nearer), so that it gives the same result when it is used again."""


@torch.no_grad()
def compress(
    tokens: torch.Tensor,
    *,
    similarity_threshold: float | None = None,
    retention_ratio: float | Decimal | Rational | None = None,
    num_retained: int | None = None,
) -> CompressedTokens:
    """Return one video's tokens merged by Semantic Connected Components.

    Give exactly one of the three: the threshold (the paper's form, K follows from the data) or a
    budget (exactly K rows).

    With a budget the threshold is the smallest whose two steps leave at least K components; the
    strongest temporal merges that remain are then made until K are left. Where the threshold alone
    leaves K, the result is the paper's at ``similarity_threshold`` of the result.

    Args:
        tokens: (T, P, D) float32, bfloat16, float16 or float64: frames, tokens of a frame, width.
            Not modified. Similarities are float32, sums float64.
        similarity_threshold: cosine in [-1, 1] above which two tokens are connected (paper: tau).
        retention_ratio: fraction of the T*P tokens to keep, in (0, 1];
            K is :func:`scissor_vllm.num_retained_tokens` of it.
        num_retained: K itself, 1..T*P.

    Raises:
        TypeError: tokens are not a floating tensor, or the chosen argument is not a number.
        ValueError: none or several of the three given, one out of its range, tokens of another
            shape, or a token that is not finite in float32.

    Source: LLaVA-Scissor, sections 3.1 to 3.3, with exact components and a cut for the budget.
    """
    num_tokens = check_tokens(tokens)
    given = [similarity_threshold, retention_ratio, num_retained]
    if sum(value is not None for value in given) != 1:
        raise ValueError(
            "give exactly one of similarity_threshold, retention_ratio and num_retained, got "
            f"{similarity_threshold}, {retention_ratio} and {num_retained}"
        )
    if retention_ratio is not None:
        num_retained = num_retained_tokens(num_tokens, retention_ratio)
    if num_retained is not None:
        check_num_retained(num_retained, num_tokens)
    if similarity_threshold is not None:
        check_similarity_threshold(similarity_threshold)
    frames = tokens.float()
    check_finite(frames)
    flat = frames.reshape(num_tokens, -1)
    spatial = Similarity(frames)
    if num_retained is not None:
        threshold, kept = _within_budget(flat, spatial, num_retained)
    else:
        assert similarity_threshold is not None
        threshold = float(similarity_threshold)
        kept = _above_threshold(flat, spatial, threshold)
    assignment = most_similar(flat, kept)
    merged = _merge(flat, kept, assignment)
    return CompressedTokens(merged.to(tokens.dtype), assignment, threshold)


def _above_threshold(flat: torch.Tensor, spatial: Similarity, threshold: float) -> torch.Tensor:
    """Return the representatives that both steps leave at a threshold, (K, D) float32."""
    in_frames = in_order(threshold_labels(spatial, threshold), degrees(spatial, threshold))
    representatives = _means(flat, in_frames)
    temporal = Similarity(representatives[None])
    labels = threshold_labels(temporal, threshold)
    return _means(representatives, in_order(labels, degrees(temporal, threshold)))


def _within_budget(
    flat: torch.Tensor, spatial: Similarity, num_retained: int
) -> tuple[float, torch.Tensor]:
    """Return the threshold that was found and exactly K representatives, (K, D) float32."""
    found = _Search(flat, spatial).find(num_retained)
    in_frames = in_order(found.spatial_labels, degrees(spatial, found.threshold))
    # What was found counts representatives by their lowest token, the paper by its own order.
    position = in_frames.part[torch.unique(found.spatial_labels)]
    representatives = torch.empty_like(found.representatives)
    representatives[position] = found.representatives
    degree = torch.empty_like(position)
    degree[position] = degrees(found.temporal, found.threshold)
    left, right = position[found.trees.left], position[found.trees.right]
    weight, num_merges = found.trees.weight, len(position) - num_retained
    if 0 < num_merges < len(weight) and weight[num_merges - 1] == weight[num_merges]:
        # Which of several equal merges come first is decided by the paper's order.
        trees = maximum_spanning_trees(Similarity(representatives[None]))
        left, right = trees.left, trees.right
    labels = forest_labels(len(position), left[:num_merges], right[:num_merges])
    return found.threshold, _means(representatives, in_order(labels, degree))


@dataclass(frozen=True)
class _Found:
    """A threshold, and what its spatial step leaves, numbered by lowest token."""

    threshold: float
    spatial_labels: torch.Tensor
    """(N,) int64."""
    representatives: torch.Tensor
    """(S, D) float32."""
    temporal: Similarity
    trees: SpanningTrees


class _Search:
    """Finds the threshold of a budget.

    Between two neighbouring weights of the spatial trees the spatial step does not change. In such
    an interval [start, end) the number of components rises with the threshold, so its largest value
    tells whether the interval holds a threshold that leaves K.
    """

    def __init__(self, flat: torch.Tensor, spatial: Similarity) -> None:
        self._flat = flat
        self._trees = maximum_spanning_trees(spatial)
        breaks, num_edges = torch.unique(self._trees.weight, return_counts=True)
        self._starts: list[float] = [-1.0, *breaks.tolist()]
        num_spatial = spatial.num_sets + torch.cumsum(num_edges, 0)
        self._num_spatial: list[int] = [spatial.num_sets, *num_spatial.tolist()]

    def find(self, num_retained: int) -> _Found:
        """Return a threshold whose two steps leave at least K, no lower one found that does."""
        # The temporal step only joins: an interval with fewer than K spatial components is out.
        low = bisect.bisect_left(self._num_spatial, num_retained)
        num_tokens = len(self._flat)
        if num_tokens > EXHAUSTIVE_TOKENS and num_tokens**2 <= similarity.BLOCK_ELEMENTS:
            low = self._bisect(low, num_retained, products=Products.of_rows(self._flat))
        elif num_tokens > EXHAUSTIVE_TOKENS:
            low = self._bisect(low, num_retained, products=None)
        while True:
            found = self._within(low, num_retained)
            if found is not None:
                return found
            low += 1

    def _bisect(self, low: int, num_retained: int, products: Products | None) -> int:
        """Return an interval that leaves K, the one before it does not; the first if all do."""
        high = len(self._starts) - 1  # It keeps every token apart.
        fewest, most = 0, len(self._flat)
        halve = False
        while low < high:
            # By turns where a straight line through the ends has K, and half way.
            share = 0.5 if halve else (num_retained - fewest) / (most - fewest)
            middle = min(low + int(share * (high - low)), high - 1)
            halve = not halve
            labels = self._labels(middle)
            if products is None:
                joined = None
                temporal = Similarity(self._representatives(labels)[None])
            else:
                joined = products.joined(labels)
                temporal = joined.similarity()
            below_end = _float32_below(self._starts[middle + 1])
            count = len(torch.unique(threshold_labels(temporal, below_end)))
            if count >= num_retained:
                # What is left to try joins these further.
                high, most, products = middle, count, joined
            else:
                low, fewest = middle + 1, count
        return low

    def _labels(self, interval: int) -> torch.Tensor:
        """Return the spatial components of an interval, (N,) int64: their lowest token."""
        num_edges = len(self._flat) - self._num_spatial[interval]
        return forest_labels(
            len(self._flat), self._trees.left[:num_edges], self._trees.right[:num_edges]
        )

    def _representatives(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the means of spatial components, (S, D) float32, by their lowest token."""
        roots, part = torch.unique(labels, return_inverse=True)
        return _means(self._flat, Components(part, len(roots)))

    def _within(self, interval: int, num_retained: int) -> _Found | None:
        """Return the smallest threshold of the interval that leaves at least K, with its margin."""
        labels = self._labels(interval)
        representatives = self._representatives(labels)
        temporal = Similarity(representatives[None])
        trees = maximum_spanning_trees(temporal)
        weights = trees.weight.tolist()
        num_merges = len(representatives) - num_retained
        interval_end = self._starts[interval + 1] if interval + 1 < len(self._starts) else math.inf
        # What is above the threshold is merged: at most the num_merges strongest may be.
        start = max([self._starts[interval], *weights[num_merges : num_merges + 1]])
        if start >= interval_end > self._starts[interval]:
            return None
        end = min([interval_end, 1.0, *(weight for weight in weights if weight > start)])
        threshold = _float32(start + min((end - start) / 2, THRESHOLD_MARGIN))
        if not start <= threshold < end:
            threshold = start
        return _Found(threshold, labels, representatives, temporal, trees)


def _means(rows: torch.Tensor, components: Components) -> torch.Tensor:
    """Return the plain mean of each part's rows, (parts, D) float32."""
    count = torch.bincount(components.part, minlength=components.num_parts)
    return sums(rows, components.part, count).div_(count[:, None]).float()


def _merge(flat: torch.Tensor, kept: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Return (representative + sum of its tokens) / (number of its tokens + 1), (K, D) float32."""
    count = torch.bincount(assignment, minlength=len(kept))
    return sums(flat, assignment, count).add_(kept).div_(count[:, None] + 1).float()


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


def _float32_below(value: float) -> float:
    """Return the largest float32 below the value; what is above it is at least the value."""
    if math.isinf(value):
        return value
    exact = torch.tensor([value, -math.inf], dtype=torch.float32, device="cpu")
    return torch.nextafter(exact[0], exact[1]).item()
