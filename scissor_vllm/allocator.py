"""Tunes glibc malloc to keep large freed buffers mapped.

A video takes buffers of tens of MiB in the process that decodes it and in the one that receives it.
By default glibc maps each buffer anew and unmaps it afterwards. The first write to each page is
then a page fault: 10 thousand for 40 MiB. The faults take longer than the copy, and on some virtual
machines several times as long. All threads of a process contend for the same lock there.
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
"""One arena for all threads, because a thread's own arena ends at 64 MiB. It serves blocks of up to
128 MiB and keeps up to 512 MiB of free memory."""

_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Torch's: tensors of 2 MiB and more ask the kernel for large pages."""


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
