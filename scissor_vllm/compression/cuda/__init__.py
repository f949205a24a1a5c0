"""SCC on a CUDA device by Triton kernels, with the result of ``scc.py``.

The files in order of a call:

    compress, compress_for_serving  tokens (T, P, D) and K, or a threshold
      → graphs.py                 the workspace, and the CUDA graph if there is one
      → video.py, products.py     Prim's order of frames, dot products; the passes over pairs
      → search.py                 guesses, spanning tree, cut
      → merge.py                  K rows and the assignment

``workspace.py`` is the memory of a search; ``kernels/`` shows in which order kernels run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from scissor_vllm.compression.cuda import graphs
from scissor_vllm.compression.cuda.kernels import layout
from scissor_vllm.compression.cuda.kernels import threshold as threshold_kernels
from scissor_vllm.compression.cuda.merge import merge
from scissor_vllm.compression.cuda.products import max_held_tokens
from scissor_vllm.compression.cuda.search import Search, SearchSettings, num_components
from scissor_vllm.compression.cuda.video import LEAST, MOST, Video
from scissor_vllm.compression.cuda.workspace import (
    LANES,
    SHARED_LANES,
    SHARED_TOKENS,
    WIDE_BLOCK,
)
from scissor_vllm.compression.result import CompressedTokens

MAX_TOKENS, MAX_PER_FRAME = layout.MAX_TOKENS, layout.MAX_PER_FRAME
"""Limits: tokens of a video, and tokens of a frame."""

__all__ = [
    "MAX_PER_FRAME",
    "MAX_TOKENS",
    "SearchSettings",
    "compress",
    "compress_for_serving",
    "takes",
    "warm_up_shapes",
]


def takes(tokens: torch.Tensor) -> bool:
    """Return whether tokens (T, P, D) are within these kernels' limits."""
    num_frames, per_frame, _ = tokens.shape
    return num_frames * per_frame <= layout.MAX_TOKENS and per_frame <= layout.MAX_PER_FRAME


def compress(
    tokens: torch.Tensor,
    threshold: float | None,
    num_retained: int | None,
    settings: SearchSettings,
) -> CompressedTokens | None:
    """Return tokens merged at a threshold or to a budget; exactly one is given.

    Args:
        tokens: (T, P, D) floating, on a CUDA device; ``takes`` them.
        threshold: cosine above which two tokens are connected.
        num_retained: K.
        settings: of the search for a budget's threshold.

    Returns:
        None if the magnitudes of tokens differ too much for these kernels, or a token is not
        finite.
    """
    if num_retained is None:
        assert threshold is not None
        return _at_threshold(tokens, threshold, settings.window)
    with _started(tokens, num_retained, settings) as (video, search):
        threshold, num_joined, flags = search.run_to_end()
        if flags & (layout.NOT_FINITE | layout.OUT_OF_RANGE):
            return None
        if flags:
            raise RuntimeError(f"the search for a threshold ended with flags {flags}: a defect")
        rows, assignment = merge(video, num_retained, num_joined)
        return CompressedTokens(rows.to(tokens.dtype), assignment, threshold)


def compress_for_serving(
    tokens: torch.Tensor, num_retained: int, settings: SearchSettings
) -> CompressedTokens:
    """Return tokens merged to a budget; unusable tokens count as zeros.

    Up to ``SHARED_TOKENS`` tokens without a host synchronization: the threshold stays on the
    device.

    Args:
        tokens: (T, P, D) floating, on a CUDA device; ``takes`` them.
        num_retained: K.
        settings: of the search.
    """
    with _started(tokens, num_retained, settings) as (video, search):
        if video.num_tokens > SHARED_TOKENS:
            search.run_to_end()
        # Each of these parts has at least two tokens; the other parts have one.
        max_joined = min(num_retained, video.num_tokens - num_retained)
        rows, assignment = merge(video, num_retained, max_joined)
        threshold_on_device = video.passes.workspace.outcome[layout.THRESHOLD].clone()
        return CompressedTokens(
            rows.to(tokens.dtype), assignment, threshold_on_device=threshold_on_device
        )


def _at_threshold(tokens: torch.Tensor, threshold: float, window: int) -> CompressedTokens | None:
    video = Video(_as_taken(tokens), window, threshold=threshold)
    ws, passes = video.passes.workspace, video.passes
    threshold_kernels.check_kernel[1,](
        ws.largest, ws.link, ws.state, ws.shape, ws.capacity, LEAST, MOST, block=WIDE_BLOCK
    )
    passes.unite(ws.tau, ws.always)
    lead, _ = passes.order_of_runs()
    passes.group(passes.labels(), lead)
    flags, num_joined, num_parts = torch.stack(
        [ws.state[layout.FLAGS], ws.outcome[layout.NUM_JOINED].long(), ws.number[-1]]
    ).tolist()
    if flags:
        return None
    rows, assignment = merge(video, num_parts, num_joined)
    return CompressedTokens(rows.to(tokens.dtype), assignment, float(threshold))


@contextmanager
def _started(
    tokens: torch.Tensor, num_retained: int, settings: SearchSettings
) -> Iterator[tuple[Video, Search]]:
    """Yield a video and its started search, for exclusive use in the context."""
    tokens = _as_taken(tokens)
    num_frames, per_frame, _ = tokens.shape
    num_tokens = num_frames * per_frame
    with graphs.shared(num_tokens, per_frame, tokens.device) as shared:
        if shared is None:
            size = num_components(num_tokens, num_retained, tokens.device)
            video = Video(tokens, settings.window, num_retained, num_components=size)
            search = Search(video.passes, settings)
            search.start()
            yield video, search
            return
        with shared.turn() as workspace:
            video = Video(tokens, settings.window, num_retained, workspace=workspace)
            search = Search(video.passes, settings)
            key = (video.passes.lanes, video.passes.aligned, settings.line_steps)
            shared.start((*key, settings.threshold_margin), search.start)
            yield video, search


def _as_taken(tokens: torch.Tensor) -> torch.Tensor:
    """Return tokens in a dtype and layout that the kernels take."""
    return (tokens.float() if tokens.dtype == torch.float64 else tokens).contiguous()


def warm_up_shapes(max_tokens: int, device: torch.device) -> list[tuple[int, int, float]]:
    """Return shapes and ratios (T, P, K/N) of warm-up calls.

    They compile the kernels and capture the graphs for frames of any size, and take the most
    memory beside the tokens that videos of up to ``max_tokens`` take.
    """
    shapes = []
    for lanes in LANES:
        # Kernels differ by whether P is a multiple of 4.
        for per_frame in (lanes, lanes - 1):
            num_frames = min(max_tokens, SHARED_TOKENS) // per_frame
            times = graphs.USES_BEFORE_CAPTURE + 1 if lanes <= SHARED_LANES else 1
            shapes += [(num_frames, per_frame, 0.1)] * times if num_frames else []
    per_frame = min(max_tokens, 256)
    num_held = min(max_tokens, max_held_tokens(device))
    for num_tokens, ratio in ((num_held, 0.4), (max_tokens, 0.4)):
        if num_tokens > SHARED_TOKENS:
            shapes.append((num_tokens // per_frame, per_frame, ratio))
    # The largest comes first, because it determines the shared size.
    return sorted(shapes, key=lambda shape: -min(shape[0] * shape[1], SHARED_TOKENS))
