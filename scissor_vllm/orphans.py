"""Ends the processes of a server whose parent was killed.

vLLM's engine core does not notice that the process which started it was killed. It would hold the
GPU's memory, so that the server could not be started again. vLLM's workers end with the engine
core.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

VARIABLE = "SCISSOR_VLLM_SERVER_PID"
"""Names the process of ``scissor-vllm serve``; those that it starts end with their parents."""
_INTERVAL_SECONDS = 1.0
_watching: set[int] = set()
"""Processes with a thread that watches; a fork has its parent's numbers."""


def end_with_parent() -> None:
    """Have this process end once its parent is gone, if a server's process started it.

    In the server's process: have its forks do so. vLLM calls no plugin again in a fork. It starts
    processes by fork or spawn.
    """
    server = os.environ.get(VARIABLE)
    if server == str(os.getpid()):
        if os.getpid() not in _watching:
            _watching.add(os.getpid())
            os.register_at_fork(after_in_child=_watch)
    elif server is not None and multiprocessing.parent_process() is not None:
        _watch()


def _watch() -> None:
    if os.getpid() not in _watching:
        _watching.add(os.getpid())
        threading.Thread(
            target=_wait_and_end, args=(os.getppid(),), name="scissor-vllm-orphans", daemon=True
        ).start()


def _wait_and_end(parent: int) -> None:
    # The pipe of multiprocessing's sentinel is also held by siblings that are forks.
    while os.getppid() == parent:
        time.sleep(_INTERVAL_SECONDS)
    os._exit(1)
