"""Validation of the input of all methods."""

import torch


def check_tokens(tokens: torch.Tensor) -> int:
    """Return N = T*P of tokens (T, P, D).

    Raises:
        TypeError: not a floating tensor.
        ValueError: not three-dimensional, or with an empty dimension.
    """
    if not isinstance(tokens, torch.Tensor) or not tokens.is_floating_point():
        got = tokens.dtype if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be a floating torch tensor, got {got}: convert it first")
    if tokens.ndim != 3 or tokens.numel() == 0:
        raise ValueError(
            "tokens must be (frames, tokens of a frame, width), none of them 0, got "
            f"{tuple(tokens.shape)}: reshape one video to (T, P, D)"
        )
    return tokens.shape[0] * tokens.shape[1]


def check_finite(tokens: torch.Tensor) -> None:
    """Raise ValueError if any value is NaN or infinite. One host synchronization."""
    num_bad = int((~torch.isfinite(tokens)).sum())
    if num_bad:
        raise ValueError(
            f"tokens must be finite, got {num_bad} of {tokens.numel()} values NaN or infinite: "
            "look for an overflow in what made them (float16 overflows above 65504)"
        )


def check_num_retained(num_retained: int, num_tokens: int) -> None:
    """Raise if K is not an int in 1..N."""
    if isinstance(num_retained, bool) or not isinstance(num_retained, int):
        raise TypeError(f"num_retained must be an int, got {num_retained!r}")
    if not 1 <= num_retained <= num_tokens:
        raise ValueError(
            f"num_retained must lie in 1..{num_tokens} (the number of tokens), got {num_retained}"
        )


def check_similarity_threshold(threshold: float) -> None:
    """Raise if the threshold is not a cosine."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"similarity_threshold must be a number, got {threshold!r}")
    if not -1 <= threshold <= 1:
        raise ValueError(f"similarity_threshold must be a cosine in [-1, 1], got {threshold}")


def checked_frames(tokens: torch.Tensor, num_retained: int) -> torch.Tensor:
    """Return tokens (T, P, D) in float32 after all checks above."""
    check_num_retained(num_retained, check_tokens(tokens))
    frames = tokens.float()
    check_finite(frames)
    return frames
