"""A server that is told to stop answers what it has and takes nothing new."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from bench.numbered_clips import make_clip
from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.frontend.draining import InFlight, add_draining
from scissor_vllm.loadtest.clips import ClipShape, make_clips
from scissor_vllm.vllm_compat import wait_before_shutdown
from tests.deployment import METRICS, chart
from tests.serving import SCISSOR, STOCK, OneServer, Server, message

NUM_TOKENS = 1500
"""Of an answer in flight: some seconds."""


Answer = tuple[int, str | None]


def answer(server: Server, clip: Path, stream: bool) -> Answer:
    """Return how many tokens an answer has, and why it ended."""
    options: dict[str, Any] = {"max_completion_tokens": NUM_TOKENS}
    extra = {"ignore_eos": True, "retention_ratio": 0.5}
    messages: Any = [message(clip, "Go on.")]
    if not stream:
        whole = server.client.chat.completions.create(
            model="demo", messages=messages, extra_body=extra, **options
        )
        return whole.usage.completion_tokens, whole.choices[0].finish_reason
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = server.client.chat.completions.create(
        model="demo", messages=messages, extra_body=extra, **options
    )
    (reason,) = (c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason)
    return last.usage.completion_tokens, reason


def status_and_retry(server: Server, path: str, body: bytes | None = None) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}",
        data=body,
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, ""
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Retry-After", "")


def num_running(server: Server) -> float:
    try:
        return server.counter("vllm:num_requests_running")
    except LookupError:
        # Before the engine's first step.
        return 0


def start_answers(server: Server, clip: Path, pool: ThreadPoolExecutor) -> list[Future[Answer]]:
    """Return four answers of which none has ended while the engine works on all."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        running = [pool.submit(answer, server, clip, stream) for stream in (True, False) * 2]
        while not any(future.done() for future in running):
            if num_running(server) == len(running):
                return running
            time.sleep(0.02)
        # On a loaded machine one can end before another begins.
        ended = [future.exception() or future.result() for future in running]
        assert ended == [(NUM_TOKENS, "length")] * len(running)
    raise AssertionError("the engine never worked on all answers at once")


def assert_drains(server: Server, clip: Path) -> None:
    chat = json.dumps({"model": "demo", "messages": [message("Hello")]}).encode()
    # Of requests that come at once with a video of which vLLM knows nothing, it may refuse some.
    server.ask(clip, "First.", ratio=0.5)
    # Making a client takes as long as the last answers may.
    client = server.client
    with ThreadPoolExecutor(6) as pool:
        running = start_answers(server, clip, pool)
        deadline = time.monotonic() + 60
        # These two reach the server about when the signal does: they are taken whole or not at all.
        late = [pool.submit(answer, server, clip, stream) for stream in (True, False)]
        time.sleep(0.3)
        server.process.terminate()
        while status_and_retry(server, "/health") == (200, ""):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert status_and_retry(server, "/health") == (503, "5")
        assert status_and_retry(server, "/v1/chat/completions", chat) == (503, "5")
        assert not all(future.done() for future in running)
        with pytest.raises(openai.InternalServerError, match="send it again"):
            client.chat.completions.create(model="demo", messages=[message("Hello")])  # type: ignore[list-item]
        whole = (NUM_TOKENS, "length")
        assert [future.result() for future in running] == [whole] * len(running)
        for future in late:
            error = future.exception()
            if error is None:
                assert future.result() == whole
            else:
                assert isinstance(error, openai.InternalServerError)
                assert error.status_code == 503
    assert server.process.wait(60) in (0, -15)


def test_at_sigterm_answers_in_flight_end_whole_and_new_chats_are_sent_elsewhere(
    ending_server: Server, tmp_path: Path
) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=64, height=48, num_frames=6)
    assert_drains(ending_server, clip)


@pytest.mark.slow
def test_two_api_servers_end_their_answers_too(servers: OneServer, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=64, height=48, num_frames=6)
    assert_drains(servers.get(*SCISSOR, "demo", "--api-server-count=2"), clip)
    servers.stop()


@pytest.mark.slow
def test_the_command_of_production_stacks_chart_merges_patches_and_drains_too(
    servers: OneServer, tmp_path: Path
) -> None:
    made = chart()
    _, _published, *options = made.command
    # On a CPU it is a share of the host's memory.
    position = options.index("--gpu_memory_utilization")
    del options[position : position + 2]
    small = ("--served-model-name=demo", "--enforce-eager", "--dtype=float32")
    (metrics := tmp_path / "metrics").mkdir()
    environment = {**made.environment, METRICS: str(metrics), "HOME": os.environ["HOME"]}
    server = servers.get(*STOCK, str(demo_model_path()), *options, *small, environment=environment)
    (still,) = make_clips(tmp_path, 1, ClipShape(320, 192, num_frames=32, fps=8, camera="fixed"))
    report = server.ask(still.path, "What moves?", ratio=0.1).video_compression
    assert 0 < report["num_computed_video_patches"] < report["num_video_patches"]
    clip = make_clip(tmp_path / "clip.mp4", width=64, height=48, num_frames=6)
    assert_drains(server, clip)
    servers.stop()


