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

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from scissor_vllm.patch_merging import computed_patches
from scissor_vllm.vllm_compat import frames_attention
from scissor_vllm.worker.encoder_graphs import USES_BEFORE_CAPTURE, EncoderGraphs, graph_rows
from scissor_vllm.worker.merged_patches import (
    Placement,
    Plan,
    ends_of,
    in_rows_order,
    moves_of,
    numbers_of_rows,
    placed,
)
from scissor_vllm.worker.pinned import to_device

_ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    Qwen2VisionTransformer: Qwen2VisionAttention,
    Qwen2_5_VisionTransformer: Qwen2_5_VisionAttention,
    Qwen3_VisionTransformer: Qwen2_5_VisionAttention,
}
"""Towers, and their attention layers."""

MAX_GRAPH_PATCHES = 1 << 15
"""Most patches of a call that is captured: 8192 tokens. Longer calls keep the GPU busy while the
host launches, and their graphs would take more memory."""

_WARM_UP_FRAME = (32, 64)
"""Rows and columns of patches."""

_MAX_LAYOUTS = 8


@dataclass(frozen=True)
class Parts:
    """The parts of all frames in which patches attend to each other: frames, or their windows."""

    ends: torch.Tensor
    """Where the tokens of each part begin and end, int64 (n + 1,)."""
    key_ends: torch.Tensor
    """The same for patches, int32 (n + 1,)."""
    most_patches: int
    """Of a part."""

    @classmethod
    def of(cls, lengths: torch.Tensor, patches_per_token: int, device: torch.device) -> Parts:
        """Return parts of so many tokens, int64 (n,) on the CPU."""
        ends = ends_of(lengths)
        return cls(
            to_device(ends, device),
            to_device((ends * patches_per_token).int(), device),
            int(lengths.max()) * patches_per_token,
        )


@dataclass(frozen=True)
class Sequences:
    """What a layer's attention reads beside patches."""

    query_ends: torch.Tensor
    """Where the computed patches of each part begin and end, int32 (n + 1,)."""
    parts: Parts


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
    frame_query_ends: torch.Tensor
    """Where the computed patches of each frame begin and end, int32 (T + 1,)."""
    window_query_ends: torch.Tensor | None
    """The same for windows, None if every layer attends within frames."""

    @classmethod
    def of(
        cls,
        anchors: torch.Tensor,
        layout: Layout,
        device: torch.device,
        dtype: torch.dtype,
        num_rows: int | None = None,
    ) -> MergedTokens:
        """Return the plan for the frames of a tower call, without a host synchronization.

        Args:
            anchors: int64 (T, P) on the CPU, counted from the call's first frame.
            layout: of the tower, for these frames.
            device: of the tower.
            dtype: of the tower.
            num_rows: rows of tokens, at least M: further ones are the first token's. None for M.
        """
        num_frames, num_tokens = anchors.shape
        size, order = layout.patches_per_token, layout.order
        if num_rows is None:
            num_rows = layout.num_computed(anchors)
        plan = Plan.of(anchors, layout.grid, device, order, num_rows)
        in_order = in_rows_order(plan.is_computed, order).flatten()
        num_before = ends_of(in_order)
        numbers = torch.arange(num_frames * num_tokens, device=device)
        tokens = numbers_of_rows(in_order, num_before[1:] - 1, numbers, num_rows)
        row, move = (
            in_rows_order(plan.row_of_place, order),
            in_rows_order(plan.move_of_place, order),
        )
        weights = plan.weights.to(dtype)
        windows = layout.windows
        return cls(
            plan.computed.int(),
            _of_patches(tokens, size).flatten().int(),
            Placement(
                _of_patches(row, size).flatten().int(),
                torch.where(move[..., None] < 0, -1, _of_patches(move, size)).flatten().int(),
                _of_patches(plan.probes, size).flatten(2).int(),
                weights,
            ),
            Placement(
                plan.row_of_place.flatten().int(),
                plan.move_of_place.flatten().int(),
                plan.probes.int(),
                weights,
            ),
            (num_before[layout.frames.ends] * size).int(),
            None if windows is None else (num_before[windows.ends] * size).int(),
        )


