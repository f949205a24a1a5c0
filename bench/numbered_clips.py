"""Short video files made for tests, in which every frame carries its own number."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.stream import Disposition

NUM_BITS = 16
_SOUND_RATE = 48000

_ENCODERS = {
    "h264": "libx264",
    "hevc": "libx265",
    "mpeg4": "mpeg4",
    "vp8": "libvpx",
    "vp9": "libvpx-vp9",
}


def has_codec(codec: str) -> bool:
    """Whether this PyAV can encode `codec`."""
    return _ENCODERS.get(codec, codec) in av.codecs_available


def draw_frame(number: int, width: int, height: int) -> npt.NDArray[np.uint8]:
    """RGB picture (height, width, 3): a moving texture under `number` in black and white blocks.

    The top quarter holds NUM_BITS blocks side by side, most significant bit first, white for 1:
    `read_number` finds them again after lossy coding.
    """
    frame = _texture(width, height)[:, (3 * number) % width :][:, :width].copy()
    edges = np.linspace(0, width, NUM_BITS + 1, dtype=int)
    for bit in range(NUM_BITS):
        white = number >> (NUM_BITS - 1 - bit) & 1
        frame[: height // 4, edges[bit] : edges[bit + 1]] = 255 if white else 0
    return frame


def read_number(frame: npt.NDArray[np.uint8]) -> int:
    """The number that `draw_frame` wrote into this picture."""
    height, width, _ = frame.shape
    edges = np.linspace(0, width, NUM_BITS + 1, dtype=int)
    number = 0
    for left, right in pairwise(edges):
        number = number << 1 | int(frame[: height // 4, left:right].mean() > 127)
    return number


def make_clip(
    path: str | Path,
    *,
    codec: str = "h264",
    width: int = 320,
    height: int = 180,
    num_frames: int = 32,
    fps: int = 30,
    gop: int | None = None,
    b_frames: int | None = None,
    times_ms: Sequence[int] | None = None,
    audio: bool = False,
    rotation: int = 0,
    moov_first: bool = False,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    shown: Sequence[int] | None = None,
) -> Path:
    """Path of a new clip whose frame i shows the number i; the suffix names the container.

    gop: frames from one key frame to the next at most, the codec's own choice if None.
    times_ms: one increasing presentation time per frame (variable frame rate), instead of `fps`.
    rotation: degrees of the display matrix; the pictures are stored unrotated.
    shown: the numbers that the frames show instead.
    moov_first: put the mp4 index before the pictures, so that a cut file can still be opened.
    """
    path = Path(path)
    encoder = _ENCODERS.get(codec, codec)
    codec_options = dict(options or {})
    if encoder == "libx265":
        codec_options.setdefault("x265-params", "log-level=none")
    if encoder in ("libx264", "libx265"):
        codec_options.setdefault("preset", "veryfast")
    if encoder in ("libvpx", "libvpx-vp9"):
        codec_options.setdefault("deadline", "realtime")
        codec_options.setdefault("cpu-used", "8")
    container_options = {"movflags": "faststart"} if moov_first else {}
    with av.open(str(path), "w", options=container_options) as container:
        video = container.add_stream(encoder, rate=fps, options=codec_options)
        video.width, video.height, video.pix_fmt = width, height, pix_fmt
        video.codec_context.time_base = Fraction(1, 1000) if times_ms else Fraction(1, fps)
        if gop is not None:
            video.codec_context.gop_size = gop
        if b_frames is not None:
            video.codec_context.max_b_frames = b_frames
        if rotation:
            video.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=_SOUND_RATE, layout="mono") if audio else None
        for number in range(num_frames):
            drawn = draw_frame(shown[number] if shown else number, width, height)
            frame = av.VideoFrame.from_ndarray(drawn, format="rgb24")
            frame.time_base = video.codec_context.time_base
            frame.pts = times_ms[number] if times_ms else number
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound is not None:
            container.mux(_encode_sound(sound, num_frames / fps))
    return path


def make_audio(path: str | Path, seconds: float = 0.5) -> Path:
    """Path of a new file that holds a sound track and no picture."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=_SOUND_RATE, layout="mono")
        container.mux(_encode_sound(sound, seconds))
    return Path(path)


