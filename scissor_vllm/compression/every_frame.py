"""At least one row for every frame, for runs of images.

A method may merge all tokens of a frame into rows that stand for other frames. Where every frame
must keep a row, the method is asked for fewer rows, and each frame without one gets one of its own
tokens: the one that its row resembles least.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import cosine_similarity

from scissor_vllm.compression.members import representative_members
from scissor_vllm.compression.result import CompressedTokens

_MAX_TRIES = 3
_FIRST, _DROPPED, _NEVER = -3.0, -2.0, 2.0
"""In place of cosines: of tokens to add first, of dropped ones, of representative members."""


@torch.no_grad()
def keep_every_frame(
    compress: Callable[[int], CompressedTokens], tokens: torch.Tensor, num_retained: int
) -> CompressedTokens:
    """Return K rows, of which each frame has at least one.

    A frame has the rows whose representative member is one of its tokens. Where the method leaves
    no frame without, its rows are returned as they are. The host waits for the device.

    Args:
        compress: the method for these tokens, by K.
        tokens: (T, P, D) floating.
        num_retained: K, at least T.

    Raises:
        ValueError: K is less than T.
    """
    num_frames = len(tokens)
    if num_retained < num_frames:
        raise ValueError(
            f"{num_frames} frames keep a row each, but num_retained is {num_retained}: ask for "
            f"{num_frames} or more"
        )
    num_added = 0
    for _ in range(_MAX_TRIES):
        if num_retained <= num_added:
            break
        compressed = compress(num_retained - num_added)
        members = representative_members(tokens, compressed)
        num_missing = int((_rows_of_frames(members, tokens) == 0).sum())
        if num_missing <= num_added:
            return _with_tokens(tokens, compressed, members, num_added)
        num_added = num_missing
    if num_retained == num_frames:
        return _means_of_frames(tokens)
    compressed = compress(num_retained - num_frames)
    members = representative_members(tokens, compressed)
    return _with_tokens(tokens, compressed, members, num_frames)


def _rows_of_frames(members: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return how many rows each frame has, (T,) int64."""
    return torch.bincount(members // tokens.shape[1], minlength=len(tokens))


def _with_tokens(
    tokens: torch.Tensor, compressed: CompressedTokens, members: torch.Tensor, num_added: int
) -> CompressedTokens:
    """Return the rows, and among them tokens that become rows: one of each frame without a row,
    and others that their rows resemble least.

    Args:
        tokens: (T, P, D).
        compressed: of them.
        members: (K,) int64, the representative members of its rows.
        num_added: at least the number of frames without a row.
    """
    if num_added == 0:
        return compressed
    likeness = _likeness(tokens, compressed)
    likeness[members] = _NEVER
    by_frame = likeness.view(tokens.shape[:2])
    numbers = torch.arange(len(tokens), device=tokens.device)
    first = numbers * tokens.shape[1] + by_frame.argmin(dim=1)
    missing = _rows_of_frames(members, tokens) == 0
    likeness[first] = torch.where(missing, _FIRST, likeness[first])
    added = likeness.argsort(stable=True)[:num_added].sort().values
    num_rows = len(members)
    assignment = compressed.assignment.clone()
    assignment[added] = torch.arange(num_rows, num_rows + num_added, device=added.device)
    order = torch.cat([members, added]).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    rows = torch.cat([compressed.tokens, tokens.flatten(0, 1)[added]])
    return replace(
        compressed,
        tokens=rows[order],
        assignment=torch.where(assignment < 0, -1, place[assignment.clamp(min=0)]),
    )


def _likeness(tokens: torch.Tensor, compressed: CompressedTokens) -> torch.Tensor:
    """Return the cosine of each token and its row, (N,) float32; below any for a dropped token."""
    row_of = compressed.assignment.view(tokens.shape[:2])
    likeness = torch.cat(
        [
            cosine_similarity(frame.float(), compressed.tokens[rows.clamp(min=0)].float(), dim=-1)
            for frame, rows in zip(tokens, row_of, strict=True)
        ]
    )
    return torch.where(compressed.assignment < 0, _DROPPED, likeness)


def _means_of_frames(tokens: torch.Tensor) -> CompressedTokens:
    """Return the mean of each frame."""
    frame_of = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1])
    return CompressedTokens(tokens.float().mean(dim=1).to(tokens.dtype), frame_of)
