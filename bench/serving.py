"""Measures several servers of a model in turn under the same load, and prints one table.

    python -m bench.serving PLAN.toml MODEL [--output FILE] [--only LABEL ...] [--videos FOLDER]
        [--together]

A plan names servers and the sweeps of each, see ``bench/serving-7b.toml``. The first server is the
baseline. Each server is started, measured by ``scissor-vllm bench``, and stopped with all of its
processes. Cells in the result file are not measured again, so the same command resumes an aborted
run.

With ``--together`` all servers are started at once, on the GPUs that the plan names, and asked one
after the other: a start takes minutes, in which the other GPUs would wait. The plan then bounds the
memory of each, see ``bench/serving-7b-together.toml``.

A server with ``encoder_rows``, a folder, is two of the same options behind ``bench.encoder_proxy``:
one on the first GPU encodes only, one on the second answers.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
import time
import tomllib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scissor_vllm.loadtest.command import INTERRUPTED
from scissor_vllm.loadtest.command import main as bench
from scissor_vllm.loadtest.process import end_on_sigterm, free_port, running_server

ROOT = Path(__file__).resolve().parents[1]


def _stock_command() -> list[str]:
    """Return vLLM's own serve command; the model follows.

    The command ``vllm`` looks up a distribution name that the CPU build does not have, so that
    build starts its server module.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


COMMANDS = {
    "vllm": _stock_command(),
    "scissor-vllm": [sys.executable, "-m", "scissor_vllm.cli", "serve"],
}
ENVIRONMENT = {
    # Without VLLM_PLUGINS, vLLM loads every installed plugin.
    "vllm": {"VLLM_PLUGINS": ""},
    "scissor-vllm": {},
}
PROXY = [sys.executable, "-m", "bench.encoder_proxy"]
SERVED_NAME = "measured"


class PlanError(Exception):
    """A plan that cannot be followed."""


@dataclass(frozen=True)
class Sweep:
    """Every ratio at every concurrency."""

    retention_ratios: list[str]
    concurrencies: list[str]
    camera: str | None = None
    """``--camera`` of generated clips, whose results have a separate file."""
    num_frames: int | None = None
    """``--num-frames`` of generated clips, likewise."""
    extra_body: dict[str, Any] | None = None
    """``--extra-body``."""

    def output(self, path: Path) -> Path:
        """Return the sweep's result file, given the plan's."""
        parts = [path.stem, self.camera, self.num_frames and f"{self.num_frames}-frames"]
        return path.with_stem("-".join(str(part) for part in parts if part))

    def arguments(self) -> list[str]:
        """Return what ``scissor-vllm bench`` is told of it."""
        arguments = ["--retention-ratio", *self.retention_ratios]
        arguments += ["--max-concurrency", *self.concurrencies]
        if self.camera is not None:
            arguments += ["--camera", self.camera]
        if self.num_frames is not None:
            arguments += ["--num-frames", str(self.num_frames)]
        if self.extra_body is not None:
            arguments += ["--extra-body", json.dumps(self.extra_body)]
        return arguments


_OF_A_SWEEP = {"camera", "num_frames", "extra_body"}
"""What a plan may say of a sweep."""


@dataclass(frozen=True)
class Server:
    """A server of the model, and its sweeps."""

    label: str
    command: list[str]
    environment: dict[str, str]
    options: list[str]
    sweeps: list[Sweep]
    encoder_rows: str | None = None
    """Folder in which an encode-only instance leaves rows, None without one."""

    def instance(self, role: str, gpu: int) -> Server:
        """Return the instance that encodes or answers."""
        transfer = {
            "ec_connector": "ECExampleConnector",
            "ec_role": role,
            "ec_connector_extra_config": {"shared_storage_path": self.encoder_rows},
        }
        return replace(
            self,
            label=f"{self.label}, {role}",
            environment={**self.environment, "CUDA_VISIBLE_DEVICES": str(gpu)},
            options=[*self.options, "--ec-transfer-config", json.dumps(transfer)],
            encoder_rows=None,
        )


def read_plan(path: Path) -> tuple[list[Server], list[str]]:
    """Return the servers of a plan, and the options of all sweeps.

    Raises:
        PlanError: the file is no plan; the message names the entry.
    """
    try:
        plan = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{path} must be a TOML file: {error}") from error
    known = {"serve_options", "bench_options", "environment", "servers"}
    _check_keys(f"{path}", plan, known, {"servers"})
    servers = []
    for entry in plan["servers"]:
        where = f"{path}: server {entry.get('label', '')!r}"
        known = {"label", "serve", "options", "sweeps", "encoder_rows", "gpu"}
        _check_keys(where, entry, known, {"label", "sweeps"})
        serve = entry.get("serve", "scissor-vllm")
        if serve not in COMMANDS:
            raise PlanError(f"{where}: serve must be one of {', '.join(COMMANDS)}, got {serve!r}")
        for sweep in entry["sweeps"]:
            keys = {"retention_ratio", "max_concurrency"}
            _check_keys(f"{where}: sweep", sweep, keys | _OF_A_SWEEP, keys)
        on_gpu = {"CUDA_VISIBLE_DEVICES": str(entry["gpu"])} if "gpu" in entry else {}
        servers.append(
            Server(
                entry["label"],
                COMMANDS[serve],
                {**plan.get("environment", {}), **ENVIRONMENT[serve], **on_gpu},
                [*plan.get("serve_options", []), *entry.get("options", [])],
                [
                    Sweep(
                        _texts(sweep["retention_ratio"]),
                        _texts(sweep["max_concurrency"]),
                        **{key: sweep[key] for key in _OF_A_SWEEP & sweep.keys()},
                    )
                    for sweep in entry["sweeps"]
                ],
                entry.get("encoder_rows"),
            )
        )
    return servers, list(plan.get("bench_options", []))


