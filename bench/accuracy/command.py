"""The command ``python -m bench.accuracy`` and its parts."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.accuracy.benchmarks import BENCHMARKS
from bench.accuracy.client import ChatSettings, ask_missing, check_videos
from bench.accuracy.plot import save_plots
from bench.accuracy.questions import (
    HarnessError,
    Question,
    describe_questions,
    read_questions,
    write_questions,
)
from bench.accuracy.results import Results, open_results, read_results
from bench.accuracy.servers import MethodServer, split_serve_options
from bench.accuracy.summary import Summary, accuracy_file
from bench.accuracy.table import csv_table, markdown
from scissor_vllm.compression import METHODS
from scissor_vllm.loadtest.record import environment, write_json, write_text
from scissor_vllm.loadtest.server import ServerError, describe_server
from scissor_vllm.retention import check_retention_ratio
from scissor_vllm.settings import DEFAULT_VIDEO_COMPRESSION

RATIOS = (1.0, 0.5, 0.35, 0.25, 0.1, 0.07, 0.05)
PROG = "python -m bench.accuracy"


def main(argv: Sequence[str]) -> int:
    """Run a part and return the exit status."""
    parts = {part.__name__: part for part in (run, methods, convert, table, plot, summary)}
    if not argv or argv[0] not in parts:
        asked = list(argv[:1]) in (["-h"], ["--help"])
        usage = [f"  {PROG} {name:9} {part.__doc__}" for name, part in parts.items()]
        print("\n".join(["usage:", *usage]), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        return parts[argv[0]](argv[1:])
    except (HarnessError, ServerError, RuntimeError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\n{PROG}: stopped; every answer is saved, the same command goes on", file=sys.stderr
        )
        return 130


def run(argv: Sequence[str]) -> int:
    """Ask a running server; 1 if a question stays without answer."""
    parser = argparse.ArgumentParser(prog=f"{PROG} run", description=run.__doc__)
    parser.add_argument(
        "--base-url", default="http://localhost:8000", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--label",
        default=DEFAULT_VIDEO_COMPRESSION,
        help="name of this server's answers, as its --video-compression (default: %(default)s)",
    )
    parser.add_argument("--model", help="(default: the first that it serves)")
    _add_asking(parser)
    args = parser.parse_args(argv)
    questions = read_questions(args.questions, num_per_skill=args.num_per_skill)
    results = _open(args, questions)
    base_url = args.base_url.rstrip("/").removesuffix("/v1")
    command = shlex.join(["python", "-m", "bench.accuracy", "run", *argv])
    num_missing = _ask(results, args.label, base_url, args.model, command, [], questions, args)
    _show(results)
    return int(num_missing > 0)


def methods(argv: Sequence[str]) -> int:
    """Serve a model with each method in turn and ask it; 1 if one could not be measured."""
    arguments, serve_options = split_serve_options(argv)
    parser = argparse.ArgumentParser(
        prog=f"{PROG} methods",
        description=f"{methods.__doc__} Flags after -- are for `scissor-vllm serve`.",
    )
    parser.add_argument("--model", default="demo", help="(default: %(default)s)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"(default: {' '.join(METHODS)})",
    )
    parser.add_argument(
        "--suffix",
        default="",
        help="put behind each method's name, where the flags after -- make it another",
    )
    parser.add_argument(
        "--start-timeout", type=float, default=900.0, metavar="SECONDS", help="(default: 900)"
    )
    _add_asking(parser)
    args = parser.parse_args(arguments)
    questions = read_questions(args.questions, num_per_skill=args.num_per_skill)
    results = _open(args, questions)
    if args.local_media:
        folder = args.questions.resolve()
        if any(not question.video.resolve().is_relative_to(folder) for question in questions):
            folder = Path("/")
        serve_options += ["--allowed-local-media-path", str(folder)]
    server = MethodServer(args.model, tuple(serve_options), args.output.parent, args.start_timeout)
    command = shlex.join(["python", "-m", "bench.accuracy", "methods", *argv])
    failed = False
    for method in dict.fromkeys(args.methods):
        label = method + args.suffix
        previous = next((run for run in results.runs if run.label == label), None)
        if previous is not None and not previous.missing(questions, args.retention_ratio):
            print(f"{label}: measured before, left as it is", flush=True)
            continue
        try:
            with server.running(method) as base_url:
                num_missing = _ask(
                    results, label, base_url, None, command, serve_options, questions, args
                )
            failed = failed or num_missing > 0
        except (HarnessError, ServerError, RuntimeError) as error:
            print(f"{PROG}: {label}: {error}", file=sys.stderr)
            failed = True
    if any(run.answers for run in results.runs):
        _show(results)
    return int(failed)


def convert(argv: Sequence[str]) -> int:
    """Write a public benchmark's questions.jsonl."""
    parser = argparse.ArgumentParser(prog=f"{PROG} convert", description=convert.__doc__)
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("folder", type=Path, help="where questions.jsonl is written")
    parser.add_argument(
        "--annotations",
        type=Path,
        required=True,
        help="a folder (mvbench, mlvu: json/; egoschema) or a file (videomme: .parquet; nextqa: "
        ".csv)",
    )
    parser.add_argument("--videos", type=Path, required=True, help="the folder of the videos")
    parser.add_argument(
        "--skip-missing", action="store_true", help="leave out questions whose video is not there"
    )
    args = parser.parse_args(argv)
    try:
        questions = BENCHMARKS[args.benchmark](args.annotations, args.videos.resolve())
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise HarnessError(
            f"{args.annotations} is not of {args.benchmark}'s published form: {error!r}"
        ) from error
    available = [question for question in questions if question.video.is_file()]
    if lost := [question for question in questions if not question.video.is_file()]:
        by_skill = ", ".join(
            f"{n} of {skill}" for skill, n in Counter(q.skill for q in lost).items()
        )
        told = f"{len(lost)} of {len(questions)} questions lack their video: {by_skill}"
        if not args.skip_missing or not available:
            raise HarnessError(
                f"{told}; the first is {lost[0].video}: complete --videos, or leave them out with "
                "--skip-missing"
            )
        print(f"left out: {told}")
    print(f"{write_questions(args.folder, available)}: {len(available)} questions")
    return 0


