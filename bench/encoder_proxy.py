"""Serves an encode-only vLLM server and a decoder behind one URL, as a load test needs it.

    python -m bench.encoder_proxy --encoder URL --decoder URL [--port 8000] [--rows FOLDER]

Both serve the same model with ``--ec-transfer-config``. A chat with a video goes to the encoder
first, for one token that is not streamed. An error of the encoder is the client's answer. The same
chat then goes to the decoder. Every other request goes to the decoder alone; /health asks both.

Both get the same new ``uuid`` for each video, image and audio. Without it, and with prefix caching
and the processor cache off, vLLM numbers them by arrival, and the decoder would read other rows.
ECExampleConnector never removes a file. With ``--rows``, the shared folder, files of earlier runs
are removed at the start, and a request's after its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web

CHAT_PATH = "/v1/chat/completions"
ROWS_FILE = "encoder_cache.safetensors"
"""Name of ECExampleConnector's file, in a folder named by the video's hash."""
GRACE_SECONDS = 60.0
"""Time in which a decoder may still read the rows of a request whose client hung up."""
OF_A_CONNECTION = {"connection", "content-encoding", "content-length", "expect", "host"} | {
    "transfer-encoding"
}
OF_THE_ANSWER = {"logprobs", "max_tokens", "min_tokens", "n", "prompt_logprobs"} | {
    *("response_format", "stream_options", "structured_outputs", "top_logprobs")
}
"""Fields that do not change a video's rows; an encoder has no answer."""


def named_chat(body: bytes) -> dict[str, Any] | None:
    """Return a chat with a video, its media named; None for every other body."""
    try:
        chat = json.loads(body)
        parts = [part for message in chat["messages"] for part in message["content"]]
    except (ValueError, KeyError, TypeError):
        return None
    has_video = False
    for part in parts:
        # vLLM reads a part by its type, or by its fields.
        names = " ".join(map(str, [part.get("type"), *part])) if isinstance(part, dict) else ""
        has_video = has_video or "video" in names
        if any(kind in names for kind in ("video", "image", "audio")):
            part["uuid"] = uuid4().hex
    return chat if has_video else None


def encoder_chat(chat: dict[str, Any]) -> dict[str, Any]:
    """Return the encoder's form of a chat."""
    kept = {name: value for name, value in chat.items() if name not in OF_THE_ANSWER}
    return {**kept, "max_completion_tokens": 1, "stream": False}


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that do not belong to a connection."""
    return {name: text for name, text in headers.items() if name.lower() not in OF_A_CONNECTION}


def refusal(status: int, message: str) -> web.Response:
    """Return an error of the proxy in the form of vLLM's."""
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


class Proxy:
    """Forwards requests; holds at most `max_held_bytes` of bodies."""

    def __init__(self, encoder: str, decoder: str, rows: Path | None, max_held_bytes: int) -> None:
        self.encoder, self.decoder = encoder.rstrip("/"), decoder.rstrip("/")
        self.rows, self.max_held_bytes = rows, max_held_bytes
        self.num_held_bytes = 0
        self.app = web.Application(client_max_size=max_held_bytes)
        self.app.cleanup_ctx.append(self._connect)
        self.app.router.add_get("/health", self.health)
        self.app.router.add_route("*", "/{path:.*}", self.answer)

    async def _connect(self, _: web.Application) -> AsyncIterator[None]:
        for file in self.rows.glob(f"*/{ROWS_FILE}") if self.rows is not None else ():
            file.unlink()
        timeout = ClientTimeout(total=None, sock_connect=10)
        async with ClientSession(connector=TCPConnector(limit=0), timeout=timeout) as self.session:
            yield

    async def health(self, _: web.Request) -> web.Response:
        """Return 200 if both servers do, 503 otherwise."""
        for url in (self.encoder, self.decoder):
            try:
                async with self.session.get(f"{url}/health", timeout=ClientTimeout(5)) as response:
                    response.raise_for_status()
            except (ClientError, TimeoutError) as error:
                return refusal(503, f"{url} must be healthy, got {error!r}: see its log")
        return web.Response()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Return the decoder's answer, or the encoder's error."""
        size = request.content_length if request.can_read_body else 0
        if size is None:
            return refusal(411, "a body must have a Content-Length, got none: send it in one piece")
        if self.num_held_bytes + size > self.max_held_bytes:
            held = f"got {size} bytes beside {self.num_held_bytes}: send fewer at a time"
            return refusal(503, f"bodies may have --max-held-bytes {self.max_held_bytes}, {held}")
        self.num_held_bytes += size
        response = web.StreamResponse()
        try:
            body = await request.read()
            chat = named_chat(body) if request.path == CHAT_PATH else None
            hashes: list[str] = []
            if chat is not None:
                body = json.dumps(chat).encode()
                url, headers = f"{self.encoder}{request.path_qs}", passed_on(request.headers)
                sent = json.dumps(encoder_chat(chat)).encode()
                async with self.session.post(url, data=sent, headers=headers) as encoded:
                    if encoded.status != 200:
                        return await self._pass(request, encoded, response)
                    hashes = list((await encoded.json()).get("ec_transfer_params") or {})
            url, headers = f"{self.decoder}{request.path_qs}", passed_on(request.headers)
            with self._using(hashes):
                async with self.session.request(
                    request.method, url, data=body or None, headers=headers
                ) as decoded:
                    return await self._pass(request, decoded, response)
        except ClientError as error:
            if response.prepared:  # Only a broken connection tells the client.
                raise
            return refusal(502, f"{url} must answer, got {error!r}: see its log")
        finally:
            self.num_held_bytes -= size

    async def _pass(
        self, request: web.Request, upstream: ClientResponse, response: web.StreamResponse
    ) -> web.StreamResponse:
        response.set_status(upstream.status, upstream.reason)
        response.headers.update(passed_on(upstream.headers))
        await response.prepare(request)
        async for chunk in upstream.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response

    @contextmanager
    def _using(self, hashes: list[str]) -> Iterator[None]:
        """Remove the rows afterwards."""
        wait = GRACE_SECONDS
        try:
            yield
            wait = 0.0
        finally:
            asyncio.get_running_loop().call_later(wait, self._remove, hashes)

    def _remove(self, hashes: list[str]) -> None:
        for name in hashes:
            if self.rows is not None and Path(name).name == name:
                (self.rows / name / ROWS_FILE).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", required=True, metavar="URL", help="without /v1")
    parser.add_argument("--decoder", required=True, metavar="URL", help="without /v1")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rows", type=Path, metavar="FOLDER", help="remove its files after use")
    parser.add_argument("--max-held-bytes", type=int, default=4 << 30, help="(default: 4 GiB)")
    args = parser.parse_args(argv)
    proxy = Proxy(args.encoder, args.decoder, args.rows, args.max_held_bytes)
    # Cancelling the handler of a client that hangs up closes the connections to the servers.
    web.run_app(
        proxy.app, host=args.host, port=args.port, handler_cancellation=True, access_log=None
    )


if __name__ == "__main__":
    main()
