"""Representative members of rows, for models that need a position for each row."""

import torch
from torch.nn.functional import cosine_similarity

from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.sums import sizes, sums

_TOKENS_AT_ONCE = 4096
"""Most tokens in float32 at a time: 56 MiB at 3584 values each."""


@torch.no_grad()
def representative_members(tokens: torch.Tensor, compressed: CompressedTokens) -> torch.Tensor:
    """Return the member nearest to each row, (K,) int64 in 0..N-1.

    The nearest member has the highest cosine, computed in float32; ties go to the first. A row
    without members takes the member of the row before it. No host synchronization.

    Args:
        tokens: (T, P, D) floating, the input of compression; N = T*P.
        compressed: its output, on the same device.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    rows, assignment = compressed.tokens, compressed.assignment
    likeness = torch.cat(
        [
            cosine_similarity(block.float(), rows[row_of.clamp(min=0)].float(), dim=-1)
            for block, row_of in zip(
                flat.split(_TOKENS_AT_ONCE), assignment.split(_TOKENS_AT_ONCE), strict=True
            )
        ]
    )
    num_rows = len(rows)
    row_of = _row_of(assignment, num_rows)
    best = likeness.new_full((num_rows + 1,), -torch.inf)
    best = best.scatter_reduce(0, row_of, likeness, "amax")
    number = torch.arange(len(flat), device=flat.device)
    candidate = torch.where(likeness >= best[row_of], number, len(flat))
    first = torch.full((num_rows + 1,), len(flat), dtype=torch.int64, device=flat.device)
    first = first.scatter_reduce(0, row_of, candidate, "amin")[:num_rows]
    return _filled(first, len(flat))


@torch.no_grad()
def member_means(
    values: torch.Tensor, assignment: torch.Tensor, members: torch.Tensor
) -> torch.Tensor:
    """Return the mean of the members' values for each row, (K, E) in their dtype.

    Args:
        values: (N, E) floating, further values of the compressed tokens.
        assignment: (N,) int64, the row of each token, -1 for none.
        members: (K,) int64, the representative member of each row. A row without members takes its
            values.
    """
    num_rows = len(members)
    row_of = _row_of(assignment, num_rows)
    count = sizes(row_of, num_rows + 1)
    total = sums(values, row_of, count)[:num_rows]
    mean = (total / count[:num_rows, None].clamp(min=1)).to(values.dtype)
    return torch.where(count[:num_rows, None] > 0, mean, values[members])


def _row_of(assignment: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the row of each token, with dropped tokens in an extra last row."""
    return torch.where(assignment < 0, num_rows, assignment)


def _filled(numbers: torch.Tensor, missing: int) -> torch.Tensor:
    """Return the numbers with each missing one replaced by the number before it, or 0."""
    place = torch.arange(len(numbers), device=numbers.device)
    last = torch.where(numbers == missing, 0, place).cummax(0).values
    filled = numbers[last]
    return torch.where(filled == missing, 0, filled)
