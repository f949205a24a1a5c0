"""``bench.encoder_proxy``: one URL of an encoder and a decoder."""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from scissor_vllm.loadtest.process import free_port, running_server
from tests.proxies import request

WAIT_SECONDS = 20
VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
TEXT = {"type": "text", "text": "What is it?"}
CHAT = "/v1/chat/completions"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def told(request: web.Request) -> web.StreamResponse:
    return web.json_response({"path": request.path})


@dataclass
class Fake:
    """A server that notes its requests, and answers as a test says."""

    name: str
    asked: list[tuple[str, str, bytes]]
    """Server, path and body of requests to either server, in order."""
    port: int = 0
    answer: Answer = told
    keys: list[str | None] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((self.name, request.path_qs, await request.read()))
        self.keys.append(request.headers.get("Authorization"))
        self.begun.set()
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            self.hung_up.set()
            raise

    async def healthy(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if self.answer is told else 500)

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self.healthy)
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()


@dataclass
class Pair:
    """A proxy in front of two servers."""

    port: int
    encoder: Fake
    decoder: Fake
    rows: Path

    @property
    def asked(self) -> list[tuple[str, str, bytes]]:
        return self.encoder.asked

    def chat(self, *parts: Any, **fields: Any) -> tuple[int, str]:
        answer = request(self.port, CHAT, "POST", chat(*parts, **fields))
        return answer.status, answer.body

    @contextmanager
    def begun(self, body: bytes) -> Iterator[http.client.HTTPConnection]:
        """Yield a connection on which a chat was sent; it is closed at the end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        try:
            connection.request("POST", CHAT, body)
            yield connection
        finally:
            connection.close()


def chat(*parts: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}], **fields}).encode()


@contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_SECONDS)


@contextmanager
def proxied(folder: Path, *options: str) -> Iterator[Pair]:
    asked: list[tuple[str, str, bytes]] = []
    fakes = Fake("encoder", asked, free_port()), Fake("decoder", asked, free_port())
    with ExitStack() as stack:
        loop = stack.enter_context(loop_in_a_thread())
        for fake in fakes:
            asyncio.run_coroutine_threadsafe(fake.start(), loop).result(WAIT_SECONDS)
        command = [sys.executable, "-m", "bench.encoder_proxy", "--rows", str(folder), *options]
        for fake in fakes:
            command += [f"--{fake.name}", f"http://127.0.0.1:{fake.port}"]
        port = free_port()
        log = folder / "proxy.log"
        stack.enter_context(
            running_server("the proxy", command, port=port, log=log, timeout_seconds=WAIT_SECONDS)
        )
        yield Pair(port, *fakes, folder)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with proxied(tmp_path_factory.mktemp("rows")) as pair:
        yield pair


@pytest.fixture
def pair(running: Pair) -> Pair:
    running.asked.clear()
    for fake in (running.encoder, running.decoder):
        fake.answer = told
        fake.keys.clear()
        fake.begun.clear()
        fake.hung_up.clear()
    return running


@pytest.mark.parametrize(
    "part",
    [
        VIDEO,
        {"video_url": {"url": "http://host/a.mp4"}},
        {"type": "video_url", "video_url": None, "uuid": "a"},
        {"type": "input_video", "input_video": "a"},
    ],
)
def test_a_chat_with_a_video_is_encoded_before_it_is_answered(
    part: dict[str, Any], pair: Pair
) -> None:
    fields = {"model": "demo", "retention_ratio": 0.1, "temperature": 0}
    answer = {
        "max_completion_tokens": 64,
        "max_tokens": 64,
        "min_tokens": 64,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
    }
    body = chat(TEXT, part, **fields, **answer, stream=True)
    assert request(pair.port, CHAT, "POST", body).status == 200
    (encoder, first, encoded), (decoder, second, decoded) = pair.asked
    assert (encoder, decoder, first, second) == ("encoder", "decoder", CHAT, CHAT)
    named = {**part, "uuid": json.loads(decoded)["messages"][0]["content"][1]["uuid"]}
    assert named["uuid"] != part.get("uuid")
    assert json.loads(decoded) == json.loads(chat(TEXT, named, **fields, **answer, stream=True))
    told_apart = {"max_completion_tokens": 1, "stream": False}
    assert json.loads(encoded) == json.loads(chat(TEXT, named, **fields, **told_apart))
    assert pair.encoder.keys == pair.decoder.keys == ["Bearer a-key-of-the-tests"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(TEXT)),
        (CHAT, chat({"type": "image_url", "image_url": {"url": "data:,"}}, TEXT)),
        (CHAT, json.dumps({"messages": [{"role": "user", "content": "a video"}]}).encode()),
        (CHAT, b'{"messages": 1}'),
        (CHAT, b"[1]"),
        (CHAT, b"no JSON"),
        (CHAT, b"\xff"),
        (CHAT, b""),
        ("/tokenize", chat(VIDEO)),
        ("/v1/models", None),
        ("/metrics", None),
        ("/version", None),
        ("/openapi.json", None),
    ],
)
def test_a_request_without_a_video_to_encode_goes_to_the_decoder_alone(
    path: str, body: bytes | None, pair: Pair
) -> None:
    answer = request(pair.port, f"{path}?a=b", "GET" if body is None else "POST", body)
    assert (answer.status, json.loads(answer.body)) == (200, {"path": path})
    assert pair.asked == [("decoder", f"{path}?a=b", body or b"")]


def test_an_error_of_the_encoder_is_the_clients(pair: Pair) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too long"}}, status=400)

    pair.encoder.answer = refuse
    assert pair.chat(VIDEO, stream=True) == (400, '{"error": {"message": "too long"}}')
    assert [name for name, *_ in pair.asked] == ["encoder"]


def test_an_error_of_the_decoder_is_the_clients(pair: Pair) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "busy"}}, status=503)

    pair.decoder.answer = refuse
    assert pair.chat(VIDEO) == (503, '{"error": {"message": "busy"}}')


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_server_that_hangs_up_without_an_answer_is_named(name: str, pair: Pair) -> None:
    async def hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    fake = getattr(pair, name)
    fake.answer = hang_up
    status, body = pair.chat(VIDEO)
    assert status == 502
    assert f"127.0.0.1:{fake.port}" in json.loads(body)["error"]["message"]


def test_health_is_that_of_both(pair: Pair) -> None:
    async def ill(_: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    assert request(pair.port, "/health").status == 200
    for fake in (pair.encoder, pair.decoder):
        fake.answer = ill
        answer = request(pair.port, "/health")
        assert answer.status == 503
        assert f"127.0.0.1:{fake.port} must be healthy" in answer.body
        fake.answer = told


def streaming(last: threading.Event, *, breaks_off: bool = False) -> Answer:
    """Return an answer of two events, the second once `last` is set."""

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: first\n\n")
        while not last.is_set():
            await asyncio.sleep(0.01)
        if breaks_off:
            assert request.transport is not None
            request.transport.abort()
        await response.write(b"data: second\n\n")
        return response

    return stream


def test_a_stream_is_passed_on_as_it_comes(pair: Pair) -> None:
    last = threading.Event()
    pair.decoder.answer = streaming(last)
    with pair.begun(chat(VIDEO, stream=True)) as connection:
        response = connection.getresponse()
        assert response.getheader("Content-Type") == "text/event-stream"
        assert response.read1() == b"data: first\n\n"
        last.set()
        assert response.read() == b"data: second\n\n"


def test_a_stream_that_breaks_off_does_not_end_as_a_whole_one(pair: Pair) -> None:
    last = threading.Event()
    pair.decoder.answer = streaming(last, breaks_off=True)
    with pair.begun(chat(VIDEO, stream=True)) as connection:
        response = connection.getresponse()
        assert response.read1() == b"data: first\n\n"
        last.set()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_client_that_hangs_up_ends_the_request_at_the_server(name: str, pair: Pair) -> None:
    fake = getattr(pair, name)
    fake.answer = streaming(threading.Event())
    with pair.begun(chat(VIDEO, stream=True)):
        assert fake.begun.wait(WAIT_SECONDS)
        assert not fake.hung_up.is_set()
    assert fake.hung_up.wait(WAIT_SECONDS)


def test_what_is_held_of_bodies_is_bounded(tmp_path: Path) -> None:
    with proxied(tmp_path, "--max-held-bytes", "1000") as pair:
        assert request(pair.port, CHAT, "POST", b"x" * 1000).status == 200
        assert request(pair.port, CHAT, "POST", b"x" * 1001).status == 503
        parts = iter([b"x" * 500, b"x" * 500])
        assert request(pair.port, CHAT, "POST", parts).status == 411
        last = threading.Event()
        pair.decoder.answer = streaming(last)
        with pair.begun(b"x" * 600) as connection:
            assert connection.getresponse().read1()
            answer = request(pair.port, CHAT, "POST", b"x" * 401)
            assert answer.status == 503
            assert "--max-held-bytes 1000, got 401 bytes beside 600" in answer.body
            last.set()
            assert request(pair.port, CHAT, "POST", b"x" * 400).status == 200
        # What ended or broke off is held no more.
        assert request(pair.port, CHAT, "POST", b"x" * 1000).status == 200


def test_every_video_image_and_audio_of_a_request_has_a_name_of_its_own(pair: Pair) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "a"}
    audio = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    for _ in range(2):
        assert pair.chat(VIDEO, TEXT, image, VIDEO, audio)[0] == 200
    bodies = [json.loads(body) for _, _, body in pair.asked]
    names = [[part.get("uuid") for part in body["messages"][0]["content"]] for body in bodies]
    assert names[0] == names[1]
    assert names[2] == names[3]
    assert names[0][1] is names[2][1] is None
    assert len({*names[0], *names[2]} - {None, "a"}) == 8


def test_rows_are_removed_after_the_answer(pair: Pair) -> None:
    file = pair.rows / "a-hash" / "encoder_cache.safetensors"
    beside = pair.rows / "encoder_cache.safetensors"
    beside.touch()
    was_there: list[bool] = []

    async def encode(_: web.Request) -> web.StreamResponse:
        file.parent.mkdir(exist_ok=True)
        file.touch()
        hashes = ["a-hash", "never-written", "..", f"../{pair.rows.name}"]
        return web.json_response({"ec_transfer_params": {name: {} for name in hashes}})

    async def decode(_: web.Request) -> web.StreamResponse:
        was_there.append(file.exists())
        return web.Response()

    pair.encoder.answer, pair.decoder.answer = encode, decode
    assert pair.chat(VIDEO)[0] == 200
    request(pair.port, "/health")
    assert was_there == [True]
    assert not file.exists()
    assert beside.exists()


def test_rows_stay_a_while_when_the_client_hangs_up(pair: Pair) -> None:
    file = pair.rows / "another-hash" / "encoder_cache.safetensors"

    async def encode(_: web.Request) -> web.StreamResponse:
        file.parent.mkdir(exist_ok=True)
        file.touch()
        return web.json_response({"ec_transfer_params": {"another-hash": {}}})

    pair.encoder.answer, pair.decoder.answer = encode, streaming(threading.Event())
    with pair.begun(chat(VIDEO, stream=True)) as connection:
        assert connection.getresponse().read1()
    assert pair.decoder.hung_up.wait(WAIT_SECONDS)
    request(pair.port, "/health")
    assert file.exists()


def test_rows_of_earlier_runs_are_removed_at_the_start(tmp_path: Path) -> None:
    rows, other = tmp_path / "a-hash" / "encoder_cache.safetensors", tmp_path / "a-hash" / "other"
    rows.parent.mkdir()
    rows.touch()
    other.touch()
    with proxied(tmp_path):
        assert not rows.exists()
    assert other.exists()
