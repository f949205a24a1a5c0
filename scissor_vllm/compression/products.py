"""Dot products of tokens, which give the products of joined tokens without the tokens.

The search for a threshold joins tokens in many ways. The cosine of two groups' means needs only the
sum of their members' products. So one matrix gives all later similarities.
"""

from dataclasses import dataclass

import torch

from scissor_vllm.compression.components import Components
from scissor_vllm.compression.similarity import TILE, Similarity, exact_float32
from scissor_vllm.compression.sums import sizes, weighted_sums


@dataclass(frozen=True)
class Products:
    """Products of S groups' sums.

    A group's sum is stored up to its scale, so that one matrix holds groups of very small and very
    large tokens.
    """

    product: torch.Tensor
    """(S, S) float32."""
    exponent: torch.Tensor
    """(S,) int32: the group's sum is 2 to this power times what the product holds."""
    first: torch.Tensor
    """(S,) int64: a token of each group."""

    @classmethod
    def of_rows(cls, rows: torch.Tensor, first: int = 0) -> "Products":
        """Return the products of tokens, each a group of its own.

        Args:
            rows: (n, D) float32.
            first: the number of the first of them among all tokens.
        """
        _, exponent = torch.frexp(rows.abs().amax(dim=1))
        # Scaled values and their products stay far from the limits of float32.
        exponent = exponent.clamp(-100, 100)
        scaled = rows * torch.exp2(-exponent.float())[:, None]
        with exact_float32(rows.device):
            product = scaled @ scaled.T
        return cls(product, exponent, torch.arange(first, first + len(rows), device=rows.device))

    def joined(self, tokens: Components) -> "Products":
        """Return the products after groups were joined.

        Args:
            tokens: the part of each of the N tokens; groups of one part become one. All parts
                between two that hold groups of these do so too.
        """
        part = tokens.part[self.first]
        lowest, highest = (int(number) for number in part.aminmax())
        part, num_parts = part - lowest, highest - lowest + 1
        largest = torch.full_like(self.exponent[:1], torch.iinfo(torch.int32).min)
        largest = largest.expand(num_parts).scatter_reduce(0, part, self.exponent, "amax")
        weight = torch.exp2((self.exponent - largest[part]).float())
        count = sizes(part, num_parts)
        rows = weighted_sums(self.product, weight, part, count)
        product = weighted_sums(_transposed(rows), weight, part, count)
        first = torch.full_like(count, len(tokens.part))
        return Products(product, largest, first.scatter_reduce(0, part, self.first, "amin"))

    def similarity(self) -> Similarity:
        """Return the cosines of the groups' means."""
        return Similarity.of_products(self.product, self._unit())

    def _unit(self) -> torch.Tensor:
        """Return one over the length of each group's sum, 0 for a sum of zero."""
        norm = self.product.diagonal().clamp(min=0).sqrt()
        return torch.where(norm > 0, 1 / norm, 0)


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Return (m, n) of (n, m), contiguous; on a CPU faster than torch's own from 1000 rows on."""
    out = torch.empty_like(matrix.T, memory_format=torch.contiguous_format)
    for rows, columns in zip(matrix.split(TILE), out.split(TILE, dim=1), strict=True):
        columns.copy_(rows.T)
    return out
