"""Kernels that place computed rows where merged patches take their values."""

import torch
import triton

from scissor_vllm.worker.row_placement_kernels import (
    place_rotated_row,
    place_row,
    subtract_rows,
)

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


def place_rotated(
    projected: torch.Tensor,
    row_of_place: torch.Tensor,
    moves: torch.Tensor,
    move_of_place: torch.Tensor,
    place_of_row: torch.Tensor,
    rotations: tuple[torch.Tensor, torch.Tensor],
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rotated queries, and the rotated key and the value of each place.

    A value of a head's first half turns with that of its second half.

    Args:
        projected: queries, keys and values (M, 3 * heads * size), contiguous.
        row_of_place: int32 (N,).
        moves: of keys and values, (L, 2 * heads * size), contiguous.
        move_of_place: int32 (N,), -1 for none.
        place_of_row: int32 (M,).
        rotations: cosines and sines of the places, (N, size / 2), contiguous.
        num_heads: of the attention.

    Returns:
        (M, heads, size), and twice (N, heads, size), the last two in one tensor.
    """
    num_rows, num_places = len(projected), len(row_of_place)
    cosines, sines = rotations
    half = cosines.shape[1]
    width = 2 * num_heads * half
    assert projected.is_contiguous()
    assert projected.shape[1] == 3 * width
    queries = projected.new_empty(num_rows, num_heads, 2 * half)
    keys_and_values = projected.new_empty(num_places, 2, num_heads, 2 * half)
    place_rotated_row[(num_places + num_rows,)](
        projected,
        row_of_place,
        moves,
        move_of_place,
        place_of_row,
        cosines,
        sines,
        keys_and_values,
        queries,
        projected.stride(0),
        num_places,
        num_heads,
        half,
        triton.next_power_of_2(num_heads),
        triton.next_power_of_2(half),
        triton.next_power_of_2(width),
        num_warps=4,
    )
    keys, values = keys_and_values.unbind(1)
    return queries, keys, values


def _num_warps(width: int) -> int:
    """Return the warps that hold a row in registers."""
    return min(16, max(4, triton.next_power_of_2(width) // _VALUES_OF_WARP))
