"""SigLIP's MLPs in FP8, for compressed videos at low ratios.

The two matrix products of an MLP are two fifths of SigLIP's GPU time, and a Hopper GPU multiplies
E4M3 at up to twice the rate of bfloat16. A row of the input and a row of the weights have a scale
each, so a large value costs only its own row precision. Values are rounded by 2.6 % of their size
in the root mean square, unless they are 28000 times smaller than the largest of their row. Sums,
the attention and the residual stream keep the precision that they have.

On a CPU the same values are multiplied in float32. That is slow; it is what tests compare with.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest value of ``DTYPE``."""
TINY = 1e-12
"""Least magnitude by which a row is scaled: a row of zeros stays one."""
ALIGNMENT = 128
"""Rows of matrices are filled up with zeros to a multiple of this: SigLIP's 4304 columns to 4352.
The second product then takes 174 us in place of 205 (23328 rows, H200, torch 2.11)."""
OUTPUT_DTYPE = torch.bfloat16
"""Of products, whatever the model's: their error is far above its rounding."""


def padded(width: int) -> int:
    """Return the number of columns that a row of so many has here."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows in FP8 and their scales.

    Args:
        rows: (M, C).

    Returns:
        (M, ``padded(C)``) of ``DTYPE``, and float32 (M, 1), whose product is the rows.
    """
    values = F.pad(rows.float(), (0, padded(rows.shape[1]) - rows.shape[1]))
    scales = values.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / LARGEST
    return (values / scales).clamp(-LARGEST, LARGEST).to(DTYPE), scales


class FP8Linear:
    """A linear layer's weights (D, C) in FP8, with a scale for each output."""

    def __init__(self, layer: Any, pads_output: bool) -> None:
        """Make room for the weights; ``refresh`` copies them.

        Args:
            layer: vLLM's, with weight and bias.
            pads_output: whether the output has ``padded(D)`` columns.
        """
        self._layer = layer
        num_outputs, num_inputs = layer.weight.shape
        self._num_outputs = num_outputs
        num_rows = padded(num_outputs) if pads_output else num_outputs
        device = layer.weight.device
        shape = (num_rows, padded(num_inputs))
        self.weight = torch.zeros(shape, dtype=DTYPE, device=device)
        # Torch's default dtype is the model's while vLLM loads weights.
        self.scales = torch.ones(1, num_rows, dtype=torch.float32, device=device)
        self.bias = torch.zeros(num_rows, dtype=OUTPUT_DTYPE, device=device)

    def refresh(self) -> None:
        """Copy the layer's weights into the same memory, unless they are no longer there.

        On a CPU vLLM packs loaded weights and leaves none.
        """
        if self._layer.weight.numel() == 0:
            return
        values, scales = quantized(self._layer.weight.detach())
        self.weight[: self._num_outputs].copy_(values)
        self.scales[0, : self._num_outputs].copy_(scales[:, 0])
        self.bias[: self._num_outputs].copy_(self._layer.bias.detach())

    def product(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (M, D) of ``OUTPUT_DTYPE`` for rows of :func:`quantized`."""
        if values.is_cuda:
            return torch._scaled_mm(
                values,
                self.weight.t(),
                scale_a=scales,
                scale_b=self.scales,
                bias=self.bias,
                out_dtype=OUTPUT_DTYPE,
                use_fast_accum=True,
            )
        sums = values.float() @ self.weight.float().t()
        return (sums * scales * self.scales + self.bias.float()).to(OUTPUT_DTYPE)


class FP8MLP:
    """An MLP of SigLIP's: two linear layers with GELU, by tanh, between them."""

    def __init__(self, mlp: Any) -> None:
        self.fc1 = FP8Linear(mlp.fc1, pads_output=True)
        self.fc2 = FP8Linear(mlp.fc2, pads_output=False)

    def refresh(self) -> None:
        """Copy the MLP's weights."""
        self.fc1.refresh()
        self.fc2.refresh()

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the output for normed tokens (..., C), of their dtype."""
        widened = self.fc1.product(*quantized(normed.flatten(0, -2))).float()
        narrowed = self.fc2.product(*quantized(F.gelu(widened, approximate="tanh")))
        return narrowed.view(normed.shape).to(normed.dtype)


# The copies are inference tensors: they are made while vLLM loads weights or profiles memory.
@torch.inference_mode()
def make_mlps(layers: Sequence[Any]) -> list[FP8MLP]:
    """Return the MLPs of plain layers, with their weights.

    They take half of the memory of the layers' own: 0.27 GB of SigLIP so400m.
    """
    mlps = [FP8MLP(layer.mlp) for layer in layers]
    refresh(mlps)
    return mlps


@torch.inference_mode()
def refresh(mlps: Sequence[FP8MLP]) -> None:
    """Copy changed weights into the same memory, which CUDA graphs read."""
    for mlp in mlps:
        mlp.refresh()


def why_not(layers: Sequence[Any] | None) -> str | None:
    """Return why a tower's MLPs cannot be FP8, None if they can.

    Args:
        layers: from ``plain_layers``.
    """
    if not layers:
        return "the tower's layers are not vLLM's plain SigLIP layers"
    first = layers[0].mlp
    if first.fc2.tp_size > 1:
        return "ranks of tensor parallelism hold parts of the tower: set --mm-encoder-tp-mode data"
    width, device = first.fc2.weight.shape[0], first.fc2.weight.device
    if width % 16:
        return f"the tower is {width} wide, which is no multiple of 16"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} does not multiply FP8"
    return None
