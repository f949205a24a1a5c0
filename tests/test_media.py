"""Media that cannot be fetched are the client's to mend: one sentence, a 4xx, a reason."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.multimodal.media.video import VideoMediaIO

from scissor_vllm.frontend.media import _IMAGE, _VIDEO, VideoMediaConnector
from scissor_vllm.frontend.refusal import RefusedVideoError, reason_of
from scissor_vllm.metrics import Reason

DATA = b"the bytes of a video"
ENCODED = base64.b64encode(DATA).decode()


class Handler(BaseHTTPRequestHandler):
    """A host with all that can go wrong, each under a path of its own."""

    def do_GET(self) -> None:
        path, _, argument = self.path[1:].partition("/")
        if path == "closes":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"begin")
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        elif path == "hangs":
            time.sleep(3)
        elif path == "to":
            self.send_response(302)
            self.send_header("Location", f"http://{argument}")
            self.end_headers()
        else:
            self.send_response(200 if path == "video" else int(path))
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.fixture(autouse=True)
def decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """No decoding, and no patience."""
    monkeypatch.setattr(VideoMediaIO, "load_bytes", lambda self, data: data)
    monkeypatch.setenv("VLLM_VIDEO_FETCH_TIMEOUT", "1")
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "1")
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")


WAYS = ("fetch_video_async", "fetch_video", "fetch_frame_async")
"""Of a video, and of an image that becomes a frame."""


def fetch(url: str, *, is_async: bool = True, **options: Any) -> Any:
    return fetch_by(WAYS[0] if is_async else WAYS[1], url, **options)


def fetch_by(way: str, url: str, **options: Any) -> Any:
    connector = VideoMediaConnector(**options)
    if not way.endswith("async"):
        return getattr(connector, way)(url)

    async def run() -> Any:
        try:
            return await getattr(connector, way)(url)
        finally:
            # Of this loop; a server has one.
            kinds = (connector, *map(connector._checking_redirects, (_VIDEO, _IMAGE)))
            for connection in (kind.connection for kind in kinds):
                if connection._async_client is not None:
                    await connection._async_client.close()
                    connection._async_client = None

    return asyncio.run(run())


def refusal(
    url: str, status: int, reason: Reason, ways: Sequence[str] = WAYS, **options: Any
) -> str:
    """Return the message of a video's refusal, which is the same asked for in each way."""
    messages = []
    for way in ways:
        with pytest.raises(Exception) as raised:  # noqa: PT011
            fetch_by(way, url, **options)
        error = create_error_response(raised.value).error
        assert error.code == status, error
        # A decoder does not know the field.
        assert error.param in (None, "image_url" if "frame" in way else "video_url")
        assert reason_of(raised.value) is reason
        assert "\n" not in error.message
        assert len(error.message) < 300
        messages.append(error.message)
    for way, message in zip(ways, messages, strict=True):
        if "frame" in way:
            # Errors of libraries may differ.
            told = message.partition(" (")[0].replace("an image", "a video")
            assert told.replace("the image", "the video") == messages[0].partition(" (")[0]
    return messages[0]


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize(
    "head",
    [
        "data:video/mp4;base64,",
        "data:;base64,",
        "data:video/webm;codecs=vp8,opus;base64,",
        'DATA:video/webm;codecs="vp9, opus";base64,',
        "data:video/mp4;BASE64,",
    ],
)
def test_a_data_url_is_read_with_whatever_parameters(head: str, is_async: bool) -> None:
    assert fetch(head + ENCODED, is_async=is_async) == DATA


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("head", ["data:video/mp4;base64,", "data:video/webm;codecs=a,b;base64,"])
def test_nothing_keeps_a_data_url_once_its_video_is_read(head: str, way: str) -> None:
    url = head + base64.b64encode(bytes(1 << 22)).decode()
    tracemalloc.start()
    try:
        assert fetch_by(way, url) == bytes(1 << 22)
        deadline = time.monotonic() + 10
        # The thread that read the video may hold it a little longer.
        while (kept := tracemalloc.get_traced_memory()[0]) > 1 << 20:
            assert time.monotonic() < deadline, f"{kept} bytes are kept"
            time.sleep(0.01)
            gc.collect()
    finally:
        tracemalloc.stop()


def test_a_url_that_is_too_long_is_refused() -> None:
    message = refusal("http://a/" + "b" * 65_536, 400, Reason.MEDIA_NOT_FETCHED)
    assert "at most 65536 characters, got 65545: send a data URL" in message


@pytest.mark.parametrize("is_async", [True, False])
def test_a_url_is_fetched(port: int, is_async: bool) -> None:
    url = f"http://127.0.0.1:{port}/video"
    assert fetch(url, is_async=is_async) == DATA
    assert fetch(url, is_async=is_async, allowed_media_domains=["127.0.0.1"]) == DATA
    redirected = f"http://127.0.0.1:{port}/to/127.0.0.1:{port}/video"
    assert fetch(redirected, is_async=is_async, allowed_media_domains=["127.0.0.1"]) == DATA


