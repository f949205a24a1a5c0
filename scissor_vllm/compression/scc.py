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
import itertools
import math
import operator
from dataclasses import dataclass
from decimal import Decimal
from numbers import Rational
from types import ModuleType
from typing import Any

import torch

from scissor_vllm.compression import similarity
from scissor_vllm.compression.components import (
    AnySimilarity,
    Components,
    SpanningTrees,
    by_lowest_node,
    count_components,
    degrees,
    forest_labels,
    in_order,
    maximum_spanning_trees,
    threshold_labels,
)
from scissor_vllm.compression.products import Products
from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.similarity import RESOLUTION
from scissor_vllm.compression.sums import means
from scissor_vllm.compression.validation import (
    check_finite,
    check_num_retained,
    check_similarity_threshold,
    check_tokens,
    checked_frames,
)
from scissor_vllm.compression.video import Video
from scissor_vllm.retention import num_retained_tokens

EXHAUSTIVE_TOKENS = 128
"""Up to this many tokens every candidate threshold is tried, from below. Above, the search halves
the candidates: the number of components is not everywhere monotone in the threshold, because the
means that the temporal step compares change with it, so a lower threshold that also leaves K may
go unseen."""

LINE_STEPS = 10
"""After this many guesses along a straight line the search halves what is left, which always ends
soon. 3136 clustered or random tokens take 5 to 10 guesses in all."""

MAX_FRAME_PAIRS = 1 << 20
"""Most pairs of frames (T times the window) of a video that a server compresses, so that many small
frames cannot hold up the others."""

