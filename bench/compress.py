"""Prints the time to compress one video, by method, on several kinds of tokens.

    python -m bench.compress [--shape T P D] [--dtype bfloat16] [--device cuda]
        [--forms NAME ...] [--tokens KIND ...] [--repeats N] [--seconds S] [--json FILE]

A form is a method at a ratio, ``average-linkage 0.1``, or SCC with a threshold, ``threshold 0.8``.
On a GPU, times are of CUDA events from the call to its end, with the host's work. Memory excludes
the tokens and includes the result and a kept CUDA graph. The table at the end has medians.
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
from scissor_vllm.compression import CompressedTokens, get_compressor
from scissor_vllm.loadtest.record import environment, write_json

NUM_THINGS = 200
NOISE = 0.5
ALIKE_NOISE = 1e-4
NUM_COPIED = 50
NEAR_TIES_NOISE = 0.1

KINDS = {
    "clustered": f"every frame shows the same {NUM_THINGS} things, with noise",
    "random": "independent tokens",
    "alike": "one token with noise that bfloat16 rounds away",
    "still": "one frame, repeated",
    "black": "zeros",
    "copies": f"{NUM_COPIED} tokens, each many times",
    "one-hot": "all cosines are 0",
    "near-ties": "one token with noise of one size: nearly equal cosines",
    "star": "one token with noise of all sizes: each is nearest to the one before",
}
"""Kinds of tokens, with what they are."""

THRESHOLD = "threshold"
FORMS = (
    *(f"{method} 0.1" for method in ("average-linkage", "scc-windows", "scc", "kitoke")),
    *(f"{method} 0.1" for method in ("floc", "floc+merge", "k-center", "k-center+merge")),
    *(f"{method} 0.1" for method in ("uniform", "uniform+merge")),
    *(f"{method} 0.5" for method in ("average-linkage", "scc-windows", "scc")),
    f"{THRESHOLD} 0.8",
)
"""Forms that are measured by default. Any method may have any ratio."""

Form = Callable[[torch.Tensor], CompressedTokens]


def make_form(name: str) -> Form:
    """Return what compresses tokens, by its name: "METHOD RATIO" or "threshold T".

    Raises:
        ValueError: no such method, or no number.
    """
    method, _, number = name.rpartition(" ")
    value = float(number)
    if method == THRESHOLD:
        return partial(compress, similarity_threshold=value)
    compressor = get_compressor(method)

    def compressed(tokens: torch.Tensor) -> CompressedTokens:
        return compressor(tokens, num_retained_tokens(tokens.shape[0] * tokens.shape[1], value))

    return compressed


def make_tokens(kind: str, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Return tokens (T, P, D) float32 of one of KINDS."""
    generator = torch.Generator().manual_seed(seed)
    num_frames, per_frame, width = shape
    num_tokens = num_frames * per_frame
    if kind == "black":
        return torch.zeros(shape)
    if kind == "one-hot":
        number = torch.arange(num_tokens) % width
        return torch.nn.functional.one_hot(number, width).float().view(shape)
    noise = torch.randn(shape, generator=generator)
    if kind == "random":
        return noise
    if kind == "alike":
        return 1 + ALIKE_NOISE * noise
    if kind == "still":
        return noise[:1].repeat(num_frames, 1, 1)
    if kind == "copies":
        copied = torch.randint(0, NUM_COPIED, (num_tokens,), generator=generator)
        return noise.view(num_tokens, width)[copied % num_tokens].view(shape)
    if kind == "near-ties":
        return torch.randn(width, generator=generator) + NEAR_TIES_NOISE * noise
    if kind == "star":
        sizes = torch.rand(num_frames, per_frame, 1, generator=generator)
        return torch.randn(width, generator=generator) + sizes * noise
    things = torch.randn(NUM_THINGS, width, generator=generator)
    shown = torch.randint(0, NUM_THINGS, (per_frame,), generator=generator)
    return things[shown].expand(num_frames, -1, -1) + NOISE * noise


