"""Positions of a video's tokens in the language model, as other layouts than the usual would give.

Published models learned from pictures of many sizes and videos of many lengths: where a token lies
in a picture they read off the token, and its position tells but what comes before what. A model
that saw one layout alone, 121 tokens a frame, reads places off positions, and loses them as soon
as the layout is another.
"""

from __future__ import annotations

import torch

USUAL_SHARE = 0.25
"""Of the clips, those whose tokens follow each other one by one, as in an uncompressed prompt."""
SMALLEST_STEP = 1 / 24
FRAME_SPREAD = 0.5
"""Deviation of the logarithm of a frame's mean step among those of its clip."""
LARGEST_STEP = 2.0


def drawn_places(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return increasing positions from 0 of clips of T frames with P tokens, float32 (B, T * P).

    A clip's steps have a mean of their own between ``SMALLEST_STEP`` and 1, each frame's vary about
    it, and each token's about its frame's.

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
    """Return the positions of tokens that follow each other one by one, float32 (num_tokens,)."""
    return torch.arange(num_tokens, dtype=torch.float32, device=device)
