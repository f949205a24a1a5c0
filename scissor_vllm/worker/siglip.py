"""SigLIP's encoder with fewer passes over memory, for compressed videos.

At a low ratio the vision tower is most of a video's cost. Part of its GPU time is memory traffic
that can be avoided. Here
- the residual sum and its norm become one kernel;
- GELU becomes the epilogue of the matrix product, on float32 sums. vLLM rounds the sums first, so
  values differ by that rounding. vLLM's own code therefore encodes uncompressed videos;
- flash attention does not split a frame's keys, so it has no partial results to write and combine;
- patches are embedded by a matrix product. A convolution changes the layout of pixels, and its
  output has to be transposed.

The code depends on the internals of ``siglip.py`` in vLLM 0.32 and 0.33. It steps aside for any
other layer (quantized, with adapters, another activation). Remove it when vLLM fuses these
operations.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from torch import nn
from vllm.model_executor.layers.conv import Conv2dLayer
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.models.siglip import (
    SiglipEncoder,
    SiglipEncoderLayer,
    SiglipVisionEmbeddings,
    SiglipVisionModel,
    SiglipVisionTransformer,
)

from scissor_vllm.vllm_compat import frames_attention
from scissor_vllm.worker.encoder_graphs import EncoderGraphs
from scissor_vllm.worker.siglip_kernels import add_norm, gather_patch

_MAX_WIDTH = 1 << 14
"""Largest width: a kernel holds a row in registers."""
_ALIGNED_VALUES = 8


@contextmanager
def fused_encoder(vision_tower: nn.Module, graphs: EncoderGraphs | None = None) -> Iterator[bool]:
    """Fuse a vision tower's encoder in the context; yields whether it is fused.

    Towers other than SigLIP, and towers with other layers than vLLM's, stay unchanged.

    Args:
        vision_tower: any.
        graphs: launch the layers by these; None launches every kernel.
    """
    layers = plain_layers(vision_tower)
    if layers is None:
        yield False
        return
    model: Any = vision_tower.vision_model
    embed = partial(embedded_patches, model.embeddings)
    with encoding_by(vision_tower, embed, partial(_encode, layers, graphs)):
        yield True


def _encode(
    layers: list[Any], graphs: EncoderGraphs | None, embedded: torch.Tensor
) -> torch.Tensor:
    """Return the layers' output for (B, P, C), which is overwritten; valid until the next call."""
    shape = num_frames, num_places, _ = embedded.shape
    num_rows = num_frames * num_places
    ends = torch.arange(
        0, num_rows + num_places, num_places, dtype=torch.int32, device=embedded.device
    )
    if graphs is None:
        return encode_fused(layers, embedded, partial(_attend_in_frames, ends))

    def launch(rows: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        (held_ends,) = inputs
        encode_fused(layers, rows.view(shape), partial(_attend_in_frames, held_ends))
        return rows

    rows = embedded.flatten(0, 1)
    encoded = graphs.run(("whole", num_frames), rows, num_rows, num_rows, [ends], launch)
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


def plain_layers(vision_tower: nn.Module) -> list[Any] | None:
    """Return the layers of a SigLIP tower, None unless all are vLLM's plain layers."""
    if not isinstance(vision_tower, SiglipVisionModel):
        return None
    model = vision_tower.vision_model
    if not isinstance(model.encoder, SiglipEncoder) or not _embeds_plainly(model.embeddings):
        return None
    return list(model.encoder.layers) if all(map(_is_plain, model.encoder.layers)) else None


@contextmanager
def encoding_by(
    vision_tower: SiglipVisionModel,
    embed: Callable[[torch.Tensor], torch.Tensor] | None,
    encode: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[None]:
    """Replace the parts of a tower by functions in the context.

    Calls for the output of several layers, or for interpolated positions, stay vLLM's.

    Args:
        vision_tower: SigLIP's.
        embed: maps pixels (T, C, H, W) to the input of ``encode``; None for vLLM's (T, P, D).
        encode: returns the output of the last layer, (T, P, D).
    """
    model = vision_tower.vision_model

    def forward(pixel_values: torch.Tensor, **options: Any) -> torch.Tensor:
        with ExitStack() as parts:
            if options.get("select_layers") is None and not options.get("interpolate_pos_encoding"):
                parts.enter_context(
                    _calling(model.encoder, lambda inputs_embeds, **_: encode(inputs_embeds))
                )
                if embed is not None:
                    parts.enter_context(
                        _calling(model.embeddings, lambda pixels, **_: embed(pixels))
                    )
            tokens: torch.Tensor = SiglipVisionTransformer.forward(model, pixel_values, **options)
            return tokens

    with _calling(model, forward):
        yield


@contextmanager
def _calling(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Have a module call a function in place of its ``forward`` in the context."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward


def _embeds_plainly(embeddings: Any) -> bool:
    if type(embeddings) is not SiglipVisionEmbeddings:
        return False
    layer = embeddings.patch_embedding
    height, width = layer.kernel_size
    # A layer that is a matrix product takes each pixel once.
    return type(layer) is Conv2dLayer and bool(layer.enable_linear) and height == width


def _is_plain(layer: Any) -> bool:
    if type(layer) is not SiglipEncoderLayer:
        return False
    first, activation = layer.mlp.fc1, layer.mlp.activation_fn
    norms = (layer.layer_norm1, layer.layer_norm2)
    return (
        type(first) is ColumnParallelLinear
        and type(first.quant_method) is UnquantizedLinearMethod
        and first.bias is not None
        and not (first.gather_output or first.skip_bias_add)
        and type(activation) is nn.GELU
        and activation.approximate == "tanh"
        and all(type(norm) is LayerNorm and norm.bias is not None for norm in norms)
        and all(norm.weight.dtype == first.weight.dtype for norm in norms)
        and first.input_size <= _MAX_WIDTH
    )


def encode_fused(
    layers: list[Any],
    hidden: torch.Tensor,
    attend: Callable[[Any, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the output of plain layers.

    Args:
        layers: from :func:`plain_layers`.
        hidden: (..., C), contiguous; overwritten.
        attend: a layer's attention, a function of its module and normed tokens.

    Returns:
        like ``hidden``.
    """
    normed = layers[0].layer_norm1(hidden)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        attended = attend(layer.self_attn, normed)
        normed = add_and_norm(hidden, attended, layer.layer_norm2)
        widened = linear_gelu(normed, layer.mlp.fc1.weight, layer.mlp.fc1.bias)
        narrowed, _ = layer.mlp.fc2(widened)
        if following is None:
            hidden += narrowed
        else:
            normed = add_and_norm(hidden, narrowed, following.layer_norm1)
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
        added: of the same shape and dtype, contiguous.
        norm: with weight and bias, over C.

    Returns:
        like ``hidden``, computed in float32.
    """
    assert hidden.is_contiguous()
    assert added.is_contiguous()
    normed = torch.empty_like(hidden)
    width = hidden.shape[-1]
    block = triton.next_power_of_2(width)
    add_norm[(hidden.numel() // width,)](
        hidden, added, normed, norm.weight, norm.bias, norm.eps, width, block, num_warps=4
    )
    return normed
