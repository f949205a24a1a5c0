"""Average linkage on a CUDA device: the groups of ``linkage.py``, without a host synchronization.

``kernels/`` shows in which order the kernels run.
"""

import torch
import triton

from scissor_vllm.compression.cuda.kernels import distances, tree
from scissor_vllm.compression.cuda.kernels import linkage as kernels
from scissor_vllm.compression.linkage import MAX_WINDOW_TOKENS, WINDOW_FRAMES, pair_weights
from scissor_vllm.compression.similarity import BLOCK_ELEMENTS

_PART_TOKENS = 1 << 16
"""Most tokens whose unit vectors are held at once."""
_PART_WINDOWS = 1 << 14
"""Most windows of a part; a launch's second and third dimensions end at 65535."""
_UNITS_BLOCK = 1024
_MIN_LANES = 1024
"""Lanes of a program that holds a window's tokens. Few widths, because kernels are compiled for
each."""
_TILE, _DEPTH, _TILE_WARPS, _TILE_STAGES = 64, 64, 4, 3
_TILE_ELEMENTS = 1 << 13
"""Distances that a program reads at once."""
_CHUNK = 128
"""Columns that it reads at once, except for copies, which it finds in whole rows."""
_JOIN_WARPS = 16
_MEANS_BLOCK, _MEMBERS = 512, 4
_EXACT = {"enable_fp_fusion": False}


