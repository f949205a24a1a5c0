"""Helpers of methods that select tokens: their result, and merging of the other tokens."""

import torch

from scissor_vllm.compression.merge import merged
from scissor_vllm.compression.result import CompressedTokens, Compressor
from scissor_vllm.compression.validation import check_finite, check_num_retained, check_tokens


def selected(tokens: torch.Tensor, kept: torch.Tensor) -> CompressedTokens:
    """Return the kept tokens unchanged, in order; the others are dropped.

    Args:
        tokens: (T, P, D), one video; N = T*P.
        kept: (K,) int64, on the tokens' device: distinct numbers in 0..N-1, in any order.
    """
    kept = kept.sort().values
    flat = tokens.detach().reshape(-1, tokens.shape[-1])
    assignment = torch.full((len(flat),), -1, dtype=torch.int64, device=tokens.device)
    assignment[kept] = torch.arange(len(kept), device=tokens.device)
    return CompressedTokens(flat[kept], assignment)


def evenly_spaced(num_kept: int, num: int, device: torch.device) -> torch.Tensor:
    """Return ``num_kept`` of 0..num-1, the first included, (num_kept,) int64 ascending."""
    return torch.arange(num_kept, device=device) * num // num_kept


def merging(select: Compressor) -> Compressor:
    """Return the method that merges all tokens into the selected ones, as SCC does.

    Its rows are (kept token + sum of the tokens nearest to it by cosine) / (their number + 1).
    """

    @torch.no_grad()
    def compress(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
        check_num_retained(num_retained, check_tokens(tokens))
        frames = tokens.float()
        check_finite(frames)
        kept = select(tokens, num_retained).tokens
        rows, assignment = merged(frames.reshape(-1, frames.shape[-1]), kept)
        return CompressedTokens(rows.to(tokens.dtype), assignment)

    return compress