def measure(
    form: Form, tokens: torch.Tensor, repeats: int, seconds: float
) -> tuple[list[float], int]:
    """Return the milliseconds of each call after the warm-up, and the tokens kept.

    Two calls warm up, or one that takes longer than so many seconds. After so many seconds no
    further call begins.
    """
    times: list[float] = []
    num_warm_up = 2
    while len(times) < repeats + num_warm_up and sum(times[num_warm_up:]) < seconds * 1e3:
        if tokens.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = form(tokens)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            result = form(tokens)
            times.append((time.perf_counter() - begin) * 1e3)
        if times[0] > seconds * 1e3:
            num_warm_up = 1
    return times[num_warm_up:], len(result.tokens)


def memory(device: str, peak: bool = False) -> int:
    """Return the MiB of tensors on a GPU; with ``peak`` the maximum since the last call without."""
    if not device.startswith("cuda"):
        return 0
    if peak:
        return torch.cuda.max_memory_allocated() >> 20
    from scissor_vllm.compression.cuda import graphs

    graphs.clear()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() >> 20


def table(runs: list[dict[str, Any]]) -> str:
    """Return a Markdown table of median ms: a line for each form, a column for each kind."""
    kinds = list(dict.fromkeys(run["tokens"] for run in runs))
    medians: dict[str, list[str]] = {}
    for run in runs:
        median = statistics.median(run["milliseconds"])
        medians.setdefault(run["form"], []).append(f"{median:.{1 if median < 100 else 0}f}")
    lines = ["| | " + " | ".join(kinds) + " |", "| --- |" + " ---: |" * len(kinds)]
    return "\n".join(
        [*lines, *(f"| `{form}` | {' | '.join(cells)} |" for form, cells in medians.items())]
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command's options."""
    kinds = "\n".join(f"  {kind:10} {meaning}" for kind, meaning in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench.compress",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"kinds of tokens:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", type=int, nargs=3, default=[32, 196, 3584], metavar=("T", "P", "D"))
    add("--dtype", default="bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--repeats", type=int, default=10, help="calls of a form at most")
    add("--seconds", type=float, default=1.0, help="after which no further call of a form begins")
    add("--tokens", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    add("--forms", nargs="+", default=list(FORMS), metavar="NAME", help='as "average-linkage 0.1"')
    add("--json", type=Path, help="also write the times of all calls to this file")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}: name 1 or more")
    try:
        args.compress = [make_form(name) for name in args.forms]
    except ValueError as error:
        parser.error(f'{error}: a form is "METHOD RATIO" or "{THRESHOLD} T"')
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(arguments)
    shape = tuple(args.shape)
    rows: list[dict[str, Any]] = []
    print(f"{shape} {args.dtype} on {args.device}: median ms (fastest - slowest), tokens kept, MiB")
    forms = dict(zip(args.forms, args.compress, strict=True))
    for kind in args.tokens:
        dtype = getattr(torch, args.dtype)
        tokens = make_tokens(kind, shape, seed=0).to(args.device, dtype)
        for name, form in forms.items():
            before = memory(args.device)
            times, kept = measure(form, tokens, args.repeats, args.seconds)
            taken = memory(args.device, peak=True) - before
            median = statistics.median(times)
            spread = f"({min(times):.1f} - {max(times):.1f})"
            print(f"{kind:10} {name:20} {median:8.1f} {spread:18} {kept:6} {taken:6}", flush=True)
            rows.append(
                {
                    "tokens": kind,
                    "form": name,
                    "kept": kept,
                    "milliseconds": times,
                    "memory_mib": taken,
                }
            )
    print(f"\n{table(rows)}")
    if args.json:
        settings = {"shape": shape, "dtype": args.dtype, "device": args.device}
        write_json(args.json, {"environment": environment(), **settings, "runs": rows})


if __name__ == "__main__":
    main()
