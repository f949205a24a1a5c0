"""Random positions of a video's tokens in the language model, as different layouts would give.

Published models were trained on images of many sizes and videos of many lengths. They read a
token's place in an image from the token, and only the order from its position. A model trained on
one layout, 121 tokens a frame, would read places from positions, and fail with any other layout.
"""

from __future__ import annotations

import torch

USUAL_SHARE = 0.25
"""Share of clips with consecutive positions, as in an uncompressed prompt."""
SMALLEST_STEP = 1 / 24
FRAME_SPREAD = 0.5
"""Standard deviation of the logarithm of a frame's mean step within its clip."""
LARGEST_STEP = 2.0


def drawn_places(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return increasing positions from 0 of clips of T frames with P tokens, float32 (B, T * P).

    A clip's mean step is between ``SMALLEST_STEP`` and 1. Frames' mean steps vary about it, and
    tokens' steps about their frame's.

    Args:
        shape: B, T and P.
        generator: on the device of the result.
    """
    num_clips, num_frames, tokens_per_frame = shape
    device = generator.device

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device, generator=generator)

    of_clip = SMALLEST_STEP ** uniform(num_clips, 1, 1)
    spread = torch.randn(num_clips, num_frames, 1, device=device, generator=generator)
    of_frame = (of_clip * (FRAME_SPREAD * spread).exp()).clamp(max=1.0)
    waits = -uniform(num_clips, num_frames, tokens_per_frame).clamp(min=1e-6).log()
    steps = (of_frame * waits).clamp(max=LARGEST_STEP)
    is_usual = uniform(num_clips, 1, 1) < USUAL_SHARE
    steps = torch.where(is_usual, 1.0, steps).flatten(1)
    return steps.cumsum(1) - steps[:, :1]


def usual_places(num_tokens: int, device: torch.device) -> torch.Tensor:
    """Return consecutive positions, float32 (num_tokens,)."""
    return torch.arange(num_tokens, dtype=torch.float32, device=device)
