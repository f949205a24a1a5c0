"""What is measured of a compressed sequence of real features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from scissor_vllm.compression import CompressedTokens, Compressor

WINDOW_FRAMES = 4
"""Frames of the windows that coverage inside the window looks at."""

COVERED_QUANTILE = 0.05
NUM_NEEDLES = 16
RECOVERED = 0.9
"""Cosine of a needle to its nearest row from which it counts as recovered."""

NOISE = 0.05
"""Standard deviation of the noise that stability is measured with, in units of the tokens'."""


@dataclass(frozen=True)
class Figures:
    """The figures of one method, ratio and sequence."""

    coverage: float
    """5 % quantile over tokens: the cosine to the nearest row."""
    coverage_in_window: float
    """The same, to the nearest row that has a member in the token's window of 4 frames."""
    fvu: float
    """Fraction of variance unexplained: squared error when a token is replaced by its row, over
    the tokens' variance. A dropped token's row is the nearest one."""
    needles: float
    """Share of needles (single tokens of another sequence, each in one frame) that have a row of
    cosine 0.9 or more."""
    change_by_noise: float
    """Squared change of what tokens are replaced by, over the variance, when 5 % noise is added."""
    change_by_shift: float
    """The same on the common frames, when the sequence starts one frame later."""


def measure(
    compress: Compressor, frames: torch.Tensor, needles: torch.Tensor, num_retained: int, seed: int
) -> Figures:
    """Return a method's figures.

    Args:
        compress: the method.
        frames: (T + 1, P, D) float32; the sequence is the first T.
        needles: (n, P, D) float32, tokens of another sequence to take needles from.
        num_retained: K.
        seed: of needles and noise.
    """
    tokens = frames[:-1]
    num_tokens = tokens.shape[0] * tokens.shape[1]
    flat = tokens.reshape(num_tokens, -1)
    variance = (flat - flat.mean(dim=0)).square().sum()
    compressed = compress(tokens, num_retained)
    cosine = normalize(flat, dim=1) @ normalize(compressed.tokens, dim=1).T
    replaced = _replaced(compressed, cosine)

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens.shape, generator=generator) * (NOISE * flat.std())
    noisy = _reconstruct(compress, tokens + noise, num_retained)
    shifted = _reconstruct(compress, frames[1:], num_retained)
    common = num_tokens - tokens.shape[1]
    shift = (shifted[:common] - replaced[tokens.shape[1] :]).square().sum()
    return Figures(
        coverage=_covered(cosine.amax(dim=1)),
        coverage_in_window=_covered(_in_window(compressed, cosine, tokens.shape[1])),
        fvu=float((flat - replaced).square().sum() / variance),
        needles=_needles_recovered(compress, tokens, needles, num_retained, generator),
        change_by_noise=float((noisy - replaced).square().sum() / variance),
        change_by_shift=float(shift / variance * num_tokens / common),
    )


def _covered(nearest: torch.Tensor) -> float:
    return float(torch.quantile(nearest, COVERED_QUANTILE))


def _in_window(compressed: CompressedTokens, cosine: torch.Tensor, per_frame: int) -> torch.Tensor:
    """Return each token's cosine to the nearest row with a member in its window, -1 for none."""
    num_tokens, num_rows = cosine.shape
    window = torch.arange(num_tokens) // (per_frame * WINDOW_FRAMES)
    kept = compressed.assignment >= 0
    has_member = torch.zeros(int(window[-1]) + 1, num_rows, dtype=torch.bool)
    has_member[window[kept], compressed.assignment[kept]] = True
    return cosine.masked_fill(~has_member[window], -1.0).amax(dim=1)


def _replaced(compressed: CompressedTokens, cosine: torch.Tensor) -> torch.Tensor:
    """Return the row of each token, (N, D)."""
    row = torch.where(compressed.assignment >= 0, compressed.assignment, cosine.argmax(dim=1))
    return compressed.tokens[row]


def _reconstruct(compress: Compressor, tokens: torch.Tensor, num_retained: int) -> torch.Tensor:
    compressed = compress(tokens, num_retained)
    flat = tokens.reshape(-1, tokens.shape[-1])
    return _replaced(compressed, normalize(flat, dim=1) @ normalize(compressed.tokens, dim=1).T)


def _needles_recovered(
    compress: Compressor,
    tokens: torch.Tensor,
    source: torch.Tensor,
    num_retained: int,
    generator: torch.Generator,
) -> float:
    flat = tokens.reshape(-1, tokens.shape[-1]).clone()
    others = source.reshape(-1, source.shape[-1])
    places = torch.randperm(len(flat), generator=generator)[:NUM_NEEDLES]
    needles = others[torch.randperm(len(others), generator=generator)[:NUM_NEEDLES]]
    flat[places] = needles
    rows = compress(flat.view_as(tokens), num_retained).tokens
    nearest = (normalize(needles, dim=1) @ normalize(rows, dim=1).T).amax(dim=1)
    return float((nearest >= RECOVERED).float().mean())