@pytest.mark.parametrize(
    "url",
    ["data:video/mp4,plain", "data:", "data:video/mp4;base64", "data:video/mp4;base64,n%t"],
)
def test_a_data_url_without_base64_is_refused(url: str) -> None:
    assert "base64" in refusal(url, 400, Reason.MEDIA_NOT_FETCHED)


@pytest.mark.parametrize(
    "url", ["ftp://a/b.mp4", "/etc/passwd", "video.mp4", "http://", "http://["]
)
def test_what_is_no_url_of_a_video_is_refused(url: str) -> None:
    assert "must be an http" in refusal(url, 400, Reason.MEDIA_NOT_FETCHED)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("404", "HTTP 404"),
        ("403", "HTTP 403"),
        ("500", "HTTP 500"),
        ("503", "HTTP 503"),
        ("429", "HTTP 429"),
        ("closes", "127.0.0.1 failed"),
        ("hangs", "127.0.0.1"),
        ("to/nowhere.invalid/a", "failed"),
    ],
)
def test_what_a_host_does_wrong_is_told(port: int, path: str, told: str) -> None:
    url = f"http://127.0.0.1:{port}/{path}"
    assert told in refusal(url, 422, Reason.MEDIA_NOT_FETCHED)


def test_a_host_that_is_not_there_is_told() -> None:
    for url in ("http://nowhere.invalid/a.mp4", "http://127.0.0.1:9/a.mp4"):
        assert "fetching the video from" in refusal(url, 422, Reason.MEDIA_NOT_FETCHED)


def test_files_are_read_where_the_operator_allows_it_alone(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in" / "a.mp4", tmp_path / "b.mp4"
    inside.parent.mkdir()
    inside.write_bytes(DATA)
    outside.write_bytes(DATA)
    allowed = {"allowed_local_media_path": str(inside.parent)}
    told = refusal(f"file://{inside}", 400, Reason.MEDIA_NOT_ALLOWED)
    assert "--allowed-local-media-path" in told
    refusal(f"file://{outside}", 400, Reason.MEDIA_NOT_ALLOWED, **allowed)
    refusal(f"file://{inside}x", 422, Reason.MEDIA_NOT_FETCHED, **allowed)


def test_hosts_that_the_operator_does_not_allow_are_not_asked(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    get = Handler.do_GET

    def counted(self: Handler) -> None:
        asked.append(self.headers["Host"])
        get(self)

    monkeypatch.setattr(Handler, "do_GET", counted)
    only = {"allowed_media_domains": ["127.0.0.1"]}
    for url in (
        f"http://localhost:{port}/video",
        "http://169.254.169.254/latest/meta-data",
        f"http://127.0.0.1:{port}/to/localhost:{port}/video",
        f"http://127.0.0.1:{port}/to/127.0.0.1:{port}/to/localhost:{port}/video",
    ):
        told = refusal(url, 400, Reason.MEDIA_NOT_ALLOWED, **only)
        assert "--allowed-media-domains" in told
    assert asked
    assert all(host.startswith("127.0.0.1") for host in asked)


def test_what_a_decoder_refuses_stays_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, data: bytes) -> Any:
        raise RefusedVideoError("no frames", reason=Reason.VIDEO_TOO_LARGE)

    monkeypatch.setattr(VideoMediaIO, "load_bytes", refuse)
    url = f"data:video/mp4;base64,{ENCODED}"
    told = refusal(url, 400, Reason.VIDEO_TOO_LARGE, WAYS[:2])
    assert told == "no frames"


def damaged_images() -> dict[str, bytes]:
    """Return files for which Pillow raises what vLLM does not catch."""
    png, bmp = io.BytesIO(), io.BytesIO()
    picture = Image.effect_noise((40, 50), 100)
    picture.save(png, "PNG")
    picture.save(bmp, "BMP")
    chunk, size = bytearray(png.getvalue()), bytearray(bmp.getvalue())
    begin = chunk.index(b"IDAT") - 4
    length = int.from_bytes(chunk[begin : begin + 4], "big")
    chunk[begin : begin + 4] = (length // 2).to_bytes(4, "big")
    size[18:26] = (30000).to_bytes(4, "little") * 2
    return {"a chunk's length": bytes(chunk), "its size": bytes(size), "text": b"hello"}


@pytest.mark.parametrize("name", damaged_images())
def test_an_image_that_cannot_be_decoded_is_a_bad_request(name: str) -> None:
    data = base64.b64encode(damaged_images()[name]).decode()
    with pytest.raises(Exception) as raised:  # noqa: PT011
        fetch_by("fetch_frame_async", f"data:image/png;base64,{data}")
    assert create_error_response(raised.value).error.code == 400
    if name != "text":
        assert "send it as JPEG or PNG" in str(raised.value)
        assert reason_of(raised.value) is Reason.UNREADABLE_VIDEO
