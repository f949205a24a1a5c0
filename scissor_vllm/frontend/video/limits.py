"""Limits of decoding: bytes of one video, bytes of all videos at once, and videos at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm.multimodal.video_decoders import check_frame_pixel_limit

from scissor_vllm.byte_locks import ByteLocks, OpenByteLocks
from scissor_vllm.cpus import is_alone, num_own_cpus
from scissor_vllm.frontend.refusal import RefusedVideoError
from scissor_vllm.metrics import Reason

MAX_DECODE_BYTES_VARIABLE = "SCISSOR_MAX_VIDEO_DECODE_BYTES"
DEFAULT_MAX_DECODE_BYTES = 4 * 1024**3

_CPUS_PER_VIDEO = 4
# Beside videos that are decoded for so long another one may begin.
_LONG_SECONDS = 0.1
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
    compete with decoding the others for CPUs and the interpreter lock. Beside videos that take
    long one more may begin, so that a short video does not wait for their end.
    """

    def __init__(self) -> None:
        self._turns = threading.Condition()
        self._num_came = 0
        self._num_begun = 0
        self._begun: dict[int, float] = {}
        """When each of the videos began that threads are decoding now, in order."""

    @property
    def num_decoding(self) -> int:
        """Number of videos that threads are decoding now."""
        return len(self._begun)

    @property
    def num_waiting(self) -> int:
        """Number of videos that wait for a slot."""
        return self._num_came - self._num_begun

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for a slot, and hold it in the context."""
        # Where several servers decode, a single one need not: its first video is ready sooner.
        at_once = max(2 if is_alone() else 1, num_own_cpus() // _CPUS_PER_VIDEO)
        with self._turns:
            number = self._num_came
            self._num_came += 1
            self._turns.wait_for(lambda: number == self._num_begun)
            while self.num_decoding >= at_once:
                may_wait = None
                if self.num_decoding == at_once:
                    longest = time.monotonic() - next(iter(self._begun.values()))
                    if longest >= _LONG_SECONDS:
                        break
                    may_wait = _LONG_SECONDS - longest
                self._turns.wait(may_wait)
            self._num_begun += 1
            self._begun[number] = time.monotonic()
            self._turns.notify_all()
        try:
            yield
        finally:
            with self._turns:
                del self._begun[number]
                self._turns.notify_all()


SLOTS = DecodingSlots()
"""The slots of this process."""


class DecodingBudget:
    """Bounds the bytes of all videos decoded at once, across all processes of a user.

    A video waits until the budget has room. A video that needs more than the whole budget takes all
    of it and is decoded alone. Without a file for the locks nothing is bounded.
    """

    _NUM_SHARES = 64
    _POLL_SECONDS = 0.005

    def __init__(self, path: Path | None = None) -> None:
        self._shares = ByteLocks(
            path or "scissor-vllm-decoding", "videos decoded at once are not bounded in bytes"
        )

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Wait for this many bytes of the budget, and hold them in the context."""
        num_shares = -(-num_bytes * self._NUM_SHARES // max_decode_bytes())
        num_shares = max(1, min(num_shares, self._NUM_SHARES))
        with self._shares.opened() as shares:
            if shares is not None:
                self._take(shares, num_shares)
            yield

    def _take(self, shares: OpenByteLocks, num_shares: int) -> None:
        # One process gathers shares at a time, or two videos with half of theirs would deadlock.
        shares.lock(self._NUM_SHARES)
        taken: set[int] = set()
        while True:
            for share in range(self._NUM_SHARES):
                if len(taken) < num_shares and share not in taken and shares.try_lock(share):
                    taken.add(share)
            if len(taken) == num_shares:
                break
            time.sleep(self._POLL_SECONDS)
        shares.unlock(self._NUM_SHARES)
