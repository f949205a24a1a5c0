"""SigLIP's encoder with fewer passes over memory, for compressed videos.

At a low ratio the vision tower is most of a video's cost. A tenth of its GPU time is memory traffic
that fusion avoids. In vLLM's encoder layer
- the residual sum and its norm become one kernel;
- GELU becomes the epilogue of the matrix product, on float32 sums. vLLM rounds the sums first, so
  values differ by that rounding. vLLM's own code therefore encodes uncompressed videos.

The code depends on the internals of ``siglip.py`` in vLLM 0.32 and 0.33. It steps aside for any
other layer (quantized, with adapters, another activation). Remove it when vLLM fuses these
operations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from torch import nn
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.models.siglip import SiglipEncoder, SiglipEncoderLayer, SiglipVisionModel

from scissor_vllm.worker.encoder_graphs import EncoderGraphs
from scissor_vllm.worker.siglip_kernels import add_norm

_MAX_WIDTH = 1 << 14
"""Largest width: a kernel holds a row in registers."""


@contextmanager
def fused_encoder(vision_tower: nn.Module) -> Iterator[bool]:
    """Fuse a vision tower's encoder in the context; yields whether it is fused.

    Towers other than SigLIP, and towers with other layers than vLLM's, stay unchanged.
    """
    layers = plain_layers(vision_tower)
    if layers is None:
        yield False
        return
    with encoding_by(vision_tower, partial(_encode, layers)):
        yield True


def _encode(layers: list[Any], inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Return the layers' output for (B, P, C)."""
    # Sums are written in place, so the caller's tensor is copied.
    hidden = inputs_embeds.clone(memory_format=torch.contiguous_format)
    return encode_fused(layers, hidden, _attend_in_frames)


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


def _attend_in_frames(attention: Any, normed: torch.Tensor) -> torch.Tensor:
    attended: torch.Tensor = attention(normed)[0]
    return attended


def plain_layers(vision_tower: nn.Module) -> list[Any] | None:
    """Return the layers of a SigLIP tower, None unless all are vLLM's plain layers."""
    encoder = (
        vision_tower.vision_model.encoder if isinstance(vision_tower, SiglipVisionModel) else None
    )
    if not isinstance(encoder, SiglipEncoder) or not all(map(_is_plain, encoder.layers)):
        return None
    return list(encoder.layers)


@contextmanager
def encoding_by(
    vision_tower: SiglipVisionModel, encode: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Replace the tower's layers on (B, P, C) by a function in the context."""
    encoder = vision_tower.vision_model.encoder

    def forward(
        inputs_embeds: torch.Tensor, return_all_hidden_states: bool
    ) -> torch.Tensor | list[torch.Tensor]:
        if return_all_hidden_states:
            every: list[torch.Tensor] = SiglipEncoder.forward(encoder, inputs_embeds, True)
            return every
        return encode(inputs_embeds)

    encoder.forward = forward
    try:
        yield
    finally:
        del encoder.forward


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
