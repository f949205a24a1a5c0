"""The command ``scissor-vllm bench`` and its parts ``clips``, ``table`` and ``plot``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scissor_vllm.loadtest import clips as videos
from scissor_vllm.loadtest.record import environment, write_text
from scissor_vllm.loadtest.results import ResultError, open_results, open_run, read_results
from scissor_vllm.loadtest.server import (
    Metrics,
    ServerError,
    describe_server,
    has_plugin,
    kv_cache_bytes_per_token,
)
from scissor_vllm.loadtest.summary import parse_goodput, summarize_all
from scissor_vllm.loadtest.table import csv_table, markdown_table, text_table
from scissor_vllm.loadtest.workload import STOCK, cells, parse_ratios

QUESTION = "Describe what happens in this video, step by step."
NO_CACHES = ("--mm-processor-cache-gb", "0", "--no-enable-prefix-caching")
"""Server flags that disable caches, so that every request does the full work."""
RESULT = Path("bench-results", "result.json")
INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell has it."""


def main(argv: Sequence[str]) -> int:
    """Run a subcommand and return the exit status."""
    parts = {"clips": clips, "table": table, "plot": plot}
    part, rest = (parts[argv[0]], argv[1:]) if argv and argv[0] in parts else (run, argv)
    try:
        return part(rest)
    except (videos.ClipError, ResultError, ServerError, RuntimeError) as error:
        print(f"scissor-vllm bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nscissor-vllm bench: stopped; what was measured is saved, --append goes on",
            file=sys.stderr,
        )
        return INTERRUPTED


def run(argv: Sequence[str]) -> int:
    """Measure a server; return 1 if a cell had no answer."""
    from scissor_vllm.loadtest.client import ChatSettings
    from scissor_vllm.loadtest.sweep import Load, sweep

    args = _run_parser().parse_args(argv)
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError(
            "requests are sent by vLLM's benchmark client, and vllm is not installed here: install "
            "it as the server's host has it"
        )
    load = Load(args.num_prompts, args.num_warmups)
    concurrencies = args.max_concurrency or [None if args.request_rate else 1]
    planned = cells(args.retention_ratio, concurrencies, args.request_rate or [None])
    label = args.label or (STOCK if args.retention_ratio == [()] else "scissor-vllm")
    file = open_results(args.output, environment(), append=args.append, overwrite=args.overwrite)
    if args.videos:
        chosen = videos.load_clips(args.videos)
    else:
        num_clips = load.num_clips(planned)
        chosen = videos.make_clips(videos.default_folder(), num_clips, _clip_shape(args))
    with _server(args) as base_url:
        metrics_url = args.metrics_url or f"{base_url}/metrics"
        server = _describe_server(base_url, metrics_url, label, args)
        command = shlex.join(["scissor-vllm", "bench", *argv])
        measured = open_run(file, label, command, server, _settings(args))
        sweep(
            file,
            measured,
            planned,
            chosen,
            ChatSettings(
                base_url=base_url,
                model=server["model"],
                question=args.question,
                output_len=args.output_len,
                ignore_eos=args.ignore_eos,
                seed=args.seed,
                extra_body=args.extra_body,
            ),
            load,
            metrics_url=metrics_url,
            metrics_interval_seconds=args.metrics_interval,
            keep_itl=args.save_detailed,
        )
    rows = summarize_all(file.runs)
    table_path = args.output.with_suffix(".csv")
    write_text(table_path, csv_table(rows))
    print(f"\n{text_table(rows)}\n\n{args.output}, {table_path}")
    return int(any(row["completed"] == 0 for row in rows))


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    """Yield the server's URL without ``/v1``; the demo's server runs until the end."""
    with contextlib.ExitStack() as stack:
        base_url: str = args.base_url
        if args.demo:
            from scissor_vllm.demo.client import demo_server

            base_url = stack.enter_context(demo_server(*NO_CACHES))
        yield base_url.rstrip("/").removesuffix("/v1")


