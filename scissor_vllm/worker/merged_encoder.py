"""SigLIP's encoder for videos with merged patches: fewer patches to compute, the same grid.

Only the M patches that ``scissor_vllm.patch_merging`` selects pass through the layers. A frame's
attention has a query for each of its patches among the M, and a key and a value for every place.
A place without a computed patch takes those of its anchor, plus the change of the probes around it.
At the end each place takes its values in the same way. Without merged patches, the result is vLLM's
up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.siglip import SiglipEncoder, SiglipEncoderLayer, SiglipVisionModel

from scissor_vllm.patch_merging import CALL_FRAMES
from scissor_vllm.vllm_compat import frames_attention
from scissor_vllm.worker.encoder_graphs import EncoderGraphs, graph_rows
from scissor_vllm.worker.fp8_mlp import FP8MLP
from scissor_vllm.worker.merged_patches import MergedPatches, placed
from scissor_vllm.worker.siglip_layers import Attend, encode_by_modules, encoding_by, plain_layers

_GRAPH_INPUTS = ("row_of_place", "move_of_place", "probes", "weights", "query_ends", "key_ends")
"""Fields of ``MergedPatches`` that the layers read."""

_Run = Callable[[torch.Tensor, Attend], torch.Tensor]
"""Returns the layers' output for rows (M, C)."""


def merges_patches(vision_tower: nn.Module) -> bool:
    """Return whether this module supports the tower's encoder."""
    if not isinstance(vision_tower, SiglipVisionModel):
        return False
    encoder = vision_tower.vision_model.encoder
    return type(encoder) is SiglipEncoder and all(
        type(layer) is SiglipEncoderLayer for layer in encoder.layers
    )


@contextmanager
def merging_encoder(
    vision_tower: Any,
    anchors: torch.Tensor,
    graphs: EncoderGraphs | None = None,
    mlps: Sequence[FP8MLP] | None = None,
) -> Iterator[None]:
    """Make a vision tower skip the patches that take an anchor's values, in the context.

    Args:
        vision_tower: one for which :func:`merges_patches` is true.
        anchors: of the frames of the tower's call, see :meth:`MergedPatches.of`.
        graphs: run calls of few frames by these; None launches every kernel.
        mlps: in place of the layers' own, None for those.
    """
    weight = next(vision_tower.parameters())
    device, dtype = weight.device, weight.dtype
    merged = MergedPatches.of(anchors, device, dtype)
    embed = None
    layers = plain_layers(vision_tower) if device.type == "cuda" else None
    if layers is None:
        every_layer = list(vision_tower.vision_model.encoder.layers)
        run: _Run = partial(encode_by_modules, every_layer, mlps)
    else:
        # Imported here, because it imports Triton.
        from scissor_vllm.worker.siglip import embedded_patches, encode_fused

        run = partial(encode_fused, layers, mlps)
        embeddings = vision_tower.vision_model.embeddings
        embed = partial(embedded_patches, embeddings, numbers=merged.computed)
        if graphs is not None and len(anchors) <= CALL_FRAMES:
            run = partial(_encode_by_graph, graphs, run, mlps is not None, merged)
    with encoding_by(vision_tower, embed, partial(_encode_merged, run, merged)):
        yield


def _encode_merged(
    run: _Run,
    merged: MergedPatches,
    embedded: torch.Tensor,
) -> torch.Tensor:
    """Return the layers' output (T, P, C) for all patches (T, P, C), or computed ones (M, C)."""
    if embedded.ndim == 3:
        embedded = embedded.flatten(0, 1).index_select(0, merged.computed)
    encoded = run(embedded, partial(_attend, merged))
    return placed(encoded, merged).view(merged.num_frames, merged.num_places, -1)


def _encode_by_graph(
    graphs: EncoderGraphs,
    run: _Run,
    in_fp8: bool,
    merged: MergedPatches,
    hidden: torch.Tensor,
    _: Attend,
) -> torch.Tensor:
    """Return the output of plain layers for (M, C), with rows up to the next of the graphs'."""
    num_frames, num_places = merged.num_frames, merged.num_places

    def launch(rows: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        held = replace(merged, **dict(zip(_GRAPH_INPUTS, inputs, strict=True)))
        return run(rows, partial(_attend, held))

    encoded = graphs.run(
        ("merged", in_fp8, num_frames, num_places),
        hidden,
        graph_rows(len(hidden), num_frames * num_places),
        num_frames * num_places,
        [getattr(merged, name) for name in _GRAPH_INPUTS],
        launch,
    )
    return encoded[: len(hidden)]


def _attend(merged: MergedPatches, attention: Any, normed: torch.Tensor) -> torch.Tensor:
    """Return the attention (M, C) of computed patches over all places of their frames."""
    projected, _ = attention.qkv_proj(normed)
    heads, size = attention.num_heads_per_partition, attention.head_dim
    queries, keys_and_values = projected.tensor_split([heads * size], dim=1)
    keys, values = placed(keys_and_values, merged).view(-1, 2, heads, size).unbind(1)
    attended = frames_attention(
        attention.attn,
        queries.view(-1, heads, size),
        keys,
        values,
        query_ends=merged.query_ends,
        key_ends=merged.key_ends,
        most_queries=merged.num_places,
        most_keys=merged.num_places,
    )
    out: torch.Tensor
    out, _ = attention.out_proj(attended.flatten(-2))
    return out
