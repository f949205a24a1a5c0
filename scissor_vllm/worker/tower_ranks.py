"""A video's frames shared out among the ranks of tensor parallelism.

With ``--mm-encoder-tp-mode data`` every rank has the whole vision tower. vLLM gives whole videos
to ranks, so of one video all ranks but one would wait. A tower whose frames do not depend on each
other encodes a part of each video's frames on each rank, and the ranks exchange the tokens once.
All have the same tokens, bit for bit. With ``weights`` they exchange sums, twice in each layer.
"""

from collections.abc import Callable

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.models.vision import is_vit_use_data_parallel

from scissor_vllm.patch_merging import GROUP_FRAMES

Encode = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Tokens (t, P, D) of pixels (t, ...) and of anchors (t, P), which may be None."""


def num_tower_ranks() -> int:
    """Return the number of ranks that share out frames; call it while a model is made."""
    return get_tensor_model_parallel_world_size() if is_vit_use_data_parallel() else 1


def frames_per_rank(num_frames: int, num_ranks: int, group: int = 1) -> int:
    """Return the frames of the first rank: an equal share, rounded up to whole groups."""
    return -(-num_frames // (num_ranks * group)) * group


def encode_on_all_ranks(
    encode: Encode, pixels: torch.Tensor, anchors: torch.Tensor | None, num_ranks: int
) -> torch.Tensor:
    """Return the tokens of all frames, each encoded by one rank.

    Args:
        encode: the tower on this rank. Anchors apart, a frame's tokens depend on that frame alone.
        pixels: (t, ...), the same on all ranks.
        anchors: int64 (t, P) of groups of ``GROUP_FRAMES``, or None.
        num_ranks: from :func:`num_tower_ranks`.

    Returns:
        (t, P, D), the same on all ranks.
    """
    num_frames = len(pixels)
    share = frames_per_rank(num_frames, num_ranks, 1 if anchors is None else GROUP_FRAMES)
    first = get_tensor_model_parallel_rank() * share
    here = pixels[first : first + share]
    num_missing = share - len(here)
    if num_missing > 0:
        # All ranks exchange tensors of one shape, so this one encodes the first frame again.
        here = torch.cat([here, pixels[:1].expand(num_missing, *pixels.shape[1:])])
    if anchors is not None:
        mine = (anchors[first : first + share] - first).clamp(min=0)
        anchors = torch.cat([mine, mine.new_zeros(num_missing, mine.shape[1])])
    tokens = encode(here, anchors)
    gathered: torch.Tensor = tensor_model_parallel_all_gather(tokens.contiguous(), dim=0)
    return gathered[:num_frames]
