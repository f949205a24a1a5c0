"""What all ways of encoding by SigLIP's layers share; nothing here needs Triton."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
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

Attend = Callable[[Any, torch.Tensor], torch.Tensor]
"""A layer's attention: a function of ``SiglipAttention`` and normed tokens."""

MLP = Callable[[torch.Tensor], torch.Tensor]
"""A layer's MLP: a function of normed tokens."""

_MAX_WIDTH = 1 << 14
"""Largest width: a kernel holds a row in registers."""


def plain_layers(vision_tower: nn.Module) -> list[Any] | None:
    """Return the layers of a SigLIP tower, None unless all are vLLM's plain layers."""
    if not isinstance(vision_tower, SiglipVisionModel):
        return None
    model = vision_tower.vision_model
    if not isinstance(model.encoder, SiglipEncoder) or not _embeds_plainly(model.embeddings):
        return None
    return list(model.encoder.layers) if all(map(_is_plain, model.encoder.layers)) else None


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


def encode_by_modules(
    layers: Sequence[Any], mlps: Sequence[MLP] | None, hidden: torch.Tensor, attend: Attend
) -> torch.Tensor:
    """Return the output of any SigLIP layers, computed by their modules.

    Args:
        layers: of the encoder.
        mlps: in place of the layers' own, None for those.
        hidden: (..., C).
        attend: a layer's attention.
    """
    for number, layer in enumerate(layers):
        mlp = layer.mlp if mlps is None else mlps[number]
        hidden = hidden + attend(layer.self_attn, layer.layer_norm1(hidden))
        hidden = hidden + mlp(layer.layer_norm2(hidden))
    return hidden


@contextmanager
def encoding_with(vision_tower: SiglipVisionModel, mlps: Sequence[MLP]) -> Iterator[None]:
    """Give the layers of a tower other MLPs in the context."""

    def attend(attention: Any, normed: torch.Tensor) -> torch.Tensor:
        attended: torch.Tensor
        attended, _ = attention(normed)
        return attended

    layers = list(vision_tower.vision_model.encoder.layers)
    run = partial(encode_by_modules, layers, mlps)
    with encoding_by(vision_tower, None, lambda embedded: run(embedded, attend)):
        yield


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
