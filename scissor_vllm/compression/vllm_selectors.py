"""vLLM's own selection of video tokens, EVS and VidCom2, as compressors with an exact budget.

vLLM takes the share to drop, ``q``, counts what is left by a function, and returns a mask of that
many tokens. Here ``q`` is chosen so that the count is K. Neither count goes down to one: EVS keeps
the first frame whole, VidCom2 a token of every frame. Below it, K of the fewest that vLLM keeps
are kept, evenly spaced: in EVS's own order they are equals.
"""

import math
from types import ModuleType

import torch
from vllm.multimodal.video_prune import evs, vidcom2

from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.selection import evenly_spaced, selected
from scissor_vllm.compression.validation import check_finite, check_num_retained, check_tokens


def select_by_evs(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return the first frame's tokens, then those least like the same place a frame before.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P. vLLM compares them in their dtype.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`.

    Source: Efficient Video Sampling (arXiv 2510.14624), in ``vllm.multimodal.video_prune``.
    """
    return _select(evs, tokens, num_retained)


def select_by_vidcom2(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return tokens far from their frame's mean and the video's; unusual frames get more.

    Arguments and errors are those of :func:`select_by_evs`.

    Source: VidCom2 (arXiv 2505.14454), in ``vllm.multimodal.video_prune``.
    """
    return _select(vidcom2, tokens, num_retained)


@torch.no_grad()
def _select(method: ModuleType, tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    check_num_retained(num_retained, check_tokens(tokens))
    check_finite(tokens.float())
    num_frames, per_frame, width = tokens.shape
    # One row of tokens a frame: neither method asks where in its frame a token is.
    grid = num_frames, 1, per_frame
    q = _share_dropped(method, num_frames, per_frame, num_retained)
    kept = method.compute_retention_mask(tokens.reshape(-1, width), grid, 1, q).nonzero().flatten()
    if len(kept) > num_retained:
        kept = kept[evenly_spaced(num_retained, len(kept), kept.device)]
    return selected(tokens, kept)


def _share_dropped(method: ModuleType, num_frames: int, per_frame: int, num_retained: int) -> float:
    """Return the q nearest to 1 - K/N at which vLLM's method keeps at least K tokens."""
    q = 1 - num_retained / (num_frames * per_frame)
    # vLLM rounds down what is left of N, so the last bit of q can cost a token.
    while method.compute_retained_tokens_count(per_frame, num_frames, q) < num_retained:
        q = math.nextafter(q, 0.0)
    return q
