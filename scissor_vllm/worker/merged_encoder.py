"""SigLIP's encoder for videos with merged patches: fewer patches to compute, the same grid.

Only the M patches that ``scissor_vllm.patch_merging`` selects pass through the layers. A frame's
attention has a query for each of its patches among the M, and a key and a value for every place.
A place without a computed patch takes those of its anchor, plus the change of the probes around it.
At the end each place takes its values in the same way. Without merged patches, the result is vLLM's
up to rounding.
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
from vllm.model_executor.models.siglip import SiglipEncoder, SiglipEncoderLayer, SiglipVisionModel

from scissor_vllm.patch_merging import computed_patches, nearest_probes, probe_places
from scissor_vllm.vllm_compat import frames_attention
from scissor_vllm.worker.encoder_graphs import GRAPH_FRAMES, EncoderGraphs

_DECAY = 8 / 9
"""Decay of a probe's weight with its squared distance on the lattice."""

_GRAPH_STEPS = 48
"""Numbers of rows for which there are graphs, up to all places of a call: 1 % is computed for
nothing in the mean."""

_GRAPH_INPUTS = ("row_of_place", "move_of_place", "probes", "weights", "query_ends", "key_ends")
"""Fields of ``MergedPatches`` that the layers read."""

Attend = Callable[[Any, torch.Tensor], torch.Tensor]
"""A layer's attention: a function of ``SiglipAttention`` and normed tokens."""


@dataclass(frozen=True)
class MergedPatches:
    """Which patches of T frames with P places are computed, and where their values go."""

    computed: torch.Tensor
    """Indices of the M computed patches among the T*P, ascending, int32 (M,)."""
    row_of_place: torch.Tensor
    """Row among the M for each place, int32 (T*P,)."""
    move_of_place: torch.Tensor
    """Index among T*L of the move that is added at each place, -1 for none, int32 (T*P,)."""
    probes: torch.Tensor
    """Rows of each frame's lattice, and rows of their anchors, int32 (2, T, L)."""
    weights: torch.Tensor
    """Weight of each probe's change in the move around each probe, (T, L, L) in the tower's dtype.
    """
    query_ends: torch.Tensor
    """Bounds of each frame's queries among the M, int32 (T + 1,)."""
    key_ends: torch.Tensor
    """Bounds of each frame's keys among the T*P, int32 (T + 1,)."""
    num_queries: list[int]
    """Number of queries of each frame."""

    @property
    def num_places(self) -> int:
        """P."""
        return len(self.row_of_place) // len(self.num_queries)

    @classmethod
    def of(cls, anchors: torch.Tensor, device: torch.device, dtype: torch.dtype) -> MergedPatches:
        """Return the plan for the frames of a tower call, without a host synchronization.

        Args:
            anchors: int64 (T, P) on the CPU, counted from the call's first frame.
            device: of the tower.
            dtype: of the tower.
        """
        num_frames, num_places = anchors.shape
        frames, places = torch.arange(num_frames)[:, None], torch.arange(num_places)
        is_computed = computed_patches(anchors)
        num_queries = is_computed.sum(dim=1)
        row = (is_computed.flatten().cumsum(0) - 1).view(num_frames, num_places)
        lattice = probe_places(num_places)
        move = frames * len(lattice) + nearest_probes(num_places)
        parts = {
            "computed": is_computed.flatten().nonzero().flatten(),
            "row_of_place": row[torch.where(is_computed, frames, anchors), places].flatten(),
            "move_of_place": torch.where(is_computed, -1, move).flatten(),
            "probes": torch.stack([row[:, lattice], row[anchors[:, lattice], lattice]]),
            "weights": probe_weights((anchors != frames)[:, lattice]).view(torch.int32),
            "query_ends": nn.functional.pad(num_queries.cumsum(0), (1, 0)),
            "key_ends": torch.arange(num_frames + 1) * num_places,
        }
        # Each part begins at a multiple of 16 bytes: kernels are compiled anew for other addresses.
        flat = [part.flatten().to(torch.int32) for part in parts.values()]
        padded = [nn.functional.pad(part, (0, -len(part) % 4)) for part in flat]
        packed = torch.cat(padded)
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        split = packed.split([*map(len, padded)])
        fields = {
            name: values[: part.numel()].view(part.shape)
            for (name, part), values in zip(parts.items(), split, strict=True)
        }
        fields["weights"] = fields["weights"].view(torch.float32).to(dtype)
        return cls(**fields, num_queries=num_queries.tolist())


