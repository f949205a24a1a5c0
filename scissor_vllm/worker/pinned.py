"""Copies from host memory to the model's device, for which the host does not wait.

A copy from pageable memory waits for all queued work of the device, so values go through pinned
memory. vLLM does that too, in one thread: at 3 GB/s a video's frames take the host 4 to 9 ms, in
which it launches nothing (a profile of a server with an H200). Here several threads copy.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from scissor_vllm.cpus import threads_per_video

_BYTES_WORTH_A_THREAD = 1 << 21


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values on a device, without a host synchronization.

    Args:
        values: of any shape and dtype, on the CPU or on the device.
        device: of the model.
    """
    if values.device == device or device.type != "cuda":
        return values.to(device)
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy_in_threads(pinned, values)
    return pinned.to(device, non_blocking=True)


def copy_in_threads(into: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values in host memory, large ones in several threads.

    Args:
        into: contiguous, of the same shape and dtype; overwritten.
        values: likewise, in any layout.
    """
    target, source = _as_bytes(into), _as_bytes(values.contiguous())
    num_parts = min(threads_per_video(), len(source) // _BYTES_WORTH_A_THREAD)
    if num_parts <= 1:
        target[:] = source
        return
    # NumPy releases the interpreter lock while it copies.
    parts = zip(np.array_split(target, num_parts), np.array_split(source, num_parts), strict=True)
    for _ in _pool().map(lambda part: np.copyto(*part), parts):
        pass


def _as_bytes(values: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    array: np.ndarray[tuple[int], np.dtype[np.uint8]] = (
        values.view(-1).view(torch.uint8).numpy() if values.numel() else np.empty(0, np.uint8)
    )
    return array


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads_per_video(), "pin")