@dataclass(frozen=True)
class Layout:
    """How a tower orders the patches of T frames, and where they stand, on the tower's device."""

    grid: tuple[int, int]
    """Number of rows and of columns of tokens."""
    patches_per_token: int
    order: torch.Tensor | None
    """Tokens of a frame in the tower's order, int64 (P,); None for row by row."""
    frames: Parts
    windows: Parts | None
    """None if every layer attends within frames."""
    rotations: tuple[torch.Tensor, torch.Tensor]
    """Cosines and sines of all patches of all frames in the tower's order."""
    embeddings: torch.Tensor | None
    """Position embeddings of a frame's patches in that order, None if the tower has none."""

    @classmethod
    def of(cls, tower: Any, grid: tuple[int, int, int]) -> Layout:
        """Return the layout of temporal patches, rows and columns of patches."""
        num_frames, rows, columns = grid
        merged, device = tower.spatial_merge_size, tower.device
        size = merged**2
        num_tokens = rows * columns // size
        tokens = rows // merged, columns // merged
        frames = Parts.of(torch.full((num_frames,), num_tokens), size, device)
        if not isinstance(tower, Qwen2_5_VisionTransformer):
            rotations = tower.rot_pos_emb([[num_frames, rows, columns]])
            embeddings = (
                tower.fast_pos_embed_interpolate([[1, rows, columns]])
                if isinstance(tower, Qwen3_VisionTransformer)
                else None
            )
            return cls(tokens, size, None, frames, None, rotations, embeddings)
        cos, sin, index, window_ends, _ = tower.get_rope_by_thw(num_frames, rows, columns)
        lengths = nn.functional.pad(window_ends.view(num_frames, -1)[0].long() // size, (1, 0))
        windows = Parts.of(lengths.diff().repeat(num_frames), size, device)
        order = to_device(index[:num_tokens], device)
        return cls(tokens, size, order, frames, windows, (cos, sin), None)

    def num_computed(self, anchors: torch.Tensor) -> int:
        """Return M of anchors, int64 (T, P) on the CPU."""
        return int(computed_patches(anchors, self.grid).sum())


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


class MergingTower:
    """Encodes videos by a tower of Qwen-VL, with patches merged; one at a time."""

    def __init__(self, tower: Any, graph_patches: int = 0) -> None:
        """Keep the tower.

        Args:
            tower: one for which :func:`why_not_merging` gives None.
            graph_patches: launch its layers by CUDA graphs for so many patches of a call at most,
                where they can be captured. Ranks that exchange sums within the layers do so by
                buffers that vLLM registers in its own captures alone.
        """
        self._tower, self._graph_patches = tower, graph_patches
        self._layouts: dict[tuple[int, int, int], Layout] = {}
        self._graphs: EncoderGraphs | None = None
        if graph_patches and tower.device.type == "cuda" and tower.blocks[0].attn.tp_size == 1:
            self._graphs = EncoderGraphs(tower.device)

    def encode(
        self, patches: torch.Tensor, grid: tuple[int, int, int], anchors: torch.Tensor
    ) -> torch.Tensor:
        """Return a video's tokens.

        Args:
            patches: the tower's input, (T * rows * columns, values of a patch).
            grid: temporal patches, rows and columns of patches.
            anchors: int64 (T, P) on the CPU, counted from the first frame.

        Returns:
            (T, P, D).
        """
        tower, layout = self._tower, self._layout(grid)
        num_tokens, size = anchors.numel(), layout.patches_per_token
        graphs = self._graphs if len(patches) <= self._graph_patches else None
        num_rows = layout.num_computed(anchors)
        if graphs is not None:
            num_rows = graph_rows(num_rows, num_tokens)
        merged = MergedTokens.of(anchors, layout, tower.device, tower.dtype, num_rows)
        computed = patches.view(num_tokens, -1).index_select(0, merged.computed)
        rows = computed.view(num_rows * size, -1)
        if graphs is None:
            tokens = _computed_tokens(tower, layout, merged, rows)
        else:
            tokens = graphs.run(
                ("merged", grid),
                rows,
                len(rows),
                len(patches),
                _graph_inputs(merged),
                lambda rows, inputs: _computed_tokens(tower, layout, _with(merged, inputs), rows),
            )
        return placed(tokens, merged.tokens).view(*anchors.shape, -1)

    def warm_up(self) -> None:
        """Encode empty patches, so that no request waits for the compilation of kernels.

        On a GPU it captures the graph that takes the most memory, so that vLLM counts that memory.
        """
        side = 2 * self._tower.spatial_merge_size
        self._encode_empty((2, side, side))
        num_frames = self._graph_patches // math.prod(_WARM_UP_FRAME)
        if self._graphs is not None and num_frames > 1:
            for _ in range(USES_BEFORE_CAPTURE + 1):
                self._encode_empty((num_frames, *_WARM_UP_FRAME))

    def _encode_empty(self, grid: tuple[int, int, int]) -> None:
        """Encode a grid of empty patches, of which one frame is merged, so nearly all computed."""
        num_frames, rows, columns = grid
        layer = self._tower.patch_embed
        width = layer.proj.weight[0].numel()
        patches = next(layer.parameters()).new_zeros(math.prod(grid), width)
        frames = torch.arange(num_frames)[:, None]
        num_tokens = rows * columns // self._tower.spatial_merge_size**2
        self.encode(patches, grid, (frames - (frames == 1).long()).expand(-1, num_tokens))

    def forget(self) -> None:
        """Drop what was made of the tower's weights."""
        self._layouts.clear()
        if self._graphs is not None:
            self._graphs.forget()

    def _layout(self, grid: tuple[int, int, int]) -> Layout:
        layout = self._layouts.pop(grid, None) or Layout.of(self._tower, grid)
        # The last used comes last.
        self._layouts[grid] = layout
        if len(self._layouts) > _MAX_LAYOUTS:
            del self._layouts[next(iter(self._layouts))]
        return layout


def _graph_inputs(merged: MergedTokens) -> list[torch.Tensor]:
    """Return what the layers read of a plan, for :func:`_with`."""
    patches = merged.patches
    inputs = [
        merged.patch_numbers,
        patches.row_of_place,
        patches.move_of_place,
        patches.probes,
        patches.weights,
        merged.frame_query_ends,
    ]
    windows = merged.window_query_ends
    return inputs if windows is None else [*inputs, windows]


def _with(merged: MergedTokens, inputs: Sequence[torch.Tensor]) -> MergedTokens:
    """Return a plan that reads other tensors, in the order of :func:`_graph_inputs`."""
    numbers, row, move, probes, weights, frame_ends, *window_ends = inputs
    return replace(
        merged,
        patch_numbers=numbers,
        patches=Placement(row, move, probes, weights),
        frame_query_ends=frame_ends,
        window_query_ends=window_ends[0] if window_ends else None,
    )


def _computed_tokens(
    tower: Any, layout: Layout, merged: MergedTokens, rows: torch.Tensor
) -> torch.Tensor:
    """Return the tokens (M, D) of computed patches (M * patches, values of a patch)."""
    windows = merged.window_query_ends
    metadata: dict[str, Any] = {
        # Attention takes the rotations of queries from those of all patches.
        "rotary_pos_emb_cos": None,
        "rotary_pos_emb_sin": None,
        "cu_seqlens": Sequences(merged.frame_query_ends, layout.frames),
        "cu_window_seqlens": (
            None
            if windows is None or layout.windows is None
            else Sequences(windows, layout.windows)
        ),
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
        tokens: torch.Tensor = tower(rows, None, encoder_metadata=metadata)
    return tokens


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
        key_ends=cu_seqlens.parts.key_ends,
        most_queries=cu_seqlens.parts.most_patches,
        most_keys=cu_seqlens.parts.most_patches,
    )
    out: torch.Tensor
    out, _ = attention.proj(attended.flatten(-2)[:, None])
    return out


def _of_patches(indices: torch.Tensor, size: int) -> torch.Tensor:
    """Return the indices of the ``size`` patches of each token, (..., n, size)."""
    return indices[..., None] * size + torch.arange(size, device=indices.device)
