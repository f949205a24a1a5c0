"""The video loader: exact frames, vLLM's sampling and limits, and clear errors."""

from __future__ import annotations

import gc
import io
import os
import queue
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps
from vllm.multimodal.media import VideoMediaIO
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.video import (
    VIDEO_LOADER_REGISTRY,
    Qwen2VLVideoBackend,
    Qwen3VLVideoBackend,
    VideoBackend,
    get_video_loader_backend_for_processor,
)

from bench.numbered_clips import (
    decode_all,
    draw_frame,
    has_codec,
    make_audio,
    make_clip,
    read_number,
    shown_frames,
    trim_clip,
)
from scissor_vllm import cpus
from scissor_vllm.byte_locks import ByteLocks
from scissor_vllm.cpus import take_cpus
from scissor_vllm.frontend.frame_cache import FrameCache
from scissor_vllm.frontend.refusal import RefusedVideoError
from scissor_vllm.frontend.video import decoder, loader
from scissor_vllm.frontend.video.container import VideoFile, _index_of
from scissor_vllm.frontend.video.limits import (
    MAX_DECODE_BYTES_VARIABLE,
    SLOTS,
    DecodingSlots,
    max_decode_bytes,
)
from scissor_vllm.frontend.video.loader import PyAVVideoBackend, register_video_loader
from scissor_vllm.frontend.video.picture import PictureConverter


@pytest.fixture(autouse=True)
def no_cached_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the process's cache, which another file's processors may have switched on."""
    monkeypatch.setattr("scissor_vllm.frontend.video.loader.FRAMES", FrameCache())


# Two converters of YUV to RGB round differently.
COLOUR_TOLERANCE = 6

CLIPS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"num_frames": 64},
    "one_frame.mp4": {"num_frames": 1},
    "one_frame.webm": {"num_frames": 1, "codec": "vp9"},
    "b_frames.mp4": {"num_frames": 90, "gop": 12, "b_frames": 3},
    "intra_only.mp4": {"num_frames": 40, "gop": 1},
    "one_key_frame.mp4": {"num_frames": 300, "gop": 1000},
    "h264_open_groups.mp4": {
        "num_frames": 120,
        "gop": 24,
        "options": {"x264-params": "open-gop=1:bframes=3"},
    },
    "hevc_open_groups.mp4": {"codec": "hevc", "num_frames": 120, "gop": 24},
    "mpeg4.mp4": {"codec": "mpeg4", "num_frames": 40},
    "mpeg4_b_frames.mp4": {"codec": "mpeg4", "num_frames": 40, "b_frames": 2},
    "mpeg4_without_times.avi": {"codec": "mpeg4", "num_frames": 40, "b_frames": 2},
    "vp9.webm": {"codec": "vp9", "num_frames": 60, "gop": 20},
    "vp9_odd.webm": {"codec": "vp9", "width": 321, "height": 179},
    "odd.mp4": {"width": 321, "height": 179, "pix_fmt": "yuv444p"},
    "upside_down.mp4": {"rotation": 180},
    "quarter_turn.mp4": {"rotation": 90},
    "sound.mp4": {"num_frames": 60, "gop": 12, "audio": True},
    "uneven.mp4": {"num_frames": 50, "gop": 10, "times_ms": [40 * i + i * i for i in range(50)]},
    "uneven.webm": {"codec": "vp9", "num_frames": 30, "times_ms": [40 * i**2 for i in range(30)]},
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register_video_loader()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    """48 frames of H.264, a key frame every 12, the index before the pictures."""
    return make_clip(folder / "clip.mp4", num_frames=48, gop=12, moov_first=True)


def load(data: bytes, **kwargs: Any) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
    frames, metadata = PyAVVideoBackend.load_bytes(data, **kwargs)
    assert isinstance(frames, np.ndarray)
    return frames, metadata


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("num_frames", [1, 8, -1])
def test_frames_equal_those_of_a_sequential_decode(
    name: str, num_frames: int, folder: Path
) -> None:
    path = folder / name
    if not has_codec(CLIPS[name].get("codec", "h264")):
        pytest.skip(f"PyAV has no encoder for {CLIPS[name]['codec']}")
    if not path.exists():
        make_clip(path, **CLIPS[name])
    every = decode_all(path)
    frames, metadata = load(path.read_bytes(), num_frames=num_frames)

    assert metadata["total_num_frames"] == len(every)
    assert frames.dtype == np.uint8
    assert len(frames) == (len(every) if num_frames < 0 else min(num_frames, len(every)))
    turns = CLIPS[name].get("rotation", 0) // 90
    for frame, index in zip(frames, metadata["frames_indices"], strict=True):
        # PyAV leaves the picture as it is stored, the loaders show it as a player would.
        upright = np.rot90(frame, -turns)
        assert read_number(upright) == index
        assert np.abs(upright.astype(int) - every[index]).mean() < COLOUR_TOLERANCE


@pytest.mark.parametrize("width", [16, 24, 32, 48, 64, 96, 98, 144, 176])
def test_small_widths_keep_three_channels_and_their_pixels(folder: Path, width: int) -> None:
    path = make_clip(folder / f"width_{width}.mp4", width=width, height=48, num_frames=3)
    frames, _ = PyAVVideoBackend.load_bytes(path.read_bytes())
    difference = np.abs(frames.astype(int) - np.stack(decode_all(path)))
    assert frames.shape == (3, 48, width, 3)
    assert difference.mean() < COLOUR_TOLERANCE


def test_the_number_of_a_drawn_frame_can_be_read() -> None:
    assert [read_number(draw_frame(n, 64, 64)) for n in (0, 1, 77, 65535)] == [0, 1, 77, 65535]


def test_frames_hidden_by_an_edit_list_are_not_counted(folder: Path) -> None:
    whole = make_clip(folder / "whole.mp4", num_frames=60, gop=20, b_frames=2)
    trimmed = trim_clip(whole, folder / "trimmed.mp4", first=7)
    frames, metadata = load(trimmed.read_bytes(), num_frames=6)
    assert metadata["total_num_frames"] == 53
    shown = [read_number(frame) - 7 for frame in frames]
    assert shown == metadata["frames_indices"] == np.linspace(0, 52, 6, dtype=int).tolist()


def damage_frames(path: Path, numbers: Iterable[int]) -> bytes:
    """The H.264 file with the headers of these frames' slices overwritten."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = list(container.demux(video=0))
    for number in numbers:
        packet = packets[number]
        assert packet.pos is not None
        unit = packet.pos
        while unit < packet.pos + packet.size:
            size = int.from_bytes(data[unit : unit + 4], "big")
            data[unit + 5 : unit + 4 + min(size, 12)] = b"\xff" * (min(size, 12) - 1)
            unit += 4 + size
    return bytes(data)


