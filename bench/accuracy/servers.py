"""Serves the model with each method in turn, for all questions."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scissor_vllm.loadtest.process import free_port, running_server

SERVE = (sys.executable, "-m", "scissor_vllm.cli", "serve")


@dataclass(frozen=True)
class MethodServer:
    """Settings of a server with a given compression method."""

    model: str
    options: tuple[str, ...]
    """Further flags of ``scissor-vllm serve``."""
    log_folder: Path
    timeout_seconds: float

    def command(self, method: str) -> list[str]:
        """Return the command of the server."""
        return [*SERVE, self.model, "--video-compression", method, *self.options]

    @contextmanager
    def running(self, method: str, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Yield the base URL of the server, which is stopped at the end.

        Raises:
            RuntimeError: the server did not start; the message ends with its log.
        """
        self.log_folder.mkdir(parents=True, exist_ok=True)
        log = self.log_folder / f"server-{method}.log"
        print(f"\n{method}: {shlex.join(self.command(method))} > {log}", flush=True)
        with running_server(
            method,
            self.command(method),
            port=free_port(),
            log=log,
            timeout_seconds=self.timeout_seconds,
            on_wait=on_wait,
        ) as base_url:
            yield base_url


def split_serve_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before ``--``, and those after, which are the server's."""
    arguments = list(argv)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]
