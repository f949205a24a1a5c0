"""A video's tokens in torch, and their similarities inside frames and windows."""

import itertools

import torch

from scissor_vllm.compression import similarity
from scissor_vllm.compression.components import AnySimilarity, Components
from scissor_vllm.compression.merge import merged
from scissor_vllm.compression.products import Products
from scissor_vllm.compression.similarity import Similarity, WindowedSimilarity
from scissor_vllm.compression.sums import means


class Video:
    """A video's tokens and their similarities."""

    def __init__(self, frames: torch.Tensor, window: int) -> None:
        """Take frames (T, P, D) float32 and the number of frames of a window."""
        self.flat = frames.reshape(-1, frames.shape[-1])
        self.spatial = Similarity(frames)
        in_window = window * frames.shape[1]
        self._window_sizes = [len(window_tokens) for window_tokens in self.flat.split(in_window)]
        self._window = torch.arange(len(self.flat), device=frames.device) // in_window

    def products(self) -> list[Products] | None:
        """Return the products of each window's tokens, None if they are too many to hold."""
        if sum(size**2 for size in self._window_sizes) > similarity.BLOCK_ELEMENTS:
            return None
        first = itertools.accumulate(self._window_sizes[:-1], initial=0)
        windows = zip(self.flat.split(self._window_sizes), first, strict=True)
        return [Products.of_rows(rows, number) for rows, number in windows]

    def means(self, spatial: Components) -> torch.Tensor:
        """Return the representatives of spatial components, (S, D) float32."""
        return means(self.flat, spatial.part, spatial.num_parts)

    def across(
        self,
        spatial: Components,
        representatives: torch.Tensor | None = None,
        products: list[Products] | None = None,
    ) -> AnySimilarity:
        """Return the similarities of spatial components."""
        if products is not None:
            temporal = [product.similarity() for product in products]
        else:
            known = self.means(spatial) if representatives is None else representatives
            num_rows = self._count_by_window(spatial.part, spatial.num_parts)
            temporal = [Similarity(window_means[None]) for window_means in known.split(num_rows)]
        return temporal[0] if len(temporal) == 1 else WindowedSimilarity(temporal)

    def merged(self, kept: torch.Tensor, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the merged rows and the assignment.

        Args:
            kept: (K, D) float32, the representatives of both steps.
            part: (N,) int64, the component of each token.
        """
        num_rows = self._count_by_window(part, len(kept))
        return merged(self.flat, kept, (self._window_sizes, num_rows))

    def _count_by_window(self, part: torch.Tensor, num_parts: int) -> list[int]:
        """Return how many parts each window has: none has tokens of two windows, and a window's are
        numbered one after the other.
        """
        if len(self._window_sizes) == 1:
            return [num_parts]
        window = torch.zeros_like(part[:num_parts]).scatter(0, part, self._window)
        counts: list[int] = torch.bincount(window).tolist()
        return counts
