"""What is kept of a video for the next question about it, at whatever ratio.

An API server keeps decoded frames, a worker keeps the tokens of the vision tower before they are
compressed. Both are found by content, by a cryptographic hash, never by a name that a client chose;
both are bounded in bytes and drop what was not used for the longest time.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from scissor_vllm.metrics import count_cache_query
from scissor_vllm.retention import VIDEO_FEATURE_CACHE_GB, VIDEO_FRAME_CACHE_GB

DEFAULT_FRAME_CACHE_GB = 1.0
DEFAULT_FEATURE_CACHE_GB = 2.0
"""In GiB. Where vLLM's own cache of processed inputs is off, these are too, unless set."""

_GIB = 1024**3
_PAGE_BYTES = 1024**2
_PAGES_AT_ONCE = 64


@dataclass(frozen=True)
class CacheSizes:
    """Bytes that each cache may take."""

    frames: int
    """Decoded frames, in each API-server process."""
    features: int
    """Tokens of the vision tower, in each worker, in host memory."""

    @classmethod
    def of(cls, kwargs: Mapping[str, object] | None, mm_processor_cache_gb: float) -> CacheSizes:
        """Return the sizes that an engine's ``mm_processor_kwargs`` set, or the defaults.

        Raises:
            TypeError: a size is not a number.
            ValueError: a size is negative or not finite.
        """
        kwargs = kwargs or {}
        is_on = mm_processor_cache_gb > 0
        return cls(
            frames=_num_bytes(kwargs, VIDEO_FRAME_CACHE_GB, DEFAULT_FRAME_CACHE_GB * is_on),
            features=_num_bytes(kwargs, VIDEO_FEATURE_CACHE_GB, DEFAULT_FEATURE_CACHE_GB * is_on),
        )


def _num_bytes(kwargs: Mapping[str, object], name: str, default: float) -> int:
    return int(check_cache_gb(name, kwargs.get(name, default)) * _GIB)


def check_cache_gb(name: str, size: object) -> float:
    """Return the size if it is a number of GiB, 0 or more.

    Raises:
        TypeError: not a number.
        ValueError: negative or not finite.
    """
    if isinstance(size, bool) or not isinstance(size, (int, float)):
        raise TypeError(f"{name} must be a number of GiB, got {size!r}: 0 switches it off")
    if not (math.isfinite(size) and size >= 0):
        raise ValueError(f"{name} must be 0 or more GiB, got {size!r}: 0 switches it off")
    return float(size)


@dataclass
class _Decoding:
    """A video that some thread decodes; others that want it wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_threads: int = 0


class FrameCache:
    """Decoded frames with their metadata. Safe to use from several threads."""

    def __init__(self, max_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._videos: OrderedDict[Hashable, tuple[np.ndarray, dict[str, Any]]] = OrderedDict()
        self._decoding: dict[Hashable, _Decoding] = {}

    @property
    def is_on(self) -> bool:
        """Whether anything may be kept."""
        return self._max_bytes > 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the frames that are kept now."""
        return self._num_bytes

    def resize(self, max_bytes: int) -> None:
        """Set what all frames together may take; 0 switches the cache off."""
        with self._lock:
            self._max_bytes = max_bytes
            self._drop_oldest()

    def get(
        self, key: Hashable, decode: Callable[[], tuple[Any, dict[str, Any]]]
    ) -> tuple[Any, dict[str, Any]]:
        """Return frames and metadata, decoded if they are not kept; by one thread at a time.

        Kept frames are shared and must not be written to: the array says so. What `decode` raises
        is passed on and nothing is kept.
        """
        if not self.is_on:
            return decode()
        with self._turn(key):
            with self._lock:
                kept = self._videos.get(key)
                if kept is not None:
                    self._videos.move_to_end(key)
            count_cache_query("frames", is_hit=kept is not None)
            if kept is None:
                frames, metadata = decode()
                if not isinstance(frames, np.ndarray):
                    return frames, metadata
                frames.flags.writeable = False
                kept = frames, metadata
                self._keep(key, frames, metadata)
        frames, metadata = kept
        return frames, copy.deepcopy(metadata)

    @contextmanager
    def _turn(self, key: Hashable) -> Iterator[None]:
        with self._lock:
            decoding = self._decoding.setdefault(key, _Decoding())
            decoding.num_threads += 1
        try:
            with decoding.lock:
                yield
        finally:
            with self._lock:
                decoding.num_threads -= 1
                if decoding.num_threads == 0:
                    del self._decoding[key]

    def _keep(self, key: Hashable, frames: np.ndarray, metadata: dict[str, Any]) -> None:
        with self._lock:
            if frames.nbytes > self._max_bytes:
                return
            self._videos[key] = frames, metadata
            self._num_bytes += frames.nbytes
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        while self._num_bytes > self._max_bytes:
            _, (frames, _) = self._videos.popitem(last=False)
            self._num_bytes -= frames.nbytes


FRAMES = FrameCache()
"""The one of this process: vLLM calls a loader without telling it any setting."""


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
