"""The last step: every token is merged into its most similar representative."""

from collections.abc import Sequence

import torch

from scissor_vllm.compression.similarity import most_similar
from scissor_vllm.compression.sums import sizes, sums


def merged(
    flat: torch.Tensor,
    representatives: torch.Tensor,
    windows: tuple[Sequence[int], Sequence[int]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (representative + sum of its tokens) / (number of its tokens + 1), and the assignment.

    Args:
        flat: (N, D) float32, all tokens of a video.
        representatives: (K, D) floating.
        windows: numbers of tokens and of representatives of each window, at least one each. A token
            goes to a representative of its window. Tokens of a window are contiguous.

    Returns:
        The rows (K, D) float32, and the row of highest cosine for each token, (N,) int64.
    """
    num_tokens, num_rows = windows or ([len(flat)], [len(representatives)])
    first = 0
    nearest = []
    for tokens, rows in zip(flat.split(num_tokens), representatives.split(num_rows), strict=True):
        nearest.append(most_similar(tokens, rows) + first)
        first += len(rows)
    assignment = torch.cat(nearest)
    count = sizes(assignment, len(representatives))
    total = sums(flat, assignment, count).add_(representatives)
    return total.div_(count[:, None] + 1).float(), assignment
