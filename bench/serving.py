"""Runs several servers of a model in turn under the same load, and prints one table.

    python -m bench.serving PLAN.toml MODEL [--output FILE] [--only LABEL ...] [--videos FOLDER]

A plan names servers and the sweeps of each, see ``bench/serving-7b.toml``. The first server is the
baseline. Each server is started, measured by ``scissor-vllm bench``, and stopped with all of its
processes. Cells in the result file are not measured again, so the same command resumes an aborted
run.

A server with ``encoder_rows``, a folder, is two of the same options behind ``bench.encoder_proxy``:
one on the first GPU encodes only, one on the second answers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
BENCH = [sys.executable, "-m", "scissor_vllm.cli", "bench"]
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

    def output(self, path: Path) -> Path:
        """Return the sweep's result file, given the plan's."""
        return path if self.camera is None else path.with_stem(f"{path.stem}-{self.camera}")


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
        known = {"label", "serve", "options", "sweeps", "encoder_rows"}
        _check_keys(where, entry, known, {"label", "sweeps"})
        serve = entry.get("serve", "scissor-vllm")
        if serve not in COMMANDS:
            raise PlanError(f"{where}: serve must be one of {', '.join(COMMANDS)}, got {serve!r}")
        for sweep in entry["sweeps"]:
            keys = {"retention_ratio", "max_concurrency"}
            _check_keys(f"{where}: sweep", sweep, {*keys, "camera"}, keys)
        servers.append(
            Server(
                entry["label"],
                COMMANDS[serve],
                {**plan.get("environment", {}), **ENVIRONMENT[serve]},
                [*plan.get("serve_options", []), *entry.get("options", [])],
                [
                    Sweep(
                        _texts(sweep["retention_ratio"]),
                        _texts(sweep["max_concurrency"]),
                        sweep.get("camera"),
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
    for number, server in enumerate(servers):
        log = args.output.with_name(f"{args.output.stem}-{number}.log")
        try:
            with serving(server, args.model, args.port, log, args.start_timeout) as base_url:
                for sweep in server.sweeps:
                    command = [*BENCH, *bench_options, "--append", "--label", server.label]
                    output = sweep.output(args.output)
                    command += ["--base-url", base_url, "--output", str(output)]
                    if sweep.camera is not None:
                        command += ["--camera", sweep.camera]
                    command += ["--retention-ratio", *sweep.retention_ratios]
                    command += ["--max-concurrency", *sweep.concurrencies]
                    done = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=ROOT, check=False)
                    failed = failed or done.returncode != 0
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed = True
    outputs = {sweep.output(args.output) for server in servers for sweep in server.sweeps}
    for output in sorted(path for path in outputs if path.exists()):
        print(f"\n{output}")
        subprocess.run([*BENCH, "table", str(output)], cwd=ROOT, check=False)
    return int(failed)


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
