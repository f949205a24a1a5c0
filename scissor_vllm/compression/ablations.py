"""SCC without one of its steps, to measure the gain of the step.

Both are single linkage with a budget, and merge as SCC does. ``represent`` in ``scc.py`` is the
third ablation: both steps without the merge.
"""

import torch

from scissor_vllm.compression.components import (
    Components,
    degrees,
    forest_labels,
    in_order,
    maximum_spanning_trees,
)
from scissor_vllm.compression.merge import merged
from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.similarity import Similarity
from scissor_vllm.compression.sums import means
from scissor_vllm.compression.validation import checked_frames


@torch.no_grad()
def compress_in_frames(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return tokens merged by the spatial step alone: no two frames are joined.

    One threshold holds for all frames: the N - K strongest edges of their maximum spanning trees
    are joined. With fewer rows than frames, where each frame is one component already, runs of
    consecutive frames share a row, in K runs as equally long as can be.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`.
    """
    frames = checked_frames(tokens, num_retained)
    num_frames, per_frame, _ = frames.shape
    if num_retained >= num_frames:
        return _linked(frames, tokens.dtype, num_retained)
    frame = torch.arange(num_frames * per_frame, device=frames.device) // per_frame
    runs = Components(frame * num_retained // num_frames, num_retained)
    return _compressed(frames, tokens.dtype, runs, None)


@torch.no_grad()
def compress_across_frames(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return tokens merged by the temporal step alone: all N tokens are one set.

    The N - K strongest edges of its maximum spanning tree are joined. Above 8192 tokens the
    similarities are computed again in each of up to log2(N) rounds.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`.
    """
    frames = checked_frames(tokens, num_retained)
    return _linked(frames.reshape(1, -1, frames.shape[-1]), tokens.dtype, num_retained)


def _linked(sets: torch.Tensor, dtype: torch.dtype, num_retained: int) -> CompressedTokens:
    """Return K rows, no two sets (B, n, D) joined; B <= K."""
    num_sets, size, _ = sets.shape
    similarity = Similarity(sets)
    trees = maximum_spanning_trees(similarity)
    num_nodes = num_sets * size
    num_joined = num_nodes - num_retained
    labels = forest_labels(num_nodes, trees.left[:num_joined], trees.right[:num_joined])
    # Edges above the strongest edge outside of the cut are joined.
    threshold = float(trees.weight[num_joined]) if num_joined < len(trees.weight) else -1.0
    parts = in_order(labels, degrees(similarity, threshold), num_retained)
    return _compressed(sets, dtype, parts, threshold)


def _compressed(
    sets: torch.Tensor, dtype: torch.dtype, parts: Components, threshold: float | None
) -> CompressedTokens:
    flat = sets.reshape(-1, sets.shape[-1])
    rows, assignment = merged(flat, means(flat, parts.part, parts.num_parts))
    return CompressedTokens(rows.to(dtype), assignment, threshold)
