"""Triton kernels of ``siglip.py``. Each program handles one row."""

import triton
import triton.language as tl


@triton.jit
def add_norm(hidden, added, normed, weight, bias, eps, width: tl.constexpr, block: tl.constexpr):
    """Add a row in place, rounded to its dtype, then store its layer norm."""
    columns = tl.arange(0, block)
    inside = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    hidden_row = tl.load(hidden + places, mask=inside, other=0.0).to(tl.float32)
    added_row = tl.load(added + places, mask=inside, other=0.0).to(tl.float32)
    rounded = (hidden_row + added_row).to(hidden.dtype.element_ty)
    tl.store(hidden + places, rounded, mask=inside)
    total = rounded.to(tl.float32)
    mean = tl.sum(total, 0) / width
    centred = tl.where(inside, total - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    result = centred / deviation * gain + shift
    tl.store(normed + places, result.to(hidden.dtype.element_ty), mask=inside)


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
