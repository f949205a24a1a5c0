"""A server ends with an error when one of its processes is killed, and it starts anew."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from bench.numbered_clips import make_clip
from tests.serving import SCISSOR, OneServer, Server, message
from tests.test_draining import num_running

NUM_IN_FLIGHT = 4
CLIENT_SECONDS = 20.0
"""Longest that a client waits after the kill: vLLM's API servers have 5 s to end."""
END_SECONDS = 40.0
ENGINE, WORKER, API_SERVER, PARENT = "engine core", "worker", "API server", "parent"


def told(server: Server, clip: Path, stream: bool) -> str:
    """Return how a long answer ended, for a client."""
    options: dict[str, Any] = {
        "model": "demo",
        "messages": [message(clip, "Go on.")],
        "max_completion_tokens": 3000,
        "extra_body": {"ignore_eos": True},
    }
    create: Any = server.client.chat.completions.create
    try:
        if stream:
            for _ in create(**options, stream=True):
                pass
        else:
            create(**options)
    except openai.APIStatusError as error:
        return f"{error.status_code} {error.message}"
    except openai.APIConnectionError:
        return "closed"
    except openai.APIError as error:
        return f"event {error.message}"
    except Exception as error:
        # The client's library passes on what breaks within a body.
        return "closed" if "closed" in str(error) else repr(error)
    return "whole"


def process_of(parent: psutil.Process, name: str) -> psutil.Process:
    """Return a process of a server by its place: the engine core alone has children."""
    children = [c for c in parent.children() if "resource_tracker" not in " ".join(c.cmdline())]
    (engine,) = (child for child in children if child.children())
    found = {ENGINE: engine, WORKER: engine.children()[0], PARENT: parent}
    if name == API_SERVER:
        return next(child for child in children if child != engine)
    return found[name]


def assert_ends_clearly(server: Server, clip: Path, victim: str) -> list[str]:
    """Kill a process of a server under load; return how the answers in flight ended."""
    parent = psutil.Process(server.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    killed = process_of(parent, victim)
    with ThreadPoolExecutor(NUM_IN_FLIGHT) as pool:
        running = [
            pool.submit(told, server, clip, number % 2 == 0) for number in range(NUM_IN_FLIGHT)
        ]
        deadline = time.monotonic() + 60
        while num_running(server) < NUM_IN_FLIGHT:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        begin = time.monotonic()
        killed.kill()
        ends = [future.result() for future in running]
        assert time.monotonic() - begin < CLIENT_SECONDS
    assert "whole" not in ends
    assert server.process.wait(END_SECONDS) != 0
    _, left = psutil.wait_procs(processes, END_SECONDS)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
    with pytest.raises(openai.APIConnectionError):
        server.client.models.list()
    return ends


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_api_servers", "victims"),
    [(1, (ENGINE, WORKER, PARENT)), (2, (ENGINE, API_SERVER, PARENT))],
)
def test_a_killed_process_ends_the_server_with_an_error_and_it_starts_anew(
    servers: OneServer, tmp_path: Path, num_api_servers: int, victims: tuple[str, ...]
) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=64, height=48, num_frames=6)
    command = (*SCISSOR, "demo", f"--api-server-count={num_api_servers}")
    for victim in victims:
        servers.stop()
        server = servers.get(*command)
        server.ask(clip, "First.", max_tokens=1)
        ends = assert_ends_clearly(server, clip, victim)
        if num_api_servers == 1 and victim != PARENT:
            # The API server lives to say it.
            streamed, whole = ends[::2], ends[1::2]
            assert all(end.startswith("event EngineCore encountered") for end in streamed), ends
            assert all(end.startswith("500 ") and "EngineCore" in end for end in whole), ends
        else:
            assert set(ends) <= {"closed"} or all(end.startswith("503") for end in ends), ends
    servers.stop()
    assert servers.get(*command).ask(clip, "First.", max_tokens=1).usage.completion_tokens == 1
    servers.stop()
