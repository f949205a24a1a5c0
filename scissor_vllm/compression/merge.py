"""The last step: every token is merged into the representative that it resembles most."""

import torch

from scissor_vllm.compression.similarity import most_similar
from scissor_vllm.compression.sums import sizes, sums


def merged(
    flat: torch.Tensor,
    representatives: torch.Tensor,
    windows: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (representative + sum of its tokens) / (number of its tokens + 1), and whose they are.

    Args:
        flat: (N, D) float32, all tokens of a video.
        representatives: (K, D) floating.
        windows: of each token (N,) and of each representative (K,), int64, where a token goes to a
            representative of its own window; each window has one.

    Returns:
        The rows (K, D) float32, and of each token the row of its representative, (N,) int64: the
        one of highest cosine.
    """
    assignment = most_similar(flat, representatives, windows)
    count = sizes(assignment, len(representatives))
    total = sums(flat, assignment, count).add_(representatives)
    return total.div_(count[:, None] + 1).float(), assignment
