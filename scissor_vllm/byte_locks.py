"""Locks on single bytes of a file, by which the processes of a user share a number of something.

The system releases the locks of a process that dies.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


class ByteLocks:
    """A file in the system's temporary folder; its bytes need not exist."""

    def __init__(self, name: str | Path, without: str) -> None:
        """Name the file.

        Args:
            name: one for all processes of a user, or a path.
            without: what is so without the file, for a warning.
        """
        self._without = without
        is_path = isinstance(name, Path)
        self._path = name if is_path else Path(tempfile.gettempdir(), f"{name}-{os.getuid()}.lock")
        self._has_warned = False

    @contextmanager
    def opened(self) -> Iterator[OpenByteLocks | None]:
        """Open the file for a holder of locks, which the end of the context frees.

        None where open file description locks do not exist, or the file cannot be opened.
        """
        file = self._open()
        if file is None:
            yield None
            return
        try:
            yield OpenByteLocks(file)
        finally:
            os.close(file)

    def _open(self) -> int | None:
        if not hasattr(fcntl, "F_OFD_SETLK"):
            return None
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("%s: %s", self._without, error)
            return None


class OpenByteLocks:
    """The locks of one holder. Another one of the same process is another holder."""

    def __init__(self, file: int) -> None:
        self._file = file

    def try_lock(self, number: int) -> bool:
        """Lock a byte that nobody else has, and return whether that is so."""
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _lock(number))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def lock(self, number: int) -> None:
        """Wait for a byte, and lock it."""
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW, _lock(number))

    def unlock(self, number: int) -> None:
        """Free a byte."""
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _lock(number, fcntl.F_UNLCK))


def _lock(number: int, kind: int = fcntl.F_WRLCK) -> bytes:
    """A `struct flock` for one byte of a file."""
    return struct.pack("@hhqqi", kind, os.SEEK_SET, number, 1, 0)