MAX_TOKEN_PAIRS = 1 << 31
"""Most pairs of tokens (N times the tokens of a window), likewise: some 0.3 s on an H200."""

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
    temporal_window: int | None = None,
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
        temporal_window: frames; the temporal step joins, and the merge that follows goes to, only
            what is of the same so many frames, counted from the first. All windows share the
            threshold and the budget. With a budget of fewer rows than windows, they are as long as
            gives K. Where windows show the same, last bits decide in which of them a cut is. By
            default, as in the paper, the whole video is one.

    Raises:
        TypeError: tokens are not a floating tensor, or the chosen argument is not a number.
        ValueError: none or several of the three given, one out of its range, tokens of another
            shape, or a token that is not finite in float32.

    Source: LLaVA-Scissor (arXiv 2506.21862), with exact components and a cut for the budget.
    """
    num_tokens = check_tokens(tokens)
    num_retained = _num_retained(num_tokens, similarity_threshold, retention_ratio, num_retained)
    window = _window(len(tokens), temporal_window, num_retained)
    if num_tokens > EXHAUSTIVE_TOKENS:
        compressed = _on_gpu(tokens, similarity_threshold, num_retained, window)
        if compressed is not None:
            return compressed
    frames = tokens.float()
    check_finite(frames)
    video = Video(frames, window)
    if num_retained is not None:
        threshold, kept, part = _within_budget(video, num_retained)
    else:
        assert similarity_threshold is not None
        threshold = float(similarity_threshold)
        kept, part = _above_threshold(video, threshold)
    rows, assignment = video.merged(kept, part)
    return CompressedTokens(rows.to(tokens.dtype), assignment, threshold)


def _num_retained(
    num_tokens: int,
    similarity_threshold: float | None,
    retention_ratio: float | Decimal | Rational | None,
    num_retained: int | None,
) -> int | None:
    """Return the K that is asked for, None for a threshold; all are checked."""
    budgets = [similarity_threshold, retention_ratio, num_retained]
    if sum(value is not None for value in budgets) != 1:
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
    return num_retained


def _window(num_frames: int, asked: int | None, num_retained: int | None) -> int:
    """Return the frames of a window, at most T."""
    if asked is None:
        return num_frames
    if isinstance(asked, bool) or not isinstance(asked, int):
        raise TypeError(f"temporal_window must be an int, got {asked!r}")
    if asked < 1:
        raise ValueError(f"temporal_window must be 1 frame or more, got {asked}")
    return min(num_frames, max(asked, -(-num_frames // (num_retained or num_frames))))


@torch.no_grad()
def compress_for_serving(
    tokens: torch.Tensor, num_retained: int, temporal_window: int | None = None
) -> CompressedTokens:
    """Return what ``compress`` does, within the time and memory that a server grants one video.

    With Triton and a GPU, videos of up to 8192 tokens are compressed without a host
    synchronization: the host prepares the language model's step meanwhile, and the threshold stays
    on the device. Tokens that are not finite count as zeros there, as do those whose largest
    magnitude is not between 2^-40 and 2^40.

    Time is bounded: a window has at most ``MAX_FRAME_PAIRS`` / T frames, and at most
    ``MAX_TOKEN_PAIRS`` / N tokens. A longer one, or the whole video, is divided.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P.
        num_retained: K, 1 <= K <= N.
        temporal_window: as for ``compress``.

    Raises:
        TypeError, ValueError: as :func:`compress`, or the video is beyond what a server compresses.
    """
    num_tokens = check_tokens(tokens)
    check_num_retained(num_retained, num_tokens)
    cuda = _cuda_kernels(tokens.device) if num_tokens > EXHAUSTIVE_TOKENS else None
    if cuda is None:
        window = _served_window(tokens, num_retained, temporal_window)
        return compress(tokens, num_retained=num_retained, temporal_window=window)
    if not cuda.takes(tokens):
        raise ValueError(
            f"a server's GPU compresses videos of at most {cuda.MAX_TOKENS} tokens, and "
            f"{cuda.MAX_PER_FRAME} a frame, got {tokens.shape[0]} frames of {tokens.shape[1]}: "
            "send fewer or smaller frames"
        )
    window = _served_window(tokens, num_retained, temporal_window)
    compressed: CompressedTokens = cuda.compress_for_serving(
        tokens, num_retained, _settings(cuda, window)
    )
    return compressed


def _served_window(tokens: torch.Tensor, num_retained: int, asked: int | None) -> int:
    """Return the frames of a window, no more than a server compresses together."""
    num_frames, per_frame, _ = tokens.shape
    window = _window(num_frames, asked, num_retained)
    num_pairs = num_frames * per_frame**2
    most = max(1, min(MAX_FRAME_PAIRS // num_frames, MAX_TOKEN_PAIRS // num_pairs))
    if window > most and -(-num_frames // most) > num_retained:
        raise ValueError(
            f"a server compresses {num_frames} frames of {per_frame} tokens in windows of {most} "
            f"frames, each of one row or more, got {num_retained} rows: keep more rows, or send "
            "fewer frames"
        )
    return min(window, most)


@torch.no_grad()
def represent(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return the K representatives that both steps leave, without the merge that follows them.

    A token's row is the one of its component: ``compress`` may merge it into another, that it
    resembles more.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`compress`.
    """
    frames = checked_frames(tokens, num_retained)
    threshold, kept, assignment = _within_budget(Video(frames, len(frames)), num_retained)
    return CompressedTokens(kept.to(tokens.dtype), assignment, threshold)


def _on_gpu(
    tokens: torch.Tensor, threshold: float | None, num_retained: int | None, window: int
) -> CompressedTokens | None:
    """Return the result by the GPU's kernels, None where they are not for these tokens."""
    cuda = _cuda_kernels(tokens.device)
    if cuda is None or not cuda.takes(tokens):
        return None
    settings = _settings(cuda, window)
    compressed: CompressedTokens | None = cuda.compress(tokens, threshold, num_retained, settings)
    return compressed


def _settings(cuda: ModuleType, window: int) -> Any:
    return cuda.SearchSettings(LINE_STEPS, THRESHOLD_MARGIN, window)


