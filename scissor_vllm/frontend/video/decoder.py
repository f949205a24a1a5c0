"""Frames of a file by their number: frame n is the n-th that the ffmpeg command shows.

Where packets tell the number of each picture, only the groups of pictures that hold a sampled
frame are decoded, up to that frame. H.264 pictures that are neither sampled nor a reference of
others are not decoded. Damage in what is not decoded goes unnoticed. Each decoded picture must have
the time that its number has in the file; if one has not, or if packets tell nothing, all packets
are decoded and their pictures counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from scissor_vllm.cpus import num_cpus, take_cpus
from scissor_vllm.frontend.refusal import RefusedVideoError
from scissor_vllm.frontend.video.container import Packets, VideoFile
from scissor_vllm.frontend.video.limits import check_decode_bytes, check_pixels
from scissor_vllm.frontend.video.picture import PictureConverter

logger = logging.getLogger(__name__)

# Threads begin without a frame after each seek and wait for the last one before the next. Where a
# seek is for fewer frames than this, they take a fifth more CPU time.
_FRAMES_PER_SEEK_WORTH_THREADS = 32
# What a thread decodes in some 25 ms: with less for each, handing frames over costs what it saves.
# A video that is worth two threads is ready no sooner with them than with one.
_PIXELS_WORTH_A_THREAD = 32 * 640 * 360
_FEWEST_THREADS, _MAX_DECODER_THREADS = 3, 16
_CPUS_PER_SPARED_ONE = 4
# Pictures that a decoder keeps back for their order or in its threads: 16 of each.
_MAX_HELD_PICTURES = 64
# Types of H.264's units that hold a picture's slices, and that of a slice in one piece.
_SLICES, _WHOLE_SLICE = range(1, 6), 1


class _UnexpectedPictureError(Exception):
    """A decoded picture is not the one that the packets promised."""


class _NeedsOneThreadError(Exception):
    """Damage: with several threads FFmpeg may lose good pictures beside broken ones."""


@dataclass(frozen=True)
class _Run:
    """Sampled frames that are decoded from one start without a seek between them."""

    start: int
    """Position of the first packet."""
    first_number: int
    """Number of the first picture shown."""
    wanted: list[int]


def max_threads(file: VideoFile) -> int:
    """Return how many threads decode a video at most."""
    return min(num_cpus(), _threads_worth(file, file.packets.num_shown))


def read_frames(
    file: VideoFile, sample: Callable[[int], list[int]]
) -> tuple[npt.NDArray[np.uint8], list[int], int]:
    """Sampled frames, uint8 RGB (num_sampled, height, width, 3), their numbers, and the total.

    Args:
        file: the open video.
        sample: returns the numbers to sample of so many frames, ascending.

    Raises:
        RefusedVideoError: no frame can be decoded, or sampled frames are too large.
    """
    num_frames = file.packets.num_shown
    if len(file.packets.starts) > 0:
        indices = sample(num_frames)
        try:
            return _read_runs(file, indices), indices, num_frames
        except (_UnexpectedPictureError, av.FFmpegError) as error:
            logger.debug("decoding the whole video: %s", error)
    # Damage and some codecs show fewer pictures than there are packets: count, then sample anew.
    # Numbers below the first count exist, so that the second pass finds all.
    num_threads = _threads_worth(file, num_frames)
    while num_frames > 0:
        indices = sample(num_frames)
        try:
            with take_cpus(num_threads, spared=_num_spared()) as num_taken:
                frames, num_counted = _read_all(file, indices, num_taken)
        except _NeedsOneThreadError:
            num_threads = 1
            continue
        if num_counted == num_frames:
            return frames, indices, num_frames
        num_frames = num_counted
    raise RefusedVideoError(
        f"at least one frame of a video must be decodable, but none of its "
        f"{len(file.packets.packets)} packets gives one: the file is damaged or its codec is not "
        f"supported; send it whole, or encoded as H.264"
    )


def _read_runs(file: VideoFile, indices: list[int]) -> npt.NDArray[np.uint8]:
    """Frames of these numbers, of the groups of pictures that hold them."""
    runs = _runs_of(file.packets, indices)
    num_decoded = sum(run.wanted[-1] - run.first_number + 1 for run in runs)
    wanted = 1
    if num_decoded >= _FRAMES_PER_SEEK_WORTH_THREADS * len(runs):
        wanted = _threads_worth(file, num_decoded)
    frames = _Frames(indices, file)
    with (
        take_cpus(wanted, spared=_num_spared()) as num_threads,
        file.decoder(num_threads) as decoder,
    ):
        for run in runs:
            for number, picture in _run_pictures(decoder, file.packets, run):
                if picture.is_corrupt or picture.interlaced_frame:
                    raise _UnexpectedPictureError(f"number {number}")
                frames.offer(number, picture)
            decoder.flush_buffers()
    return frames.pixels()


def _runs_of(packets: Packets, indices: list[int]) -> list[_Run]:
    runs: list[_Run] = []
    for number in sorted(set(indices)):
        group = int(np.searchsorted(packets.first_numbers, number, side="right")) - 1
        first_number = int(packets.first_numbers[group])
        if runs and first_number <= runs[-1].wanted[-1] + 1:
            runs[-1].wanted.append(number)
        else:
            runs.append(_Run(int(packets.starts[group]), first_number, [number]))
    return runs


def _run_pictures(decoder: Any, packets: Packets, run: _Run) -> Iterator[tuple[int, Any]]:
    """Decoded pictures of a run with their numbers, among them all wanted ones.

    Packets after the last wanted picture's are not decoded.

    Raises:
        _UnexpectedPictureError: the next picture has not the time that the packets promised.
    """
    wanted = set(packets.shown_times[run.wanted].tolist())
    run_packets = _packets_until_last(packets.packets[run.start :], wanted)
    skipped = _unreferenced(decoder, run_packets) - wanted

    def set_to_skip() -> Iterator[Any]:
        for packet in run_packets:
            if skipped:
                decoder.skip_frame = "NONREF" if packet.pts in skipped else "DEFAULT"
            yield packet

    num_missing = len(wanted)
    promised = iter(sorted(packet.pts for packet in run_packets if not packet.is_discard))
    for picture in _pictures(decoder, set_to_skip()):
        for time in promised:
            if time == picture.pts:
                break
            if time not in skipped:
                raise _UnexpectedPictureError(f"time {picture.pts} instead of {time}")
        else:
            raise _UnexpectedPictureError(f"time {picture.pts}")
        yield int(np.searchsorted(packets.shown_times, time)), picture
        num_missing -= time in wanted
        if num_missing == 0:
            return
    raise _UnexpectedPictureError(f"{num_missing} pictures are missing")


def _unreferenced(decoder: Any, packets: list[Any]) -> set[int]:
    """Times of H.264 pictures to which no other picture refers, as their slices are marked.

    HEVC's mark holds within a temporal layer only: a picture of a higher layer may refer to a
    marked one.
    """
    settings = bytes(decoder.extradata or b"")
    # Version 1 of H.264's settings in MP4 and Matroska, where a length comes before each unit.
    if decoder.name != "h264" or len(settings) < 5 or settings[0] != 1:
        return set()
    length_bytes = (settings[4] & 3) + 1
    return {packet.pts for packet in packets if _is_unreferenced(bytes(packet), length_bytes)}


def _is_unreferenced(data: bytes, length_bytes: int) -> bool:
    """Whether a packet holds a picture, and all of its slices say that no other refers to it."""
    num_slices = position = 0
    while position + length_bytes < len(data):
        begin = position + length_bytes
        kind, importance = data[begin] & 31, data[begin] >> 5 & 3
        if kind in _SLICES:
            if kind != _WHOLE_SLICE or importance > 0:
                return False
            num_slices += 1
        position = begin + int.from_bytes(data[position:begin], "big")
    return num_slices > 0


def _packets_until_last(packets: list[Any], times: set[int]) -> list[Any]:
    """The packets up to the last one of these times."""
    num_missing = len(times)
    for position, packet in enumerate(packets):
        num_missing -= packet.pts in times and not packet.is_discard
        if num_missing == 0:
            return packets[: position + 1]
    return packets


def _read_all(
    file: VideoFile, indices: list[int], num_threads: int
) -> tuple[npt.NDArray[np.uint8], int]:
    """Frames of these numbers as far as there are, and how many pictures the file shows."""
    frames = _Frames(indices, file)
    number, begin = 0, None

    def on_error(error: Exception) -> None:
        if num_threads > 1:
            raise _NeedsOneThreadError from error

    with file.decoder(num_threads) as decoder:
        for picture in _pictures(decoder, file.packets.packets, on_error):
            if number == 0:
                begin = picture.pts
            if picture.is_corrupt and num_threads > 1:
                raise _NeedsOneThreadError
            try:
                frames.offer(number, picture)
            except av.FFmpegError as error:
                raise RefusedVideoError(
                    f"a video's frames must be convertible to RGB, got {picture.width}x"
                    f"{picture.height} {picture.format.name} that is not ({error}): encode it "
                    "anew, as H.264 yuv420p"
                ) from error
            number += 1
    # FFmpeg does not tell of each picture that its threads lose. What comes before the first one is
    # not lost: a recording may begin in the middle of a group of pictures.
    if num_threads > 1 and number < _num_shown_from(begin, file.packets.packets):
        raise _NeedsOneThreadError
    return frames.pixels(), number


def _num_shown_from(begin: int | None, packets: list[Any]) -> int:
    """Number of packets that are shown at this time or later, of all if it is not known."""
    return sum(
        not packet.is_discard and (begin is None or packet.pts is None or packet.pts >= begin)
        for packet in packets
    )


def _raise(error: Exception) -> None:
    raise error


def _pictures(
    decoder: Any, packets: Iterable[Any], on_error: Callable[[Exception], None] = _raise
) -> Iterator[Any]:
    """Decoded pictures in the order in which they are shown."""
    for packet in packets:
        try:
            pictures = decoder.decode(packet)
        except av.FFmpegError as error:
            on_error(error)
            continue
        yield from pictures
    # A broken picture that was kept back ends a call, not the draining.
    for _ in range(_MAX_HELD_PICTURES):
        try:
            pictures = decoder.decode(None)
        except EOFError:
            return
        except av.FFmpegError as error:
            on_error(error)
            continue
        yield from pictures


def _threads_worth(file: VideoFile, num_decoded: int) -> int:
    """Decoder threads for so many frames, if there are CPUs for them."""
    worth = num_decoded * file.width * file.height // _PIXELS_WORTH_A_THREAD
    return min(worth, _MAX_DECODER_THREADS) if worth >= _FEWEST_THREADS else 1


def _num_spared() -> int:
    """CPUs that decoders leave to what prepares decoded videos: those are the next for the GPU."""
    return num_cpus() // _CPUS_PER_SPARED_ONE


class _Frames:
    """Collects the pixels of sampled frames, each in its place."""

    def __init__(self, indices: list[int], file: VideoFile) -> None:
        self._places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            self._places.setdefault(index, []).append(place)
        self._num_places = len(indices)
        self._num_written = 0
        self._convert = PictureConverter(file.time_base)
        self._pixels: npt.NDArray[np.uint8] | None = None

    def offer(self, number: int, picture: Any) -> None:
        """Write the picture where its number was asked for."""
        places = self._places.get(number)
        if places is None:
            return
        # A picture may be larger than its file's header says.
        check_pixels(picture.width, picture.height)
        rgb = self._convert(picture)
        height, width, _ = rgb.shape
        if self._pixels is None:
            check_decode_bytes(self._num_places, height, width)
            self._pixels = np.empty((self._num_places, height, width, 3), dtype=np.uint8)
        for place in places:
            # Numpy lets other threads run while it copies to one place, not to some of many.
            self._pixels[place] = rgb
        self._num_written += len(places)

    def pixels(self) -> npt.NDArray[np.uint8]:
        """The frames, or none unless all were written."""
        if self._pixels is None or self._num_written < self._num_places:
            return np.empty((0, 0, 0, 3), dtype=np.uint8)
        return self._pixels
