"""The loader's frames are those of a plain sequential decode, whatever the file.

The files are made here, by PyAV. The oracle is `shown_frames`: PyAV's decoder, packet after packet,
without a seek, a whitelist or a filter. Where an ffmpeg command is installed, it must agree too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bench.numbered_clips import (
    add_sound_and_cover,
    has_codec,
    make_clip,
    remux,
    shown_frames,
    trim_clip,
)
from scissor_vllm.frontend.refusal import RefusedVideoError
from scissor_vllm.frontend.video.loader import PyAVVideoBackend, register_video_loader

# Mean difference of 255: the oracle converts colours of fields and of HDR by other filters.
COLOUR_TOLERANCE = 4
NUM_PLACES = 20
FFMPEG = shutil.which("ffmpeg")

Change = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Case:
    """A file: how its clip is encoded, in which container, and what is done to it."""

    suffix: str
    clip: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None
    source_suffix: str | None = None


def _trim(source: Path, path: Path) -> Path:
    return trim_clip(source, path, first=17)


def _drop(source: Path, path: Path) -> Path:
    return remux(source, path, drop=5)


def _live(source: Path, path: Path) -> Path:
    return remux(source, path, container_format="matroska", options={"live": "1"})


def _fragments(source: Path, path: Path) -> Path:
    return remux(source, path, options={"movflags": "frag_keyframe+empty_moov"})


H264: dict[str, Any] = {"gop": 12, "b_frames": 3}
X264 = "x264-params"
OPEN = {"gop": 12, "options": {X264: "open-gop=1:bframes=3"}}
REFRESH = {"options": {X264: "intra-refresh=1:keyint=15"}}
INTERLACED = {"gop": 12, "options": {X264: "tff=1", "flags": "+ildct+ilme"}}
HEVC = {"codec": "hevc", "gop": 12}
HDR = {
    "codec": "hevc",
    "gop": 12,
    "pix_fmt": "yuv420p10le",
    "options": {
        "x265-params": "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
    },
}
FULL_RANGE = {"options": {X264: "fullrange=on:colormatrix=bt709"}}
INTRA = {
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mjpeg.mkv": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ffv1.mkv": {"codec": "ffv1"},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "raw.avi": {"codec": "rawvideo"},
    "png.mov": {"codec": "png", "pix_fmt": "rgb24"},
    "qtrle.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "gif.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "flv1.flv": {"codec": "flv"},
}


def _corpus() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(name: str, suffixes: str, clip: dict[str, Any], change: Change | None = None) -> None:
        for suffix in suffixes.split():
            # Packets of MP4 are copied to where they are changed.
            cases[f"{name}.{suffix}"] = Case(suffix, clip, change, "mp4" if change else None)

    add("h264", "mp4 mov mkv flv ts avi 3gp m4v", H264)
    add("h264_open_groups", "mp4 mov mkv ts", OPEN)
    add("h264_intra_refresh", "mp4 mkv ts", REFRESH)
    add("h264_interlaced", "mp4 mov mkv ts avi", INTERLACED)
    add("hevc", "mp4 mov mkv ts", HEVC)
    add("vp8", "webm mkv avi ogv", {"codec": "vp8", "gop": 12})
    add("vp9", "webm mkv mp4", {"codec": "vp9", "gop": 12})
    add("av1", "mp4 webm", {"codec": "libsvtav1", "gop": 12, "num_frames": 24})
    for b_frames in (0, 2):
        mpeg: dict[str, Any] = {"gop": 12, "b_frames": b_frames}
        interlaced = {"options": {"flags": "+ildct+ilme"}}
        add(f"mpeg4_b{b_frames}", "mp4 mkv avi mov ts", {"codec": "mpeg4", **mpeg})
        add(f"mpeg2_b{b_frames}", "mpg vob ts mkv mp4", {"codec": "mpeg2video", **mpeg})
        add(
            f"mpeg2_interlaced_b{b_frames}", "mpg ts", {"codec": "mpeg2video", **mpeg, **interlaced}
        )
        add(f"mpeg1_b{b_frames}", "mpg mkv", {"codec": "mpeg1video", **mpeg})
    for codec, suffixes in {"wmv1": "wmv avi", "wmv2": "wmv avi", "msmpeg4": "wmv avi mkv"}.items():
        add(codec, suffixes, {"codec": codec, "gop": 12})
    for name, clip in INTRA.items():
        stem, suffix = name.split(".")
        add(stem, suffix, clip)
    for name, clip in {"h264": H264, "open": OPEN, "interlaced": INTERLACED, "hevc": HEVC}.items():
        add(f"{name}_edit_list", "mp4", clip, _trim)
        add(f"{name}_without_key_frame", "mp4 mkv ts", clip, _drop)
        add(f"{name}_without_duration", "mkv", clip, _live)
    add("mpeg4_edit_list", "mov", {"codec": "mpeg4", "gop": 12, "b_frames": 2}, _trim)
    add("mpeg2_without_key_frame", "mpg", {"codec": "mpeg2video", "gop": 12}, _drop)
    add("h264_fragments", "mp4", H264, _fragments)
    add("hdr", "mp4 mkv", HDR)
    add("hdr_edit_list", "mp4", HDR, _trim)
    add("full_range", "mp4", FULL_RANGE)
    for turn in (90, 180, 270):
        add(f"rotated_{turn}", "mp4", {"rotation": turn})
    add("rotated_edit_list", "mp4", {**H264, "rotation": 90}, _trim)
    add("odd", "mp4", {"width": 97, "height": 65, "pix_fmt": "yuv444p"})
    add("odd_vp9", "webm", {"codec": "vp9", "width": 97, "height": 65})
    add("thin", "webm", {"codec": "vp9", "width": 33, "height": 5})
    add("one_pixel", "mp4 avi", {"codec": "mpeg4", "width": 1, "height": 1})
    add("one_pixel", "gif", {"codec": "gif", "pix_fmt": "rgb8", "width": 1, "height": 1})
    add("one_frame", "mp4 mkv ts mpg", {"codec": "mpeg4", "num_frames": 1})
    add("uneven", "mp4 mkv", {**H264, "times_ms": [40 * i + i * i for i in range(40)]})
    add("sound", "mp4 mkv ts", {**H264, "audio": True})
    add("cover", "mp4", H264, add_sound_and_cover)
    return cases


CORPUS = _corpus()
QUICK = [
    "h264.ts",
    "h264_interlaced.avi",
    "interlaced_without_duration.mkv",
    "interlaced_edit_list.mp4",
    "open_without_key_frame.mkv",
    "mpeg2_b0.mpg",
    "wmv2.wmv",
    "one_pixel.gif",
    "rotated_90.mp4",
    "mpeg4_b2.avi",
    "cover.mp4",
    "h264_intra_refresh.mp4",
]


def every(names: list[str]) -> list[Any]:
    """The whole corpus as parameters, all but these marked slow."""
    return [
        pytest.param(name, marks=[] if name in names else [pytest.mark.slow]) for name in CORPUS
    ]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register_video_loader()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def make(name: str, folder: Path) -> Path:
    case = CORPUS[name]
    clip = {"width": 176, "height": 144, "num_frames": 40, **case.clip}
    if not has_codec(clip.get("codec", "h264")):
        pytest.skip(f"PyAV has no encoder for {clip['codec']}")
    if case.change is None:
        return make_clip(folder / name, **clip)
    source = make_clip(folder / f"source_of_{name}.{case.source_suffix}", **clip)
    return case.change(source, folder / name)


def load(data: bytes, num_frames: int) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
    frames, metadata = PyAVVideoBackend.load_bytes(data, num_frames=num_frames)
    assert isinstance(frames, np.ndarray)
    return frames, metadata


def assert_same(data: bytes, shown: list[npt.NDArray[np.uint8]], turns: int = 0) -> None:
    """Every sampled frame is the one of its number, at each sampling."""
    for num_frames in (1, 7, -1):
        frames, metadata = load(data, num_frames)
        assert metadata["total_num_frames"] == len(shown)
        indices = metadata["frames_indices"]
        assert len(frames) == (len(shown) if num_frames < 0 else min(num_frames, len(shown)))
        for frame, index in zip(frames, indices, strict=True):
            expected = np.rot90(shown[index], turns)
            assert frame.shape == expected.shape
            assert np.abs(frame.astype(int) - expected).mean() < COLOUR_TOLERANCE


@pytest.mark.parametrize("name", every(QUICK))
def test_every_frame_is_the_one_of_its_number(name: str, folder: Path) -> None:
    data = make(name, folder).read_bytes()
    shown = shown_frames(data)
    if not shown:
        with pytest.raises(RefusedVideoError, match="at least one frame"):
            load(data, 7)
        return
    assert_same(data, shown, CORPUS[name].clip.get("rotation", 0) // 90)


@pytest.mark.slow
@pytest.mark.skipif(FFMPEG is None, reason="no ffmpeg command")
@pytest.mark.parametrize("name", CORPUS)
def test_the_ffmpeg_command_shows_the_same(name: str, folder: Path) -> None:
    path = make(name, folder)
    command = [str(FFMPEG), "-v", "error", "-i", str(path), "-fps_mode", "passthrough"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = np.frombuffer(subprocess.run(command, capture_output=True, check=False).stdout, np.uint8)
    if name.startswith("hevc_without_key_frame"):
        pytest.skip("FFmpeg before version 8 shows more: pictures whose references are missing")
    try:
        frames, metadata = load(path.read_bytes(), -1)
    except RefusedVideoError:
        assert len(raw) == 0
        return
    shown = raw.reshape(-1, *frames.shape[1:])
    assert len(frames) == len(shown) == metadata["total_num_frames"]
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(frames, shown, strict=True)) < 1


TRUNCATED = {
    "mp4": {**H264, "moov_first": True},
    "ts": H264,
    "mkv": OPEN,
    "avi": {"codec": "mpeg4", "gop": 12, "b_frames": 2},
    "mpg": {"codec": "mpeg2video", "gop": 12, "b_frames": 2},
    "webm": {"codec": "vp8", "gop": 12},
}


@pytest.mark.parametrize(
    ("suffix", "places"),
    [
        pytest.param("mp4", (3, 11)),
        pytest.param("ts", (8,)),
        *(
            pytest.param(suffix, range(1, NUM_PLACES + 1), marks=pytest.mark.slow)
            for suffix in TRUNCATED
        ),
    ],
)
def test_a_truncated_file_shows_what_is_left(
    suffix: str, places: range | tuple[int, ...], folder: Path
) -> None:
    path = make_clip(folder / f"whole.{suffix}", width=176, height=144, **TRUNCATED[suffix])
    whole = path.read_bytes()
    num_loaded = 0
    for place in places:
        data = whole[: len(whole) * place // (NUM_PLACES + 1)]
        try:
            shown = shown_frames(data)
        except ValueError:
            shown = []
        if shown:
            assert_same(data, shown)
            num_loaded += 1
        else:
            with pytest.raises(RefusedVideoError):
                load(data, 7)
    assert num_loaded >= len(places) * 2 // 3


@pytest.mark.parametrize("num_files", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_end_no_process_hang_not_and_leave_no_memory(
    num_files: int, folder: Path
) -> None:
    """In a process of its own. SCISSOR_TEST_DAMAGED_FILES sets another number of files."""
    if num_files > 1000:
        num_files = int(os.environ.get("SCISSOR_TEST_DAMAGED_FILES", num_files))
    seeds = "h264.mp4 mpeg4_b2.avi mpeg2_b2.ts mpeg2_b2.mpg vp8.webm h264_open_groups.mkv wmv2.wmv"
    seeds += " h264_edit_list.mp4 gif.gif vp8.ogv h264.flv h264_interlaced.mov"
    paths = [str(make(name, folder)) for name in seeds.split()]
    done = subprocess.run(
        [sys.executable, "-c", DAMAGE, str(num_files), *paths],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100 + num_files,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


DAMAGE = """
import faulthandler, random, resource, sys, time
import numpy as np
from scissor_vllm.frontend.refusal import RefusedVideoError
from scissor_vllm.frontend.video.loader import PyAVVideoBackend, register_video_loader

