"""Baselines that select tokens without comparing them: by chance, and by length."""

import torch

from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.selection import selected
from scissor_vllm.compression.validation import check_finite, check_num_retained, check_tokens

SEED = 2506_21862
"""Of ``random``; with the video's T and P it makes the generator's seed."""


def select_randomly(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return K tokens by chance, each as likely as any other, in order.

    The choice follows from T, P and K alone, so a video's is the same on every run and device, and
    that of a smaller K is part of that of a larger one.

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
    """Return the K tokens of largest Euclidean norm, in order; of equal ones the first.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P. Norms are float64.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`.
    """
    check_num_retained(num_retained, check_tokens(tokens))
    frames = tokens.float()
    check_finite(frames)
    # Frame by frame: float64 copies of all tokens would be four times what they are.
    norms = torch.cat([torch.linalg.vector_norm(frame.double(), dim=1) for frame in frames])
    order = torch.sort(norms, descending=True, stable=True).indices
    return selected(tokens, order[:num_retained])
