"""The interface of compression methods and their result."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class CompressedTokens:
    """The kept tokens of one video and the row of each input token."""

    tokens: torch.Tensor
    """(K, D), dtype and device of the input, in the order of space and time."""
    assignment: torch.Tensor
    """(T*P,) int64, on the input's device: the row that each input token was merged into, -1 for a
    token that a selecting method dropped."""
    similarity_threshold: float | None = None
    """Cosine above which tokens are connected: the given one, or the one found for the budget. With
    average linkage, the mean cosine of the last two groups that were joined."""
    threshold_on_device: torch.Tensor | None = None
    """The threshold without host synchronization: () float64 on the input's device. NaN means none.
    Infinity means a defect, fewer than K parts, which the reader reports."""


class Compressor(Protocol):
    """A method: exactly ``num_retained`` rows from one video's tokens."""

    def __call__(self, tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
        """Return K rows for tokens (T, P, D), for any K in 1..T*P and any finite input."""
        ...