register_video_loader()
rng = random.Random(11)
files = [open(path, "rb").read() for path in sys.argv[2:]]
num_files = int(sys.argv[1])

def damaged(data):
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not data:
            break
        start, kind = rng.randrange(len(data)), rng.randrange(6)
        end = start + rng.choice([1, 4, 100, 5000])
        if kind == 0:
            del data[max(64, start) :]
        elif kind == 1:
            del data[start:end]
        elif kind == 2:
            data[start:end] = data[start:end] * 2
        elif kind == 3:
            data[start : start + 4] = rng.choice([b"\\xff" * 4, bytes(4), b"\\x7f\\xff\\xff\\xff"])
        else:
            # Headers are at the start or, of MP4, at the end.
            for _ in range(rng.choice([1, 5, 50])):
                where = rng.choice([len(data), 2000, -2000])
                place = rng.randrange(min(abs(where), len(data)))
                data[place if where > 0 else -place - 1] = rng.randrange(256)
    return bytes(data)

shown, refused, slowest, memory = 0, 0, 0.0, []
for number in range(num_files):
    data = damaged(bytearray(files[number % len(files)]))
    faulthandler.dump_traceback_later(10, exit=True)
    start = time.perf_counter()
    try:
        frames, metadata = PyAVVideoBackend.load_bytes(data, num_frames=rng.choice([1, 8, -1]))
    except RefusedVideoError:
        refused += 1
    else:
        assert 0 < len(frames) == len(metadata["frames_indices"]) <= metadata["total_num_frames"]
        assert frames.base is None
        shown += 1
        del frames
    faulthandler.cancel_dump_traceback_later()
    slowest = max(slowest, time.perf_counter() - start)
    if number % (num_files // 10) == 0:
        with open("/proc/self/statm") as file:
            memory.append(int(file.read().split()[1]) * resource.getpagesize() >> 20)
print(f"{shown} shown, {refused} refused, slowest {slowest:.2f} s, MiB held {memory}")
assert shown > num_files // 10 < refused
assert memory[-1] < max(memory[:3]) + 200, memory
"""
