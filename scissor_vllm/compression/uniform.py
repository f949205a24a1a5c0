"""The baseline: evenly spaced tokens, independent of their values."""

import torch

from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.selection import evenly_spaced, selected
from scissor_vllm.compression.validation import check_num_retained, check_tokens


def select_evenly(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return every (N/K)-th token, the first included, in order.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`, but values may be non-finite.
    """
    num_tokens = check_tokens(tokens)
    check_num_retained(num_retained, num_tokens)
    return selected(tokens, evenly_spaced(num_retained, num_tokens, tokens.device))
