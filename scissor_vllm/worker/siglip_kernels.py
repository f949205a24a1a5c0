"""Triton kernels of ``siglip.py``. Each program handles one row.

The kernels of norms and of GELU have a row of ``width`` columns in two parts, of ``main`` and of at
most ``rest`` columns, both powers of 2: SigLIP's 1152 are 1024 and 128. ``main`` is no longer than
the row.
"""

import triton
import triton.language as tl

LARGEST_FP8 = tl.constexpr(448.0)


@triton.jit
def _load(pointer, first, last, inside):
    """Return both parts of a row in float32, zeros where ``last`` is not inside."""
    tail = tl.load(pointer + last, mask=inside, other=0.0)
    return tl.load(pointer + first).to(tl.float32), tail.to(tl.float32)


@triton.jit
def _largest(head, tail, tiny):
    """Return the largest magnitude of a row's parts, at least ``tiny``."""
    both = tl.maximum(tl.max(tl.abs(head), 0), tl.max(tl.abs(tail), 0))
    return tl.maximum(both, tiny)


@triton.jit
def add_norm(
    hidden,
    added,
    normed,
    scales,
    weight,
    bias,
    eps,
    tiny,
    width: tl.constexpr,
    normed_width: tl.constexpr,
    main: tl.constexpr,
    rest: tl.constexpr,
    to_fp8: tl.constexpr,
):
    """Add a row in place, rounded to its dtype, then store its layer norm.

    In FP8 the norm is divided by its scale, which is stored too, and has zeros up to
    ``normed_width``.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, main)
    last = main + tl.arange(0, rest)
    inside = last < width
    hidden_row = hidden + row * width
    head, tail = _load(hidden_row, first, last, inside)
    added_head, added_tail = _load(added + row * width, first, last, inside)
    head = (head + added_head).to(hidden.dtype.element_ty)
    tail = (tail + added_tail).to(hidden.dtype.element_ty)
    tl.store(hidden_row + first, head)
    tl.store(hidden_row + last, tail, mask=inside)
    head, tail = head.to(tl.float32), tail.to(tl.float32)
    mean = (tl.sum(head, 0) + tl.sum(tail, 0)) / width
    head = head - mean
    tail = tl.where(inside, tail - mean, 0.0)
    deviation = tl.sqrt((tl.sum(head * head, 0) + tl.sum(tail * tail, 0)) / width + eps)
    gain_head, gain_tail = _load(weight, first, last, inside)
    shift_head, shift_tail = _load(bias, first, last, inside)
    head = head / deviation * gain_head + shift_head
    tail = tail / deviation * gain_tail + shift_tail
    if to_fp8:
        scale = _largest(head, tail, tiny) / LARGEST_FP8
        tl.store(scales + row, scale)
        head, tail = head / scale, tail / scale
    normed_row = normed + row * normed_width
    tl.store(normed_row + first, head.to(normed.dtype.element_ty))
    tl.store(normed_row + last, tail.to(normed.dtype.element_ty), mask=last < normed_width)


@triton.jit
def _gelu(value):
    """Return GELU by tanh: tanh(u) + 1 is twice the logistic function of 2u."""
    twice = 1.5957691216057308 * (value + 0.044715 * value * value * value)
    return value / (1.0 + tl.exp(-twice))


@triton.jit
def gelu_to_fp8(
    values, rows, scales, tiny, width: tl.constexpr, main: tl.constexpr, rest: tl.constexpr
):
    """Store GELU of a row, divided by its scale, and the scale."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, main)
    last = main + tl.arange(0, rest)
    inside = last < width
    head, tail = _load(values + row * width, first, last, inside)
    head, tail = _gelu(head), _gelu(tail)
    scale = _largest(head, tail, tiny) / LARGEST_FP8
    tl.store(scales + row, scale)
    stored = rows + row * width
    tl.store(stored + first, (head / scale).to(rows.dtype.element_ty))
    tl.store(stored + last, (tail / scale).to(rows.dtype.element_ty), mask=inside)


@triton.jit
def gather_patch(
    pixels,
    numbers,
    patches,
    num_channels,
    height,
    width,
    num_values,
    side: tl.constexpr,
    takes_all: tl.constexpr,
    block: tl.constexpr,
):
    """Store a patch's pixels, channel by channel and line by line, and zeros up to num_values."""
    row = tl.program_id(0).to(tl.int64)
    number = row if takes_all else tl.load(numbers + row).to(tl.int64)
    columns = width // side
    places = (height // side) * columns
    frame, place = number // places, number % places
    value = tl.arange(0, block)
    channel, inside = value // (side * side), value % (side * side)
    line = (frame * num_channels + channel) * height + (place // columns) * side + inside // side
    source = line * width + (place % columns) * side + inside % side
    read = tl.load(pixels + source, mask=channel < num_channels, other=0.0)
    tl.store(patches + row * num_values + value, read, mask=value < num_values)
