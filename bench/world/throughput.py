"""Prints how fast clips are generated: ``python -m bench.world.throughput --device cuda``.

Sampling and asking are the work of one CPU core; packing, painting and covering are given for the
device, from the call to its end, in milliseconds a clip. Median of `--repeats`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bench.world.questions import ask
from bench.world.render import cover, pack, render
from bench.world.scene import NUM_FRAMES, sample_scene


def measure(work: Callable[[], object], num_clips: int, repeats: int) -> float:
    """Return the median milliseconds a clip of `work`, which handles `num_clips`."""
    times = []
    for turn in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn:
            times.append((time.perf_counter() - begin) * 1e3 / num_clips)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-clips", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    scenes = [sample_scene(seed) for seed in range(args.num_clips)]
    packed = pack(scenes).to(args.device)
    steps: dict[str, Callable[[], object]] = {
        "sample": lambda: [sample_scene(seed) for seed in range(args.num_clips)],
        "ask": lambda: [ask(scene, scene.seed) for scene in scenes],
        "pack": lambda: pack(scenes).to(args.device),
        "render": lambda: render(packed, args.device),
        "cover": lambda: cover(packed, 11, args.device),
    }
    print(f"mixed clips of {NUM_FRAMES} frames, {args.num_clips} at a time, {args.device}")
    for name, work in steps.items():
        milliseconds = measure(work, args.num_clips, args.repeats)
        print(f"{name:8} {milliseconds:8.3f} ms a clip {1e3 / milliseconds:10.0f} a second")


if __name__ == "__main__":
    main()
