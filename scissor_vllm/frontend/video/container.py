"""Containers of video files: the accepted formats, and the index of packets.

FFmpeg probes the format. It may use the demuxers listed here and no protocol, so it reads the
request's bytes only. FFmpeg itself refuses play lists, session descriptions and references to other
files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.stream import Disposition
from vllm import envs

from scissor_vllm.frontend.refusal import RefusedVideoError

DEMUXERS = "mov,matroska,avi,flv,ogg,asf,mpeg,mpegts,gif"
"""FFmpeg's names: MP4 and MOV, WebM, Ogg, WMV, MPEG program and transport streams, ..."""

_PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE; 0 is unknown.
_READ_BYTES = 1024**2
# As the ffmpeg command weighs a stream that its file marks as the default.
_DEFAULT_STREAM_BONUS = 5_000_000
# PyAV 18 notes which streams are wanted once, and looks up streams that appear later beyond its
# notes: few enough streams keep it near them.
_MAX_STREAMS = 64
# A small file can name the same bytes as a packet again and again.
_MAX_PACKET_BYTES_PER_FILE_BYTE = 4
_SPARE_PACKET_BYTES = 64 * 1024**2
_PACKET_OVERHEAD_BYTES = 64

# Each packet of these is one picture, where the container keeps one sample a packet.
_PICTURE_PER_PACKET_CODECS = {"h264", "hevc", "vp9", "av1", "libdav1d"}
_PICTURE_PER_PACKET_DEMUXERS = {"mov", "matroska"}


@dataclass(frozen=True)
class Packets:
    """The packets of a file's video stream, in the order of decoding."""

    packets: list[Any]
    num_shown: int
    """Packets whose pictures are shown: not hidden by an edit list."""
    num_bytes: int
    shown_times: npt.NDArray[np.int64]
    """Presentation times of the shown pictures, ascending. Empty unless `starts` has members."""
    starts: npt.NDArray[np.int64]
    """Positions of key frames that are shown after all earlier packets and before all later ones.

    Decoding may begin at each. Empty where the number of a picture does not follow from packets.
    """
    first_numbers: npt.NDArray[np.int64]
    """Number of the first picture shown from each start on."""


class VideoFile:
    """An open file, its best video stream and that stream's packets."""

    def __init__(self, data: bytes, container: Any, stream: Any) -> None:
        self._data = data
        self._container = container
        self._stream = stream
        self._is_decoder_used = False
        self.width = int(stream.codec_context.width)
        self.height = int(stream.codec_context.height)
        self.packets = _read_packets(container, stream, len(data))
        self.fps = _frame_rate(stream, self.packets)
        self.time_base = stream.time_base

    def first_picture(self) -> tuple[Any | None, bool]:
        """The first decoded picture, None if there is none, and whether the video is interlaced.

        It is if the stream's header or this picture says so.
        """
        with _open(self._data) as container:
            decoder = _prepared(_best_stream(container, self._data), num_threads=1)
            is_interlaced = decoder.field_order > _PROGRESSIVE
            for packet in [*self.packets.packets, None]:
                with suppress(av.FFmpegError):
                    for picture in decoder.decode(packet):
                        return picture, is_interlaced or bool(picture.interlaced_frame)
        return None, is_interlaced

    @contextmanager
    def decoder(self, num_threads: int) -> Iterator[Any]:
        """A decoder of the stream that has seen no packet yet."""
        if self._is_decoder_used:
            with _open(self._data) as container:
                yield _prepared(_best_stream(container, self._data), num_threads)
        else:
            self._is_decoder_used = True
            yield _prepared(self._stream, num_threads)


@contextmanager
def open_video(data: bytes) -> Iterator[VideoFile]:
    """The video in these bytes.

    Raises:
        RefusedVideoError: FFmpeg does not know the container, it is not one of `DEMUXERS`, or it
            holds no video stream that can be decoded.
    """
    with _open(data) as container:
        try:
            file = VideoFile(data, container, _best_stream(container, data))
        except av.FFmpegError as error:
            raise RefusedVideoError(_not_a_video(data)) from error
        yield file


