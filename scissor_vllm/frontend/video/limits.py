"""Limits of decoding: bytes of one video, bytes of all videos at once, and videos at once."""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm.multimodal.video_decoders import check_frame_pixel_limit

from scissor_vllm.cpus import num_own_cpus
from scissor_vllm.frontend.refusal import RefusedVideoError
from scissor_vllm.metrics import Reason

logger = logging.getLogger(__name__)

MAX_DECODE_BYTES_VARIABLE = "SCISSOR_MAX_VIDEO_DECODE_BYTES"
DEFAULT_MAX_DECODE_BYTES = 4 * 1024**3

# With two at once a short video does not wait for a long one.
_MIN_VIDEOS_AT_ONCE, _CPUS_PER_VIDEO = 2, 4
# Pictures that a decoder buffers, at most 4 bytes a pixel.
_NUM_REFERENCE_PICTURES = 17


def max_decode_bytes() -> int:
    """Most bytes that decoded frames may take: of one video, and of all that are decoded at once.

    Raises:
        ValueError: the environment variable is no positive integer.
    """
    text = os.environ.get(MAX_DECODE_BYTES_VARIABLE, str(DEFAULT_MAX_DECODE_BYTES))
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError(
            f"{MAX_DECODE_BYTES_VARIABLE} must be a positive integer (bytes), got {text!r}; "
            f"unset it for the default of {DEFAULT_MAX_DECODE_BYTES}"
        )
    return int(text)


def check_decode_bytes(num_frames: int, height: int, width: int) -> None:
    """Refuse frames of this number and size that take more than `max_decode_bytes`.

    Raises:
        RefusedVideoError: they do, with the reason `video_too_large`.
    """
    num_bytes, limit = num_frames * height * width * 3, max_decode_bytes()
    if num_bytes > limit:
        raise RefusedVideoError(
            f"the sampled frames of a video may take {limit} bytes, got {num_frames} frames of "
            f"{width}x{height}, which take {num_bytes}: ask for fewer frames (num_frames, fps), or "
            f"have the operator raise {MAX_DECODE_BYTES_VARIABLE}",
            reason=Reason.VIDEO_TOO_LARGE,
        )


def check_pixels(width: int, height: int) -> None:
    """Refuse a frame that is larger than VLLM_MAX_IMAGE_PIXELS.

    Raises:
        RefusedVideoError: it is, with the reason `video_too_large`.
    """
    try:
        check_frame_pixel_limit(width, height)
    except ValueError as error:
        raise RefusedVideoError(str(error), reason=Reason.VIDEO_TOO_LARGE) from error


def num_bytes_to_decode(
    num_frames: int, height: int, width: int, num_threads: int, num_packet_bytes: int
) -> int:
    """Bytes that a video takes while it is decoded: packets, decoder and sampled frames."""
    num_held = _NUM_REFERENCE_PICTURES + num_threads
    return num_packet_bytes + (3 * num_frames + 4 * num_held) * height * width


class DecodingSlots:
    """Limits how many videos are decoded at once, in order of arrival.

    Without a limit all videos of a burst would finish late, and preparing the first one would
    compete with decoding the others for CPUs and the interpreter lock.
    """

    def __init__(self) -> None:
        self._turns = threading.Condition()
        self._num_came = 0
        self._num_done = 0
        self.num_decoding = 0
        """Number of videos that threads are decoding now."""

    @property
    def num_waiting(self) -> int:
        """Number of videos that wait for a slot."""
        return self._num_came - self._num_done - self.num_decoding

    def __enter__(self) -> None:
        at_once = max(_MIN_VIDEOS_AT_ONCE, num_own_cpus() // _CPUS_PER_VIDEO)
        with self._turns:
            before = self._num_came
            self._num_came += 1
            self._turns.wait_for(lambda: before - self._num_done < at_once)
            self.num_decoding += 1

    def __exit__(self, *raised: object) -> None:
        with self._turns:
            self.num_decoding -= 1
            self._num_done += 1
            self._turns.notify_all()


SLOTS = DecodingSlots()
"""The slots of this process."""


class DecodingBudget:
    """Bounds the bytes of all videos decoded at once, across all processes of a user.

    A video waits until the budget has room. A video that needs more than the whole budget takes all
    of it and is decoded alone. Shares are locks on bytes of a file. The system releases them when a
    process dies.
    """

    _NUM_SHARES = 64
    _POLL_SECONDS = 0.005

    def __init__(self, path: Path | None = None) -> None:
        name = f"scissor-vllm-decoding-{os.getuid()}.lock"
        self._path = path or Path(tempfile.gettempdir(), name)
        self._has_warned = False

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Wait for this many bytes of the budget, and hold them in the context."""
        num_shares = -(-num_bytes * self._NUM_SHARES // max_decode_bytes())
        num_shares = max(1, min(num_shares, self._NUM_SHARES))
        file = self._open()
        if file is None:
            yield
            return
        # Closing the file frees its locks.
        try:
            self._take(file, num_shares)
            yield
        finally:
            os.close(file)

    def _take(self, file: int, num_shares: int) -> None:
        # One process gathers shares at a time, or two videos with half of theirs would deadlock.
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW, _lock(self._NUM_SHARES))
        taken: set[int] = set()
        while True:
            for share in range(self._NUM_SHARES):
                if len(taken) < num_shares and share not in taken:
                    with suppress(BlockingIOError, PermissionError):
                        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _lock(share))
                        taken.add(share)
            if len(taken) == num_shares:
                break
            time.sleep(self._POLL_SECONDS)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _lock(self._NUM_SHARES, fcntl.F_UNLCK))

    def _open(self) -> int | None:
        """Open the lock file, None where open file description locks do not exist."""
        if not hasattr(fcntl, "F_OFD_SETLK"):
            return None
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("videos decoded at once are not bounded in bytes: %s", error)
            return None


def _lock(share: int, kind: int = fcntl.F_WRLCK) -> bytes:
    """A `struct flock` for one byte of a file."""
    return struct.pack("@hhqqi", kind, os.SEEK_SET, share, 1, 0)
