"""Dot products of tokens, from which those of any joined tokens follow without the tokens.

The search for a threshold joins tokens in many ways. The cosine of two groups' means needs only
the sum of their members' products, so one matrix, made once, gives every similarity that follows.
"""

from dataclasses import dataclass

import torch

from scissor_vllm.compression.similarity import Similarity, exact_float32
from scissor_vllm.compression.sums import weighted_sums


@dataclass(frozen=True)
class Products:
    """Products of S groups' sums.

    A group's sum is known up to its scale, so that groups of very small and very large tokens
    stand in one matrix.
    """

    product: torch.Tensor
    """(S, S) float32."""
    exponent: torch.Tensor
    """(S,) int32: the group's sum is 2 to this power times what the product holds."""
    first: torch.Tensor
    """(S,) int64: a token of each group."""

    @classmethod
    def of_rows(cls, rows: torch.Tensor) -> "Products":
        """Return the products of rows (N, D) float32, each a group of its own."""
        _, exponent = torch.frexp(rows.abs().amax(dim=1))
        # Far from where float32 ends, also for the products of what is scaled.
        exponent = exponent.clamp(-100, 100)
        scaled = rows * torch.exp2(-exponent.float())[:, None]
        with exact_float32(rows.device):
            product = scaled @ scaled.T
        return cls(product, exponent, torch.arange(len(rows), device=rows.device))

    def joined(self, labels: torch.Tensor) -> "Products":
        """Return the products after groups were joined.

        Args:
            labels: (N,) int64 of the rows at first given; groups of one label become one.
        """
        roots, part, count = torch.unique(
            labels[self.first], return_inverse=True, return_counts=True
        )
        largest = torch.full_like(roots, torch.iinfo(torch.int32).min, dtype=torch.int32)
        largest = largest.scatter_reduce(0, part, self.exponent, "amax")
        weight = torch.exp2((self.exponent - largest[part]).float())
        rows = weighted_sums(self.product, weight, part, count)
        product = weighted_sums(rows.T.contiguous(), weight, part, count)
        return Products(product, largest, roots)

    def similarity(self) -> Similarity:
        """Return the cosines of the groups' means, those above the diagonal to be used."""
        norm = self.product.diagonal().clamp(min=0).sqrt()
        unit = torch.where(norm > 0, 1 / norm, 0)
        return Similarity.of_cosines(self.product * unit[:, None] * unit[None, :])