@contextmanager
def _open(data: bytes) -> Iterator[Any]:
    options = {
        "format_whitelist": DEMUXERS,
        "protocol_whitelist": "",
        "max_streams": str(_MAX_STREAMS),
    }
    try:
        container = av.open(
            BytesIO(data),
            options=options,
            metadata_errors="replace",
            buffer_size=_READ_BYTES,
            io_open=_open_nothing,
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        raise RefusedVideoError(_not_a_video(data)) from error
    with container:
        yield container


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> Any:
    raise PermissionError(f"a video may not open other files, tried {url!r}")


def _best_stream(container: Any, data: bytes) -> Any:
    """The video stream that the ffmpeg command shows, a cover picture aside."""
    streams = container.streams.video
    moving = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
    if not moving:
        if streams:
            raise RefusedVideoError(
                f"a video must have a video stream, got a {container.format.name} file with "
                f"sound and a cover picture: send the video, or the picture as an image"
            )
        raise RefusedVideoError(_not_a_video(data))
    decodable = [stream for stream in moving if stream.codec_context is not None]
    if not decodable:
        raise RefusedVideoError(
            f"a video's codec must be one that FFmpeg decodes, got none in a "
            f"{container.format.name} file: encode it as H.264 in MP4"
        )

    def score(stream: Any) -> int:
        is_default = bool(stream.disposition & Disposition.default)
        area = stream.codec_context.width * stream.codec_context.height
        return int(area + _DEFAULT_STREAM_BONUS * is_default)

    return max(decodable, key=score)


def _prepared(stream: Any, num_threads: int) -> Any:
    decoder = stream.codec_context
    decoder.thread_count = num_threads
    decoder.thread_type = "FRAME"
    if envs.VLLM_MAX_IMAGE_PIXELS > 0:
        decoder.options = {"max_pixels": str(min(envs.VLLM_MAX_IMAGE_PIXELS, 2**31 - 1))}
    try:
        decoder.open()
    except av.FFmpegError as error:
        raise RefusedVideoError(
            f"a video's {decoder.name} stream must be one that FFmpeg can decode, got one of "
            f"{decoder.width}x{decoder.height} whose header is damaged or whose profile is not "
            f"supported: send it whole, or encoded as H.264"
        ) from error
    return decoder


def _read_packets(container: Any, stream: Any, num_file_bytes: int) -> Packets:
    packets = []
    num_bytes, limit = 0, _MAX_PACKET_BYTES_PER_FILE_BYTE * num_file_bytes + _SPARE_PACKET_BYTES
    try:
        for packet in container.demux(stream):
            num_bytes += packet.size + _PACKET_OVERHEAD_BYTES
            if num_bytes > limit:
                raise RefusedVideoError(
                    f"the packets of a video file of {num_file_bytes} bytes may take {limit} "
                    f"bytes, got more: the file is damaged; encode it anew"
                )
            if packet.size > 0:
                packets.append(packet)
    except (av.FFmpegError, IndexError):
        # What can be read of a damaged file is shown, as the ffmpeg command does. PyAV's error of
        # an index comes after the last packet, where a stream appeared late.
        pass
    num_shown = sum(not packet.is_discard for packet in packets)
    demuxer = container.format.name.partition(",")[0]
    none = np.empty(0, dtype=np.int64)
    index = (none, none, none)
    if (
        demuxer in _PICTURE_PER_PACKET_DEMUXERS
        and stream.codec_context.name in _PICTURE_PER_PACKET_CODECS
    ):
        index = _index_of(packets) or index
    return Packets(packets, num_shown, num_bytes, *index)


def _index_of(
    packets: list[Any],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """`shown_times`, `starts` and `first_numbers`.

    None if packets do not tell the order, or none of them is shown.

    The last packet of a truncated file is marked corrupt: only decoding tells whether it is shown.
    """
    if not packets or any(packet.pts is None or packet.is_corrupt for packet in packets):
        return None
    times = np.array([packet.pts for packet in packets], dtype=np.int64)
    is_shown = np.array([not packet.is_discard for packet in packets])
    if not is_shown.any():
        return None
    keys = np.flatnonzero([packet.is_keyframe for packet in packets])
    shown_times = np.sort(times[is_shown])
    if np.any(np.diff(shown_times) == 0):
        return None
    earliest_from_here = np.minimum.accumulate(times[::-1])[::-1]
    latest_until_here = np.maximum.accumulate(times)
    starts = keys[earliest_from_here[keys] == latest_until_here[keys]]
    if len(starts) == 0 or starts[0] != 0:
        return None
    first_numbers = np.concatenate([[0], np.cumsum(is_shown)])[starts]
    return shown_times, starts, first_numbers


def _frame_rate(stream: Any, packets: Packets) -> float:
    """Frames per second, 0 if unknown."""
    for rate in (stream.guessed_rate, stream.average_rate):
        if rate:
            return float(rate)
    times = [packet.pts for packet in packets.packets if packet.pts is not None]
    if len(times) < 2 or max(times) == min(times) or not stream.time_base:
        return 0.0
    return float((len(times) - 1) / ((max(times) - min(times)) * stream.time_base))


def _not_a_video(data: bytes) -> str:
    return (
        f"a video must be a whole file of MP4, MOV, WebM, Matroska, AVI, FLV, Ogg, ASF, MPEG-PS, "
        f"MPEG-TS or GIF, with a video stream that FFmpeg can open; got {len(data)} bytes that "
        f"begin with {data[:12]!r}: send H.264 in MP4, for example"
    )