def table(argv: Sequence[str]) -> int:
    """Print result files as tables."""
    parser = argparse.ArgumentParser(prog=f"{PROG} table", description=table.__doc__)
    _add_results(parser)
    parser.add_argument("--csv", action="store_true", help="every value")
    parser.add_argument(
        "--baseline",
        metavar="LABEL",
        help="what the others are compared with (default: scc, or the first)",
    )
    args = parser.parse_args(argv)
    measured = _summary(args)
    shown = (
        csv_table(measured)
        if args.csv
        else markdown(measured, args.baseline or measured.default_baseline)
    )
    print(shown.rstrip("\n"))
    return 0


def plot(argv: Sequence[str]) -> int:
    """Draw result files as PNG pictures."""
    parser = argparse.ArgumentParser(prog=f"{PROG} plot", description=plot.__doc__)
    _add_results(parser)
    parser.add_argument("--output", type=Path, help="folder (default: that of the first result)")
    args = parser.parse_args(argv)
    for path in save_plots(_summary(args), args.output or args.results[0].parent):
        print(path)
    return 0


def summary(argv: Sequence[str]) -> int:
    """Write the means over skills for `scissor-vllm bench plot --accuracy`."""
    parser = argparse.ArgumentParser(prog=f"{PROG} summary", description=summary.__doc__)
    _add_results(parser)
    parser.add_argument("--output", type=Path, help="JSON (default: print it)")
    args = parser.parse_args(argv)
    entries = accuracy_file(_summary(args))
    if args.output is None:
        print(json.dumps(entries))
    else:
        write_json(args.output, entries)
        print(args.output)
    return 0


def _open(args: argparse.Namespace, questions: list[Question]) -> Results:
    return open_results(args.output, describe_questions(args.questions, questions))


def _ask(
    results: Results,
    label: str,
    base_url: str,
    model: str | None,
    command: str,
    serve_options: list[str],
    questions: list[Question],
    args: argparse.Namespace,
) -> int:
    """Ask a server all that its label lacks; return how many questions stay without answer."""
    server: dict[str, Any] = describe_server(base_url, model)
    chat = ChatSettings(
        base_url=base_url,
        model=server["model"],
        max_tokens=args.max_tokens,
        concurrency=args.concurrency,
        local_media=args.local_media,
        max_video_bytes=int(args.max_video_mb * 1e6),
        timeout_seconds=args.timeout,
    )
    check_videos(questions, chat)
    server["serve_options"] = serve_options
    run = results.begin(label, command, environment(), server, chat.as_dict())
    return ask_missing(results, run, questions, args.retention_ratio, chat)


def _show(results: Results) -> None:
    measured = Summary([results])
    path = results.path.with_suffix(".csv")
    write_text(path, csv_table(measured))
    print(f"\n{markdown(measured, measured.default_baseline)}\n\n{results.path}, {path}")


def _summary(args: argparse.Namespace) -> Summary:
    files = [read_results(path) for path in args.results]
    return Summary(files, args.label, common=args.common)


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument(
        "--label", nargs="+", metavar="LABEL", help="only these, in this order (default: all)"
    )
    parser.add_argument(
        "--common",
        action="store_true",
        help="only questions that every label answered at all of its ratios",
    )


def _add_asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="RESULT.json")
    parser.add_argument(
        "--retention-ratio",
        type=_ratio,
        nargs="+",
        default=list(RATIOS),
        metavar="RATIO",
        help=f"(default: {' '.join(map(str, RATIOS))})",
    )
    parser.add_argument(
        "--num-per-skill",
        type=_positive,
        metavar="N",
        help="the first of each skill (default: all)",
    )
    parser.add_argument(
        "--concurrency", type=_positive, default=4, help="requests in flight (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=_positive, default=16, help="of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--local-media",
        action="store_true",
        help="send file:// URLs; the server must run on this host with --allowed-local-media-path",
    )
    parser.add_argument(
        "--max-video-mb",
        type=float,
        default=100.0,
        metavar="MB",
        help="of a file that is sent itself (default: %(default)g)",
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="(default: %(default)g)"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _ratio(text: str) -> float:
    try:
        return check_retention_ratio(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
