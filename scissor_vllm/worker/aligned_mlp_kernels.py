"""The Triton kernel of ``aligned_mlp.py``."""

import triton
import triton.language as tl


@triton.jit
def silu_and_multiply(gate_up, out, width: tl.constexpr, padded: tl.constexpr, block: tl.constexpr):
    """Store a block of SiLU(gate) * up of a row, with zeros after ``width`` values."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out + row * padded + column, product.to(out.dtype.element_ty), mask=column < padded)