# Without a server.


class Client:
    """In place of an engine's client: notes with what it is shut down."""

    def __init__(self) -> None:
        self.timeouts: list[float | None] = []
        self.fails = self.errored = False

    def shutdown(self, timeout: float | None = None) -> None:
        self.timeouts.append(timeout)
        # As vLLM's is after it has ended.
        self.errored = True
        if self.fails:
            raise RuntimeError("the engine is dead")


class Served:
    """An app whose answers end when they are told to, and its engine's client."""

    def __init__(self) -> None:
        self.app = FastAPI()
        add_draining(self.app)
        self.client: Any = Client()
        wait_before_shutdown(self.client, self.app.state.in_flight)
        self.may_end = asyncio.Event()
        self.has_begun = asyncio.Event()

        @self.app.post("/answer")
        async def answer() -> str:
            self.has_begun.set()
            await self.may_end.wait()
            return "whole"

        @self.app.post("/stream")
        async def stream() -> StreamingResponse:
            async def parts() -> Any:
                yield "begun,"
                self.has_begun.set()
                await self.may_end.wait()
                yield "whole"

            return StreamingResponse(parts())

        @self.app.get("/health")
        async def health() -> None:
            pass

        @self.app.get("/metrics")
        async def metrics() -> str:
            return "metrics"

    def http(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30)

    async def shut_down(self, timeout: float | None) -> None:
        await asyncio.to_thread(self.client.shutdown, timeout=timeout)


@pytest.mark.parametrize("path", ["/answer", "/stream"])
def test_the_engine_is_shut_down_once_nothing_is_in_flight(path: str) -> None:
    async def run() -> None:
        served = Served()
        async with served.http() as http:
            running = asyncio.create_task(http.post(path))
            await served.has_begun.wait()
            ending = asyncio.create_task(served.shut_down(30))
            while (health := await http.get("/health")).status_code == 200:
                await asyncio.sleep(0.01)
            assert (health.status_code, health.headers["retry-after"]) == (503, "5")
            refused = await http.post("/answer")
            assert refused.status_code == refused.json()["error"]["code"] == 503
            assert (await http.get("/metrics")).status_code == 200
            assert served.client.timeouts == []
            served.may_end.set()
            assert "whole" in (await running).text
            await ending
            (left,) = served.client.timeouts
            assert 20 < left <= 30

    asyncio.run(run())


@pytest.mark.parametrize("timeout", [0, 1.0, 4.5])
def test_what_is_not_answered_in_time_is_cut_after_the_engine(timeout: float) -> None:
    async def run() -> None:
        served = Served()
        async with served.http() as http:
            running = asyncio.create_task(http.post("/answer"))
            await served.has_begun.wait()
            begin = time.monotonic()
            await served.shut_down(timeout)
            assert time.monotonic() - begin < 10
            (left,) = served.client.timeouts
            margin = min(2, timeout / 2)
            assert left == (0 if timeout == 0 else pytest.approx(margin, abs=0.3))
            assert (await running).status_code == 503

    asyncio.run(run())


def test_what_is_in_flight_is_cut_where_the_engines_shutdown_fails() -> None:
    async def run() -> None:
        served = Served()
        served.client.fails = True
        async with served.http() as http:
            running = asyncio.create_task(http.post("/answer"))
            await served.has_begun.wait()
            with pytest.raises(RuntimeError, match="engine is dead"):
                await served.shut_down(0)
            assert (await running).status_code == 503

    asyncio.run(run())


def test_a_shutdown_on_the_event_loop_waits_for_nothing() -> None:
    async def run() -> None:
        served = Served()
        async with served.http() as http:
            running = asyncio.create_task(http.post("/answer"))
            await served.has_begun.wait()
            served.client.shutdown(timeout=30)
            assert (await running).status_code == 503

    asyncio.run(run())


def test_a_server_without_an_engine_has_nothing_to_wait_for() -> None:
    in_flight = InFlight()
    client: Any = SimpleNamespace(shutdown=lambda timeout=None: None, errored=False)
    wait_before_shutdown(client, in_flight)
    thread = threading.Thread(target=client.shutdown)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert in_flight.is_draining


@pytest.mark.parametrize("has_failed", [True, False])
def test_a_shutdown_tells_an_engine_that_failed_from_one_that_was_ended(has_failed: bool) -> None:
    client: Any = Client()
    client.errored = has_failed
    failures: list[bool] = []
    wait_before_shutdown(client, InFlight(), lambda: failures.append(True))
    for _ in range(2):
        client.shutdown(timeout=0)
    assert failures == [True] * has_failed
