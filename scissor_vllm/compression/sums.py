"""Sums of rows by group, the same on every run and device."""

import torch

from scissor_vllm.compression import similarity


def sizes(part: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Return the number of rows of each part, (parts,) int64."""
    count = torch.zeros(num_parts, dtype=torch.int64, device=part.device)
    return count.scatter_add(0, part, torch.ones_like(part))


def sums(rows: torch.Tensor, part: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Return the sum of each part's rows, (parts, D) float64.

    Rows are added in the order of their number, so the result does not depend on how a device
    schedules its threads; in float64, because thousands of like rows drift in float32 and large
    ones overflow.

    Args:
        rows: (n, D) floating.
        part: (n,) int64, the part of each row.
        count: (parts,) int64, the number of rows of each part.
    """
    order, first = grouped(part, count)
    step = max(1, similarity.BLOCK_ELEMENTS // (2 * len(rows)))
    return torch.cat(
        [
            torch.nn.functional.embedding_bag(
                order, rows[:, start : start + step].double(), first, mode="sum"
            )
            for start in range(0, rows.shape[1], step)
        ],
        dim=1,
    )


def weighted_sums(
    rows: torch.Tensor, weight: torch.Tensor, part: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """Return the sum of each part's rows times their weights, (parts, D) in the rows' dtype."""
    order, first = grouped(part, count)
    return torch.nn.functional.embedding_bag(
        order, rows, first, mode="sum", per_sample_weights=weight[order]
    )


def grouped(part: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows by part and number, and where each part begins among them."""
    return torch.argsort(part, stable=True), torch.cumsum(count, 0) - count


def means(rows: torch.Tensor, part: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Return the plain mean of each part's rows, (parts, D) float32; see :func:`sums`."""
    count = sizes(part, num_parts)
    return sums(rows, part, count).div_(count[:, None]).float()
