"""CUDA graphs of searches: a hundred launches as one, for videos of a shape that comes again.

The host needs longer to launch a search's small kernels one by one than a GPU to run them. A graph
works on memory of its own, so few are kept, and only of videos up to a size.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch

logger = logging.getLogger(__name__)

MAX_CAPTURES = 2
"""Most graphs that are kept. Each holds three copies of its tokens, the products of all pairs and
as many weights again: some 400 MiB for 32 frames of 196 tokens, 3584 wide; a batch's that often."""

MAX_TOKENS = 1 << 13
"""Most tokens of a captured search. With more, the GPU is busy longer than the host."""

USES_BEFORE_CAPTURE = 2
"""Searches of a shape that are launched one by one before it is captured."""

_Key = tuple[object, ...]


class Search(Protocol):
    """What can be captured."""

    asked: torch.Tensor
    """(1,) on the device: K or a threshold, the only number that a start takes besides tokens."""

    def start(self) -> None:
        """Launch work on the device, without waiting for it."""


S = TypeVar("S", bound=Search)

_lock = threading.Lock()
_captures: OrderedDict[_Key, "_Capture[Any]"] = OrderedDict()
_uses: OrderedDict[_Key, int] = OrderedDict()
_refused: set[_Key] = set()
_MAX_USES_KEPT = 64


class _Capture(Generic[S]):
    """A search of one shape on one stream."""

    def __init__(self, tokens: torch.Tensor, make: Callable[[torch.Tensor], S]) -> None:
        self._tokens = tokens.clone()
        self.search = make(self._tokens)
        self.search.asked.fill_(1)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of a server go on using the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.search.start()

    def start(self, tokens: torch.Tensor, asked: float) -> None:
        self._tokens.copy_(tokens)
        self.search.asked.fill_(asked)
        self._graph.replay()


@contextmanager
def search(
    tokens: torch.Tensor, asked: float, variant: object, make: Callable[[torch.Tensor], S]
) -> Iterator[S]:
    """Yield a search that was started; its memory is the caller's until the context ends.

    Args:
        tokens: (T, P, D), or several videos' (B, T, P, D), contiguous, on a CUDA device.
        asked: K, or a threshold.
        variant: what a search depends on besides shape and dtype.
        make: returns the search of tokens.
    """
    stream = torch.cuda.current_stream(tokens.device)
    # What is made in inference mode may not be written to outside of it.
    mode = torch.is_inference_mode_enabled()
    key = (tokens.device, stream.cuda_stream, tokens.shape, tokens.dtype, mode, variant)
    with _lock:
        capture = _captured(key, tokens, make)
        if capture is not None:
            capture.start(tokens, asked)
            yield capture.search
            return
    alone = make(tokens)
    alone.asked.fill_(asked)
    alone.start()
    yield alone


def _captured(
    key: _Key, tokens: torch.Tensor, make: Callable[[torch.Tensor], S]
) -> _Capture[S] | None:
    """Return the capture of a key, made now if it has come often enough, None if it has not."""
    num_tokens = tokens.shape[-3] * tokens.shape[-2]
    if num_tokens > MAX_TOKENS or torch.cuda.is_current_stream_capturing():
        return None
    if key in _refused:
        return None
    if key in _captures:
        _captures.move_to_end(key)
        return _captures[key]
    _uses[key] = _uses.pop(key, 0) + 1
    if _uses[key] <= USES_BEFORE_CAPTURE:
        if len(_uses) > _MAX_USES_KEPT:
            _uses.popitem(last=False)
        return None
    del _uses[key]
    while len(_captures) >= MAX_CAPTURES:
        # It may still run.
        torch.cuda.synchronize(tokens.device)
        _captures.popitem(last=False)
    try:
        _captures[key] = _Capture(tokens, make)
    except RuntimeError as error:
        # Without a graph it takes longer, no more.
        logger.warning("searches of shape %s are not captured: %s", tuple(tokens.shape), error)
        _refused.add(key)
        return None
    return _captures[key]


def clear() -> None:
    """Give back the memory of all graphs."""
    with _lock:
        if _captures:
            torch.cuda.synchronize()
        _captures.clear()
        _uses.clear()
        _refused.clear()
