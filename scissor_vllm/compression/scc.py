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
from decimal import Decimal
from numbers import Rational

import torch

from scissor_vllm.compression.components import (
    Components,
    degrees,
    forest_labels,
    in_order,
    maximum_spanning_trees,
    threshold_labels,
)
from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.similarity import BLOCK_ELEMENTS, Similarity, most_similar
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
    spatial = Similarity(frames)
    if num_retained is not None:
        threshold = _Search(frames, spatial).threshold(num_retained)
    else:
        assert similarity_threshold is not None
        threshold = float(similarity_threshold)
    flat = frames.reshape(num_tokens, -1)
    in_frames = in_order(threshold_labels(spatial, threshold), degrees(spatial, threshold))
    representatives = _means(flat, in_frames)
    across_frames = _temporal_components(representatives, threshold, num_retained)
    kept = _means(representatives, across_frames)
    assignment = most_similar(flat, kept)
    merged = _merge(flat, kept, assignment)
    return CompressedTokens(merged.to(tokens.dtype), assignment, threshold)


def _temporal_components(
    representatives: torch.Tensor, threshold: float, num_retained: int | None
) -> Components:
    """Return the components of all frames' representatives, exactly K of them if given."""
    temporal = Similarity(representatives[None])
    if num_retained is None:
        labels = threshold_labels(temporal, threshold)
    else:
        trees = maximum_spanning_trees(temporal)
        num_merges = len(representatives) - num_retained
        labels = forest_labels(
            len(representatives), trees.left[:num_merges], trees.right[:num_merges]
        )
    return in_order(labels, degrees(temporal, threshold))


class _Search:
    """Finds the threshold of a budget.

    Between two neighbouring weights of the spatial trees the spatial step does not change. In such
    an interval [start, end) the number of components rises with the threshold, so its largest value
    tells whether the interval holds a threshold that leaves K.
    """

    def __init__(self, frames: torch.Tensor, spatial: Similarity) -> None:
        self._flat = frames.reshape(-1, frames.shape[-1])
        self._trees = maximum_spanning_trees(spatial)
        breaks, num_edges = torch.unique(self._trees.weight, return_counts=True)
        self._starts: list[float] = [-1.0, *breaks.tolist()]
        num_spatial = spatial.num_sets + torch.cumsum(num_edges, 0)
        self._num_spatial: list[int] = [spatial.num_sets, *num_spatial.tolist()]

    def threshold(self, num_retained: int) -> float:
        """Return a threshold whose two steps leave at least K, no lower one found that does."""
        # The temporal step only joins: an interval with fewer than K spatial components is out.
        low = bisect.bisect_left(self._num_spatial, num_retained)
        high = len(self._starts) - 1  # It keeps every token apart.
        if len(self._flat) <= EXHAUSTIVE_TOKENS:
            while low < high and self._most_components(low) < num_retained:
                low += 1
            return self._threshold_within(low, num_retained)
        fewest, most = 0, len(self._flat)
        halve = False
        while low < high:
            # By turns where a straight line through the ends has K, and half way.
            share = 0.5 if halve else (num_retained - fewest) / (most - fewest)
            middle = min(low + int(share * (high - low)), high - 1)
            halve = not halve
            count = self._most_components(middle)
            if count >= num_retained:
                high, most = middle, count
            else:
                low, fewest = middle + 1, count
        return self._threshold_within(low, num_retained)

    def _end(self, interval: int) -> float:
        return self._starts[interval + 1] if interval + 1 < len(self._starts) else math.inf

    def _representatives(self, interval: int) -> torch.Tensor:
        """Return the spatial representatives of all frames in an interval, (S, D), in any order."""
        num_edges = len(self._flat) - self._num_spatial[interval]
        labels = forest_labels(
            len(self._flat), self._trees.left[:num_edges], self._trees.right[:num_edges]
        )
        roots, part = torch.unique(labels, return_inverse=True)
        return _means(self._flat, Components(part, len(roots)))

    def _most_components(self, interval: int) -> int:
        """Return the number of components just below the interval's end."""
        representatives = self._representatives(interval)
        if math.isinf(self._end(interval)):
            return len(representatives)
        below_end = _float32_below(self._end(interval))
        labels = threshold_labels(Similarity(representatives[None]), below_end)
        return len(torch.unique(labels))

    def _threshold_within(self, interval: int, num_retained: int) -> float:
        """Return the smallest threshold of the interval that leaves at least K, with its margin."""
        representatives = self._representatives(interval)
        weights = maximum_spanning_trees(Similarity(representatives[None])).weight.tolist()
        num_merges = len(representatives) - num_retained
        # What is above the threshold is merged: at most the num_merges strongest may be.
        start = max([self._starts[interval], *weights[num_merges : num_merges + 1]])
        end = min([self._end(interval), 1.0, *(weight for weight in weights if weight > start)])
        threshold = _float32(start + min((end - start) / 2, THRESHOLD_MARGIN))
        return threshold if start <= threshold < end else start


def _means(rows: torch.Tensor, components: Components) -> torch.Tensor:
    """Return the plain mean of each part's rows, (parts, D) float32."""
    count = torch.bincount(components.part, minlength=components.num_parts)
    return _sums(rows, components.part, count).div_(count[:, None]).float()


def _merge(flat: torch.Tensor, kept: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Return (representative + sum of its tokens) / (number of its tokens + 1), (K, D) float32."""
    count = torch.bincount(assignment, minlength=len(kept))
    return _sums(flat, assignment, count).add_(kept).div_(count[:, None] + 1).float()


def _sums(rows: torch.Tensor, part: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Return the sum of each part's rows, (parts, D) float64.

    Rows are added in the order of their number, so the result does not depend on how a device
    schedules its threads; in float64, because thousands of like rows drift in float32 and large
    ones overflow.
    """
    order = torch.argsort(part, stable=True)
    first = torch.cumsum(count, 0) - count
    width = rows.shape[1]
    step = max(1, BLOCK_ELEMENTS // (2 * len(rows)))
    return torch.cat(
        [
            torch.nn.functional.embedding_bag(
                order, rows[:, start : start + step].double(), first, mode="sum"
            )
            for start in range(0, width, step)
        ],
        dim=1,
    )


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


def _float32_below(value: float) -> float:
    """Return the largest float32 below the value; what is above it is at least the value."""
    if math.isinf(value):
        return value
    exact = torch.tensor([value, -math.inf], dtype=torch.float32, device="cpu")
    return torch.nextafter(exact[0], exact[1]).item()
