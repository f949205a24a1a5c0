"""SigLIP's encoder with fewer passes over memory, for compressed videos.

At a low ratio the vision tower is most of a video's cost. Part of its GPU time is memory traffic
that can be avoided. Here
- the residual sum and its norm become one kernel;
- GELU becomes the epilogue of the matrix product, on float32 sums. vLLM rounds the sums first, so
  values differ by that rounding. vLLM's own code therefore encodes uncompressed videos;
- where the operator allows it, MLPs are computed in FP8 (``fp8_mlp.py``): norm and GELU round rows
  as they write them;
- flash attention does not split a frame's keys, so it has no partial results to write and combine;
- patches are embedded by a matrix product. A convolution changes the layout of pixels, and its
  output has to be transposed.

The code depends on the internals of ``siglip.py`` in vLLM 0.32 and 0.33. It steps aside for any
other layer (quantized, with adapters, another activation). Remove it when vLLM fuses these
operations.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from torch import nn
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.models.siglip import SiglipVisionEmbeddings

from scissor_vllm.vllm_compat import frames_attention
from scissor_vllm.worker import fp8_mlp
from scissor_vllm.worker.encoder_graphs import EncoderGraphs
from scissor_vllm.worker.fp8_mlp import FP8MLP
from scissor_vllm.worker.siglip_kernels import add_norm, gather_patch, gelu_to_fp8
from scissor_vllm.worker.siglip_layers import Attend, encoding_by, plain_layers

_ALIGNED_VALUES = 8
_LEAST_REST = 16
"""Columns of the second part of a row, also where the first has all of them."""


@contextmanager
def fused_encoder(
    vision_tower: nn.Module,
    graphs: EncoderGraphs | None = None,
    mlps: Sequence[FP8MLP] | None = None,
) -> Iterator[bool]:
    """Fuse a vision tower's encoder in the context; yields whether it is fused.

    Towers other than SigLIP, and towers with other layers than vLLM's, stay unchanged.

    Args:
        vision_tower: any.
        graphs: launch the layers by these; None launches every kernel.
        mlps: in place of the layers' own, None for those.
    """
    layers = plain_layers(vision_tower)
    if layers is None:
        yield False
        return
    model: Any = vision_tower.vision_model
    embed = partial(embedded_patches, model.embeddings)
    with encoding_by(vision_tower, embed, partial(_encode, layers, mlps, graphs)):
        yield True


def _encode(
    layers: list[Any],
    mlps: Sequence[FP8MLP] | None,
    graphs: EncoderGraphs | None,
    embedded: torch.Tensor,
) -> torch.Tensor:
    """Return the layers' output for (B, P, C), which is overwritten; valid until the next call."""
    shape = num_frames, num_places, _ = embedded.shape
    num_rows = num_frames * num_places
    ends = torch.arange(
        0, num_rows + num_places, num_places, dtype=torch.int32, device=embedded.device
    )
    if graphs is None:
        return encode_fused(layers, mlps, embedded, partial(_attend_in_frames, ends))

    def launch(rows: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        (held_ends,) = inputs
        encode_fused(layers, mlps, rows.view(shape), partial(_attend_in_frames, held_ends))
        return rows

    rows = embedded.flatten(0, 1)
    key = ("whole", mlps is not None, num_frames)
    encoded = graphs.run(key, rows, num_rows, num_rows, [ends], launch)
    return encoded.view(shape)


def graphs_of(vision_tower: nn.Module) -> EncoderGraphs | None:
    """Return graphs for a tower's layers, None where they cannot or need not be captured.

    Ranks that exchange sums within the layers do so by buffers that vLLM registers in its own
    captures alone.
    """
    layers = plain_layers(vision_tower)
    if not layers:
        return None
    device = layers[0].layer_norm1.weight.device
    exchanges_sums = layers[0].mlp.fc2.tp_size > 1
    return None if device.type != "cuda" or exchanges_sums else EncoderGraphs(device)


def _attend_in_frames(ends: torch.Tensor, attention: Any, normed: torch.Tensor) -> torch.Tensor:
    """Return the attention of frames (B, P, C), which begin and end at ``ends``."""
    kernel = attention.attn
    attended: torch.Tensor
    if not (normed.is_cuda and kernel.is_flash_attn_backend) or kernel.fp8_enabled:
        attended, _ = attention(normed)
        return attended
    num_places = normed.shape[1]
    projected, _ = attention.qkv_proj(normed.flatten(0, 1))
    heads = attention.num_heads_per_partition
    queries, keys, values = projected.view(len(projected), 3, heads, -1).unbind(1)
    of_heads = frames_attention(
        kernel,
        queries,
        keys,
        values,
        query_ends=ends,
        key_ends=ends,
        most_queries=num_places,
        most_keys=num_places,
    )
    attended, _ = attention.out_proj(of_heads.flatten(-2))
    return attended.view(normed.shape)


def encode_fused(
    layers: list[Any], mlps: Sequence[FP8MLP] | None, hidden: torch.Tensor, attend: Attend
) -> torch.Tensor:
    """Return the output of plain layers.

    Args:
        layers: from ``plain_layers``.
        mlps: in place of the layers' own, None for those.
        hidden: (..., C), contiguous; overwritten.
        attend: a layer's attention.

    Returns:
        like ``hidden``.
    """
    normed = layers[0].layer_norm1(hidden)
    for number, layer in enumerate(layers):
        attended = attend(layer.self_attn, normed)
        if mlps is None:
            normed = add_and_norm(hidden, attended, layer.layer_norm2)
            widened = linear_gelu(normed, layer.mlp.fc1.weight, layer.mlp.fc1.bias)
            narrowed, _ = layer.mlp.fc2(widened)
        else:
            rows, scales = add_and_norm_to_fp8(hidden, attended, layer.layer_norm2)
            widened = mlps[number].fc1.product(rows, scales)
            narrowed = mlps[number].fc2.product(*gelu_of_rows(widened)).view(hidden.shape)
        if number + 1 == len(layers):
            hidden += narrowed
        else:
            normed = add_and_norm(hidden, narrowed, layers[number + 1].layer_norm1)
    return hidden


def embedded_patches(
    embeddings: SiglipVisionEmbeddings, pixels: torch.Tensor, numbers: torch.Tensor | None = None
) -> torch.Tensor:
    """Return embedded patches with their positions, by one matrix product.

    Args:
        embeddings: plain ones, see :func:`plain_layers`.
        pixels: (T, C, H, W).
        numbers: patches to embed among the T*P, int32 (M,); None for all.

    Returns:
        (M, D), or (T, P, D) for all patches, of the weights' dtype.
    """
    layer = embeddings.patch_embedding
    side = layer.kernel_size[0]
    pixels = pixels.to(layer.weight.dtype).contiguous()
    num_frames, num_channels, height, width = pixels.shape
    num_places = (height // side) * (width // side)
    weight = layer.weight.flatten(1)
    # Tensor cores load rows of whole 16 bytes.
    num_added = -weight.shape[1] % _ALIGNED_VALUES
    num_values = weight.shape[1] + num_added
    num_rows = num_frames * num_places if numbers is None else len(numbers)
    patches = pixels.new_empty(num_rows, num_values)
    gather_patch[(num_rows,)](
        pixels,
        pixels if numbers is None else numbers,
        patches,
        num_channels,
        height,
        width,
        num_values,
        side=side,
        takes_all=numbers is None,
        block=triton.next_power_of_2(num_values),
        num_warps=4,
    )
    rows = F.linear(patches, F.pad(weight, (0, num_added)), layer.bias)
    positions = embeddings.position_embedding.weight
    if numbers is None:
        return rows.view(num_frames, num_places, -1).add_(positions)
    return rows.add_(positions.index_select(0, numbers % num_places))


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return GELU, by tanh, of a linear layer.

    Args:
        x: (..., C).
        weight: (D, C).
        bias: (D,).

    Returns:
        (..., D), of x's dtype.
    """
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    # cuBLASLt's epilogue; torch applies the activation if cuBLASLt cannot.
    flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return flat.view(*x.shape[:-1], len(weight))


def add_and_norm(hidden: torch.Tensor, added: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    """Add to ``hidden``, in place, and return the norm of the sum.

    Args:
        hidden: (..., C), contiguous.
        added: of the same shape, contiguous.
        norm: with weight and bias, over C.

    Returns:
        like ``hidden``, computed in float32.
    """
    normed = torch.empty_like(hidden)
    _add_and_norm(hidden, added, norm, normed, None)
    return normed


def add_and_norm_to_fp8(
    hidden: torch.Tensor, added: torch.Tensor, norm: LayerNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as :func:`add_and_norm`, and return the norm's M rows as ``fp8_mlp.quantized`` would."""
    width = hidden.shape[-1]
    num_rows = hidden.numel() // width
    rows = hidden.new_empty(num_rows, fp8_mlp.padded(width), dtype=fp8_mlp.DTYPE)
    scales = hidden.new_empty(num_rows, 1, dtype=torch.float32)
    _add_and_norm(hidden, added, norm, rows, scales)
    return rows, scales


def _add_and_norm(
    hidden: torch.Tensor,
    added: torch.Tensor,
    norm: LayerNorm,
    normed: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """Fill ``normed``, and ``scales`` of its FP8 rows."""
    assert hidden.is_contiguous()
    assert added.is_contiguous()
    width = hidden.shape[-1]
    main, rest = _blocks(width, normed.shape[-1])
    add_norm[(hidden.numel() // width,)](
        hidden,
        added,
        normed,
        normed if scales is None else scales,
        norm.weight,
        norm.bias,
        norm.eps,
        fp8_mlp.TINY,
        width,
        normed.shape[-1],
        main,
        rest,
        scales is not None,
        num_warps=4,
    )


def gelu_of_rows(widened: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return GELU, by tanh, of rows (M, C) as ``fp8_mlp.quantized`` would; C is a padded width."""
    num_rows, width = widened.shape
    rows = torch.empty_like(widened, dtype=fp8_mlp.DTYPE)
    scales = widened.new_empty(num_rows, 1, dtype=torch.float32)
    gelu_to_fp8[(num_rows,)](
        widened, rows, scales, fp8_mlp.TINY, width, *_blocks(width, width), num_warps=4
    )
    return rows, scales


def _blocks(width: int, stored_width: int) -> tuple[int, int]:
    """Return two powers of 2 whose sum is at least ``stored_width``.

    The first is the largest that a row has. A single power of 2 would be up to twice as long as the
    row.
    """
    main = 1 << (width.bit_length() - 1)
    return main, max(_LEAST_REST, triton.next_power_of_2(stored_width - main))
