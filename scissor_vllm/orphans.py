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
_watched: set[int] = set()
"""Processes that watch: a fork has its parent's, and its own thread."""


def end_with_parent() -> None:
    """Have this process, if a server's process started it, end once its parent is gone.

    vLLM starts processes by fork or spawn.
    """
    parent = multiprocessing.parent_process()
    is_of_server = os.environ.get(VARIABLE) not in (None, str(os.getpid()))
    if not is_of_server or parent is None or os.getpid() in _watched:
        return
    _watched.add(os.getpid())
    threading.Thread(
        target=_wait_and_end, args=(os.getppid(),), name="scissor-vllm-orphans", daemon=True
    ).start()


def _wait_and_end(parent: int) -> None:
    # The pipe of multiprocessing's sentinel is also held by siblings that are forks.
    while os.getppid() == parent:
        time.sleep(_INTERVAL_SECONDS)
    os._exit(1)
