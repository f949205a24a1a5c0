"""Prints the time in which our loader and vLLM's OpenCV loader sample frames of a video.

    python -m bench.decode [--json FILE] [--repeats N] [--frames N] [--quick]

Both loaders take turns on the same bytes in one process. Each clip is hard for a loader in its own
way: few frames, many pixels, few or many key frames, groups of pictures that are not closed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from bench.numbered_clips import make_clip
from scissor_vllm.frontend.video.loader import register_video_loader
from scissor_vllm.loadtest.record import environment, write_json

LOADERS = ("pyav", "opencv")
MINUTE = 60 * 30

CLIPS: dict[str, dict[str, Any]] = {
    "64 frames 640x360": {"width": 640, "height": 360, "num_frames": 64},
    "10 s 1280x720": {"width": 1280, "height": 720, "num_frames": 300},
    "20 s 640x360, one key frame": {"width": 640, "height": 360, "num_frames": 600, "gop": 600},
    "20 s 640x360, HEVC open groups": {
        "width": 640,
        "height": 360,
        "num_frames": 600,
        "codec": "hevc",
        "gop": 60,
    },
    "10 s 640x360, VP9": {"width": 640, "height": 360, "num_frames": 300, "codec": "vp9"},
    "3 min 640x360, key frame every 250": {
        "width": 640,
        "height": 360,
        "num_frames": 3 * MINUTE,
        "gop": 250,
    },
    "3 min 640x360, key frame every 30": {
        "width": 640,
        "height": 360,
        "num_frames": 3 * MINUTE,
        "gop": 30,
    },
}


def measure(data: bytes, num_frames: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each run by loader; loaders take turns after a warm-up run each."""
    seconds: dict[str, list[float]] = {name: [] for name in LOADERS}
    for turn in range(repeats + 1):
        for name in LOADERS:
            start = time.perf_counter()
            VIDEO_LOADER_REGISTRY.load(name).load_bytes(data, num_frames=num_frames)
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_concurrent(
    data: bytes, num_frames: int, repeats: int, num_threads: int
) -> dict[str, list[float]]:
    """Return the seconds by loader to load one video in several threads at once, once in each."""
    seconds: dict[str, list[float]] = {name: [] for name in LOADERS}
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(repeats):
            for name in LOADERS:
                load = VIDEO_LOADER_REGISTRY.load(name).load_bytes
                start = time.perf_counter()
                turns = range(num_threads)
                list(pool.map(lambda _, load=load: load(data, num_frames=num_frames), turns))
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the video loaders, PyAV against OpenCV.")
    parser.add_argument("--json", type=Path, help="also write the times of all runs to this file")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default: 5)")
    parser.add_argument("--frames", type=int, default=32, help="frames to sample (default: 32)")
    parser.add_argument("--quick", action="store_true", help="leave out clips over a minute")
    arguments = parser.parse_args()

    register_video_loader()
    rows: list[dict[str, Any]] = []
    width = max(map(len, CLIPS)) + len(", 2 at once")
    print(f"{'median ms, ' + str(arguments.frames) + ' frames':{width}}    pyav  opencv  ratio")
    with tempfile.TemporaryDirectory() as folder:
        for name, clip in CLIPS.items():
            if arguments.quick and clip["num_frames"] > MINUTE:
                continue
            suffix = ".webm" if clip.get("codec") == "vp9" else ".mp4"
            data = make_clip(Path(folder, f"clip{suffix}"), **clip).read_bytes()
            runs = {name: measure(data, arguments.frames, arguments.repeats)}
            if len(rows) == 0:
                # The number of videos that an API server loads at once.
                for number in (2, 8):
                    runs[f"{name}, {number} at once"] = measure_concurrent(
                        data, arguments.frames, arguments.repeats, number
                    )
            for label, seconds in runs.items():
                pyav, opencv = (statistics.median(seconds[loader]) for loader in LOADERS)
                times = f"{pyav * 1e3:6.0f}  {opencv * 1e3:6.0f}  {pyav / opencv:5.2f}"
                print(f"{label:{width}}  {times}", flush=True)
                rows.append({"clip": label, "bytes": len(data), **clip, "seconds": seconds})
    if arguments.json:
        measured = {"unit": "s", "num_frames": arguments.frames, "runs": rows}
        write_json(arguments.json, {"environment": environment(), **measured})


if __name__ == "__main__":
    main()
