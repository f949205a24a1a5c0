"""Sends a server thousands of requests that it must refuse, and checks that all others are right.

    python -m bench.hostile_requests [--num-requests 10000] [--duration SECONDS] [--burst 512]
        [--base-url URL [--server-pid PID]] [--json FILE]

Requests are drawn from a seed: ratios and budgets out of range or of another type, damaged files,
forbidden URLs, bodies that are no chats, small videos of mixed sizes and ratios, and clients that
hang up. Every tenth is one of a dozen whose answers a quiet server gave: videos whole and streamed,
budgets, images, text, ``/tokenize`` and the estimate. With ``--burst`` so many requests are sent at
once before the load.

Without ``--base-url`` the demo model is served, with small caches, which fill soon. Memory of the
server's processes is sampled. The exit code is 1 if an answer was wrong, if the server answered
with a 5xx or not at all, if it is not healthy at the end, or if its memory or its open files grew
faster than ``--max-growth`` allows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from bench.hostile_requests.load import Load, offer_of
from bench.hostile_requests.memory import SHOWN_MIB, MemorySampler, growth
from bench.hostile_requests.traffic import Traffic
from scissor_vllm.demo.client import demo_server
from scissor_vllm.loadtest.record import environment, write_json

SERVER_FLAGS = (
    "--allow-compress-images",
    "--auto-retention-ratio=0.1:1.0",
    "--target-ttft-ms=1500",
    "--mm-processor-cache-gb=0.25",
    "--video-frame-cache-gb=0.05",
    "--video-feature-cache-gb=0.05",
)
SERVER_ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "VLLM_MQ_MAX_CHUNK_BYTES_MB": "4"}
"""What takes long to fill is small: on a CPU, oneDNN keeps the kernels of its last 1024 shapes, 300
MiB. vLLM's messages to the workers lie in ten chunks of 16 MiB; larger ones go by a socket."""
MAX_GROWTH = 50.0
"""MiB an hour, about 1 % of the server's memory: a request that left 2 KiB would exceed it."""
MAX_FILES_PER_HOUR = 60.0
MEMORY_EVERY = 6
"""Of the samples, so many are written once."""


def main(argv: list[str] | None = None) -> int:
    """Send requests; return the exit code."""
    args = parsed(argv)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pid = args.server_pid
        if args.base_url:
            base_url = args.base_url.rstrip("/").removesuffix("/v1")
        else:
            before = _children()
            os.environ.update(SERVER_ENVIRONMENT)
            base_url = stack.enter_context(demo_server(*SERVER_FLAGS)).removesuffix("/v1")
            (pid,) = _children() - before
        load = Load(base_url, Traffic(args.seed, folder, offer_of(base_url)), args.seed)
        sampler = MemorySampler(pid)
        # The commit of now: a run takes long.
        made_in = environment()
        begin = time.perf_counter()
        with sampler:
            asyncio.run(load.run(args.num_requests, args.concurrency, args.duration, args.burst))
        seconds = time.perf_counter() - begin
    grown = growth(sampler.samples)
    report(load, seconds, grown)
    is_flat = grown is None or is_within(grown, args.max_growth)
    if not is_flat:
        print(f"memory grows faster than {args.max_growth:g} MiB an hour, or open files do")
    if args.json:
        names = ("num_requests", "duration", "burst", "concurrency", "seed", "max_growth")
        settings: dict[str, Any] = {name: getattr(args, name) for name in names}
        if not args.base_url:
            settings |= {"server_flags": SERVER_FLAGS, "environment": SERVER_ENVIRONMENT}
        content = {
            "environment": made_in,
            "settings": settings,
            "statuses": load.statuses,
            "seconds": round(seconds, 1),
            "wrong": load.wrong,
            "burst": load.burst,
            "growth": grown,
            "memory": [one_line(entry) for entry in sampler.samples[::MEMORY_EVERY]],
        }
        write_json(args.json, content)
    return int(bool(load.wrong) or not is_flat)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.hostile_requests", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--base-url", help="of a server of the demo model (default: one is started)"
    )
    parser.add_argument("--server-pid", type=int, help="of that server, to sample its memory")
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument(
        "--duration", type=float, default=0, help="seconds that the load goes on for at least"
    )
    parser.add_argument(
        "--burst", type=int, default=0, help="requests that are sent at once before the load"
    )
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-growth",
        type=float,
        default=MAX_GROWTH,
        help="MiB an hour that all processes together may grow by after a third of the run "
        "(default: %(default)g)",
    )
    parser.add_argument("--json", type=Path, help="where to write counts and samples")
    return parser.parse_args(argv)


def one_line(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample with the MiB of each large process beside those of all."""
    large = {name: mib for name, mib in entry["processes"].items() if mib >= SHOWN_MIB}
    return {name: entry[name] for name in ("seconds", "mib", "num_files")} | large


def is_within(grown: Mapping[str, Any], max_growth: float) -> bool:
    """Return whether memory and open files are flat."""
    return grown["mib_per_hour"] <= max_growth and grown["files_per_hour"] <= MAX_FILES_PER_HOUR


def report(load: Load, seconds: float, grown: Mapping[str, Any] | None) -> None:
    """Print what came back."""
    if load.burst:
        print(f"{load.burst['num_requests']} at once in {load.burst['seconds']} s:")
        _print_statuses(load.burst["statuses"])
    _print_statuses(load.statuses)
    total = sum(sum(statuses.values()) for statuses in load.statuses.values())
    print(f"{total} requests in {seconds:.0f} s, {len(load.wrong)} wrong")
    print(*load.wrong[:20], sep="\n")
    if grown is not None:
        low, high = grown["mib"]
        print(
            f"memory in the last {grown['fitted_seconds']:.0f} s: {low:.0f} to {high:.0f} MiB, "
            f"{grown['mib_per_hour']:+.0f} MiB and {grown['files_per_hour']:+.0f} files an hour"
        )


def _print_statuses(counted: Mapping[str, Counter[str]]) -> None:
    for kind, statuses in sorted(counted.items()):
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        print(f"{kind:16}{counts}")


def _children() -> set[int]:
    return {process.pid for process in psutil.Process(os.getpid()).children()}
