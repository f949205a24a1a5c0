"""Baselines that select tokens without comparing them: at random, and by norm."""

import torch

from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.selection import selected
from scissor_vllm.compression.validation import check_finite, check_num_retained, check_tokens

SEED = 2506_21862
"""Seed of ``random``, combined with the video's T and P."""


def select_randomly(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return K tokens drawn uniformly without replacement, in order.

    The choice depends on T, P and K only, so it is the same on every run and device. The tokens of
    a smaller K are a subset of those of a larger K.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`, but values may be non-finite.
    """
    num_tokens = check_tokens(tokens)
    check_num_retained(num_retained, num_tokens)
    num_frames, per_frame, _ = tokens.shape
    seed = (SEED << 32) + (num_frames << 16) + per_frame
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(num_tokens, generator=generator, device="cpu")
    return selected(tokens, order[:num_retained].to(tokens.device))


@torch.no_grad()
def select_longest(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return the K tokens of largest Euclidean norm, in order; ties go to the first.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P. Norms are float64.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`.
    """
    check_num_retained(num_retained, check_tokens(tokens))
    frames = tokens.float()
    check_finite(frames)
    # Frame by frame, because float64 copies of all tokens would take four times their memory.
    norms = torch.cat([torch.linalg.vector_norm(frame.double(), dim=1) for frame in frames])
    order = torch.sort(norms, descending=True, stable=True).indices
    return selected(tokens, order[:num_retained])