def _describe_server(
    base_url: str, metrics_url: str, label: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the server's part of a run.

    Raises:
        ServerError: the label is stock's, and the server has this plugin.
    """
    server = describe_server(base_url, args.model)
    if label == STOCK and has_plugin(base_url):
        raise ServerError(
            f"label {STOCK} is for vLLM without this plugin, and {base_url} has it: start that "
            "with an empty VLLM_PLUGINS (vLLM loads every installed plugin where none is "
            "named), or give another --label"
        )
    server["kv_cache_bytes_per_token"] = args.kv_cache_bytes_per_token or (
        kv_cache_bytes_per_token(server["model_path"], Metrics(metrics_url).read())
    )
    return server


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that a run records."""
    folder = args.videos and {"folder": args.videos.resolve().name}
    return {
        "num_prompts": args.num_prompts,
        "num_warmups": args.num_warmups,
        "output_len": args.output_len,
        "ignore_eos": args.ignore_eos,
        "question": args.question,
        "seed": args.seed,
        "videos": folder or _clip_shape(args).as_dict(),
        "goodput_milliseconds": args.goodput,
        **({"extra_body": args.extra_body} if args.extra_body else {}),
    }


def _clip_shape(args: argparse.Namespace) -> videos.ClipShape:
    return videos.ClipShape(
        args.width, args.height, args.num_frames, args.fps, args.seed, args.camera
    )


def clips(argv: Sequence[str]) -> int:
    """Generate clips for a host without PyAV."""
    parser = argparse.ArgumentParser(
        prog="scissor-vllm bench clips", description="Make distinct clips with motion (needs PyAV)."
    )
    parser.add_argument("folder", type=Path, help="where a folder of the clips' shape is made")
    parser.add_argument("--num-clips", type=_positive, default=160, help="(default: %(default)s)")
    _add_clip_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    made = videos.make_clips(args.folder, args.num_clips, _clip_shape(args))
    size = sum(clip.path.stat().st_size for clip in made)
    print(f"{made[0].path.parent}: {len(made)} clips, {size / 1e6:.1f} MB")
    return 0


def table(argv: Sequence[str]) -> int:
    """Print result files as a table."""
    parser = argparse.ArgumentParser(prog="scissor-vllm bench table", description=table.__doc__)
    _add_results(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="for a README")
    form.add_argument("--csv", action="store_true", help="every value")
    args = parser.parse_args(argv)
    runs = [run for path in args.results for run in read_results(path).runs]
    rows = summarize_all(runs, args.goodput)
    shown = markdown_table if args.markdown else csv_table if args.csv else text_table
    print(shown(rows).rstrip("\n"))
    return 0


def plot(argv: Sequence[str]) -> int:
    """Draw result files as PNG pictures."""
    from scissor_vllm.loadtest.plot import read_accuracy, save_plots

    parser = argparse.ArgumentParser(prog="scissor-vllm bench plot", description=plot.__doc__)
    _add_results(parser)
    parser.add_argument(
        "--accuracy",
        type=Path,
        help='JSON: [{"method": "scc", "retention_ratio": 0.1, "accuracy": 0.61, "low": 0.59, '
        '"high": 0.63}, ...]; method is a label of the results, low and high may be left out',
    )
    parser.add_argument("--output", type=Path, help="folder (default: that of the first result)")
    args = parser.parse_args(argv)
    runs = [run for path in args.results for run in read_results(path).runs]
    rows = summarize_all(runs, args.goodput)
    accuracy = read_accuracy(args.accuracy) if args.accuracy else None
    for path in save_plots(rows, args.output or args.results[0].parent, accuracy):
        print(path)
    return 0


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    _add_goodput(parser, "(default: those of the run)", None)


def _add_goodput(
    parser: argparse._ActionsContainer, default_text: str, default: dict[str, float] | None
) -> None:
    class Store(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
            try:
                objectives = parse_goodput(values)
            except ValueError as error:
                parser.error(f"{option_string}: {error}")
            setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **objectives})

    parser.add_argument(
        "--goodput",
        nargs="+",
        action=Store,
        default=default,
        metavar="NAME:MS",
        help="service level objectives, as `vllm bench serve --goodput` takes them: ttft, tpot, "
        f"e2el and milliseconds, for example ttft:2000 tpot:50 {default_text}",
    )