def warm_up_shapes(max_tokens: int, device: torch.device) -> list[tuple[int, int, float]]:
    """Return shapes and ratios (T, P, K/N) of the calls after which nothing more is prepared.

    Args:
        max_tokens: N of the largest video.
        device: that compresses.
    """
    cuda = _cuda_kernels(device)
    shapes: list[tuple[int, int, float]] = cuda.warm_up_shapes(max_tokens, device) if cuda else []
    num_tokens = min(max_tokens, math.isqrt(similarity.BLOCK_ELEMENTS))
    return shapes or [(max(1, num_tokens // 256), min(num_tokens, 256), 0.1)]


def _cuda_kernels(device: torch.device) -> ModuleType | None:
    """Return the package of kernels if the device runs it."""
    if device.type != "cuda":
        return None
    try:
        from scissor_vllm.compression import cuda
    except ImportError:
        # Without Triton the code here runs on the GPU too.
        return None
    return cuda


def _above_threshold(video: Video, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the representatives that both steps leave at a threshold and the tokens' components.

    (K, D) float32 and (N,) int64.
    """
    labels = threshold_labels(video.spatial, threshold)
    num_spatial = count_components(labels)
    in_frames = in_order(labels, degrees(video.spatial, threshold), num_spatial)
    representatives = video.means(in_frames)
    temporal = video.across(in_frames, representatives)
    labels = threshold_labels(temporal, threshold)
    across_frames = in_order(labels, degrees(temporal, threshold), count_components(labels))
    kept = means(representatives, across_frames.part, across_frames.num_parts)
    return kept, across_frames.part[in_frames.part]


def _within_budget(video: Video, num_retained: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Return the threshold that was found, exactly K representatives and the tokens' components.

    (K, D) float32 and (N,) int64.
    """
    result = _Search(video).find(num_retained)
    num_spatial = len(result.representatives)
    degree = degrees(video.spatial, result.threshold)
    in_frames = in_order(result.spatial.part, degree, num_spatial)
    # What was found counts representatives by their lowest token, the paper by its own order.
    position = torch.empty_like(result.spatial.part[:num_spatial])
    position = position.scatter(0, result.spatial.part, in_frames.part)
    representatives = torch.empty_like(result.representatives)
    representatives[position] = result.representatives
    degree = torch.empty_like(position)
    degree[position] = degrees(result.temporal, result.threshold)
    left, right = position[result.trees.left], position[result.trees.right]
    num_merges = num_spatial - num_retained
    if result.tied:
        # Which of several equal merges come first is decided by the paper's order.
        trees = maximum_spanning_trees(video.across(in_frames, representatives))
        left, right = trees.left, trees.right
    labels = forest_labels(num_spatial, left[:num_merges], right[:num_merges])
    part = in_order(labels, degree, num_retained).part
    return result.threshold, means(representatives, part, num_retained), part[in_frames.part]


@dataclass(frozen=True)
class _Found:
    """A threshold, and what its spatial step leaves, numbered by lowest token."""

    threshold: float
    spatial: Components
    """Of the N tokens."""
    representatives: torch.Tensor
    """(S, D) float32."""
    temporal: AnySimilarity
    trees: SpanningTrees
    tied: bool
    """Whether the last merge that is made is as strong as the first that is not."""
    leaves_enough: bool
    """Whether some threshold of the interval leaves at least K. The cut leaves K if not, too, but
    at no threshold of the interval."""


class _Search:
    """Finds the threshold of a budget.

    Between two neighbouring weights of the spatial trees the spatial step does not change. In such
    an interval [start, end) the number of components rises with the threshold, so its largest value
    tells whether the interval holds a threshold that leaves K.
    """

    def __init__(self, video: Video) -> None:
        self._video = video
        self._flat = video.flat
        self._num_sets = video.spatial.num_sets
        self._trees = maximum_spanning_trees(video.spatial)
        self._starts: list[float] = [-1.0, *reversed(self._trees.weight.tolist())]

    def find(self, num_retained: int) -> _Found:
        """Return a threshold whose two steps leave at least K, no lower one found that does."""
        # The temporal step only joins: an interval with fewer than K spatial components is out.
        first = max(0, num_retained - self._num_sets)
        intervals = [i for i in range(first, len(self._starts)) if self._is_wide(i)]
        if len(self._flat) <= EXHAUSTIVE_TOKENS:
            cuts = (self._cut(interval, num_retained) for interval in intervals)
            return next(cut for cut in cuts if cut.leaves_enough)
        interval, products = self._bisect(intervals, num_retained, self._video.products())
        return self._cut(interval, num_retained, products)

    def _bisect(
        self, intervals: list[int], num_retained: int, products: list[Products] | None
    ) -> tuple[int, list[Products] | None]:
        """Return an interval that was counted and leaves at least K components.

        And the products of its spatial components, from those of the tokens if they are given. The
        last interval leaves every token, so it needs no count.
        """
        low, high = 0, len(intervals) - 1
        # The count grows about exponentially: the straight line between the logarithms at the two
        # ends meets K. An end that stays where it is twice counts half (the Illinois rule).
        below = math.log(num_retained)
        above = math.log((len(self._flat) + 0.5) / num_retained)
        moved_high: bool | None = None
        for step in itertools.count():
            if low == high:
                break
            share = below / (below + above) if step < LINE_STEPS else 0.5
            middle = min(low + int(share * (high - low)), high - 1)
            tokens = self._spatial(intervals[middle])
            joined = [product.joined(tokens) for product in products] if products else None
            temporal = self._video.across(tokens, products=joined)
            highest = _float32_below(self._end(intervals[middle]) - RESOLUTION)
            count = count_components(threshold_labels(temporal, highest))
            if count >= num_retained:
                # What is left to try joins these further.
                high, products = middle, joined
                above = math.log((count + 0.5) / num_retained)
                below = below / 2 if moved_high is True else below
                moved_high = True
            else:
                low = middle + 1
                below = math.log((num_retained + 0.5) / count)
                above = above / 2 if moved_high is False else above
                moved_high = False
        return intervals[high], products

    def _is_wide(self, interval: int) -> bool:
        """Return whether thresholds are told apart in an interval: alike tokens have many weights
        side by side.
        """
        return self._end(interval) - self._starts[interval] > RESOLUTION

    def _spatial(self, interval: int) -> Components:
        """Return the spatial components of an interval, by their lowest token."""
        num_tokens, end = len(self._flat), self._end(interval)
        num_edges = len(self._starts) - bisect.bisect_left(self._starts, end, lo=1)
        num_spatial = num_tokens - num_edges
        left, right = self._trees.left[:num_edges], self._trees.right[:num_edges]
        return by_lowest_node(forest_labels(num_tokens, left, right), num_spatial)

    def _end(self, interval: int) -> float:
        return self._starts[interval + 1] if interval + 1 < len(self._starts) else math.inf

    def _cut(
        self, interval: int, num_retained: int, products: list[Products] | None = None
    ) -> _Found:
        """Return the smallest threshold of the interval that leaves at least K, with its margin."""
        # What is above this joins at every threshold of the interval that is told from its end.
        end = self._end(interval) - RESOLUTION
        spatial = self._spatial(interval)
        representatives = self._video.means(spatial)
        temporal = self._video.across(spatial, representatives, products)
        trees = maximum_spanning_trees(temporal)
        weights: list[float] = trees.weight.tolist()
        num_merges = len(representatives) - num_retained
        # What is above the threshold is merged: at most the num_merges strongest may be.
        start = max([self._starts[interval], *weights[num_merges : num_merges + 1]])
        num_above = bisect.bisect_left(weights, -start - RESOLUTION, key=operator.neg)
        end = min([end, 1.0, *weights[max(num_above - 1, 0) : num_above]])
        threshold = _float32(start + min((end - start) / 2, THRESHOLD_MARGIN))
        if not start <= threshold < end:
            threshold = start
        tied = 0 < num_merges < len(weights) and weights[num_merges - 1] == weights[num_merges]
        leaves_enough = start < self._end(interval) - RESOLUTION
        return _Found(threshold, spatial, representatives, temporal, trees, tied, leaves_enough)


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


def _float32_below(value: float) -> float:
    """Return the largest float32 below the value; what is above it is at least the value."""
    if math.isinf(value):
        return value
    exact = torch.tensor([value, -math.inf], dtype=torch.float32, device="cpu")
    return torch.nextafter(exact[0], exact[1]).item()
