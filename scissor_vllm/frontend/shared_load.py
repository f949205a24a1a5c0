"""The load of all API servers of an engine, told by each to the others without waiting.

Each writes a few numbers into a file of its own, mapped into memory, and reads those of the others.
A number may be of the moment before: it is an estimate's.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PREFIX = "scissor-load-"
_LOOK_SECONDS = 1.0
"""Between two looks for servers that came or went."""
_FRESH_SECONDS = 30.0
"""A server that told nothing for so long has no prompts in the engine, or its clients hung up."""
_AHEAD_SECONDS = 1.0
"""By which the time of what another server told may be after the look at it."""


class Load(NamedTuple):
    """What an API server counts, or all of them."""

    num_arrived: float = 0
    """Requests whose ratio was chosen."""
    num_pending: float = 0
    """Prompts in the engine without a first token."""
    num_pending_tokens: float = 0
    """Of these prompts."""
    num_prepared_tokens: float = 0
    """Of requests whose ratio was chosen and that have not reached the engine, at most."""
    num_prepared: float = 0
    """Their number."""
    busy_since: float = 0
    """Time of the last first token, or later, of the end of the engine's idleness."""
    updated: float = 0
    """When this was told."""


_FORMAT = struct.Struct(f"{len(Load._fields)}d")


def total(loads: Iterable[Load]) -> Load:
    """Return the sum, and the last times."""
    *counts, since, updated = zip(*loads, strict=True)
    return Load._make((*map(sum, counts), max(since), max(updated)))


class SharedLoad:
    """An API server's load and that of the others."""

    def __init__(
        self,
        folder: Path | None,
        suffix: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a file in a folder that the server's processes share.

        Args:
            folder: None for a server alone.
            suffix: of the file's name, for several in one process.
            clock: in seconds.
        """
        self._folder = folder
        self._clock = clock
        self._others: dict[str, mmap.mmap] = {}
        self._looked = -_LOOK_SECONDS
        self._name = f"{_PREFIX}{os.getpid()}-{suffix}"
        self._own: mmap.mmap | None = None
        if folder is not None:
            path = folder / self._name
            path.write_bytes(bytes(_FORMAT.size))
            with path.open("r+b") as file:
                self._own = mmap.mmap(file.fileno(), _FORMAT.size)

    def publish(self, load: Load) -> Load:
        """Tell the others this server's load, and return that of all."""
        if self._own is None:
            return load
        now = self._clock()
        load = load._replace(updated=now)
        _FORMAT.pack_into(self._own, 0, *load)
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._look()
        loads = (Load(*_FORMAT.unpack_from(shared)) for shared in self._others.values())
        return total((load, *(_at(shared_load, now) for shared_load in loads)))

    def _look(self) -> None:
        assert self._folder is not None
        names = {path.name for path in self._folder.glob(f"{_PREFIX}*")} - {self._name}
        running = {name for name in names if _is_of_a_running_process(name)}
        self._others = {n: shared for n, shared in self._others.items() if n in running}
        for name in running - self._others.keys():
            # A file may vanish meanwhile.
            with suppress(OSError), (self._folder / name).open("rb") as file:
                if os.fstat(file.fileno()).st_size == _FORMAT.size:
                    self._others[name] = mmap.mmap(
                        file.fileno(), _FORMAT.size, access=mmap.ACCESS_READ
                    )


def _at(load: Load, now: float) -> Load:
    """Return a load as it is now: what was told long ago, or before a reboot, holds no more."""
    # Another server may tell it after this one took the time.
    if now - _FRESH_SECONDS <= load.updated <= now + _AHEAD_SECONDS:
        return load
    return Load(num_arrived=load.num_arrived)


def _is_of_a_running_process(name: str) -> bool:
    """Return whether a file is that of a server that runs: others may have the prefix."""
    try:
        os.kill(int(name.removeprefix(_PREFIX).split("-")[0]), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
