"""Prints the time to compress one video, by implementation, on three kinds of tokens.

    python -m bench.compress [--shape T P D] [--dtype bfloat16] [--device cuda]
        [--tokens KIND ...] [--forms NAME ...] [--json FILE]

On a GPU, times are of CUDA events from the call to its end, with the host's work. Memory excludes
the tokens and includes the result and a kept CUDA graph. Clustered tokens resemble a video: every
frame shows the same 200 objects with noise. Alike tokens resemble a still video: many are equal, so
equal merges must be ordered.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scissor_vllm import compress, num_retained_tokens
from scissor_vllm.compression import get_compressor
from scissor_vllm.loadtest.record import environment, write_json

NUM_THINGS = 200
NOISE = 0.5
ALIKE_NOISE = 1e-4
KINDS = ["clustered", "random", "alike"]

FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    **{f"budget {ratio}": partial(compress, retention_ratio=ratio) for ratio in (0.05, 0.1, 0.5)},
    **{
        f"windows {ratio}": partial(compress, retention_ratio=ratio, temporal_window=4)
        for ratio in (0.05, 0.1, 0.5)
    },
    "threshold 0.8": lambda tokens: compress(tokens, similarity_threshold=0.8),
    "uniform 0.1": lambda tokens: get_compressor("uniform")(
        tokens, num_retained_tokens(tokens.shape[0] * tokens.shape[1], 0.1)
    ),
}


def make_tokens(kind: str, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Return tokens (T, P, D) float32."""
    generator = torch.Generator().manual_seed(seed)
    num_frames, per_frame, width = shape
    noise = torch.randn(shape, generator=generator)
    if kind == "random":
        return noise
    if kind == "alike":
        return 1 + ALIKE_NOISE * noise
    things = torch.randn(NUM_THINGS, width, generator=generator)
    shown = torch.randint(0, NUM_THINGS, (per_frame,), generator=generator)
    return things[shown].expand(num_frames, -1, -1) + NOISE * noise


def measure(form: Callable[[torch.Tensor], Any], tokens: torch.Tensor, repeats: int) -> list[float]:
    """Return the milliseconds of each call after two warm-up calls."""
    times = []
    for turn in range(repeats + 2):
        if tokens.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            form(tokens)
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            form(tokens)
            elapsed = (time.perf_counter() - begin) * 1e3
        if turn >= 2:
            times.append(elapsed)
    return times


def memory(device: str, peak: bool = False) -> int:
    """Return the MiB of tensors on a GPU; with ``peak`` the maximum since the last call without."""
    if not device.startswith("cuda"):
        return 0
    if peak:
        return torch.cuda.max_memory_allocated() >> 20
    if device.startswith("cuda"):
        from scissor_vllm.compression.cuda import graphs

        graphs.clear()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() >> 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[32, 196, 3584])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--forms", nargs="+", metavar="NAME", help="these (default: all)")
    parser.add_argument("--json", type=Path, help="also write the times of all calls to this file")
    args = parser.parse_args()
    shape = tuple(args.shape)
    rows = []
    print(f"{shape} {args.dtype} on {args.device}: median ms (fastest - slowest), tokens kept, MiB")
    forms = dict(FORMS)
    if args.forms:
        if unknown := set(args.forms) - forms.keys():
            parser.error(f"there is no form {', '.join(sorted(unknown))}: use {', '.join(forms)}")
        forms = {name: forms[name] for name in args.forms}
    for kind in args.tokens:
        dtype = getattr(torch, args.dtype)
        tokens = make_tokens(kind, shape, seed=0).to(args.device, dtype)
        for name, form in forms.items():
            before = memory(args.device)
            times = measure(form, tokens, args.repeats)
            taken = memory(args.device, peak=True) - before
            kept = len(form(tokens).tokens)
            median = statistics.median(times)
            spread = f"({min(times):.1f} - {max(times):.1f})"
            print(f"{kind:10} {name:14} {median:8.1f} {spread:18} {kept:6} {taken:6}", flush=True)
            rows.append(
                {
                    "tokens": kind,
                    "form": name,
                    "kept": kept,
                    "milliseconds": times,
                    "memory_mib": taken,
                }
            )
    if args.json:
        settings = {"shape": shape, "dtype": args.dtype, "device": args.device}
        write_json(args.json, {"environment": environment(), **settings, "runs": rows})


if __name__ == "__main__":
    main()
