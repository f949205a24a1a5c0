"""Processes that begin with vLLM imported: forks of one process that has imported it.

A server of a tiny model spends its start importing vLLM, once in each of its processes. A fork has
it at once. vLLM's CPU platform spawns its processes because threads of OpenMP do not survive a
fork; with one thread there are none, so a server's own processes are forks too, as vLLM's are
where it serves on a GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

SMALL = {
    # Threads that wait for each other on busy cores take ten times as long as one thread alone.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles the ranks of log probabilities, for half a minute on a new machine.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""Environment of an engine of a small model, in a server or offline."""

_CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded_modules"])


class Preloaded:
    """A process that begins with vLLM imported; it leads a group of processes.

    Its methods are those of ``subprocess.Popen``.

    Args:
        function: called in it, with the arguments.
        environment: all its variables.
        log: file for what it prints.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: Any,
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        self.args = arguments
        self._process: BaseProcess = _CONTEXT.Process(
            target=_begin, args=(function, arguments, dict(environment), log)
        )
        # A new process would import the main module, which is pytest's. The first start also starts
        # the process of which all are forks.
        main = {"__main__": ModuleType("__main__")}
        with patch.dict(sys.modules, main), patch.dict(os.environ, SMALL):
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return its exit status, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit status when it has ended.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(list(map(str, self.args)), timeout)
        return status

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def run_command(command: Sequence[str], without: Iterable[str] = ()) -> None:
    """Run ``python -m module arguments``, or our command, in this process.

    Args:
        command: what a shell would run.
        without: modules that it cannot import.
    """
    if command[1] == "-m":
        module, *arguments = command[2:]
    else:
        assert Path(command[0]).name == "scissor-vllm"
        module, arguments = "scissor_vllm.cli", list(command[1:])
    for name in without:
        sys.modules[name] = None  # type: ignore[assignment]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_preloaded(
    command: Sequence[str], *, without: Sequence[str] = (), timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Return the status of a command that :func:`run_command` ran, and all that it printed.

    Raises:
        subprocess.TimeoutExpired: it was ended after ``timeout`` seconds.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        process = Preloaded(
            run_command, command, without, environment=os.environ, log=Path(log.name)
        )
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(command), status, log.read())


def _begin(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    log: Path,
) -> None:
    os.setsid()
    with log.open("ab") as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    process: Any = multiprocessing.current_process()
    process.name, process._parent_process = "MainProcess", None
    fork = multiprocessing.get_context("fork")
    with patch.object(multiprocessing, "get_context", lambda method=None: fork):
        function(*arguments)