def join_windows(
    rows: torch.Tensor, size: int, ward_exponent: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return parent (N,) int64 and height (N,) float32 of a video's tokens, see ``LinkageTree``.

    Rows that are not finite count as zeros. Similarities take at most 256 MiB at a time,
    and unit vectors are those of at most 65536 tokens.

    Args:
        rows: (N, D) floating, on a CUDA device.
        size: tokens of a window, at most ``MAX_WINDOW_TOKENS``.
        ward_exponent: in [0, 1].
    """
    rows = _readable(rows)
    num_tokens = len(rows)
    parent = torch.empty(num_tokens, dtype=torch.int64, device=rows.device)
    height = torch.empty(num_tokens, dtype=torch.float32, device=rows.device)
    step = part_tokens(size)
    for start in range(0, num_tokens, step):
        part = slice(start, start + step)
        _join(rows[part], size, ward_exponent, parent[part], height[part])
        parent[part] += start
    return parent, height


def part_tokens(size: int) -> int:
    """Return how many tokens of windows of a size are joined at once.

    They are a multiple of 4 windows, so all parts have the alignment that kernels are compiled for.
    """
    num_windows = min(BLOCK_ELEMENTS // size**2, _PART_TOKENS // size, _PART_WINDOWS)
    return num_windows // 4 * 4 * size


def _join(
    rows: torch.Tensor, size: int, ward_exponent: float, parent: torch.Tensor, height: torch.Tensor
) -> None:
    """Fill in parent and height of some windows' tokens, parents counted from the first row."""
    num_tokens, width = rows.shape
    device = rows.device
    num_windows = triton.cdiv(num_tokens, size)
    block = _lanes(size)
    whole_rows, at_once = max(1, _TILE_ELEMENTS // block), _TILE_ELEMENTS // _CHUNK
    tiles = triton.cdiv(size, _TILE)
    weights = pair_weights(ward_exponent, device)
    tables = weights.single, weights.together
    high, low = torch.empty((2, num_tokens, width), dtype=torch.float16, device=device)
    scale = torch.empty(num_tokens, dtype=torch.float64, device=device)
    # Rows of these begin aligned, whatever the number of tokens.
    aligned = triton.cdiv(num_tokens, 4) * 4
    first_copy, nearest, groups, listed, is_mutual = torch.empty(
        (5, aligned), dtype=torch.int32, device=device
    )
    count = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    num_groups = torch.empty(num_windows, dtype=torch.int32, device=device)
    least, others_least = torch.empty((2, aligned), dtype=torch.float32, device=device)
    sums = torch.empty((num_windows, size, size), dtype=torch.float32, device=device)
    distances.units_kernel[num_tokens,](
        rows, high, low, scale, width, block=_UNITS_BLOCK, num_warps=4, **_EXACT
    )
    distances.distances_kernel[tiles, tiles, num_windows](
        high, low, scale, sums, num_tokens, size, width,
        tile=_TILE, depth=_DEPTH, num_warps=_TILE_WARPS, num_stages=_TILE_STAGES, **_EXACT,
    )  # fmt: skip
    kernels.copies_kernel[triton.cdiv(size, whole_rows), num_windows](
        sums, first_copy, num_tokens, size, at_once=whole_rows, block=block, num_warps=8
    )
    kernels.join_copies_kernel[num_windows,](
        first_copy, parent, height, count, num_tokens, size, size.bit_length(),
        block=block, num_warps=8,
    )  # fmt: skip
    kernels.list_groups_kernel[num_windows,](
        count, groups, num_groups, num_tokens, size, block=block, num_warps=8
    )
    kernels.first_nearest_kernel[triton.cdiv(size, at_once), num_windows](
        sums, count, nearest, least, others_least, *tables, groups, num_groups, num_tokens, size,
        weighs=not weights.is_average, at_once=at_once, chunk=_CHUNK, num_warps=8, **_EXACT,
    )  # fmt: skip
    kernels.join_groups_kernel[num_windows,](
        sums, count, nearest, least, others_least, parent, height, groups, listed, is_mutual,
        num_groups, *tables, num_tokens, size,
        weighs=not weights.is_average, at_once=at_once, chunk=_CHUNK, block=block,
        num_warps=_JOIN_WARPS, **_EXACT,
    )  # fmt: skip


def group_roots(
    parent: torch.Tensor, rank: torch.Tensor, size: int, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest token of each token's group, (N,) int64, and which those are, int32.

    Args:
        parent: (N,) int64, of a tree.
        rank: (N,) int32, of the tree.
        size: tokens of a window.
        num_groups: K, at least the number of windows.
    """
    num_tokens = len(parent)
    root, is_root = torch.empty_like(parent), torch.empty_like(rank)
    tree.roots_kernel[triton.cdiv(num_tokens, size),](
        parent, rank, root, is_root, num_tokens, size, num_tokens - num_groups, size.bit_length(),
        block=_lanes(size), num_warps=8,
    )  # fmt: skip
    return root, is_root


def group_means(rows: torch.Tensor, part: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the mean of each group's rows, (K, D) in their dtype; non-finite values count as 0.

    Args:
        rows: (N, D) floating, on a CUDA device.
        part: (N,) int64, the group of each row; no group is empty.
        num_groups: K.
    """
    dtype = rows.dtype
    rows = _readable(rows)
    width = rows.shape[1]
    by_part, order = torch.sort(part.int(), stable=True)
    bounds = torch.arange(num_groups + 1, dtype=torch.int32, device=rows.device)
    begin = torch.searchsorted(by_part, bounds, out_int32=True)
    out = torch.empty((num_groups, width), dtype=rows.dtype, device=rows.device)
    tree.group_means_kernel[num_groups, triton.cdiv(width, _MEANS_BLOCK)](
        rows, order, begin, out, width, at_once=_MEMBERS, block=_MEANS_BLOCK, num_warps=4
    )
    return out.to(dtype)


def warm_up_shapes(max_tokens: int) -> list[tuple[int, int, float]]:
    """Return shapes and ratios (T, P, K/N) that compile all kernels and take the most memory."""
    sizes = [_MIN_LANES]
    while sizes[-1] < MAX_WINDOW_TOKENS:
        sizes.append(2 * sizes[-1])
    frames = [min(size // WINDOW_FRAMES, max_tokens) for size in sizes]
    return [(max_tokens // per_frame, per_frame, 0.1) for per_frame in frames]


def _lanes(size: int) -> int:
    """Return the lanes of a program that holds a window's tokens."""
    return max(_MIN_LANES, triton.next_power_of_2(size))


def _readable(rows: torch.Tensor) -> torch.Tensor:
    """Return rows as the kernels take them."""
    return (rows.float() if rows.dtype == torch.float64 else rows).contiguous()
