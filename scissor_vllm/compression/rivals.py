"""Published methods and a classic, to compare with at equal K. Plain torch on any device."""

import itertools

import torch

from scissor_vllm.compression import similarity
from scissor_vllm.compression.linkage import distances, unit_integers
from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.selection import selected
from scissor_vllm.compression.sums import sizes, weighted_sums
from scissor_vllm.compression.validation import checked_frames

KERNEL_SHARE = 0.25
"""KiToke's kernel width as a share of the tokens' median squared distance. The paper's width is a
constant for one model's features."""

MEDIAN_TOKENS = 96
"""Evenly spaced tokens of which that median is taken."""

FLOC_FRAMES = 32
"""Frames of a FLoC block."""

FLOC_TOKENS = 1 << 13
"""Most tokens of a FLoC block, whose similarities take 256 MiB."""

_CANDIDATES = 32
"""Tokens whose gains FLoC computes again first."""


@torch.no_grad()
def compress_by_kitoke(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return tokens sampled by rarity and merged inside scenes.

    A token's density is the sum of a Gaussian kernel over all tokens, its weight one over the
    density. Exactly K tokens are drawn with probabilities proportional to their weights, none above
    1, by systematic sampling; the draw's start follows from the tokens' bits. A scene ends where
    two frames differ by more than the mean and a standard deviation of all such differences. Every
    other token is merged, by weight, into the drawn token of its scene of highest cosine; in a
    scene without one, into that of the video.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`.

    Source: KiToke (arXiv 2604.03414). Kernel width and scene threshold are this package's own.
    """
    frames = checked_frames(tokens, num_retained)
    flat = frames.reshape(-1, frames.shape[-1]).double()
    kept, weight = draw_by_rarity(frames, num_retained)
    scene = _scenes(frames)
    assignment = _nearest_of_scene(frames.reshape(-1, frames.shape[-1]), kept, scene)
    assignment[kept] = torch.arange(num_retained, device=kept.device)
    count = sizes(assignment, num_retained)
    # Weights of a row add up to 1, so no sum overflows.
    share = (
        weight
        / torch.zeros_like(weight[:num_retained]).index_add(0, assignment, weight)[assignment]
    )
    rows = weighted_sums(flat, share, assignment, count)
    largest = torch.finfo(tokens.dtype).max
    return CompressedTokens(rows.clamp(-largest, largest).to(tokens.dtype), assignment)


def draw_by_rarity(frames: torch.Tensor, num_drawn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KiToke's drawn tokens, (K,) int64 ascending, and all tokens' weights, (N,) float64.

    Args:
        frames: (T, P, D) float32, finite.
        num_drawn: K, 1 <= K <= T*P.
    """
    weight = 1 / _density(frames.reshape(-1, frames.shape[-1]).double())
    return _systematic(_inclusion(weight, num_drawn), _start(frames), num_drawn), weight


@torch.no_grad()
def select_by_floc(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return the tokens that cover the others best, chosen greedily in blocks of 32 frames.

    K is shared out by the blocks' lengths. In a block the chosen set S grows by the token that adds
    most to the sum over all tokens of the cosine to their nearest in S; of equals the first.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P. Of long frames a block has fewer.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`.

    Source: FLoC (arXiv 2511.00141), facility location by lazy greedy choice. It does not merge.
    """
    frames = checked_frames(tokens, num_retained)
    num_frames, per_frame, width = frames.shape
    num_tokens = num_frames * per_frame
    size = min(FLOC_FRAMES * per_frame, max(1, FLOC_TOKENS // per_frame) * per_frame, FLOC_TOKENS)
    kept = []
    for start in range(0, num_tokens, size):
        stop = min(start + size, num_tokens)
        share = stop * num_retained // num_tokens - start * num_retained // num_tokens
        if share:
            block = frames.reshape(num_tokens, width)[start:stop]
            kept.append(_cover(1 - distances(block), share) + start)
    return selected(tokens, torch.cat(kept))


@torch.no_grad()
def select_k_center(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return the first token and, one after the other, the one furthest from all chosen before.

    Distance is 1 - cosine; of equally far tokens the first. The largest distance of any token to
    the chosen ones is at most twice the least possible, where distances obey the triangle
    inequality.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`.

    Source: T. Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985).
    """
    frames = checked_frames(tokens, num_retained)
    units, scale = unit_integers(frames.reshape(-1, frames.shape[-1]))
    nearest = torch.full_like(scale, torch.inf)
    kept = torch.zeros(num_retained, dtype=torch.int64, device=tokens.device)
    for place in range(num_retained):
        if place:
            kept[place] = _first_of_largest(nearest)
        token = kept[place]
        # The integers' products are exact, so all devices see the same ties.
        distance = 1 - (units @ units[token]) * (scale * scale[token])
        grid = (distance * 2.0**24).round()
        nearest = torch.minimum(nearest, grid)
        nearest[token] = -torch.inf
    return selected(tokens, kept)


def _first_of_largest(values: torch.Tensor) -> torch.Tensor:
    """Return the lowest index of the largest value, ()."""
    return (values == values.max()).to(torch.uint8).argmax()


def _density(flat: torch.Tensor) -> torch.Tensor:
    """Return the sum of each token's kernel over all tokens, (N,) float64, at least 1."""
    sample = flat[:: -(-len(flat) // MEDIAN_TOKENS)]
    median = _squared_distances(sample, sample).median()
    width = torch.where(median > 0, KERNEL_SHARE * median, 1.0)
    step = max(1, similarity.BLOCK_ELEMENTS // len(flat))
    parts = [
        (-_squared_distances(rows, flat) / width).exp().sum(dim=1) for rows in flat.split(step)
    ]
    return torch.cat(parts).clamp(min=1.0)


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    product = rows @ columns.T
    square = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    return (square - 2 * product).clamp_(min=0.0)


def _inclusion(weight: torch.Tensor, num_drawn: int) -> torch.Tensor:
    """Return min(1, c * weight) with the c for which they add up to K, (N,) float64."""
    ordered = weight.sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)
    certain = torch.arange(len(weight), device=weight.device)
    factor = (num_drawn - certain) / rest
    # With so many certain ones, the next is not: the first number for which that holds.
    fits = ((factor * ordered <= 1) & (certain < num_drawn)).to(torch.uint8)
    at = fits.argmax()
    factor = torch.where(fits[at] == 1, factor[at], torch.inf)
    return (weight * factor).clamp(max=1.0)


def _systematic(chance: torch.Tensor, start: float, num_drawn: int) -> torch.Tensor:
    """Return K tokens drawn with given chances that add up to K, (K,) int64 ascending."""
    place = torch.arange(num_drawn, device=chance.device)
    drawn = torch.searchsorted(chance.cumsum(0), place + start, right=True)
    # Rounding may meet a token twice or leave the last out.
    drawn = (drawn - place).cummax(0).values + place
    return torch.minimum(drawn, len(chance) - num_drawn + place)


def _start(frames: torch.Tensor) -> float:
    """Return a number in [0, 1) that follows from the tokens' bits."""
    bits = int(frames.contiguous().view(torch.int32).long().sum())
    return (bits * 2654435761 % 2**32) / 2**32


def _scenes(frames: torch.Tensor) -> torch.Tensor:
    """Return the scene of each token, (N,) int64 ascending."""
    num_frames, per_frame, _ = frames.shape
    differences = [_frame_difference(left, right) for left, right in itertools.pairwise(frames)]
    cuts = torch.zeros(num_frames, dtype=torch.int64, device=frames.device)
    if len(differences) > 1:
        difference = torch.stack(differences)
        cuts[1:] = (difference > difference.mean() + difference.std()).long()
    return cuts.cumsum(0).repeat_interleave(per_frame)


def _frame_difference(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the mean distance at equal places plus that to the other frame's nearest token."""
    units, scale = unit_integers(torch.cat([left, right]))
    size = len(left)
    cosine = (units[size:] @ units[:size].T) * (scale[size:, None] * scale[:size])
    return (1 - cosine.diagonal()).mean() + (1 - cosine.amax(dim=1)).mean()


def _nearest_of_scene(flat: torch.Tensor, kept: torch.Tensor, scene: torch.Tensor) -> torch.Tensor:
    """Return the kept token of each token's scene that it resembles most, (N,) int64."""
    units, scale = unit_integers(flat)
    others, other_scale = units[kept], scale[kept]
    step = max(1, similarity.BLOCK_ELEMENTS // len(kept))
    nearest = []
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        cosine = (units[part] @ others.T) * (scale[part, None] * other_scale)
        grid = (cosine * 2.0**24).round()
        apart = scene[part, None] != scene[kept]
        # A scene of which none was drawn looks at all.
        apart &= ~apart.all(dim=1, keepdim=True)
        grid.masked_fill_(apart, -torch.inf)
        best = grid == grid.amax(dim=1, keepdim=True)
        nearest.append(best.to(torch.uint8).argmax(dim=1))
    return torch.cat(nearest)


def _cover(similarities: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """Return k tokens that cover a block, (k,) int64 in the order of choice.

    On a GPU all gains are computed in every step. To ask the device which are stale would take
    longer.

    Args:
        similarities: (n, n) float32, symmetric multiples of 2^-24: sums in float64 are exact.
        num_chosen: k.
    """
    choose = cover_eagerly if similarities.is_cuda else cover_lazily
    return choose(similarities, num_chosen)


def cover_eagerly(similarities: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """Return what covers a block, from all tokens' gains in every step. No host synchronization."""
    best = torch.full_like(similarities[0], -1.0)
    is_chosen = torch.zeros_like(best, dtype=torch.bool)
    chosen = torch.zeros(num_chosen, dtype=torch.int64, device=best.device)
    for place in range(num_chosen):
        gain = (similarities - best).clamp_(min=0.0).sum(dim=1, dtype=torch.float64)
        token = _first_of_largest(gain.masked_fill_(is_chosen, -torch.inf))[None]
        chosen[place : place + 1] = token
        is_chosen.index_fill_(0, token, value=True)
        best = torch.maximum(best, similarities.index_select(0, token)[0])
    return chosen


def cover_lazily(similarities: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """Return what covers a block, from the gains that may be the largest.

    Gains only fall as the set grows, so old ones are upper bounds. Of many equal ones twice as many
    are computed each time.
    """
    best = torch.full_like(similarities[0], -1.0)
    bound = (similarities - best).sum(dim=1, dtype=torch.float64)
    fresh = torch.ones_like(bound, dtype=torch.bool)
    chosen = torch.zeros(num_chosen, dtype=torch.int64, device=best.device)
    for place in range(num_chosen):
        num_candidates = _CANDIDATES
        while True:
            token = _first_of_largest(bound)
            if fresh[token]:
                break
            stale = torch.where(fresh, -torch.inf, bound)
            rows = stale.topk(min(num_candidates, len(stale))).indices
            gain = (similarities[rows] - best).clamp_(min=0.0).sum(dim=1, dtype=torch.float64)
            bound[rows] = torch.where(torch.isinf(bound[rows]), bound[rows], gain)
            fresh[rows] = True
            num_candidates *= 2
        chosen[place] = token
        bound[token] = -torch.inf
        best = torch.maximum(best, similarities[token])
        fresh.zero_()
        fresh[token] = True
    return chosen
