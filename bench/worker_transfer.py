"""Times how long the videos of one step take from vLLM's engine core to a worker's process.

    python -m bench.worker_transfer [--num-videos 4] [--num-steps 20] [--json FILE]

With several ranks or engines vLLM's worker is a process of its own, and gets each step's videos by
a queue: pickled, or by ``--enable-shm-tensor-arena``. The time ends when the worker has copied them
once, as it does to pinned memory. It is the median over the steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from scissor_vllm.loadtest.record import environment, write_json

SHAPES = {"LLaVA-OneVision": (32, 384, 384, 3), "Qwen3-VL": (25920, 1536)}
"""What a video of 32 frames of 640 x 360, of which nothing is merged, is to the worker, uint8."""
WAYS = {"pickled": False, "shared memory": True}
_NUM_WARMUPS, _NUM_DISTINCT = 3, 3


def _work(handle: Any, results: Connection) -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    queue = MessageQueue.create_from_handle(handle, 0)
    queue.wait_until_ready()
    staging: list[torch.Tensor] = []
    while videos := queue.dequeue():
        staging = staging or [torch.zeros_like(video) for video in videos]
        for into, video in zip(staging, videos, strict=True):
            into.copy_(video)
        # Memory that a step shares is free again once nothing refers to it.
        del video, videos
        results.send([int(into.flatten()[-1]) for into in staging])


def transfer_seconds(steps: list[list[torch.Tensor]], *, has_arena: bool) -> list[float]:
    """Return the time of each step, to a process that receives them as a worker of vLLM does."""
    from vllm import envs
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    most = envs.VLLM_MQ_MAX_CHUNK_BYTES_MB << 20
    queue = MessageQueue(1, 1, max_chunk_bytes=most, enable_shm_tensor_arena=has_arena)
    context = multiprocessing.get_context("spawn")
    results, results_there = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(queue.export_handle(), results_there), daemon=True
    )
    process.start()
    queue.wait_until_ready()
    taken = []
    for videos in steps:
        begin = time.perf_counter()
        queue.enqueue(videos)
        received = results.recv()
        taken.append(time.perf_counter() - begin)
        if received != [int(video.flatten()[-1]) for video in videos]:
            raise RuntimeError("the worker received other videos")
    queue.enqueue([])
    process.join()
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-videos", type=int, default=4, help="of one step")
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="of each way, in turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print("| a step of | MB |", " | ".join(WAYS), "|")
    print("| --- " * (2 + len(WAYS)) + "|")
    for model, shape in SHAPES.items():
        distinct = [
            [torch.randint(256, shape, dtype=torch.uint8) for _ in range(args.num_videos)]
            for _ in range(_NUM_DISTINCT)
        ]
        steps = list(islice(cycle(distinct), _NUM_WARMUPS + args.num_steps))
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, has_arena in WAYS.items():
                times[way] += transfer_seconds(steps, has_arena=has_arena)[_NUM_WARMUPS:]
        milliseconds = {way: statistics.median(taken) * 1e3 for way, taken in times.items()}
        megabytes = sum(video.nbytes for video in steps[0]) / 1e6
        rows.append({"model": model, "megabytes": megabytes, "milliseconds": milliseconds})
        cells = " | ".join(f"{taken:.0f} ms" for taken in milliseconds.values())
        print(f"| {args.num_videos} videos, {model} | {megabytes:.0f} | {cells} |")
    if args.json:
        settings = {name: getattr(args, name) for name in ("num_videos", "num_steps", "rounds")}
        write_json(args.json, {"environment": environment(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
