"""Caches the vision tower's output, so that a video is encoded once for all ratios.

The key is a cryptographic hash of the content, never a name from a client. It is an LRU cache,
bounded in bytes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from scissor_vllm.settings import VIDEO_FEATURE_CACHE_GB

# A child of vLLM's logger, which alone has a handler.
logger = logging.getLogger(f"vllm.{__name__}")

_PAGE_BYTES = 1024**2
_PAGES_AT_ONCE = 64


@dataclass(frozen=True)
class _Features:
    """Location of a video's tokens."""

    pages: list[int]
    shape: torch.Size
    dtype: torch.dtype
    num_retained: set[int] = field(default_factory=set)
    """Numbers of kept tokens requested since it was cached."""


class Sharing:
    """How workers that compute the same tokens share one cache; this one is a worker alone."""

    is_owner = True
    """Whether this worker's host memory keeps the tokens."""

    def agree(self, value: bool) -> bool:
        """Return the owner's value in every worker."""
        return value

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the owner's tokens in every worker; the others give room for them."""
        return tokens


class FeatureCache:
    """Tokens of videos as the vision tower gives them, kept in host memory.

    Memory is taken in pieces as videos come, up to the limit, and kept. Copies run in the GPU's
    stream, and nothing waits for them. What is kept and dropped follows from the calls alone, so
    that workers that share a model by tensor parallelism agree on every video: they have the same
    tokens, so one keeps them and gives them to the others.
    """

    def __init__(
        self, max_bytes: int, pin_memory: bool = False, sharing: Sharing | None = None
    ) -> None:
        """Make an empty cache.

        Args:
            max_bytes: of tokens.
            pin_memory: whether a GPU copies to and from it.
            sharing: with other workers, None for none.
        """
        self._max_pages = max_bytes // _PAGE_BYTES
        self._num_pages = 0
        self._pages: list[torch.Tensor] = []
        self._pin_memory = pin_memory
        self._sharing = sharing or Sharing()
        self._free: list[int] = []
        self._videos: OrderedDict[Hashable, _Features] = OrderedDict()
        self._last_copy: torch.cuda.Event | None = None

    def _grow(self, num_pages: int) -> None:
        """Take memory until so many pages are free, as far as the limit and the system allow."""
        while len(self._free) < num_pages and self._num_pages < self._max_pages:
            # Pinned memory comes in powers of two: in one piece it could be twice as much.
            count = min(_PAGES_AT_ONCE, self._max_pages - self._num_pages)
            if not self._sharing.agree(self._sharing.is_owner and self._take(count)):
                logger.warning(
                    "%s must fit in host memory, but of %d bytes only %d could be had: lower it",
                    VIDEO_FEATURE_CACHE_GB,
                    self._max_pages * _PAGE_BYTES,
                    self._num_pages * _PAGE_BYTES,
                )
                self._max_pages = self._num_pages
                return
            self._free.extend(range(self._num_pages, self._num_pages + count))
            self._num_pages += count

    def _take(self, count: int) -> bool:
        """Return whether the system gave memory for some pages."""
        try:
            pages = torch.empty(
                (count, _PAGE_BYTES), dtype=torch.uint8, device="cpu", pin_memory=self._pin_memory
            )
        except RuntimeError:
            return False
        self._pages.extend(pages.unbind())
        return True

    def get(self, key: Hashable, device: torch.device) -> torch.Tensor | None:
        """Return a video's tokens on the device, to the bit as they were kept; None if not kept."""
        features = self._videos.get(key)
        if features is None:
            return None
        self._videos.move_to_end(key)
        tokens = torch.empty(features.shape, dtype=features.dtype, device=device)
        if self._sharing.is_owner:
            with self._in_order(device):
                for page, part in self._parts(features.pages, tokens):
                    part.copy_(page, non_blocking=True)
        return self._sharing.share(tokens)

    def put(self, key: Hashable, tokens: torch.Tensor) -> None:
        """Keep a copy of a video's tokens, unless they are larger than the whole cache."""
        num_pages = -(-tokens.nbytes // _PAGE_BYTES)
        if key in self._videos or num_pages > self._max_pages:
            return
        self._grow(num_pages)
        if num_pages > self._num_pages:
            return
        while len(self._free) < num_pages:
            _, dropped = self._videos.popitem(last=False)
            self._free.extend(dropped.pages)
        pages = [self._free.pop() for _ in range(num_pages)]
        self._videos[key] = _Features(pages, tokens.shape, tokens.dtype)
        if not self._sharing.is_owner:
            return
        with self._in_order(tokens.device):
            for page, part in self._parts(pages, tokens.contiguous()):
                page.copy_(part, non_blocking=True)

    def is_for_another_ratio(self, key: Hashable, num_retained: int) -> bool:
        """Return whether a kept video was compressed before, but never to K; note that it is."""
        features = self._videos.get(key)
        if features is None or num_retained in features.num_retained:
            return False
        features.num_retained.add(num_retained)
        return len(features.num_retained) > 1

    def clear(self) -> None:
        """Forget all videos: the tower is about to change."""
        for features in self._videos.values():
            self._free.extend(features.pages)
        self._videos.clear()

    def _parts(
        self, pages: list[int], tokens: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each page, as much of it as is used, with its part of the tokens."""
        parts = tokens.view(-1).view(torch.uint8).split(_PAGE_BYTES)
        for page, part in zip(pages, parts, strict=True):
            yield self._pages[page][: len(part)], part

    @contextmanager
    def _in_order(self, device: torch.device) -> Iterator[None]:
        """Let copies follow those before them, even if they run in another stream."""
        if device.type != "cuda":
            yield
            return
        if self._last_copy is not None:
            torch.cuda.current_stream(device).wait_event(self._last_copy)
        yield
        self._last_copy = torch.cuda.Event()
        self._last_copy.record(torch.cuda.current_stream(device))
