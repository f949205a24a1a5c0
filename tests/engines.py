"""Offline engines for tests: stock vLLM's and ours, each in a child process that stays.

One child answers one plan after the other, with the engine core in its own process, and takes down
each engine afterwards. Stock and ours differ by their environment, so each has a child.

What an engine logs goes to a file, whose end is shown when a plan fails.
"""

from __future__ import annotations

import atexit
import gc
import os
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.preloaded import SMALL, Preloaded

PLAN_SECONDS = 600
"""At most, of a plan."""
LOG_CHARACTERS = 12000
"""Of the log, shown when a plan fails."""

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
        environment = {**os.environ, **ENVIRONMENT}
        environment.pop("VLLM_PLUGINS", None)
        if stock:
            environment["VLLM_PLUGINS"] = ""
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115
        self._plans, theirs = Pipe()
        log = Path(self._log.name)
        self._process = Preloaded(_answer_plans, theirs, environment=environment, log=log)
        theirs.close()

    def run(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Return the result of a plan."""
        try:
            self._plans.send(plan)
            if not self._plans.poll(PLAN_SECONDS):
                raise self._error(f"no result within {PLAN_SECONDS} s")
            reply: dict[str, Any] = self._plans.recv()
        except (BrokenPipeError, EOFError, ConnectionResetError):
            raise self._error(f"the process ended with status {self._process.wait(60)}") from None
        if "error" in reply:
            raise self._error(reply["error"])
        return reply

    def stop(self) -> None:
        """End the process and what it started."""
        self._process.kill()
        self._process.wait(60)
        self._plans.close()

    def _error(self, message: str) -> EngineError:
        log = Path(self._log.name).read_text(errors="replace")[-LOG_CHARACTERS:]
        return EngineError(f"{message}\n{log}")


# In the child.


def _answer_plans(plans: Connection) -> None:
    """Answer the plans that come, until no more can."""
    from vllm import LLM
    from vllm.model_executor.models import registry
    from vllm.triton_utils import dispatcher

    from tests.families import answer_plan
    from tests.tiny_models.spread import register_spread_weights

    register_spread_weights()
    with ExitStack() as stack:
        # It looks at a model's class in another process, so as not to use CUDA in this one.
        stack.enter_context(patch.object(registry, "_run_in_subprocess", lambda look: look()))
        has_kernels = False
        while True:
            try:
                plan = plans.recv()
            except EOFError:
                return
            try:
                # A start collects garbage five times, and there is none.
                with patch.object(gc, "collect"):
                    llm: Any = LLM(plan["model"], **{**OPTIONS, **plan["options"]})
                # Ranks of several load theirs in processes of their own.
                if not has_kernels and plan["options"].get("tensor_parallel_size", 1) == 1:
                    # A second engine would replace the CPU's kernels by themselves, and fails at
                    # objects of modules that the first loaded.
                    stack.enter_context(patch.object(dispatcher, "register_kernels"))
                    has_kernels = True
                reply = answer_plan(llm, plan)
                llm.llm_engine.engine_core.shutdown()
                del llm
            except Exception:
                plans.send({"error": traceback.format_exc()})
                return
            plans.send(reply)
