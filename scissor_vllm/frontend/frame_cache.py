"""LRU cache of decoded frames, so that a repeated video is not decoded again.

The key is a cryptographic hash of the content, never a name from a client. The size is bounded in
bytes.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scissor_vllm.metrics import count_cache_query


@dataclass
class _Decoding:
    """A video that one thread is decoding while others wait for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_threads: int = 0


def held_bytes(frames: np.ndarray) -> int:
    """Return the bytes that an array keeps alive: for a view, the size of its base."""
    owner: Any = frames
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    try:
        return max(frames.nbytes, memoryview(owner).nbytes)
    except TypeError:
        # The memory belongs to another library, for example to a torch tensor.
        return max(frames.nbytes, getattr(owner, "nbytes", 0))


class FrameCache:
    """Thread-safe LRU cache of decoded frames with their metadata."""

    def __init__(self, max_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._videos: OrderedDict[Hashable, tuple[np.ndarray, dict[str, Any]]] = OrderedDict()
        self._decoding: dict[Hashable, _Decoding] = {}

    @property
    def is_on(self) -> bool:
        """Whether the cache has a size above 0."""
        return self._max_bytes > 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the cached frames."""
        return self._num_bytes

    def resize(self, max_bytes: int) -> None:
        """Set the largest number of bytes; 0 switches the cache off."""
        with self._lock:
            self._max_bytes = max_bytes
            self._drop_oldest()

    def get(
        self, key: Hashable, decode: Callable[[], tuple[Any, dict[str, Any]]]
    ) -> tuple[Any, dict[str, Any]]:
        """Return frames and metadata. On a cache miss one thread decodes, and others wait for it.

        Cached frames are shared, so the array is read-only. An exception of `decode` propagates,
        and nothing is cached.
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
                if held_bytes(frames) > frames.nbytes:
                    frames = frames.copy()
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
            if held_bytes(frames) > self._max_bytes:
                return
            self._videos[key] = frames, metadata
            self._num_bytes += held_bytes(frames)
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        while self._num_bytes > self._max_bytes:
            _, (frames, _) = self._videos.popitem(last=False)
            self._num_bytes -= held_bytes(frames)


FRAMES = FrameCache()
"""The cache of this process. It is global because vLLM passes no setting to a loader."""
