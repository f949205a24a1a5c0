"""A child of a server's process ends once its parent was killed, and no other process does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection

import pytest

from scissor_vllm.orphans import VARIABLE, end_with_parent


def child(pids: Connection) -> None:
    if multiprocessing.get_start_method() == "spawn":
        # vLLM calls no plugin again in a fork.
        end_with_parent()
    pids.send(os.getpid())
    time.sleep(60)


def parent(pids: Connection, method: str, is_server: bool) -> None:
    if is_server:
        os.environ[VARIABLE] = str(os.getpid())
    end_with_parent()
    multiprocessing.set_start_method(method, force=True)
    for _ in range(2):
        multiprocessing.Process(target=child, args=(pids,)).start()
    time.sleep(60)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("is_server", [True, False])
def test_children_of_a_server_end_with_it(
    monkeypatch: pytest.MonkeyPatch, method: str, is_server: bool
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # Not a daemon, which may have no children.
    started = multiprocessing.get_context("spawn").Process(
        target=parent, args=(sender, method, is_server)
    )
    started.start()
    children = [receiver.recv() for _ in range(2)]
    try:
        time.sleep(1.5)
        assert all(map(is_running, children))
        started.kill()
        started.join(10)
        deadline = time.monotonic() + (20 if is_server else 3)
        while any(map(is_running, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert any(map(is_running, children)) != is_server
    finally:
        for pid in filter(is_running, children):
            os.kill(pid, signal.SIGKILL)


def test_what_python_did_not_start_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    before = threading.active_count()
    end_with_parent()
    assert threading.active_count() == before
