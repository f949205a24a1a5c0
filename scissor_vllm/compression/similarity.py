"""Cosine similarities of sets of tokens, in blocks of bounded memory."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

BLOCK_ELEMENTS = 1 << 26
"""Most similarities in one tensor: 256 MiB in float32. A set of up to 8192 tokens is computed once
and kept. A larger set is computed again in blocks on each pass. A few such tensors exist at a
time."""

RESOLUTION = 2.0**-20
"""Cosines that differ by less than this count as equal where rounding would order them: in float32
copies of one pair of tokens have cosines that differ in their last bits."""

ONE = 1.0 - RESOLUTION
"""Cosines above this count as 1."""

NO_EDGE = -2.0
"""Value on the diagonal, below every threshold: a token is not its own neighbor."""

TILE = 512
"""Rows transposed at a time: 1 MiB of float32 stays in a CPU's cache."""

_EDGE_BLOCK = 1 << 22
"""Most pairs whose edges are listed at once: 96 MiB if every one is an edge."""


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32, independent of the process's settings.

    A serving process may allow TF32 or bfloat16 products, whose error of 1e-3 is far above the
    differences that decide components.
    """
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows / ||rows|| in float32, (..., D); a zero row stays zero.

    Each row is divided by its largest magnitude first, so no square overflows or vanishes.
    """
    rows = rows.float()
    largest = rows.abs().amax(dim=-1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1.0)


class Block(NamedTuple):
    """Cosines of some rows with all tokens that can be their neighbors."""

    sets: slice
    rows: slice
    """Tokens of each set."""
    columns: slice
    """Tokens of the same set to compare with."""
    cosines: torch.Tensor
    """(sets, rows, columns) float32."""


