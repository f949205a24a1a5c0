"""Starts a server in a separate session, and stops all of its processes at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

STOP_SECONDS = 30
_POLL_SECONDS = 0.5
_LOG_LINES = 40


@contextmanager
def running_server(
    name: str,
    command: Sequence[str],
    *,
    port: int,
    log: Path,
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    health_path: str = "/health",
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Yield the base URL, without ``/v1``, of a server that answers; it is stopped at the end.

    Args:
        name: the server's name in errors.
        command: the command; ``--host`` and ``--port`` are added.
        port: of 127.0.0.1; see `free_port`.
        log: file for the output.
        timeout_seconds: time limit for the first answer.
        environment: additional variables.
        folder: in which it is started; None for this process's.
        health_path: that answers 200 once it is up.
        on_wait: called twice a second until the server answers.

    Raises:
        RuntimeError: the port is taken, or the server ended or did not answer in time. The message
            of the latter two ends with the log.
    """
    if is_taken(port):
        raise RuntimeError(
            f"{name} cannot listen on port {port} of 127.0.0.1: another server answers there, and "
            "would be measured in its place; stop it or choose another port"
        )
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
            cwd=folder,
        )
        try:
            base_url = f"http://127.0.0.1:{port}"
            begin = time.monotonic()
            while not _is_healthy(f"{base_url}{health_path}"):
                waited = time.monotonic() - begin
                if process.poll() is not None or waited > timeout_seconds:
                    state = "ended" if process.poll() is not None else "is not up"
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
                    raise RuntimeError(f"{name} {state} after {waited:.0f} s; {log} ends:\n{tail}")
                on_wait()
                time.sleep(_POLL_SECONDS)
            yield base_url
        finally:
            _stop(process)


def end_on_sigterm() -> None:
    """Turn SIGTERM into an exception, so that servers are stopped first."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def is_taken(port: int) -> bool:
    """Return whether something accepts connections on a port of 127.0.0.1."""
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop all processes of a session, because they hold GPU memory until they end."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
