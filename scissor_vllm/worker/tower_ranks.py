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

from scissor_vllm.patch_merging import shared_lengths

Encode = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Tokens (t, P, D) of pixels (t, ...) and of anchors (t, P), which may be None."""


def num_tower_ranks() -> int:
    """Return the number of ranks that share out frames; call it while a model is made."""
    return get_tensor_model_parallel_world_size() if is_vit_use_data_parallel() else 1


def frames_per_rank(num_frames: int, num_ranks: int, anchors: torch.Tensor | None) -> list[int]:
    """Return the number of consecutive frames that each rank encodes, 0 for ranks without any.

    The longest share is as short as whole groups of frames allow.

    Args:
        num_frames: t.
        num_ranks: from :func:`num_tower_ranks`.
        anchors: int64 (t, P), counted from the first frame; None if each frame is a group.
    """
    lengths = [1] * num_frames
    if anchors is not None:
        # A frame whose patches are all computed can begin a share: no later frame needs an earlier.
        begins = (anchors == torch.arange(num_frames)[:, None]).all(dim=1).nonzero().flatten()
        ends = torch.cat([begins, torch.tensor([num_frames])])
        lengths = ends.diff().tolist()
    shares = shared_lengths(lengths, num_ranks)
    return shares + [0] * (num_ranks - len(shares))


def encode_on_all_ranks(
    encode: Encode, pixels: torch.Tensor, anchors: torch.Tensor | None, num_ranks: int
) -> torch.Tensor:
    """Return the tokens of all frames, each encoded by one rank.

    Args:
        encode: the tower on this rank. Anchors apart, a frame's tokens depend on that frame alone.
        pixels: (t, ...), the same on all ranks.
        anchors: int64 (t, P) on the CPU, counted from the first frame, or None.
        num_ranks: from :func:`num_tower_ranks`.

    Returns:
        (t, P, D), the same on all ranks.
    """
    shares = frames_per_rank(len(pixels), num_ranks, anchors)
    rank, longest = get_tensor_model_parallel_rank(), max(shares)
    first = sum(shares[:rank])
    end = first + shares[rank]
    here = pixels[first:end]
    num_missing = longest - len(here)
    if num_missing > 0:
        # All ranks exchange tensors of one shape, so this one encodes the first frame again.
        here = torch.cat([here, pixels[:1].expand(num_missing, *pixels.shape[1:])])
    if anchors is not None:
        mine = anchors[first:end] - first
        anchors = torch.cat([mine, mine.new_zeros(num_missing, mine.shape[1])])
    tokens = encode(here, anchors)
    gathered: torch.Tensor = tensor_model_parallel_all_gather(tokens.contiguous(), dim=0)
    parts = zip(gathered.split(longest), shares, strict=True)
    return torch.cat([tokens[:num_frames] for tokens, num_frames in parts])
