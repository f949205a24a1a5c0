"""SigLIP's encoder with matrix products in FP8, for videos that are compressed, if asked for.

At a low ratio the vision tower is most of what a video costs, and most of it are products, which a
Hopper GPU does twice as fast in FP8 (e4m3) as in bfloat16. Weights have a scale for each output,
activations one for each token, found as they are quantized: nothing is calibrated. Quantizing takes
no pass of its own after a norm and after GELU. Attention, norms and sums stay as they are.

Like ``siglip.py`` it knows the inside of vLLM 0.32's and 0.33's ``siglip.py``. vLLM's own online
FP8 (``--quantization fp8``) would change the language model, pictures and videos kept whole.

A CPU computes the same values, slower than without, to see what they cost in accuracy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from torch import nn
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from scissor_vllm.settings import VIDEO_ENCODER_DTYPE
from scissor_vllm.worker.siglip import encoding_by, plain_layers
from scissor_vllm.worker.siglip_kernels import add_norm_quantize, quantize

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
_LEAST_CAPABILITY = 89
_LEAST_SCALE = 1e-12
"""Of a row of zeros."""
_ALIGNMENT = 16
"""Widths that FP8 products take are multiples of it."""


@dataclass(frozen=True)
class Rows:
    """Quantized activations: ``values * scale``."""

    values: torch.Tensor
    """(n, C) e4m3."""
    scale: torch.Tensor
    """(n, 1) float32."""


@dataclass(frozen=True)
class Linear:
    """A quantized linear layer."""

    weight: torch.Tensor
    """(D, C) e4m3."""
    scale: torch.Tensor
    """(1, D) float32."""
    bias: torch.Tensor
    """(D,), of the dtype of what the layer gives."""

    @classmethod
    def of(cls, layer: Any) -> "Linear":
        """Quantize vLLM's layer."""
        weight = layer.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / LARGEST).clamp(min=_LEAST_SCALE)
        values = (weight / scale[:, None]).clamp(-LARGEST, LARGEST).to(DTYPE)
        return cls(values, scale[None], layer.bias.detach())

    def __call__(self, rows: Rows) -> torch.Tensor:
        """Return (n, D) of the bias's dtype."""
        if not rows.values.is_cuda:
            sums = rows.values.float() @ self.weight.float().t()
            return (sums * rows.scale * self.scale + self.bias.float()).to(self.bias.dtype)
        from vllm._custom_ops import cutlass_scaled_mm

        # The kernel has no float32 to give.
        dtype = torch.bfloat16 if self.bias.dtype == torch.float32 else self.bias.dtype
        product = cutlass_scaled_mm(
            rows.values, self.weight.t(), rows.scale, self.scale, dtype, self.bias.to(dtype)
        )
        return product.to(self.bias.dtype)


@dataclass(frozen=True)
class _Layer:
    """A layer of the encoder, its matrices quantized."""

    stock: Any
    qkv: Linear
    out: Linear
    fc1: Linear
    fc2: Linear


