"""Triton kernels of ``siglip.py`` and ``siglip_fp8.py``. Each does one row at a time."""

import triton
import triton.language as tl


@triton.jit
def add_norm(hidden, added, normed, weight, bias, eps, width: tl.constexpr, block: tl.constexpr):
    """Do a row, whose sum is rounded to its dtype before it is normed, as two kernels would."""
    columns = tl.arange(0, block)
    inside = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    result = _added_and_normed(hidden, added, places, inside, columns, weight, bias, eps, width)
    tl.store(normed + places, result.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_quantize(
    hidden,
    added,
    values,
    scale,
    weight,
    bias,
    eps,
    width: tl.constexpr,
    block: tl.constexpr,
    largest: tl.constexpr,
    least_scale: tl.constexpr,
):
    """Do the same and quantize the norm."""
    columns = tl.arange(0, block)
    inside = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    result = _added_and_normed(hidden, added, places, inside, columns, weight, bias, eps, width)
    _store_quantized(
        tl.where(inside, result, 0.0), values, scale, places, inside, largest, least_scale
    )


@triton.jit
def quantize(
    x,
    values,
    scale,
    width: tl.constexpr,
    block: tl.constexpr,
    largest: tl.constexpr,
    least_scale: tl.constexpr,
    gelu: tl.constexpr,
):
    """Quantize as it is, or GELU by tanh: x / (1 + exp(-2 y)), with y what tanh is taken of."""
    columns = tl.arange(0, block)
    inside = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    own = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if gelu:
        # sqrt(2 / pi)
        inner = 0.7978845608028654 * (own + 0.044715 * own * own * own)
        own = own / (1 + tl.exp(-2 * inner))
    _store_quantized(own, values, scale, places, inside, largest, least_scale)


@triton.jit
def _added_and_normed(
    hidden, added, places, inside, columns, weight, bias, eps, width: tl.constexpr
):
    one = tl.load(hidden + places, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(added + places, mask=inside, other=0.0).to(tl.float32)
    rounded = (one + other).to(hidden.dtype.element_ty)
    tl.store(hidden + places, rounded, mask=inside)
    total = rounded.to(tl.float32)
    mean = tl.sum(total, 0) / width
    centred = tl.where(inside, total - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return centred / deviation * gain + shift


@triton.jit
def _store_quantized(
    row, values, scale, places, inside, largest: tl.constexpr, least_scale: tl.constexpr
):
    """Store a row by its largest magnitude; what is not inside is 0."""
    own = tl.maximum(tl.max(tl.abs(row), 0) / largest, least_scale)
    # A quotient may be rounded beyond what the dtype holds.
    quotient = tl.minimum(tl.maximum(row / own, -largest), largest)
    tl.store(values + places, quotient.to(values.dtype.element_ty), mask=inside)
    tl.store(scale + tl.program_id(0), own)
