"""Qwen-VL's vision towers for videos with merged patches: fewer patches to compute, the same grid.

These towers join the patches of a square to a token. So a place of ``scissor_vllm.patch_merging``
is a token, and a temporal patch is a frame. vLLM's own forward pass encodes the computed tokens'
patches and joins them. It gets their positions, and attention is replaced: it has a query for each
of these patches, and a key and a value for every patch of the frame or the window. Keys are placed
before they are rotated, because a key turns with its own position.

At the end each token takes its values in the same way. Without merged patches, the result is vLLM's
up to rounding.

The code depends on the towers of ``qwen2_vl.py``, ``qwen2_5_vl.py`` and ``qwen3_vl.py`` in vLLM
0.32 and 0.33: their ``encoder_metadata`` and their attention layers. It can go when vLLM's towers
merge patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VisionAttention,
    Qwen2_5_VisionTransformer,
)
from vllm.model_executor.models.qwen2_vl import Qwen2VisionAttention, Qwen2VisionTransformer
from vllm.model_executor.models.qwen3_vl import Qwen3_VisionTransformer

from scissor_vllm.vllm_compat import frames_attention
from scissor_vllm.worker.merged_patches import (
    Placement,
    Plan,
    ends_of,
    moves_of,
    placed,
    to_device_at_once,
)

_ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    Qwen2VisionTransformer: Qwen2VisionAttention,
    Qwen2_5_VisionTransformer: Qwen2_5_VisionAttention,
    Qwen3_VisionTransformer: Qwen2_5_VisionAttention,
}
"""Towers, and their attention layers."""


@dataclass(frozen=True)
class Sequences:
    """Bounds of the parts in which patches attend to each other: frames, or windows of them."""

    query_ends: torch.Tensor
    """int32 (n + 1,)."""
    key_ends: torch.Tensor
    """int32 (n + 1,)."""
    num_queries: list[int]
    """Of each part."""
    num_keys: list[int]
    """Of each part."""


@dataclass(frozen=True)
class MergedTokens:
    """Which tokens of T frames with P tokens are computed, and where their values go.

    Patches are in the tower's order: all windows of a frame one after the other, each token's
    patches one after the other.
    """

    computed: torch.Tensor
    """Indices of the M computed tokens among the T*P, in the tower's order, int32 (M,)."""
    patch_numbers: torch.Tensor
    """Number of each computed patch among all, in the tower's order, int32 (M * patches,)."""
    patches: Placement
    """Of the patches of all tokens, in the tower's order."""
    tokens: Placement
    """Of all tokens, row by row of each frame."""
    frames: Sequences
    windows: Sequences | None
    """None if every layer attends within frames."""

    @classmethod
    def of(
        cls,
        anchors: torch.Tensor,
        layout: Layout,
        device: torch.device,
        dtype: torch.dtype,
    ) -> MergedTokens:
        """Return the plan for the frames of a tower call, without a host synchronization.

        Args:
            anchors: int64 (T, P) on the CPU, counted from the call's first frame.
            layout: of the tower, for these frames.
            device: of the tower.
            dtype: of the tower.
        """
        num_frames, num_tokens = anchors.shape
        rows, columns, merged = layout.rows, layout.columns, layout.num_merged
        order = layout.order
        plan = Plan.of(anchors, (rows // merged, columns // merged), order)
        size = merged**2
        in_order = plan.is_computed[:, order]
        ends = {"frames": torch.full((num_frames,), num_tokens)}
        if layout.windows is not None:
            ends["windows"] = layout.windows.repeat(num_frames)
        parts = {
            "computed": plan.computed,
            "patch_numbers": _of_patches(in_order.flatten().nonzero().flatten(), size),
            "row_of_patch": _of_patches(plan.row_of_place[:, order], size),
            "move_of_patch": _of_patches(plan.move_of_place[:, order], size),
            "row_of_token": plan.row_of_place.flatten(),
            "move_of_token": plan.move_of_place.flatten(),
            "probes_of_patches": _of_patches(plan.probes, size).view(2, num_frames, -1),
            "probes_of_tokens": plan.probes,
            "weights": plan.weights,
        }
        lengths = {}
        num_before = ends_of(in_order.flatten().long())
        for name, num_keys in ends.items():
            key_ends = ends_of(num_keys)
            query_ends = num_before[key_ends]
            parts[f"{name}_queries"], parts[f"{name}_keys"] = query_ends * size, key_ends * size
            lengths[name] = ((query_ends.diff() * size).tolist(), (num_keys * size).tolist())
        there = to_device_at_once(parts, device)
        weights = there["weights"].to(dtype)
        sequences = {
            name: Sequences(there[f"{name}_queries"], there[f"{name}_keys"], *lengths[name])
            for name in ends
        }
        return cls(
            there["computed"],
            there["patch_numbers"],
            Placement(
                there["row_of_patch"], there["move_of_patch"], there["probes_of_patches"], weights
            ),
            Placement(
                there["row_of_token"], there["move_of_token"], there["probes_of_tokens"], weights
            ),
            sequences["frames"],
            sequences.get("windows"),
        )


@dataclass(frozen=True)
class Layout:
    """How a tower orders the patches of T frames, and where they stand."""

    rows: int
    """Of patches."""
    columns: int
    """Of patches."""
    num_merged: int
    """Number of a token's patches in each direction."""
    order: torch.Tensor
    """Tokens of a frame in the tower's order, int64 (P,) on the CPU."""
    windows: torch.Tensor | None
    """Number of tokens of each window of a frame, int64, on the CPU; None without windows."""
    rotations: tuple[torch.Tensor, torch.Tensor]
    """Cosines and sines of all patches of all frames in the tower's order, on the device."""
    embeddings: torch.Tensor | None
    """Position embeddings of a frame's patches in that order, None if the tower has none."""

    @classmethod
    def of(cls, tower: Any, grid: tuple[int, int, int]) -> Layout:
        """Return the layout of temporal patches, rows and columns of patches."""
        num_frames, rows, columns = grid
        merged = tower.spatial_merge_size
        num_tokens = rows * columns // merged**2
        if not isinstance(tower, Qwen2_5_VisionTransformer):
            has_embeddings = isinstance(tower, Qwen3_VisionTransformer)
            return cls(
                rows,
                columns,
                merged,
                torch.arange(num_tokens),
                None,
                tower.rot_pos_emb([[num_frames, rows, columns]]),
                tower.fast_pos_embed_interpolate([[1, rows, columns]]) if has_embeddings else None,
            )
        cos, sin, index, window_ends, _ = tower.get_rope_by_thw(num_frames, rows, columns)
        ends = window_ends.view(num_frames, -1)[0].long() // merged**2
        windows = nn.functional.pad(ends, (1, 0)).diff()
        return cls(rows, columns, merged, index[:num_tokens], windows, (cos, sin), None)


def why_not_merging(tower: nn.Module) -> str | None:
    """Return why this module does not support a tower, None if it does."""
    if type(tower) not in _ATTENTION:
        return f"needs vLLM's tower of Qwen-VL, got {type(tower).__name__}"
    blocks: Any = tower.blocks
    if not all(type(block.attn) is _ATTENTION[type(tower)] for block in blocks):
        return "needs vLLM's attention layers in the tower, and other ones are there"
    if isinstance(tower, Qwen2VisionTransformer) and blocks[0].attn.tp_size > 1:
        # A rank's projection is no part of the heads.
        return "needs --mm-encoder-tp-mode data for Qwen2-VL with tensor parallelism"
    if not all(getattr(block, "do_not_compile", True) for block in blocks):
        return "needs layers of the tower that are not compiled: leave compile_mm_encoder out"
    attention = blocks[0].attn.attn
    if attention.fp8_enabled:
        return "needs --mm-encoder-attn-dtype auto, got fp8"
    if tower.device.type == "cuda" and not attention.is_flash_attn_backend:
        return f"needs --mm-encoder-attn-backend FLASH_ATTN, got {attention.attn_backend.name}"
    return None


def encode_merged(
    tower: Any, patches: torch.Tensor, grid: tuple[int, int, int], anchors: torch.Tensor
) -> torch.Tensor:
    """Return a video's tokens, with patches merged.

    Args:
        tower: one for which :func:`why_not_merging` gives None.
        patches: the tower's input, (T * rows * columns, values of a patch).
        grid: temporal patches, rows and columns of patches.
        anchors: int64 (T, P) on the CPU, counted from the first frame.

    Returns:
        (T, P, D).
    """
    layout = Layout.of(tower, grid)
    merged = MergedTokens.of(anchors, layout, tower.device, tower.dtype)
    size = layout.num_merged**2
    computed = patches.view(anchors.numel(), -1).index_select(0, merged.computed)
    metadata: dict[str, Any] = {
        # Attention takes the rotations of queries from those of all patches.
        "rotary_pos_emb_cos": None,
        "rotary_pos_emb_sin": None,
        "cu_seqlens": merged.frames,
        "cu_window_seqlens": merged.windows,
        "max_seqlen": None,
        "max_seqlen_full": None,
        "max_seqlen_window": None,
        # The rows are in the tower's order already.
        "window_index": slice(None),
        "reverse_indices": slice(None),
    }
    if layout.embeddings is not None:
        in_frame = merged.patch_numbers % len(layout.embeddings)
        metadata["pos_embeds"] = layout.embeddings.index_select(0, in_frame)
    with _attending(tower, partial(_attend, merged, layout.rotations)):
        rows = tower(computed.view(len(computed) * size, -1), None, encoder_metadata=metadata)
    return placed(rows, merged.tokens).view(*anchors.shape, -1)


@contextmanager
def _attending(tower: Any, attend: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Replace the tower's attention layers by a function of them and their input."""
    layers = [block.attn for block in tower.blocks]
    for layer in layers:
        layer.forward = partial(attend, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _attend(
    merged: MergedTokens,
    rotations: tuple[torch.Tensor, torch.Tensor],
    attention: Any,
    x: torch.Tensor,
    *,
    cu_seqlens: Sequences,
    **_: Any,
) -> torch.Tensor:
    """Return the attention (m, 1, C) of computed patches (m, 1, C) over all patches."""
    projected, _ = attention.qkv(x)
    heads = attention.num_attention_heads_per_partition
    size = attention.hidden_size_per_attention_head
    projected = projected.squeeze(1)
    queries, keys_and_values = projected.tensor_split([heads * size], dim=1)
    placement = merged.patches
    if projected.is_cuda and 2 * rotations[0].shape[1] == size:
        from scissor_vllm.worker.row_placement import place_rotated

        queries, keys, values = place_rotated(
            projected,
            placement.row_of_place,
            moves_of(keys_and_values, placement),
            placement.move_of_place,
            merged.patch_numbers,
            rotations,
            heads,
        )
    else:
        rotate = attention.apply_rotary_emb
        keys, values = placed(keys_and_values, placement).view(-1, 2, heads, size).unbind(1)
        keys = rotate(keys[None], *rotations)[0]
        of_queries = (table.index_select(0, merged.patch_numbers) for table in rotations)
        queries = rotate(queries.view(1, -1, heads, size), *of_queries)[0]
    attended = frames_attention(
        attention.attn,
        queries,
        keys,
        values,
        query_ends=cu_seqlens.query_ends,
        key_ends=cu_seqlens.key_ends,
        num_queries=cu_seqlens.num_queries,
        num_keys=cu_seqlens.num_keys,
    )
    out: torch.Tensor
    out, _ = attention.proj(attended.flatten(-2)[:, None])
    return out


def _of_patches(indices: torch.Tensor, size: int) -> torch.Tensor:
    """Return the indices of the ``size`` patches of each token, -1 for -1, (n * size,)."""
    patches = indices.reshape(-1, 1) * size + torch.arange(size)
    return torch.where(indices.reshape(-1, 1) < 0, -1, patches).flatten()
