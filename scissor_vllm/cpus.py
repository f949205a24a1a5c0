"""Number of CPUs, for thread pools and for the threads of one video."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from scissor_vllm.byte_locks import ByteLocks

_MAX_THREADS, _CPUS_PER_THREAD = 8, 2
"""Most threads for one video, and CPUs for each thread. On two CPUs joining the parts of a video of
32 frames costs what the threads gain."""

_num_sharing = 1
_TAKEN = ByteLocks("scissor-vllm-cpus", "processes do not see each other's threads")
"""A byte for each CPU."""


def threads_per_video() -> int:
    """Return how many threads share the frames of one video."""
    return max(1, min(_MAX_THREADS, num_cpus() // _CPUS_PER_THREAD))


def share_cpus(num_processes: int) -> None:
    """Tell how many processes share the CPUs, this one among them."""
    global _num_sharing
    _num_sharing = max(1, num_processes)


def is_alone() -> bool:
    """Return whether no other process shares the CPUs."""
    return _num_sharing == 1


def num_own_cpus() -> int:
    """Return this process's share of the CPUs, at least 1."""
    return max(1, num_cpus() // _num_sharing)


@contextmanager
def take_cpus(wanted: int, *, spared: int = 0) -> Iterator[int]:
    """Take CPUs for the threads of one video, and free them at the end of the context.

    The videos of all processes of a user take from the same CPUs: a video alone has many, and those
    of a burst do not start many more threads than there are CPUs. Nobody waits: where all are taken
    a video has one thread beside the others.

    Args:
        wanted: number of CPUs at most.
        spared: number of free CPUs that are left to others.

    Yields:
        The number of threads to start, at least 1.
    """
    with _TAKEN.opened() as locks:
        if locks is None:
            yield max(1, min(wanted, num_own_cpus() - spared))
            return
        num_taken = 0
        for cpu in range(num_cpus() - spared):
            if num_taken == wanted:
                break
            # A file system without locks costs threads, not the request.
            with suppress(OSError):
                num_taken += locks.try_lock(cpu)
        yield max(1, num_taken)


@cache
def num_cpus() -> int:
    """Return how many CPUs this process may use, by its affinity and its container's quota.

    They are counted once: reading the quota takes as long as resizing two frames.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    available = available or os.cpu_count() or 1
    quota = cgroup_cpu_quota()
    return available if quota is None else max(1, min(available, math.ceil(quota)))


def cgroup_cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPUs that the process's control groups allow in a period, None if unlimited.

    Reads both versions of control groups. The lowest quota of the group and its parents counts.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for membership in memberships:
        # Hierarchy, controllers separated by commas (none in version 2), path.
        _, _, rest = membership.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [controllers, "cpu"] if controllers else ["", "unified"]
        for mount in mounts:
            top = root / "sys/fs/cgroup" / mount
            group = top / path.lstrip("/")
            # A container may see its own group at the top, whatever its path says.
            folders = [group, *group.parents]
            for folder in folders[: folders.index(top) + 1] if top in folders else [top]:
                quotas.append(_quota_v1(folder) if controllers else _quota_v2(folder))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