def _check_keys(where: str, entry: dict[str, Any], known: set[str], needed: set[str]) -> None:
    if unknown := entry.keys() - known:
        raise PlanError(f"{where} has unknown {', '.join(sorted(unknown))}: use {sorted(known)}")
    if missing := needed - entry.keys():
        raise PlanError(f"{where} lacks {', '.join(sorted(missing))}")


def _texts(values: Sequence[object]) -> list[str]:
    return [str(value) for value in values]


@contextmanager
def serving(server: Server, model: str, port: int, log: Path, timeout: float) -> Iterator[str]:
    """Yield the base URL of a running server, and stop all of its processes at the end.

    Raises:
        RuntimeError: the server ended or did not answer in time; the message ends with its log.
    """
    if server.encoder_rows is not None:
        with _disaggregated(server, server.encoder_rows, model, port, log, timeout) as base_url:
            yield base_url
        return
    command = [*server.command, model, *server.options, "--served-model-name", SERVED_NAME]
    print(f"\n{server.label}: {shlex.join(command)}", flush=True)
    begin = time.monotonic()
    with running_server(
        server.label,
        command,
        port=port,
        log=log,
        timeout_seconds=timeout,
        environment=server.environment,
    ) as base_url:
        print(f"{server.label}: up after {time.monotonic() - begin:.0f} s", flush=True)
        yield base_url


@contextmanager
def _disaggregated(
    server: Server, rows: str, model: str, port: int, log: Path, timeout: float
) -> Iterator[str]:
    """Yield the base URL of a proxy in front of an encode-only instance and one that answers."""

    def start(role: str, gpu: int) -> AbstractContextManager[str]:
        role_log = log.with_stem(f"{log.stem}-{role}")
        return serving(server.instance(role, gpu), model, free_port(), role_log, timeout)

    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        starts = [start("ec_producer", 0), start("ec_consumer", 1)]
        encoder, decoder = threads.map(stack.enter_context, starts)
        command = [*PROXY, "--encoder", encoder, "--decoder", decoder, "--rows", rows]
        yield stack.enter_context(
            running_server(
                "the proxy", command, port=port, log=log, timeout_seconds=timeout, folder=ROOT
            )
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 1 if a server could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("model", help="a name or a folder")
    parser.add_argument("--output", type=Path, default=Path("bench-results", "serving.json"))
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="these servers (default: all)")
    parser.add_argument("--videos", type=Path, help="a folder of videos (default: clips are made)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--together",
        action="store_true",
        help="start all servers at once (default: one after the other)",
    )
    parser.add_argument("--start-timeout", type=float, default=900.0, metavar="SECONDS")
    args = parser.parse_args(argv)
    try:
        servers, bench_options = read_plan(args.plan)
        if args.only:
            if unknown := set(args.only) - {server.label for server in servers}:
                raise PlanError(f"{args.plan} has no server {', '.join(sorted(unknown))}")
            servers = [server for server in servers if server.label in args.only]
    except PlanError as error:
        parser.error(str(error))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.videos:
        bench_options += ["--videos", str(args.videos)]
    failed = False
    # Closed, it stops its servers whatever ends the loop.
    with closing(_running(servers, args)) as running:
        for server, base_url in running:
            failed = failed or base_url is None
            for sweep in server.sweeps if base_url is not None else ():
                argv = [*bench_options, "--append", "--label", server.label, *sweep.arguments()]
                argv += ["--base-url", str(base_url), "--output", str(sweep.output(args.output))]
                failed = _bench(argv) != 0 or failed
    outputs = {sweep.output(args.output) for server in servers for sweep in server.sweeps}
    for output in sorted(path for path in outputs if path.exists()):
        print(f"\n{output}")
        bench(["table", str(output)])
    return int(failed)


def _bench(argv: list[str]) -> int:
    """Measure in this process, so that vLLM is imported once; return 1 if a cell has no answer.

    Raises:
        KeyboardInterrupt: it was interrupted, which ``scissor-vllm bench`` tells by its status.
    """
    with redirect_stdout(io.StringIO()):
        status = bench(argv)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    return status


def _running(
    servers: Sequence[Server], args: argparse.Namespace
) -> Generator[tuple[Server, str | None], None, None]:
    """Yield each server with its base URL, None for one that did not start, which is told.

    One after the other runs, or all do until the last was measured.
    """

    def log_of(number: int) -> Path:
        output: Path = args.output
        return output.with_name(f"{output.stem}-{number}.log")

    def enter(stack: ExitStack, number: int, port: int) -> str | None:
        start = serving(servers[number], args.model, port, log_of(number), args.start_timeout)
        try:
            return stack.enter_context(start)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return None

    if not args.together:
        for number, server in enumerate(servers):
            with ExitStack() as stack:
                yield server, enter(stack, number, args.port)
        return
    with ExitStack() as all_servers, ThreadPoolExecutor(len(servers)) as threads:
        ports = [free_port() for _ in servers]
        urls = threads.map(enter, [all_servers] * len(servers), range(len(servers)), ports)
        yield from zip(servers, list(urls), strict=True)


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