def _add_clip_options(parser: argparse._ActionsContainer) -> None:
    shape = videos.ClipShape()
    for name in ("width", "height", "num_frames", "fps"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=_positive, default=getattr(shape, name), help="(default: %(default)s)"
        )
    parser.add_argument(
        "--camera",
        choices=videos.CAMERAS,
        default=shape.camera,
        help="any: pans in some clips; fixed: stands still before a noisy, textured background; "
        "moving: pans, zooms and cuts (default: %(default)s)",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def _rate(text: str) -> float | None:
    rate = float(text)
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"must be above 0 requests a second, or inf, got {text}")
    return None if math.isinf(rate) else rate


def _body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON ({error}), got {text}") from error
    if not isinstance(body, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return body


def _ratios(text: str) -> tuple[float | str, ...]:
    try:
        return parse_ratios(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scissor-vllm bench",
        description="Load a server with videos at every ratio and concurrency. Other parts: "
        "scissor-vllm bench clips | table | plot.",
    )
    _add_server_options(parser)
    _add_grid_options(parser)
    _add_load_options(parser)
    _add_video_options(parser)
    _add_result_options(parser)
    return parser


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("the server")
    where = server.add_mutually_exclusive_group()
    where.add_argument("--base-url", default="http://localhost:8000", help="(default: %(default)s)")
    where.add_argument("--demo", action="store_true", help="serve the demo model, stop it after")
    server.add_argument("--model", help="(default: the first that it serves)")
    server.add_argument("--metrics-url", help="(default: /metrics of the server)")
    server.add_argument(
        "--metrics-interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between two looks at the KV cache, 0 for none (default: %(default)s)",
    )
    server.add_argument(
        "--kv-cache-bytes-per-token",
        type=_positive,
        help="(default: by the model's config and what the server tells of its cache)",
    )


def _add_grid_options(parser: argparse.ArgumentParser) -> None:
    grid = parser.add_argument_group("what is measured: every combination")
    grid.add_argument(
        "--retention-ratio",
        type=_ratios,
        nargs="+",
        default=[(1.0,), (0.5,), (0.25,), (0.1,)],
        metavar="RATIO",
        help="0.25; 1.0,0.5,0.1: each request draws one; auto: the server chooses, see its "
        f"--auto-retention-ratio; {STOCK}: requests carry none, as vLLM "
        "without this plugin wants it (default: 1.0 0.5 0.25 0.1)",
    )
    grid.add_argument(
        "--max-concurrency",
        type=_positive,
        nargs="+",
        metavar="N",
        help="requests in flight (default: 1, without bound if there is a --request-rate)",
    )
    grid.add_argument(
        "--request-rate",
        type=_rate,
        nargs="+",
        metavar="R",
        help="requests a second, Poisson arrivals (default: inf)",
    )


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("a cell")
    load.add_argument(
        "--num-prompts", type=_positive, help="(default: 4 x the concurrency, at least 16)"
    )
    load.add_argument(
        "--num-warmups", type=_count, help="not measured (default: the concurrency, at most 32)"
    )
    load.add_argument("--output-len", type=_positive, default=64, help="(default: %(default)s)")
    load.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answer with exactly --output-len tokens (default: yes)",
    )
    load.add_argument("--question", default=QUESTION, help="(default: %(default)r)")
    load.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    load.add_argument(
        "--extra-body",
        type=_body,
        default={},
        metavar="JSON",
        help="fields of every request's body, as `vllm bench serve --extra-body` takes them, for "
        """example '{"media_io_kwargs": {"video": {"num_frames": 128}}}' (default: none)""",
    )
    _add_goodput(load, "(default: none)", {})


def _add_video_options(parser: argparse.ArgumentParser) -> None:
    clip = parser.add_argument_group("the videos, a different one for each request")
    clip.add_argument(
        "--videos", type=Path, metavar="FOLDER", help="your files (default: clips are made)"
    )
    _add_clip_options(clip)


def _add_result_options(parser: argparse.ArgumentParser) -> None:
    result = parser.add_argument_group("the result")
    result.add_argument(
        "--label", help=f"name of this server's rows (default: {STOCK} or scissor-vllm)"
    )
    result.add_argument(
        "--output", type=Path, default=RESULT, help="JSON, a CSV beside it (default: %(default)s)"
    )
    existing = result.add_mutually_exclusive_group()
    existing.add_argument(
        "--append", action="store_true", help="add to the file; cells that it has are left"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the file")
    result.add_argument(
        "--save-detailed", action="store_true", help="also keep the time between each two tokens"
    )
