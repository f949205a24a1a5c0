"""Caches the vision tower's output, so that a video is encoded once for all ratios.

Found by content, by a cryptographic hash, never by a name that a client chose; bounded in bytes,
least recently used first out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from scissor_vllm.settings import VIDEO_FEATURE_CACHE_GB

_PAGE_BYTES = 1024**2
_PAGES_AT_ONCE = 64


@dataclass(frozen=True)
class _Features:
    """Where a video's tokens lie."""

    pages: list[int]
    shape: torch.Size
    dtype: torch.dtype
    num_retained: set[int] = field(default_factory=set)
    """What it was compressed to since it is kept."""


class FeatureCache:
    """Tokens of videos as the vision tower gives them, kept in host memory.

    The memory is taken once, at the start: no request waits for it or fails by it. Copies run in
    the GPU's stream, and nothing waits for them. What is dropped follows from the calls alone, so
    that workers that share a model by tensor parallelism agree on every video.

    Raises:
        RuntimeError: the system does not give the memory.
    """

    def __init__(self, max_bytes: int, pin_memory: bool = False) -> None:
        num_pages = max_bytes // _PAGE_BYTES
        self._pages: list[torch.Tensor] = []
        # Pinned memory comes in powers of two: in one piece it could be twice as much.
        for start in range(0, num_pages, _PAGES_AT_ONCE):
            shape = (min(_PAGES_AT_ONCE, num_pages - start), _PAGE_BYTES)
            try:
                pages = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pin_memory)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{VIDEO_FEATURE_CACHE_GB} must fit in host memory, but of {max_bytes} bytes "
                    f"only {start * _PAGE_BYTES} could be had: lower it, 0 switches it off"
                ) from error
            self._pages.extend(pages.unbind())
        self._free = list(range(num_pages))
        self._videos: OrderedDict[Hashable, _Features] = OrderedDict()
        self._last_copy: torch.cuda.Event | None = None

    def get(self, key: Hashable, device: torch.device) -> torch.Tensor | None:
        """Return a video's tokens on the device, to the bit as they were kept; None if not kept."""
        features = self._videos.get(key)
        if features is None:
            return None
        self._videos.move_to_end(key)
        tokens = torch.empty(features.shape, dtype=features.dtype, device=device)
        with self._in_order(device):
            for page, part in self._parts(features.pages, tokens):
                part.copy_(page, non_blocking=True)
        return tokens

    def put(self, key: Hashable, tokens: torch.Tensor) -> None:
        """Keep a copy of a video's tokens, unless they are larger than the whole cache."""
        num_pages = -(-tokens.nbytes // _PAGE_BYTES)
        if key in self._videos or num_pages > len(self._pages):
            return
        while len(self._free) < num_pages:
            _, dropped = self._videos.popitem(last=False)
            self._free.extend(dropped.pages)
        pages = [self._free.pop() for _ in range(num_pages)]
        self._videos[key] = _Features(pages, tokens.shape, tokens.dtype)
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
