"""Merges every token into its most similar part; rows are means."""

import torch
import triton

from scissor_vllm.compression.cuda.kernels import merge as kernels
from scissor_vllm.compression.cuda.kernels import parts
from scissor_vllm.compression.cuda.products import multiply
from scissor_vllm.compression.cuda.video import Video
from scissor_vllm.compression.cuda.workspace import WIDE_BLOCK
from scissor_vllm.compression.similarity import BLOCK_ELEMENTS

_COLUMNS, _FEW_MEMBERS, _MEMBERS, _WARPS = 512, 4, 16, 4
"""Tile of a sum: columns and rows."""

_FACTOR_ROWS = 64
"""Number of rows is padded to a multiple of this, which makes products several times faster."""


def merge(video: Video, num_parts: int, max_joined: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the merged rows of a video and the assignment.

    Args:
        video: with its tokens grouped by part.
        num_parts: K, of parts.
        max_joined: upper bound of the number of parts with more than one token.

    Returns:
        (K, D) of the rows' dtype, and (N,) int64.
    """
    ws, rows, device = video.passes.workspace, video.rows, video.rows.device
    begin = ws.begin[: num_parts + 1]
    low_at = _joined(begin)
    kept = torch.empty(num_parts, video.width, dtype=torch.float32, device=device)
    # Products of 16-bit numbers are exact and fast: representatives are sums of two such.
    is_short = rows.dtype == torch.bfloat16
    factors = kept
    if is_short:
        size = triton.cdiv(num_parts + max_joined, _FACTOR_ROWS) * _FACTOR_ROWS
        factors = torch.empty(size, video.width, dtype=torch.bfloat16, device=device)
    _add_up(rows, ws.by_part, begin, ws.weight, low_at, kept, factors, merges=False)
    length = torch.linalg.vector_norm(kept, dim=-1)
    assignment = torch.empty(video.num_tokens, dtype=torch.int64, device=device)
    stride = len(factors)
    step = max(1, BLOCK_ELEMENTS // stride)
    for start in range(0, video.num_tokens, step):
        some = rows[start : start + step]
        product = multiply(some if is_short else some.float(), factors.T)
        kernels.nearest_kernel[len(some),](
            product,
            length,
            low_at,
            ws.length,
            assignment,
            ws.number,
            start,
            video.num_tokens,
            num_parts,
            stride,
            video.window * video.per_frame,
            halves=is_short,
            block=WIDE_BLOCK,
        )
    merged = torch.empty(num_parts, video.width, dtype=rows.dtype, device=device)
    row_of, order = torch.sort(assignment.int(), stable=True)
    begin = torch.searchsorted(row_of, ws.bounds[: num_parts + 1], out_int32=True)
    _add_up(rows, order, begin, ws.weight, low_at, kept, merged, merges=True)
    return merged, assignment


def _joined(begin: torch.Tensor) -> torch.Tensor:
    """Return the index of each part among parts of more than one token, else -1, int32."""
    low_at = torch.empty_like(begin)
    parts.joined_parts_kernel[1,](begin, low_at, len(begin) - 1, block=WIDE_BLOCK)
    return low_at


def _add_up(
    rows: torch.Tensor,
    order: torch.Tensor,
    begin: torch.Tensor,
    weight: torch.Tensor,
    low_at: torch.Tensor,
    kept: torch.Tensor,
    out: torch.Tensor,
    merges: bool,
) -> None:
    """Fill in the representatives ``kept``, and as factors ``out``; or the means of ``merges``."""
    num_parts, width = kept.shape
    kernels.sums_kernel[num_parts, triton.cdiv(width, _COLUMNS)](
        rows,
        order,
        begin,
        weight,
        kept,
        out,
        low_at,
        len(rows),
        width,
        len(out),
        merges=merges,
        halves=not merges and out.dtype == torch.bfloat16,
        few=_FEW_MEMBERS,
        members=_MEMBERS,
        block=_COLUMNS,
        num_warps=_WARPS,
    )
