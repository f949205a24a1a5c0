"""How a server's processes get a video's memory from the system: what they touched, they keep.

A video is some buffers of tens of MiB, in the process that decodes it and in the one that receives
it. By itself glibc maps each anew and gives it back after, and the first touch of each page is a
fault: 10 thousand for 40 MiB, more time than the copy that touches them, several times as much on
some virtual machines, and all threads of a process wait for one another there.
"""

import ctypes
import os
from collections.abc import MutableMapping

_MIB = 1 << 20

# What glibc's malloc.h calls M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
_SETTINGS = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 128 * _MIB),
    "MALLOC_TRIM_THRESHOLD_": (-1, 512 * _MIB),
}
"""One heap for all threads, since one of a thread's own ends at 64 MiB; blocks up to 128 MiB from
it; and up to 512 MiB of it are kept while they are free."""

_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Torch's: tensors of 2 MiB and more ask the kernel for large pages."""


def keep_touched_memory(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have this process, and those that it starts, keep memory that videos lay in for the next.

    What the operator set stays: glibc's settings are left alone if one of them is there.
    """
    environment.setdefault(_LARGE_PAGES, "1")
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, (number, value) in _SETTINGS.items():
        # The environment is for processes that start, this call for the one that runs.
        environment[name] = str(value)
        if mallopt is not None:
            mallopt(number, value)
