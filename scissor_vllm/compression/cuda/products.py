"""Dot products of a video's tokens in Prim's order, stored or recomputed in blocks on each pass.

With windows only products of token pairs in the same window are stored. Without, rows are in
blocks, each from its own first column on, so that most pairs are computed once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from scissor_vllm.compression.similarity import exact_float32

MAX_PRODUCTS = 1 << 29
"""Most products that are held, 2 GiB in float32: those of 29 thousand tokens. Of more tokens they
are computed again on each pass, in blocks, and the host reads the device after each guess."""

BLOCK_PRODUCTS = 1 << 27
"""Most products of such a block, 512 MiB."""

HELD_SHARE, BLOCK_SHARE = 48, 160
"""Stored products take at most this fraction (1/n) of the GPU's memory, and a block at most that
one."""

ROW_BLOCKS = 4
"""Blocks of rows of held products."""

MAX_FRAMES_AT_ONCE = 1 << 15
"""Frames of one batched product: cuBLAS takes a batch of at most 65535."""


@dataclass(frozen=True)
class Block:
    """Products of the tokens of some frames with those of all frames from the first one on."""

    products: torch.Tensor
    """(elements,) float32."""
    first_frame: int
    num_frames: int
    """0 for all frames."""
    base: int
    """Number of products in earlier blocks."""


class Products:
    """Layout of a video's products: (N, N) in blocks of rows."""

    def __init__(self, num_frames: int, per_frame: int, window: int, device: torch.device) -> None:
        """Lay out the products of T frames of P tokens in windows."""
        self.num_tokens = num_frames * per_frame
        self.per_frame = per_frame
        self.is_apart = window < num_frames
        frames = window if self.is_apart else math.ceil(num_frames / ROW_BLOCKS)
        self.block_rows = frames * per_frame
        self.size: int | None = self._num_before(self.num_tokens)
        self._ordered: torch.Tensor | None = None
        if self.size > limit(device, MAX_PRODUCTS, HELD_SHARE):
            self.size = None
            self.is_apart = False
            rows = limit(device, BLOCK_PRODUCTS, BLOCK_SHARE) // self.num_tokens
            self.block_rows = max(1, rows // per_frame) * per_frame

    @property
    def is_held(self) -> bool:
        return self.size is not None

    def hold(self, ordered: torch.Tensor, out: torch.Tensor | None) -> None:
        """Compute the products of tokens (N, D) into a flat tensor, unless they exceed the
        limit.
        """
        if out is None:
            self._ordered = ordered
            return
        start = self._multiply_windows(ordered, out) if self.is_apart else 0
        for row in range(start, self.num_tokens, self.block_rows):
            self._multiply(ordered, row, out[self._num_before(row) :])

    def blocks(self, held: torch.Tensor | None) -> Iterator[Block]:
        """Yield the stored products, or recomputed blocks that reuse the same memory."""
        if held is not None:
            yield Block(held, 0, 0, 0)
            return
        assert self._ordered is not None
        size = self.block_rows * self.num_tokens
        buffer = torch.empty(size, dtype=torch.float32, device=self._ordered.device)
        for start in range(0, self.num_tokens, self.block_rows):
            rows = min(self.block_rows, self.num_tokens - start)
            self._multiply(self._ordered, start, buffer)
            first_frame, num_frames = start // self.per_frame, rows // self.per_frame
            yield Block(buffer, first_frame, num_frames, self._num_before(start))

    def _multiply_windows(self, ordered: torch.Tensor, out: torch.Tensor) -> int:
        """Compute the products of all whole windows, and return the first token after them."""
        rows = self.block_rows
        count = self.num_tokens // rows
        for first in range(0, count, MAX_FRAMES_AT_ONCE):
            some = min(MAX_FRAMES_AT_ONCE, count - first)
            windows = ordered[first * rows : (first + some) * rows].view(some, rows, -1)
            products = out[first * rows**2 : (first + some) * rows**2].view(some, rows, rows)
            multiply(windows, windows.transpose(1, 2), products)
        return count * rows

    def _num_before(self, row: int) -> int:
        """Return the number of products in blocks that start before a row."""
        blocks, rest = divmod(row, self.block_rows)
        if self.is_apart:
            return blocks * self.block_rows**2 + rest * min(rest, self.block_rows)
        whole = blocks * self.num_tokens - self.block_rows * (blocks * (blocks - 1) // 2)
        left = self.num_tokens - blocks * self.block_rows
        return whole * self.block_rows + (min(self.block_rows, left) * left if rest else 0)

    def _multiply(self, ordered: torch.Tensor, start: int, out: torch.Tensor) -> None:
        """Compute the block of products that starts with a row."""
        left, right = ordered[start : start + self.block_rows], ordered[start:]
        if self.is_apart:
            right = left
        out = out[: len(left) * len(right)]
        multiply(left, right.T, out.view(len(left), len(right)))


def multiply(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return left @ right in float32; products of 16-bit numbers are exact."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        with exact_float32(left.device):
            return torch.matmul(left.float(), right.float(), out=out)
    product = torch.bmm if left.dim() == 3 else torch.mm
    if out is None:
        return product(left, right, out_dtype=torch.float32)
    return product(left, right, out_dtype=torch.float32, out=out)


def limit(device: torch.device, num_products: int, share: int) -> int:
    """Return the number of products, limited to a share of the GPU's memory."""
    if device.type != "cuda":
        return num_products
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(num_products, memory // (4 * share))


def max_held_tokens(device: torch.device) -> int:
    """Return about how many tokens' products are stored without windows."""
    # Of their square, the blocks of rows leave a share out.
    share = (ROW_BLOCKS + 1) / (2 * ROW_BLOCKS)
    return math.isqrt(int(limit(device, MAX_PRODUCTS, HELD_SHARE) / share))
