"""Kernels that place computed rows where merged patches take their values."""

import torch
import triton

from scissor_vllm.worker.row_placement_kernels import place_row, subtract_rows

_VALUES_OF_WARP = 1024


def row_differences(rows: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Return the differences of pairs of rows.

    Args:
        rows: (M, D), each contiguous.
        pairs: row indices of minuends and of subtrahends, int32 (2, T, L).

    Returns:
        (T, L, D), of the rows' dtype.
    """
    _, num_frames, num_pairs = pairs.shape
    differences = rows.new_empty(num_frames, num_pairs, rows.shape[1])
    width = rows.shape[1]
    subtract_rows[(num_frames * num_pairs,)](
        rows,
        pairs,
        differences,
        rows.stride(0),
        num_frames * num_pairs,
        width,
        triton.next_power_of_2(width),
        num_warps=_num_warps(width),
    )
    return differences


def place_rows(
    rows: torch.Tensor, row_of_place: torch.Tensor, moves: torch.Tensor, move_of_place: torch.Tensor
) -> torch.Tensor:
    """Return the row of each place, with the place's move added.

    Args:
        rows: (M, D), each contiguous.
        row_of_place: int32 (N,).
        moves: (L, D), contiguous.
        move_of_place: int32 (N,), -1 for none.

    Returns:
        (N, D), contiguous, of the rows' dtype.
    """
    width = rows.shape[1]
    at_places = rows.new_empty(len(row_of_place), width)
    place_row[(len(row_of_place),)](
        rows,
        row_of_place,
        moves,
        move_of_place,
        at_places,
        rows.stride(0),
        width,
        triton.next_power_of_2(width),
        num_warps=_num_warps(width),
    )
    return at_places


def _num_warps(width: int) -> int:
    """Return the warps that hold a row in registers."""
    return min(16, max(4, triton.next_power_of_2(width) // _VALUES_OF_WARP))
