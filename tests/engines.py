"""Offline engines for tests: stock vLLM's and ours, each in a child process that stays.

A process that serves a tiny model spends its time importing vLLM. So one child answers one plan
after the other, with the engine core in its own process, and takes down each engine afterwards.
Stock and ours differ by their environment, so each has a child.

A plan and its result are one line of JSON each. What an engine logs goes to a file, whose end is
shown when a plan fails.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

PLAN_SECONDS = 600
"""At most, of a plan."""
LOG_CHARACTERS = 12000
"""Of the log, shown when a plan fails."""

SMALL = {
    # Threads that wait for each other on busy cores take ten times as long as one thread alone.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles the ranks of log probabilities, for half a minute on a new machine.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""Environment of an engine of a small model, in a server or offline."""
ENVIRONMENT = {
    **SMALL,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
OPTIONS = {"enforce_eager": True, "dtype": "float32", "num_gpu_blocks_override": 1024}
"""Of every engine where a plan does not say otherwise: a cache of a GiB takes long to fill."""

_CHILDREN: dict[bool, Child] = {}


class EngineError(AssertionError):
    """A plan failed; the message has the end of the child's log."""


def run_plan(plan: Mapping[str, Any], *, stock: bool) -> dict[str, Any]:
    """Return what an engine answers to a plan.

    A child that failed, or that speculated, is replaced for the next plan.

    Args:
        plan: as ``tests.families`` makes it.
        stock: whether vLLM is without any plugin. Otherwise it finds ours by its entry point.

    Raises:
        EngineError: the plan raised, ended its process, or took too long.
    """
    child = _CHILDREN.get(stock)
    if child is None:
        child = _CHILDREN[stock] = Child(stock)
    # After an engine that speculates, the next one that does accepts wrong tokens.
    is_last = "speculative_config" in plan["options"]
    try:
        return child.run(plan)
    except BaseException:
        is_last = True
        raise
    finally:
        if is_last:
            child.stop()
            del _CHILDREN[stock]


@atexit.register
def stop_children() -> None:
    """Stop all children; a later plan starts another."""
    while _CHILDREN:
        _CHILDREN.popitem()[1].stop()


class Child:
    """A process that answers plans."""

    def __init__(self, stock: bool) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
        if stock:
            environment["VLLM_PLUGINS"] = ""
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        results, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engines", str(write)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=(write,),
            start_new_session=True,
            env={**environment, **ENVIRONMENT},
        )
        os.close(write)
        self._results = os.fdopen(results)

    def run(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Return the result of a plan."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(plan), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._error("the process ended between two plans") from None
        if not select.select([self._results], [], [], PLAN_SECONDS)[0]:
            raise self._error(f"no result within {PLAN_SECONDS} s")
        line = self._results.readline()
        if not line:
            raise self._error(f"the process ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._error(reply["error"])
        return reply

    def stop(self) -> None:
        """End the process and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._results.close()

    def _error(self, message: str) -> EngineError:
        log = Path(self._log.name).read_text(errors="replace")[-LOG_CHARACTERS:]
        return EngineError(f"{message}\n{log}")


# In the child.


def answer_plans(answer: Callable[[Any, Any], dict[str, Any]], results: int) -> None:
    """Answer the plans that come on standard input, until it ends.

    Args:
        answer: of an engine and a plan.
        results: file descriptor for the results.
    """
    from vllm import LLM
    from vllm.model_executor.models import registry
    from vllm.triton_utils import dispatcher

    with ExitStack() as stack:
        output = stack.enter_context(os.fdopen(results, "w"))
        # It looks at a model's class in another process, so as not to use CUDA in this one.
        stack.enter_context(patch.object(registry, "_run_in_subprocess", lambda look: look()))
        for number, line in enumerate(sys.stdin):
            plan = json.loads(line)
            try:
                # A start collects garbage five times, and there is none.
                with patch.object(gc, "collect"):
                    llm: Any = LLM(plan["model"], **{**OPTIONS, **plan["options"]})
                if number == 0:
                    # A second engine would replace the CPU's kernels by themselves, and fails at
                    # objects of modules that the first loaded.
                    stack.enter_context(patch.object(dispatcher, "register_kernels"))
                reply = answer(llm, plan)
                llm.llm_engine.engine_core.shutdown()
                del llm
            except Exception:
                print(json.dumps({"error": traceback.format_exc()}), file=output, flush=True)
                return
            print(json.dumps(reply), file=output, flush=True)


if __name__ == "__main__":
    from tests.families import answer_plan
    from tests.tiny_models.spread import register_spread_weights

    register_spread_weights()
    answer_plans(answer_plan, int(sys.argv[1]))