def trim_clip(source: Path, path: str | Path, *, first: int) -> Path:
    """Path of a copy of `source` whose edit list hides the first `first` frames.

    As `ffmpeg -ss ... -c copy` leaves it: the hidden pictures stay in the file, since those that
    are shown need them to be decoded.
    """
    with (
        av.open(str(source)) as old,
        av.open(str(path), "w", container_options={"avoid_negative_ts": "disabled"}) as new,
    ):
        video = old.streams.video[0]
        copy = new.add_stream_from_template(video)
        shift = round(first / video.average_rate / video.time_base)
        for packet in old.demux(video):
            if packet.dts is None:
                continue
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = copy
            new.mux(packet)
    return Path(path)


def decode_all(path: str | Path) -> list[npt.NDArray[np.uint8]]:
    """Every frame of the clip as RGB (height, width, 3), decoded from its start to its end."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def remux(
    source: Path,
    path: str | Path,
    *,
    drop: int = 0,
    container_format: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Path of a copy of `source` in another container, without its first `drop` packets."""
    with (
        av.open(str(source)) as old,
        av.open(str(path), "w", format=container_format, container_options=options or {}) as new,
    ):
        video = old.streams.video[0]
        copy = new.add_stream_from_template(video)
        for number, packet in enumerate(old.demux(video)):
            if packet.dts is not None and number >= drop:
                packet.stream = copy
                new.mux(packet)
    return Path(path)


def add_sound_and_cover(source: Path | None, path: str | Path) -> Path:
    """Path of an MP4 with a cover picture, a second of sound and the video of `source`, if any."""
    with av.open(str(path), "w") as new:
        cover = new.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 320, 320, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        sound = new.add_stream("aac", rate=_SOUND_RATE, layout="mono")
        frame = av.VideoFrame.from_ndarray(draw_frame(7, 320, 320), format="rgb24")
        packets = cover.encode(frame) + cover.encode()
        if source is not None:
            with av.open(str(source)) as old:
                copy = new.add_stream_from_template(old.streams.video[0])
                for packet in old.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = copy
                        packets.append(packet)
        new.mux(packets)
        new.mux(_encode_sound(sound, 1.0))
    return Path(path)


def shown_frames(data: bytes) -> list[npt.NDArray[np.uint8]]:
    """Every frame that a file shows as RGB (height, width, 3), upside as stored.

    The oracle of the video loader, in FFmpeg's simplest form: one thread, no seek, packet after
    packet, and what cannot be decoded is left out.
    """
    pictures: list[Any] = []
    with av.open(BytesIO(data), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        decoder = stream.codec_context
        decoder.thread_count = 1
        packets = container.demux(stream)
        with suppress(av.FFmpegError):
            for packet in packets:
                with suppress(av.FFmpegError):
                    pictures += decoder.decode(packet) if packet.size else []
        # A broken picture that was kept back ends a call, not the draining.
        with suppress(EOFError):
            while True:
                with suppress(av.error.InvalidDataError):
                    pictures += decoder.decode(None)
        return [picture.to_ndarray(format="rgb24") for picture in pictures]


@lru_cache(maxsize=2)
def _texture(width: int, height: int) -> npt.NDArray[np.uint8]:
    """RGB picture (height, 2 * width, 3) that repeats after `width` columns, smooth and coarse."""
    rng = np.random.default_rng(0)
    picture = np.zeros((height, width, 3))
    for step in (4, 16, 64):
        cells = rng.uniform(0, 1, (height // step + 1, width // step + 1, 3))
        picture += cells.repeat(step, 0).repeat(step, 1)[:height, :width]
    tile = (picture * 85).astype(np.uint8)
    return np.concatenate([tile, tile], axis=1)


def _encode_sound(stream: av.AudioStream, seconds: float) -> list[av.Packet]:
    """All packets of a 440 Hz tone."""
    num_samples = int(seconds * _SOUND_RATE)
    tone = np.sin(2 * np.pi * 440 / _SOUND_RATE * np.arange(num_samples, dtype=np.float32))
    packets = []
    for start in range(0, num_samples, 1024):
        chunk = np.ascontiguousarray(tone[None, start : start + 1024], dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = _SOUND_RATE, start
        packets += stream.encode(frame)
    return packets + stream.encode()