def probe_weights(has_anchor: torch.Tensor) -> torch.Tensor:
    """Return the weight of each probe's change in the move around each probe.

    Weights fall with distance, over the probe and its eight neighbours on the lattice. If none of
    these has an anchor, all probes of the frame with an anchor have equal weights.

    Args:
        has_anchor: bool (T, L), which probes would take an anchor's values if they were no probes.

    Returns:
        float32 (T, L, L), rows that sum to 1, or to 0 in a frame with no such probe.
    """
    line = torch.arange(math.isqrt(has_anchor.shape[1]))
    near = torch.exp(-_DECAY * (line[:, None] - line).square()) * (line[:, None] - line).abs().le(1)
    weights = torch.kron(near, near) * has_anchor[:, None]
    alone = weights.sum(dim=2, keepdim=True) == 0
    weights = torch.where(alone, has_anchor[:, None].float(), weights)
    return weights / weights.sum(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


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
    vision_tower: Any, anchors: torch.Tensor, graphs: EncoderGraphs | None = None
) -> Iterator[None]:
    """Make a vision tower skip the patches that take an anchor's values, in the context.

    Args:
        vision_tower: one for which :func:`merges_patches` is true.
        anchors: of the frames of the tower's call, see :meth:`MergedPatches.of`.
        graphs: run calls of few frames by these; None launches every kernel.
    """
    # Imported here, because it imports Triton.
    from scissor_vllm.worker.siglip import encode_fused, encoding_by, plain_layers

    weight = next(vision_tower.parameters())
    device, dtype = weight.device, weight.dtype
    layers = plain_layers(vision_tower) if device.type == "cuda" else None
    run = (
        partial(_encode, list(vision_tower.vision_model.encoder.layers))
        if layers is None
        else partial(encode_fused, layers)
    )
    merged = MergedPatches.of(anchors, device, dtype)
    if graphs is not None and layers is not None and len(anchors) <= GRAPH_FRAMES:
        run = partial(_encode_by_graph, graphs, layers, merged)
    with encoding_by(vision_tower, partial(_encode_merged, run, merged)):
        yield


def _encode_merged(
    run: Callable[[torch.Tensor, Attend], torch.Tensor],
    merged: MergedPatches,
    inputs_embeds: torch.Tensor,
) -> torch.Tensor:
    """Return the layers' output for (T, P, C)."""
    hidden = inputs_embeds.flatten(0, 1).index_select(0, merged.computed)
    encoded = run(hidden, partial(_attend, merged))
    return placed(encoded, merged).view(inputs_embeds.shape)


def _encode_by_graph(
    graphs: EncoderGraphs,
    layers: list[Any],
    merged: MergedPatches,
    hidden: torch.Tensor,
    _: Attend,
) -> torch.Tensor:
    """Return the output of plain layers for (M, C), with rows up to the next of the graphs'."""
    from scissor_vllm.worker.siglip import encode_fused

    num_frames, num_places = len(merged.num_queries), merged.num_places
    step = max(1, num_frames * num_places // _GRAPH_STEPS)

    def launch(rows: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        held = replace(
            merged,
            **dict(zip(_GRAPH_INPUTS, inputs, strict=True)),
            # The kernel's size must not depend on the video.
            num_queries=[num_places] * num_frames,
        )
        encode_fused(layers, rows, partial(_attend, held))

    return graphs.run(
        ("merged", num_frames, num_places),
        hidden,
        math.ceil(len(hidden) / step) * step,
        [getattr(merged, name) for name in _GRAPH_INPUTS],
        launch,
    )


def _encode(layers: list[Any], hidden: torch.Tensor, attend: Attend) -> torch.Tensor:
    """Return the output of any SigLIP layers for (M, C)."""
    for layer in layers:
        hidden = hidden + attend(layer.self_attn, layer.layer_norm1(hidden))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden


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
        num_queries=merged.num_queries,
        num_keys=merged.num_places,
    )
    out: torch.Tensor
    out, _ = attention.out_proj(attended.flatten(-2))
    return out


def placed(rows: torch.Tensor, merged: MergedPatches) -> torch.Tensor:
    """Return the values of each place, (T*P, D), from computed rows (M, D), each contiguous."""
    if rows.is_cuda:
        from scissor_vllm.worker.siglip import place_rows, row_differences

        changes = row_differences(rows, merged.probes)
        moves = torch.bmm(merged.weights, changes)
        return place_rows(rows, merged.row_of_place, moves.flatten(0, 1), merged.move_of_place)
    of_frame, of_anchors = rows[merged.probes]
    moves = torch.bmm(merged.weights, of_frame - of_anchors).flatten(0, 1)
    added = moves[merged.move_of_place.clamp(min=0)]
    return rows[merged.row_of_place] + added * (merged.move_of_place >= 0)[:, None]