def test_only_groups_that_hold_a_sampled_frame_are_decoded(folder: Path) -> None:
    path = make_clip(folder / "groups.mp4", num_frames=240, gop=20)
    frames, metadata = load(path.read_bytes(), num_frames=2)
    damaged = damage_frames(path, range(100, 140))
    frames_beside_damage, same_metadata = load(damaged, num_frames=2)
    assert metadata["video_backend"] == "pyav"
    assert metadata == same_metadata
    np.testing.assert_array_equal(frames, frames_beside_damage)
    # Read through, the damage is met.
    assert load(damaged)[1]["total_num_frames"] < 240


REFERENCES: dict[str, dict[str, Any]] = {
    "no_b_frames.mp4": {"b_frames": 0},
    "b_frames_of_one_level.mp4": {"options": {"x264-params": "bframes=3:b-pyramid=none"}},
    "b_frames_of_two_levels.mp4": {"options": {"x264-params": "bframes=7:b-pyramid=strict"}},
    "many_references.mkv": {"options": {"x264-params": "bframes=16:b-adapt=0:ref=16"}},
    "slices.mp4": {"options": {"x264-params": "bframes=3:slices=4"}},
    "open_groups.mkv": {"gop": 24, "options": {"x264-params": "open-gop=1:bframes=3"}},
    "temporal_layers.mp4": {
        "codec": "hevc",
        "options": {"x265-params": "log-level=none:temporal-layers=3:bframes=4"},
    },
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_sampled_frame_has_the_same_bits_whatever_else_is_sampled(
    name: str, folder: Path
) -> None:
    if not has_codec(REFERENCES[name].get("codec", "h264")):
        pytest.skip("PyAV has no such encoder")
    data = make_clip(
        folder / name, **{"num_frames": 70, "gop": 100, **REFERENCES[name]}
    ).read_bytes()
    whole, _ = load(data)
    for num_frames in (1, 2, 3, 9, 32):
        frames, metadata = load(data, num_frames=num_frames)
        np.testing.assert_array_equal(frames, whole[metadata["frames_indices"]])


@pytest.mark.parametrize("kind", ["information", "delimiter", "filler"])
def test_a_packet_without_a_picture_is_not_counted(kind: str, folder: Path) -> None:
    path = make_clip(
        folder / "plain.mkv", num_frames=70, gop=100, options={"x264-params": "bframes=3"}
    )
    units = {
        "information": b"\x06\x05\x01\x00\x80",
        "delimiter": b"\x09\xf0",
        "filler": b"\x0c\xff\x80",
    }
    added = folder / f"{kind}.mkv"
    with av.open(str(path)) as plain, av.open(str(added), "w") as container:
        stream = container.add_stream_from_template(plain.streams.video[0])
        for number, packet in enumerate(plain.demux(video=0)):
            if packet.size == 0:
                continue
            packet.stream = stream
            if number == 30:
                unit = units[kind]
                extra = av.Packet(len(unit).to_bytes(4, "big") + unit)
                extra.pts = packet.pts + 7
                extra.dts, extra.time_base, extra.stream = packet.dts, packet.time_base, stream
                container.mux(extra)
            container.mux(packet)
    whole, _ = load(path.read_bytes())
    for num_frames in (2, 5, 9, 32):
        frames, metadata = load(added.read_bytes(), num_frames=num_frames)
        assert metadata["total_num_frames"] == 70
        np.testing.assert_array_equal(frames, whole[metadata["frames_indices"]])


def _reference_packets(path: Path) -> list[bool]:
    """Whether other pictures may refer to each packet's picture, of H.264 in MP4."""
    is_reference = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            data, unit = bytes(packet), 0
            while unit < len(data):
                kind, importance = data[unit + 4] & 31, data[unit + 4] >> 5
                if kind in (1, 5):
                    is_reference.append(importance > 0)
                    break
                unit += 4 + int.from_bytes(data[unit : unit + 4], "big")
    return is_reference


def test_only_pictures_that_sampled_ones_may_need_are_decoded(folder: Path) -> None:
    options = {"x264-params": "bframes=3:b-adapt=0:b-pyramid=none"}
    path = make_clip(folder / "unneeded.mp4", num_frames=64, gop=100, options=options)
    frames, metadata = load(path.read_bytes(), num_frames=9)
    with av.open(str(path)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size > 0]
    numbers = np.argsort(np.argsort(times)).tolist()
    is_reference = _reference_packets(path)
    unneeded = [
        position
        for position, number in enumerate(numbers)
        if number not in metadata["frames_indices"] and not is_reference[position]
    ]
    assert len(unneeded) > 30
    damaged = damage_frames(path, unneeded)
    np.testing.assert_array_equal(load(damaged, num_frames=9)[0], frames)
    # Pictures are needed if they are sampled, or as references of others.
    for is_sampled in (True, False):
        needed = [
            position
            for position, number in enumerate(numbers)
            if (number in metadata["frames_indices"]) == is_sampled
            and is_reference[position] != is_sampled
        ]
        beside_damage, _ = load(damage_frames(path, needed[-1:]), num_frames=9)
        assert not np.array_equal(beside_damage, frames)


@pytest.mark.parametrize(
    "kwargs", [{"num_frames": 8}, {"fps": 5}, {"num_frames": 4, "fps": 10}, {}]
)
def test_sampling_and_metadata_are_those_of_vllm(clip: Path, kwargs: dict[str, Any]) -> None:
    data = clip.read_bytes()
    frames, metadata = load(data, **kwargs)
    expected_frames, expected = VideoBackend.load_bytes(data, **kwargs)
    assert metadata == {**expected, "video_backend": "pyav"}
    assert np.abs(frames.astype(int) - expected_frames).mean() < COLOUR_TOLERANCE


@pytest.mark.parametrize(
    ("processor", "stock"),
    [
        ("Qwen2VLVideoProcessor", Qwen2VLVideoBackend),
        ("Qwen3VLVideoProcessor", Qwen3VLVideoBackend),
    ],
)
def test_a_model_with_a_sampling_of_its_own_keeps_it(
    clip: Path, monkeypatch: pytest.MonkeyPatch, processor: str, stock: type[VideoBackend]
) -> None:
    usual = get_video_loader_backend_for_processor(processor)
    known = dict(VIDEO_LOADER_REGISTRY.processor2backend)
    monkeypatch.setattr(VIDEO_LOADER_REGISTRY, "processor2backend", known)
    monkeypatch.setenv("VLLM_VIDEO_LOADER_BACKEND", "opencv")
    register_video_loader()
    assert get_video_loader_backend_for_processor(processor) == usual
    monkeypatch.setenv("VLLM_VIDEO_LOADER_BACKEND", "pyav")
    register_video_loader()
    name = get_video_loader_backend_for_processor(processor)
    assert name not in (None, usual)
    for options in ({}, {"fps": 8}):
        media = VideoMediaIO(ImageMediaIO(), video_backend=name, **options)
        frames, metadata = media.load_bytes(clip.read_bytes()).media
        expected_frames, expected = stock.load_bytes(clip.read_bytes(), **options)
        assert metadata == {**expected, "video_backend": "pyav"}
        assert np.abs(frames.astype(int) - expected_frames).mean() < COLOUR_TOLERANCE


def test_opencv_stays_selectable(clip: Path) -> None:
    _, metadata = load(clip.read_bytes(), num_frames=4, backend="opencv")
    assert metadata["video_backend"] == "opencv"
    _, metadata = load(clip.read_bytes(), num_frames=4, frame_recovery=True)
    assert metadata["video_backend"] == "pyav"


def test_vllm_loads_it_by_name(clip: Path) -> None:
    register_video_loader()
    assert VIDEO_LOADER_REGISTRY.load("pyav") is not None
    media = VideoMediaIO(ImageMediaIO(), num_frames=4, video_backend="pyav")
    frames, metadata = media.load_bytes(clip.read_bytes()).media
    assert [read_number(frame) for frame in frames] == metadata["frames_indices"]


def test_loads_at_once_do_not_disturb_each_other(folder: Path) -> None:
    clips = [
        make_clip(folder / f"{n}.mp4", num_frames=n, gop=15, width=160, height=96).read_bytes()
        for n in (31, 47, 90)
    ]
    with ThreadPoolExecutor(4) as pool:
        for frames, metadata in pool.map(lambda data: load(data, num_frames=9), clips * 4):
            assert [read_number(frame) for frame in frames] == metadata["frames_indices"]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads each decoder of the test was opened with."""
    numbers: list[int] = []
    open_decoder = VideoFile.decoder

    def recording(file: VideoFile, num_threads: int) -> Any:
        numbers.append(num_threads)
        return open_decoder(file, num_threads)

    monkeypatch.setattr(VideoFile, "decoder", recording)
    return numbers


def test_a_video_has_the_threads_that_it_is_worth_and_its_share_of_the_cpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch, threads: list[int]
) -> None:
    def use_cpus(num_cpus: int) -> None:
        monkeypatch.setattr(cpus, "num_cpus", lambda: num_cpus)
        monkeypatch.setattr(decoder, "num_cpus", lambda: num_cpus)

    monkeypatch.setattr(cpus, "_TAKEN", ByteLocks(folder / "cpus.lock", ""))
    width, height = 160, 96
    clip = make_clip(folder / "threads.mp4", num_frames=64, gop=64, width=width, height=height)
    data = clip.read_bytes()
    load(data, num_frames=32)
    use_cpus(8)
    for num_worth in (2, 3):
        pixels_worth_a_thread = 64 * width * height // num_worth
        monkeypatch.setattr(decoder, "_PIXELS_WORTH_A_THREAD", pixels_worth_a_thread)
        load(data, num_frames=32)
    monkeypatch.setattr(decoder, "_PIXELS_WORTH_A_THREAD", 1)
    load(data, num_frames=32)
    with take_cpus(4):
        load(data, num_frames=32)
        with take_cpus(4):
            load(data, num_frames=32)
    use_cpus(64)
    load(data, num_frames=32)
    # A video worth two threads has one. A quarter of the CPUs is left to what prepares videos.
    assert threads == [1, 1, 3, 6, 2, 1, 16]


def make_resized(suffix: str, codec: str, sizes: list[tuple[int, int]]) -> bytes:
    """Twelve pictures of each size in one stream, numbered one after the other."""
    out = io.BytesIO()
    with av.open(out, "w", format=suffix) as container:
        stream: Any = container.add_stream(codec, rate=8)
        stream.width, stream.height = sizes[0]
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
        for part, (width, height) in enumerate(sizes):
            encoder: Any = av.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 8), Fraction(8)
            packets = []
            for number in range(12 * part, 12 * part + 12):
                frame = av.VideoFrame.from_ndarray(draw_frame(number, width, height), "rgb24")
                frame = frame.reformat(format="yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 8)
                packets += encoder.encode(frame)
            for packet in [*packets, *encoder.encode(None)]:
                packet.stream, packet.time_base = stream, Fraction(1, 8)
                container.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize("num_frames", [8, -1])
@pytest.mark.parametrize(
    ("suffix", "codec", "sizes"),
    [
        # As browsers record a call or a window, and as a stream of adapted quality is saved.
        ("webm", "libvpx", [(320, 192), (160, 96), (640, 384)]),
        ("webm", "libvpx-vp9", [(160, 96), (320, 180)]),
        ("mpegts", "libx264", [(320, 192), (640, 384), (320, 192)]),
    ],
)
def test_pictures_of_other_sizes_get_that_of_the_first(
    suffix: str, codec: str, sizes: list[tuple[int, int]], num_frames: int
) -> None:
    if not has_codec(codec):
        pytest.skip(f"PyAV has no encoder for {codec}")
    data = make_resized(suffix, codec, sizes)
    frames, metadata = load(data, num_frames=num_frames)
    width, height = sizes[0]
    assert frames.shape == (8 if num_frames > 0 else 12 * len(sizes), height, width, 3)
    assert [read_number(frame) for frame in frames] == metadata["frames_indices"]
    with av.open(io.BytesIO(data)) as container:
        resized = [
            picture.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
            for picture in container.decode(video=0)
        ]
    expected = np.stack(resized)[metadata["frames_indices"]]
    assert np.abs(frames.astype(int) - expected).mean() < COLOUR_TOLERANCE


def with_exif(path: Path, orientation: int) -> bytes:
    """The motion JPEG of a file, each picture with EXIF data, as cameras write it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    with av.open(path) as source, av.open(out, "w", format="mov") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size == 0:
                continue
            data = bytes(packet)
            segment = exif.tobytes()
            marker = b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big")
            # After the two bytes with which a picture starts.
            new = av.Packet(data[:2] + marker + segment + data[2:])
            new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
            new.duration, new.is_keyframe, new.stream = packet.duration, True, stream
            target.mux(new)
    return out.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_motion_jpeg_with_exif_is_shown_upright(folder: Path, orientation: int) -> None:
    path = folder / "plain.mov"
    if not path.exists():
        make_clip(path, codec="mjpeg", pix_fmt="yuvj420p", num_frames=6)
    plain, _ = load(path.read_bytes(), num_frames=3)
    frames, metadata = load(with_exif(path, orientation), num_frames=3)

    def upright(frame: npt.NDArray[np.uint8]) -> Image.Image:
        image = Image.fromarray(frame)
        image.getexif()[0x0112] = orientation
        return ImageOps.exif_transpose(image)

    assert metadata["total_num_frames"] == 6
    expected = np.stack([np.asarray(upright(frame)) for frame in plain])
    assert frames.shape == expected.shape
    # Pictures are turned before their colors are converted.
    assert np.abs(frames.astype(int) - expected).mean() < 1


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4_without_times.avi"])
def test_a_decoded_video_leaves_no_picture_behind(folder: Path, name: str) -> None:
    path = folder / f"left_{name}"
    make_clip(path, **CLIPS[name])

    def num_pictures() -> int:
        return sum(type(value) is av.VideoFrame for value in gc.get_objects())

    before = num_pictures()
    gc.disable()
    try:
        load(path.read_bytes(), num_frames=8)
        assert num_pictures() == before
    finally:
        gc.enable()


# By x264's names, and their numbers in H.264.
MATRICES = {
    **{"YCgCo": 8, "bt2020c": 10, "smpte2085": 11},
    **{"chroma-derived-nc": 12, "chroma-derived-c": 13, "ICtCp": 14},
}
UNKNOWN_COLORS = [
    *((f"colormatrix={name}", f"matrix {number} and ") for name, number in MATRICES.items()),
    ("transfer=log100", "transfer function 9:"),
    ("transfer=log316", "transfer function 10:"),
]


@pytest.mark.parametrize(("colors", "told"), UNKNOWN_COLORS)
def test_colors_that_ffmpeg_does_not_convert_are_shown_as_unnamed_ones(
    colors: str, told: str
) -> None:
    named, unnamed = (
        load(colored(options), num_frames=-1)[0] for options in (colors, "colormatrix=undef")
    )
    assert len(named) == 6
    assert np.array_equal(named, unnamed)
    # OpenCV would hand out memory that it has not written.
    with pytest.raises(RefusedVideoError, match=f"must name colors that FFmpeg converts.*{told}"):
        load(colored(colors), num_frames=-1, backend="opencv")
    known = load(colored("colormatrix=bt709"), num_frames=-1, backend="opencv")[0]
    assert (
        np.abs(known.astype(int) - load(colored("colormatrix=bt709"), num_frames=-1)[0]).max() < 9
    )


def colored(options: str) -> bytes:
    """A clip of bright colors whose header says this of them."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"x264-params": options})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(6):
            pixels = np.zeros((64, 96, 3), np.uint8)
            pixels[:, :48, number % 3] = 230
            pixels[:, 48:, (number + 1) % 3] = 120
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def test_pictures_that_cannot_be_converted_are_refused(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PictureConverter, picture: Any, turns: Any) -> Any:
        raise av.error.OSError(95, "Operation not supported")

    monkeypatch.setattr(PictureConverter, "_converted", fail)
    with pytest.raises(RefusedVideoError, match=r"convertible to RGB, got .* encode it anew"):
        load(clip.read_bytes(), num_frames=2)


@pytest.mark.parametrize(
    ("num_cpus", "num_servers", "at_once"),
    [(1, 1, 2), (8, 1, 2), (16, 1, 4), (16, 4, 1), (32, 2, 4)],
)
def test_few_videos_are_decoded_at_once_in_the_order_in_which_they_came(
    clip: Path, num_cpus: int, num_servers: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "num_cpus", lambda: num_cpus)
    monkeypatch.setattr(cpus, "_num_sharing", num_servers)
    monkeypatch.setattr("scissor_vllm.frontend.video.limits._LONG_SECONDS", 1000)
    begun: queue.Queue[bytes] = queue.Queue()
    may_end = threading.Semaphore(0)

    def decode(file: VideoFile, *settings: Any) -> tuple[Any, dict[str, Any]]:
        data = file._data
        begun.put(data)
        may_end.acquire(timeout=30)
        if data.endswith(b"0"):
            raise ValueError("damaged")
        return data, {}

    monkeypatch.setattr(PyAVVideoBackend, "_decode", decode)
    videos = [clip.read_bytes() + str(number).encode() for number in range(7)]
    with ThreadPoolExecutor(len(videos)) as pool:
        results = []
        for number, video in enumerate(videos, 1):
            results.append(pool.submit(PyAVVideoBackend.load_bytes, video))
            while begun.qsize() < min(number, at_once) or SLOTS.num_waiting < number - at_once:
                time.sleep(0.001)
        for turn, video in enumerate(videos):
            assert begun.get(timeout=30) == video
            if turn >= at_once - 1:
                assert begun.empty()
                assert SLOTS.num_decoding == at_once
                may_end.release()
        may_end.release(len(videos))
        assert [type(result.exception()) for result in results] == [ValueError, *[type(None)] * 6]
    assert SLOTS.num_decoding == 0


def test_packets_of_which_none_is_shown_name_no_picture() -> None:
    """Damage can hide every packet of a file, in order and with key frames."""

    def packet(time: int, is_discard: bool) -> Any:
        flags = {"is_discard": is_discard, "is_corrupt": False, "is_keyframe": time % 4 == 0}
        return SimpleNamespace(pts=time, **flags)

    index = _index_of([packet(time, is_discard=time < 4) for time in range(8)])
    assert index is not None
    assert [list(part) for part in index] == [[4, 5, 6, 7], [0, 4], [0, 0]]
    assert _index_of([packet(time, is_discard=True) for time in range(8)]) is None


def test_beside_a_video_that_takes_long_one_more_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpus, "num_cpus", lambda: 4)
    monkeypatch.setattr(cpus, "_num_sharing", 4)
    monkeypatch.setattr("scissor_vllm.frontend.video.limits._LONG_SECONDS", 0.05)
    slots = DecodingSlots()
    may_end = [threading.Event() for _ in range(4)]
    begun: queue.Queue[int] = queue.Queue()

    def decode(number: int) -> None:
        with slots.taken():
            begun.put(number)
            may_end[number].wait(30)

    with ThreadPoolExecutor(4) as pool:
        for number in range(4):
            pool.submit(decode, number)
            while slots.num_decoding + slots.num_waiting <= number:
                time.sleep(0.001)
        assert [begun.get(timeout=30), begun.get(timeout=30)] == [0, 1]
        time.sleep(0.1)
        assert (slots.num_decoding, slots.num_waiting) == (2, 2)
        # The short one ends, and the next one begins beside the long one.
        may_end[1].set()
        assert begun.get(timeout=30) == 2
        for event in may_end:
            event.set()
        assert begun.get(timeout=30) == 3
    assert (slots.num_decoding, slots.num_waiting) == (0, 0)


def test_a_file_that_is_kept_is_decoded_once_for_each_setting(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    open_video = loader.open_video  # type: ignore[attr-defined]

    def recording(data: bytes) -> Any:
        decoded.append(data)
        return open_video(data)

    class Other(PyAVVideoBackend):
        pass

    monkeypatch.setattr(loader, "open_video", recording)
    monkeypatch.setattr("scissor_vllm.frontend.video.loader.FRAMES", FrameCache(2**30))
    data = clip.read_bytes()
    first, metadata = load(data, num_frames=4)
    again, same_metadata = load(data[:1] + data[1:], num_frames=4)
    np.testing.assert_array_equal(again, first)
    assert same_metadata == metadata
    assert len(decoded) == 1
    for settings in ({"num_frames": 5}, {"num_frames": 4, "fps": 1.0}, {"backend": "opencv"}):
        load(data, **settings)
    Other.load_bytes(data, num_frames=4)
    load(data + b"\0" * 8, num_frames=4)
    assert len(decoded) == 6
    load(data, num_frames=5)
    assert len(decoded) == 6


# --- what is refused -------------------------------------------------------------------------


def assert_refused(data: bytes, match: str) -> None:
    for backend in ("pyav", "opencv"):
        with pytest.raises(ValueError, match=match):
            load(data, num_frames=4, backend=backend)


@pytest.mark.parametrize("data", [b"", b"\0", b"hello world" * 100, bytes(5000), b"\xff" * 5000])
def test_what_is_no_video_is_a_value_error(data: bytes) -> None:
    assert_refused(data, rf"a video must be a whole file .*got {len(data)} bytes")


@pytest.mark.parametrize(
    "data",
    [
        b"ffconcat version 1.0\nfile clip.mp4\n",
        b"#EXTM3U\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n",
        b"v=0\nc=IN IP4 127.0.0.1\nm=video 4 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        b"FLV\x01\nc=IN IP4 127.0.0.1\nm=video 4 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
)
def test_a_file_that_names_other_sources_is_not_followed(
    data: bytes, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clip.parent)
    assert_refused(data, "a video must be a whole file")


def test_a_file_without_its_index_is_a_value_error(folder: Path) -> None:
    data = make_clip(folder / "index_last.mp4").read_bytes()
    assert_refused(data[: data.rfind(b"moov") - 4], "a video must be a whole file|Could not open")


def test_a_sound_file_is_a_value_error(folder: Path) -> None:
    assert_refused(
        make_audio(folder / "sound.m4a").read_bytes(), "with a video stream|Could not open"
    )


def test_a_file_without_pictures_is_a_value_error(clip: Path) -> None:
    data = clip.read_bytes()
    assert_refused(data[: data.find(b"mdat") + 4], "at least one (sampled )?frame .* send it whole")


def test_a_file_cut_in_the_middle_gives_the_frames_that_are_left(clip: Path) -> None:
    data = clip.read_bytes()
    frames, metadata = load(data[: len(data) // 2])
    assert 0 < len(frames) == len(metadata["frames_indices"]) < 48
    assert [read_number(frame) for frame in frames[:12]] == list(range(12))


@pytest.mark.parametrize("frame_recovery", [False, True])
def test_broken_frames_have_no_number(clip: Path, frame_recovery: bool) -> None:
    data = bytearray(clip.read_bytes())
    start = data.find(b"mdat") + 4
    third = (len(data) - start) // 3
    data[start + third : start + 2 * third] = bytes(third)
    every = shown_frames(bytes(data))
    frames, metadata = load(bytes(data), num_frames=40, frame_recovery=frame_recovery)
    assert metadata["total_num_frames"] == len(every) < 48
    assert metadata["frames_indices"] == list(range(len(every)))
    assert np.abs(frames.astype(int) - np.stack(every)).max() <= 1


@pytest.mark.parametrize(("codec", "suffix"), [("mpeg4", "avi"), ("png", "mov")])
@pytest.mark.parametrize("broken", [5, 36])
def test_with_many_threads_a_broken_frame_takes_no_other_with_it(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: list[int],
    codec: str,
    suffix: str,
    broken: int,
) -> None:
    """Of those that FFmpeg's threads keep back at the end, all behind it would be missing."""
    pix_fmt = "rgb24" if codec == "png" else "yuv420p"
    path = folder / f"{codec}-{broken}.{suffix}"
    data = bytearray(
        make_clip(path, codec=codec, num_frames=40, gop=1, pix_fmt=pix_fmt).read_bytes()
    )
    with av.open(str(path)) as container:
        packet = list(container.demux(video=0))[broken]
    assert packet.pos is not None
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    monkeypatch.setattr(decoder, "_PIXELS_WORTH_A_THREAD", 1)
    monkeypatch.setattr(decoder, "take_cpus", lambda wanted, spared: nullcontext(min(wanted, 12)))
    frames, _ = load(bytes(data))
    assert threads[0] == 12
    assert [read_number(frame) for frame in frames] == [n for n in range(40) if n != broken]


def test_if_every_frame_is_broken_it_is_a_value_error(clip: Path) -> None:
    data = bytearray(clip.read_bytes())
    start = data.find(b"mdat") + 4
    data[start:] = b"\xff" * (len(data) - start)
    assert_refused(bytes(data), "at least one")


def test_frames_over_the_pixel_limit_are_refused_before_any_is_decoded(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", str(320 * 180 - 1))
    monkeypatch.setattr(VideoFile, "decoder", None)
    assert_refused(clip.read_bytes(), r"320x180 .*VLLM_MAX_IMAGE_PIXELS")


@pytest.mark.parametrize(
    ("side", "match"), [(16000, "16000x16000 .*VLLM_MAX_IMAGE_PIXELS"), (65535, "at least one")]
)
def test_a_header_that_claims_a_huge_picture_is_a_value_error(side: int, match: str) -> None:
    canvas = struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    one_pixel = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    assert_refused(b"GIF89a" + canvas + one_pixel + b"\x3b", match)


def test_sampled_frames_over_the_byte_limit_are_refused(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, num_bytes = clip.read_bytes(), 48 * 320 * 180 * 3
    monkeypatch.setenv(MAX_DECODE_BYTES_VARIABLE, str(num_bytes))
    assert len(load(data)[0]) == 48
    monkeypatch.setenv(MAX_DECODE_BYTES_VARIABLE, str(num_bytes - 1))
    for backend in ("pyav", "opencv"):
        with pytest.raises(ValueError, match=rf"{num_bytes - 1} bytes.*{num_bytes}.*num_frames"):
            load(data, backend=backend)
        assert len(load(data, backend=backend, num_frames=47)[0]) == 47


@pytest.mark.parametrize("value", ["", "0", "-1", "4 GiB", "1e9"])
def test_a_byte_limit_that_is_no_number_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MAX_DECODE_BYTES_VARIABLE, value)
    with pytest.raises(ValueError, match=MAX_DECODE_BYTES_VARIABLE):
        max_decode_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_frames", "8"),
        ("num_frames", 2.5),
        ("num_frames", None),
        ("fps", "fast"),
        ("fps", float("nan")),
        ("fps", float("inf")),
        ("max_duration", "long"),
    ],
)
def test_an_argument_that_is_no_number_is_a_value_error(
    name: str, value: object, clip: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be"):
        load(clip.read_bytes(), **{name: value})


def test_an_option_of_another_decoder_is_a_value_error(clip: Path) -> None:
    with pytest.raises(ValueError, match="seek_mode is not supported"):
        load(clip.read_bytes(), seek_mode="exact")


def test_damaged_files_load_or_are_value_errors(folder: Path, clip: Path) -> None:
    """In a process of its own, since a decoder that reads past its input ends the process."""
    paths = [str(path) for path in sorted(folder.iterdir())]
    done = subprocess.run(
        [sys.executable, "-c", DAMAGE, str(clip), *paths],
        cwd=Path(__file__).parents[1],
        env={name: text for name, text in os.environ.items() if not name.startswith("OPENCV")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # OpenCV itself says one line of a file that it cannot open; FFmpeg would say one per packet.
    assert not [line for line in done.stderr.splitlines() if " @ 0x" in line]


DAMAGE = """
import os, random, struct, sys
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
from scissor_vllm.frontend.video.loader import PyAVVideoBackend, register_video_loader

assert "pyav" not in VIDEO_LOADER_REGISTRY.name2class, "the import alone registered a loader"
register_video_loader()
rng = random.Random(7)

def damaged(data):
    start, damage = rng.randrange(len(data)), rng.randrange(4)
    if damage == 0:
        del data[start:]
    elif damage == 1:
        del data[start : start + rng.choice([1, 100, 5000])]
    elif damage == 2:
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif (sizes := data.find(b"stsz")) >= 0:
        # A frame of which most lies behind the end of the file.
        struct.pack_into(">I", data, sizes + 16 + 4 * rng.randrange(20), 0xFEFEFE)
    return bytes(data)

for path in sys.argv[1:2] * 30 + sys.argv[2:] * 3:
    try:
        with open(path, "rb") as file:
            frames, metadata = PyAVVideoBackend.load_bytes(damaged(bytearray(file.read())))
    except ValueError:
        continue
    assert 0 < len(frames) == len(metadata["frames_indices"])
"""