class Similarity:
    """Cosines inside each of B sets of n tokens, as blocks of whole rows.

    Symmetric to the last bit, that of the lower token's row; 1 at most, ``NO_EDGE`` on the
    diagonal.
    """

    def __init__(self, sets: torch.Tensor) -> None:
        """Take sets (B, n, D) floating."""
        self.num_sets, self.size, _ = sets.shape
        self.device = sets.device
        self.keeps_whole = self.num_sets * self.size**2 <= BLOCK_ELEMENTS
        """Whether all cosines are computed once and kept."""
        self._unit = unit_rows(sets)
        self._whole: torch.Tensor | None = None
        self.products: tuple[torch.Tensor, torch.Tensor] | None = None
        """Of one set, where known: dot products (n, n) float32, and what makes cosines of them,
        (n,) float32, multiplied by row and by column."""

    @property
    def num_trees(self) -> int:
        """Number of components if every cosine is an edge."""
        return self.num_sets

    @classmethod
    def of_products(cls, products: torch.Tensor, unit: torch.Tensor) -> "Similarity":
        """Return the similarities of one set, see ``products``."""
        known = cls(unit[None, :, None])
        known.products = products, unit
        return known

    def blocks(self) -> Iterator[Block]:
        """Yield blocks until all rows were covered."""
        every = slice(0, self.size)
        if self.keeps_whole:
            sets = slice(0, self.num_sets)
            if self._whole is None:
                self._whole = self._square(sets)
            yield Block(sets, every, every, self._whole)
            return
        for sets, rows in self._parts():
            cosines = self._square(sets) if rows == every else self._rows(sets, rows)
            yield Block(sets, rows, every, cosines)

    def pairs_above(self, threshold: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the pairs whose cosine is above the threshold, some at a time, each once.

        (pairs,) int64 each: the lower and the higher token, token i of set b is ``b * n + i``.
        """
        if threshold >= 1:
            return
        limit = min(threshold, ONE) if threshold >= -1 else -math.inf
        # A single pass needs neither the other half nor exact ends.
        once = self._whole is None and (self.products is not None or not self.keeps_whole)
        for sets, rows, columns, cosines in self._upper() if once else self.blocks():
            step = max(1, _EDGE_BLOCK // (len(cosines) * cosines.shape[2]))
            for start in range(rows.start, rows.stop, step):
                above = cosines[:, start - rows.start :][:, :step] > limit
                above = above.triu_(start - columns.start + 1)
                which, left, right = above.nonzero(as_tuple=True)
                first = (which + sets.start) * self.size
                yield first + start + left, first + columns.start + right

    def _upper(self) -> Iterator[Block]:
        """Yield blocks with the cosines of lower with higher tokens, by what product gives."""
        for sets, rows in self._parts():
            columns = slice(rows.start, self.size)
            yield Block(sets, rows, columns, self._product(sets, rows, columns))

    def _parts(self) -> Iterator[tuple[slice, slice]]:
        """Yield sets, and rows of them, that make a block each: some whole sets, or rows of one."""
        num_rows = self._rows_of_block
        num_sets = max(1, num_rows // self.size)
        for first in range(0, self.num_sets, num_sets):
            sets = slice(first, min(first + num_sets, self.num_sets))
            for start in range(0, self.size, num_rows):
                yield sets, slice(start, min(start + num_rows, self.size))

    @property
    def _rows_of_block(self) -> int:
        return max(1, BLOCK_ELEMENTS // self.size)

    def _product(self, sets: slice, rows: slice, columns: slice) -> torch.Tensor:
        """Return what becomes cosines, (sets, rows, columns)."""
        if self.products is not None:
            product, scale = self.products
            return ((scale[rows, None] * scale[columns]).mul_(product[rows, columns]))[None]
        return _matmul(self._unit[sets, rows], self._unit[sets, columns].transpose(1, 2))

    def _square(self, sets: slice) -> torch.Tensor:
        every = slice(0, self.size)
        return _finish(_mirrored(self._product(sets, every, every)), first_row=0)

    def _rows(self, set_: slice, rows: slice) -> torch.Tensor:
        """Return rows of one set, (1, rows, n); a tile and its mirror come from one product."""
        shape = (1, rows.stop - rows.start, self.size)
        cosines = torch.empty(shape, dtype=torch.float32, device=self.device)
        for start in range(0, self.size, self._rows_of_block):
            columns = slice(start, min(start + self._rows_of_block, self.size))
            if start < rows.start:
                tile = self._product(set_, columns, rows).transpose(1, 2)
            else:
                tile = self._product(set_, rows, columns)
            cosines[:, :, columns] = _mirrored(tile) if start == rows.start else tile
        return _finish(cosines, first_row=rows.start)


class WindowedSimilarity:
    """Cosines inside each of several runs of one set's tokens. Tokens of different runs are not
    neighbors.
    """

    num_sets = 1

    def __init__(self, windows: Sequence[Similarity]) -> None:
        """Take the runs' own, each of one set, in the order of their tokens."""
        self._windows = windows
        self.size = sum(window.size for window in windows)
        self.device = windows[0].device
        if sum(window.size**2 for window in windows) > BLOCK_ELEMENTS:
            for window in windows:
                window.keeps_whole = False

    @property
    def num_trees(self) -> int:
        """Number of components if every cosine is an edge."""
        return len(self._windows)

    def blocks(self) -> Iterator[Block]:
        """Yield blocks until all rows were covered."""
        first = 0
        for window in self._windows:
            for sets, rows, columns, cosines in window.blocks():
                yield Block(sets, _shifted(rows, first), _shifted(columns, first), cosines)
            first += window.size

    def pairs_above(self, threshold: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the pairs whose cosine is above the threshold, some at a time, each once."""
        first = 0
        for window in self._windows:
            for left, right in window.pairs_above(threshold):
                yield left + first, right + first
            first += window.size


def _shifted(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    with exact_float32(left.device):
        return left @ right


def _mirrored(cosines: torch.Tensor) -> torch.Tensor:
    """Mirror the upper triangles of squares (B, n, n) into the lower ones, in place."""
    size = cosines.shape[1]
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        tile = cosines[:, start:stop, start:stop]
        tile.copy_(tile.triu() + tile.triu(1).transpose(1, 2))
        cosines[:, stop:, start:stop] = cosines[:, start:stop, stop:].transpose(1, 2)
    return cosines


def _finish(cosines: torch.Tensor, first_row: int) -> torch.Tensor:
    """Snap to [-1, 1] and take the diagonal out, in place."""
    cosines.masked_fill_(cosines > ONE, 1.0).clamp_(min=-1.0)
    cosines.diagonal(offset=first_row, dim1=1, dim2=2).fill_(NO_EDGE)
    return cosines


def most_similar(tokens: torch.Tensor, representatives: torch.Tensor) -> torch.Tensor:
    """Return the representative (K, D) of highest cosine for each token (N, D).

    (N,) int64. Of representatives within ``RESOLUTION`` of the highest, the first.
    """
    unit_tokens, unit_representatives = unit_rows(tokens), unit_rows(representatives)
    step = max(1, BLOCK_ELEMENTS // len(representatives))
    nearest = []
    for start in range(0, len(tokens), step):
        cosines = _matmul(unit_tokens[start : start + step], unit_representatives.T)
        near = cosines >= cosines.amax(dim=1, keepdim=True) - RESOLUTION
        nearest.append(near.to(torch.uint8).argmax(dim=1))
    return torch.cat(nearest)
