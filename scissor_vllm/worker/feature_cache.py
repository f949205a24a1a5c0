"""Caches the vision tower's output and its linkage tree: a video is encoded and joined once.

The key is a cryptographic hash of the content, never a name from a client. The cache is LRU and
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

# A child of vLLM's logger, because only that one has a handler.
logger = logging.getLogger(f"vllm.{__name__}")

_PAGE_BYTES = 1024**2
_PAGES_AT_ONCE = 64


@dataclass(frozen=True)
class _Features:
    """Location of a video's tokens."""

    pages: list[int]
    shape: torch.Size
    dtype: torch.dtype
    begin_of_tree: int
    """Offset of the video's tree in bytes."""
    trees: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)
    """Shape and dtype of the cached tree; empty without one."""
    num_retained: set[int] = field(default_factory=set)
    """Values of K requested since the video was cached."""


class Sharing:
    """How workers with the same tokens share one cache. The base class is a single worker."""

    is_owner = True
    """Whether this worker's host memory holds the tokens."""

    def agree(self, value: bool) -> bool:
        """Return the owner's value in every worker."""
        return value

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the owner's tokens in every worker; other workers pass a buffer for them."""
        return tokens


class FeatureCache:
    """Cache of the vision tower's tokens in host memory.

    Memory grows in pieces up to the limit and is not given back. Copies are asynchronous, in the
    GPU's stream. Insertions and evictions depend on the calls only. So workers that share a model
    by tensor parallelism agree on every video. Their tokens are equal: one worker holds them and
    sends them to the others.
    """

    def __init__(
        self, max_bytes: int, pin_memory: bool = False, sharing: Sharing | None = None
    ) -> None:
        """Make an empty cache.

        Args:
            max_bytes: limit for tokens and trees.
            pin_memory: whether a GPU copies to and from the cache.
            sharing: with other workers, None for a single worker.
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
        """Allocate memory until ``num_pages`` are free, or the limit or the system stops it."""
        while len(self._free) < num_pages and self._num_pages < self._max_pages:
            # Pinned allocations are rounded up to a power of two: one piece could double in size.
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
        """Allocate ``count`` pages; return whether the system had the memory."""
        try:
            pages = torch.empty(
                (count, _PAGE_BYTES), dtype=torch.uint8, device="cpu", pin_memory=self._pin_memory
            )
        except RuntimeError:
            return False
        self._pages.extend(pages.unbind())
        return True

    def get(self, key: Hashable, device: torch.device) -> torch.Tensor | None:
        """Return a video's tokens on the device, bit for bit as cached; None for a cache miss."""
        features = self._videos.get(key)
        if features is None:
            return None
        self._videos.move_to_end(key)
        return self._read(features.pages, features.shape, features.dtype, 0, device)

    def put(self, key: Hashable, tokens: torch.Tensor, tree_bytes: int = 0) -> None:
        """Cache a copy of a video's tokens, unless they are larger than the whole cache.

        Args:
            key: hash of the video's content.
            tokens: of any shape and dtype.
            tree_bytes: space to reserve for :meth:`put_tree`.
        """
        num_pages = -(-(tokens.nbytes + tree_bytes) // _PAGE_BYTES)
        if key in self._videos or num_pages > self._max_pages:
            return
        self._grow(num_pages)
        if num_pages > self._num_pages:
            return
        while len(self._free) < num_pages:
            _, dropped = self._videos.popitem(last=False)
            self._free.extend(dropped.pages)
        pages = [self._free.pop() for _ in range(num_pages)]
        try:
            self._write(pages, tokens, 0)
        except BaseException:
            self._free.extend(pages)
            raise
        self._videos[key] = _Features(pages, tokens.shape, tokens.dtype, tokens.nbytes)

    def put_tree(self, key: Hashable, tree: torch.Tensor) -> None:
        """Cache a copy of a cached video's tree, in the space that :meth:`put` reserved."""
        features = self._videos.get(key)
        if features is None or features.trees:
            return
        self._write(features.pages, tree, features.begin_of_tree)
        features.trees.append((tree.shape, tree.dtype))

    def get_tree(self, key: Hashable, device: torch.device) -> torch.Tensor | None:
        """Return a video's tree on the device; None if no tree is cached."""
        features = self._videos.get(key)
        if features is None or not features.trees:
            return None
        shape, dtype = features.trees[0]
        return self._read(features.pages, shape, dtype, features.begin_of_tree, device)

    def is_for_another_ratio(self, key: Hashable, num_retained: int) -> bool:
        """Record K of a cached video; return whether K is new and others came before."""
        features = self._videos.get(key)
        if features is None or num_retained in features.num_retained:
            return False
        features.num_retained.add(num_retained)
        return len(features.num_retained) > 1

    def clear(self) -> None:
        """Drop all videos, because the tower's weights change."""
        for features in self._videos.values():
            self._free.extend(features.pages)
        self._videos.clear()

    def _read(
        self, pages: list[int], shape: torch.Size, dtype: torch.dtype, begin: int,
        device: torch.device,
    ) -> torch.Tensor:  # fmt: skip
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if self._sharing.is_owner:
            with self._in_order(device):
                for kept, part in self._parts(pages, tensor, begin):
                    part.copy_(kept, non_blocking=True)
        return self._sharing.share(tensor)

    def _write(self, pages: list[int], tensor: torch.Tensor, begin: int) -> None:
        if not self._sharing.is_owner:
            return
        with self._in_order(tensor.device):
            for kept, part in self._parts(pages, tensor.contiguous(), begin):
                kept.copy_(part, non_blocking=True)

    def _parts(
        self, pages: list[int], tensor: torch.Tensor, begin: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield parts of pages from offset ``begin``, and the parts of the tensor stored there."""
        flat = tensor.view(-1).view(torch.uint8)
        done = 0
        while done < len(flat):
            number, at = divmod(begin + done, _PAGE_BYTES)
            count = min(_PAGE_BYTES - at, len(flat) - done)
            yield self._pages[pages[number]][at : at + count], flat[done : done + count]
            done += count

    @contextmanager
    def _in_order(self, device: torch.device) -> Iterator[None]:
        """Order copies after all earlier ones, also those in another stream."""
        if device.type != "cuda":
            yield
            return
        if self._last_copy is not None:
            torch.cuda.current_stream(device).wait_event(self._last_copy)
        yield
        self._last_copy = torch.cuda.Event()
        self._last_copy.record(torch.cuda.current_stream(device))