class Fp8Encoder:
    """A vision tower's encoder in FP8.

    Raises:
        ValueError: the tower is not SigLIP's as vLLM makes it, or not whole in this worker, or the
            platform is a GPU without FP8.
    """

    def __init__(self, vision_tower: nn.Module, platform: Any) -> None:
        has_fp8 = platform.is_cuda() and platform.has_device_capability(_LEAST_CAPABILITY)
        if not (has_fp8 or platform.is_cpu()):
            raise ValueError(
                f"{VIDEO_ENCODER_DTYPE} fp8 needs a CUDA GPU of capability 8.9 or more (Ada, "
                f"Hopper and later), or a CPU, got {platform.device_name}: leave it out"
            )
        self._tower = vision_tower
        self._layers: list[_Layer] = []
        layers = plain_layers(vision_tower)
        if layers is None:
            raise ValueError(
                f"{VIDEO_ENCODER_DTYPE} fp8 needs SigLIP's vision tower, not quantized, got "
                f"{type(vision_tower).__name__}: leave it out"
            )
        self._plain_layers = layers
        for linear in (each for layer in layers for each in _linears(layer)):
            if type(linear.quant_method) is not UnquantizedLinearMethod or linear.bias is None:
                raise ValueError(
                    f"{VIDEO_ENCODER_DTYPE} fp8 needs plain matrices with a bias, got "
                    f"{type(linear.quant_method).__name__} of {type(linear).__name__}: leave it out"
                )
            if linear.tp_size != 1:
                raise ValueError(
                    f"{VIDEO_ENCODER_DTYPE} fp8 needs the whole vision tower in each worker, got a "
                    f"{linear.tp_size}th: add --mm-encoder-tp-mode data, or leave it out"
                )
            if any(size % _ALIGNMENT for size in linear.weight.shape):
                raise ValueError(
                    f"{VIDEO_ENCODER_DTYPE} fp8 needs matrices whose sides are multiples of "
                    f"{_ALIGNMENT}, got {tuple(linear.weight.shape)}: leave it out"
                )

    def quantize(self) -> None:
        """Quantize the matrices as they are now: vLLM may pack them after it loaded them."""
        self._layers = [
            _Layer(layer, *map(Linear.of, _linears(layer))) for layer in self._plain_layers
        ]

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Have the tower encode in FP8 meanwhile."""
        if not self._layers:
            # Weights that are not loaded but made up.
            self.quantize()
        with encoding_by(self._tower, self._encode):
            yield

    def _encode(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Return what the layers make of (B, P, C)."""
        shape = inputs_embeds.shape
        # Sums are written in place, and not into what the caller holds.
        hidden = inputs_embeds.flatten(0, 1).clone(memory_format=torch.contiguous_format)
        normed = quantized(self._layers[0].stock.layer_norm1(hidden))
        for layer, following in zip(self._layers, [*self._layers[1:], None], strict=True):
            queries, keys, values = layer.qkv(normed).view(*shape[:2], -1).chunk(3, dim=-1)
            seen = layer.stock.self_attn.attn(queries, keys, values)
            attended = layer.out(quantized(seen.reshape(len(hidden), -1)))
            normed = add_norm_quantized(hidden, attended, layer.stock.layer_norm2)
            narrowed = layer.fc2(quantized(layer.fc1(normed), gelu=True))
            if following is None:
                hidden += narrowed
            else:
                normed = add_norm_quantized(hidden, narrowed, following.stock.layer_norm1)
        return hidden.view(shape)


def _linears(layer: Any) -> list[Any]:
    return [layer.self_attn.qkv_proj, layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2]


def _empty_rows(like: torch.Tensor) -> Rows:
    return Rows(
        torch.empty_like(like, dtype=DTYPE),
        torch.empty(len(like), 1, dtype=torch.float32, device=like.device),
    )


def _by_kernels(x: torch.Tensor) -> bool:
    return x.is_cuda or bool(triton.knobs.runtime.interpret)


def _by_torch(x: torch.Tensor) -> Rows:
    scale = (x.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=_LEAST_SCALE)
    return Rows((x / scale).clamp(-LARGEST, LARGEST).to(DTYPE), scale)


def quantized(x: torch.Tensor, *, gelu: bool = False) -> Rows:
    """Return rows (n, C), or GELU by tanh of them, quantized, each by its largest magnitude."""
    if not _by_kernels(x):
        x = x.float()
        return _by_torch(F.gelu(x, approximate="tanh") if gelu else x)
    x = x.contiguous()
    rows, width = _empty_rows(x), x.shape[1]
    quantize[(len(x),)](
        x,
        rows.values,
        rows.scale,
        width,
        _block(width),
        LARGEST,
        _LEAST_SCALE,
        gelu=gelu,
        num_warps=8 if gelu else 4,
    )
    return rows


def add_norm_quantized(hidden: torch.Tensor, added: torch.Tensor, norm: LayerNorm) -> Rows:
    """Add to ``hidden`` (n, C), in place, and return the norm of the sum, quantized."""
    if not _by_kernels(hidden):
        hidden += added
        weight, bias = norm.weight.float(), norm.bias.float()
        return _by_torch(F.layer_norm(hidden.float(), weight.shape, weight, bias, norm.eps))
    rows, width = _empty_rows(hidden), hidden.shape[1]
    add_norm_quantize[(len(hidden),)](
        hidden,
        added,
        rows.values,
        rows.scale,
        norm.weight,
        norm.bias,
        norm.eps,
        width,
        _block(width),
        LARGEST,
        _LEAST_SCALE,
        num_warps=4,
    )
    return rows


def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))
