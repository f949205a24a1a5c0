"""Pads a vision tower's MLPs to a width that tensor cores can load, for compressed videos.

Qwen2.5-VL's MLPs are 3420 wide. A row has 6840 bytes in bfloat16, which is no multiple of the 16
bytes that a tensor core loads. So the second matrix product runs at a quarter of a GPU's speed:
1.195 ms in place of 0.299 with 3424 columns, for 25920 patches on an H200 (torch 2.11). In vLLM
0.33's tower these products take 33 of 104 ms.

Here the second matrix has zero columns up to the next multiple of 16 bytes, and the activation
appends zeros to its values. Sums equal vLLM's up to their order, so vLLM's own MLPs encode
uncompressed videos.

Layers that are quantized, compiled or have adapters keep vLLM's code. Remove this module when vLLM
pads these weights.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from torch import nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionMLP

from scissor_vllm.worker.aligned_mlp_kernels import silu_and_multiply

ALIGNMENT_BYTES = 16
_BLOCK = 1024


class AlignedMLPs:
    """A tower's MLPs with aligned copies of their weights."""

    def __init__(self, tower: nn.Module) -> None:
        self._narrowings = {mlp: _aligned_narrowing(mlp) for mlp in _misaligned_mlps(tower)}

    def __len__(self) -> int:
        return len(self._narrowings)

    # The copies are inference tensors: they are made while vLLM profiles memory.
    @torch.inference_mode()
    def refresh(self) -> None:
        """Copy changed weights into the same memory."""
        for mlp, narrowing in self._narrowings.items():
            weight = mlp.down_proj.weight
            padded = narrowing._parameters["weight"]
            padded[:, : weight.shape[1]].copy_(weight)
            narrowing._parameters = {**mlp.down_proj._parameters, "weight": padded}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the tower use these MLPs in the context."""
        for mlp, narrowing in self._narrowings.items():
            mlp.forward = _forward(mlp, narrowing)
        try:
            yield
        finally:
            for mlp in self._narrowings:
                del mlp.forward


def _misaligned_mlps(tower: nn.Module) -> list[Qwen2_5_VisionMLP]:
    blocks = getattr(tower, "blocks", ())
    # A compiled block contains the code of the MLP at the time of its tracing.
    if not all(getattr(block, "do_not_compile", True) for block in blocks):
        return []
    mlps = [block.mlp for block in blocks if type(getattr(block, "mlp", None)) is Qwen2_5_VisionMLP]
    return [mlp for mlp in mlps if _is_plain(mlp) and _padding(mlp.down_proj.weight) > 0]


def _is_plain(mlp: Qwen2_5_VisionMLP) -> bool:
    widening, narrowing = mlp.gate_up_proj, mlp.down_proj
    return (
        type(widening) is MergedColumnParallelLinear
        and type(narrowing) is RowParallelLinear
        and type(narrowing.quant_method) is UnquantizedLinearMethod
        and narrowing.input_is_parallel
        and not widening.gather_output
        and type(mlp.act_fn) is SiluAndMul
    )


def _padding(weight: torch.Tensor) -> int:
    """Return how many columns (D, C) lacks until its rows are a multiple of 16 bytes."""
    return -weight.shape[1] % (ALIGNMENT_BYTES // weight.element_size())


def _aligned_narrowing(mlp: Any) -> Any:
    """Return a copy of an MLP's second layer with an aligned matrix."""
    weight = mlp.down_proj.weight
    padded = F.pad(weight.detach(), (0, _padding(weight)))
    narrowing = copy.copy(mlp.down_proj)
    narrowing._parameters = {
        **mlp.down_proj._parameters,
        "weight": nn.Parameter(padded, requires_grad=False),
    }
    return narrowing


def _forward(mlp: Any, narrowing: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an MLP's forward function with the aligned second layer."""
    padding = _padding(mlp.down_proj.weight)

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = mlp.gate_up_proj(x)
        narrowed: torch.Tensor = narrowing(silu_and_mul(gate_up, padding))[0]
        return narrowed

    return forward


def silu_and_mul(gate_up: torch.Tensor, padding: int) -> torch.Tensor:
    """Return SiLU of each row's first half times its second half, with zeros appended.

    Args:
        gate_up: (..., 2*C), contiguous.
        padding: number of zeros after the C values.

    Returns:
        (..., C + padding), computed in float32.
    """
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width + padding)
    num_blocks = triton.cdiv(width + padding, _BLOCK)
    grid = (out.numel() // (width + padding), num_blocks)
    silu_and_multiply[grid](gate_up, out, width, width + padding, _BLOCK, num_warps=4)
    return out
