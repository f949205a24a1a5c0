"""Tunes glibc malloc to keep large freed buffers mapped, and to return what is not reused.

A video takes buffers of tens of MiB in the process that decodes it and in the one that receives it.
By default glibc maps each buffer anew and unmaps it afterwards. The first write to each page is
then a page fault: 10 thousand for 40 MiB. The faults take longer than the copy, and on some virtual
machines several times as long. All threads of a process contend for the same lock there.

Kept buffers lie in one heap with all other blocks. Small blocks with a longer life, such as the
kernels that oneDNN compiles for a shape, land between them and split them. A large buffer then fits
nowhere, and the heap grows at its end, although much of it is free. glibc returns free memory at
the end of the heap only. So a thread returns the free pages between the blocks too.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_MIB = 1 << 20

# What glibc's malloc.h calls M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
_SETTINGS = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 128 * _MIB),
    "MALLOC_TRIM_THRESHOLD_": (-1, 512 * _MIB),
}
"""One arena for all threads, because a thread's own arena ends at 64 MiB. It serves blocks of up to
128 MiB and keeps up to 512 MiB of free memory."""

_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Torch's: tensors of 2 MiB and more ask the kernel for large pages."""

_FREE_BYTES = 128 * _MIB
"""Free memory that a process keeps, because requests reuse it: a few videos' buffers."""
_CHECK_SECONDS = 60.0
"""Returned pages fault again when they are reused, so they are returned at most this often."""
_CHECKS_UNTIL_ALL = 10
"""After so many checks even less is returned: it would add up for hours, until it is too much."""
_STATM = Path("/proc/self/statm")


def keep_touched_memory(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tune malloc in this process and in the processes that it starts.

    If the operator set one of glibc's variables, all of them stay as they are.
    """
    environment.setdefault(_LARGE_PAGES, "1")
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, (number, value) in _SETTINGS.items():
        # The environment reaches new processes; mallopt acts on this one.
        environment[name] = str(value)
        if mallopt is not None:
            mallopt(number, value)


def return_free_memory(environment: Mapping[str, str] = os.environ) -> None:
    """Have a thread return free memory, in this process and in its forks.

    Nothing happens if the operator set glibc's variables, or without glibc 2.33. Safe to call
    again.
    """
    is_ours = all(environment.get(name) == str(value) for name, (_, value) in _SETTINGS.items())
    if not is_ours or os.getpid() in _returning or not FreeMemory.is_known():
        return
    # A fork inherits this hook, and no thread.
    if not _returning:
        os.register_at_fork(after_in_child=_start)
    _start()


_returning: set[int] = set()
"""Processes with a thread that returns free memory; a fork has its parent's numbers."""


def _start() -> None:
    _returning.add(os.getpid())
    threading.Thread(target=_keep_returning, name="scissor-vllm-memory", daemon=True).start()


def _keep_returning() -> None:
    free = FreeMemory()
    num_checks = 0
    while True:
        time.sleep(_CHECK_SECONDS)
        num_checks += 1
        is_due = num_checks % _CHECKS_UNTIL_ALL == 0
        free.return_excess(0 if is_due else _FREE_BYTES)


class _Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


class FreeMemory:
    """Free memory of this process's heap that the system still holds for it."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = _Mallinfo2
        self._libc.malloc_trim.argtypes = (ctypes.c_size_t,)
        self._base: int | None = None
        """Resident bytes without a block on the heap, right after free memory was returned."""

    @staticmethod
    def is_known() -> bool:
        """Return whether the C library and the system tell and return free memory."""
        libc = ctypes.CDLL(None)
        return all(hasattr(libc, name) for name in ("mallinfo2", "malloc_trim")) and _STATM.exists()

    def return_excess(self, max_bytes: int) -> bool:
        """Return all free pages if more than so many bytes were touched since the last time.

        Returns:
            Whether they were returned.
        """
        if self._base is not None and self._unused_bytes() - self._base <= max_bytes:
            return False
        self._libc.malloc_trim(0)
        self._base = self._unused_bytes()
        return True

    def _unused_bytes(self) -> int:
        """Return the private resident bytes that no block on the heap takes."""
        _, resident, shared, *_ = map(int, _STATM.read_text().split())
        in_use: int = self._libc.mallinfo2().uordblks
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE") - in_use
