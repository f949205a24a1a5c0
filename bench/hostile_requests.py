"""Sends a server thousands of requests that it must refuse, and checks that all others are right.

    python -m bench.hostile_requests [--base-url URL] [--num-requests 10000] [--json FILE]

Requests are drawn from a seed: ratios and budgets out of range or of another type, damaged files,
forbidden URLs, bodies that are no chats, small videos of mixed sizes and ratios, and clients that
hang up. Every tenth asks about the demo's clip, and its answer and K must be those of a quiet
server. Without ``--base-url`` the demo model is served. The exit code is 1 if an answer was wrong,
if the server answered with a 5xx or not at all, or if it is not healthy at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from bench.numbered_clips import make_clip
from scissor_vllm.demo.client import demo_server
from scissor_vllm.loadtest.record import environment, write_json

CLIP = Path(__file__).resolve().parents[1] / "scissor_vllm" / "demo" / "clip.mp4"
QUESTION = "what digit does the sign show ?"
RATIOS = (1.0, 0.5, 0.25, 0.1)
RIGHT_EVERY = 10
TIMEOUT_SECONDS = 300.0
MAX_HANG_UP_SECONDS = 1.0
MAX_WRONG = 100
"""After so many wrong answers no more is asked."""

REFUSED, ANSWERED, EITHER, GONE = "refused", "answered", "either", "gone"
"""What must come back: a 4xx, a 200, one of both, or nothing that anyone waits for."""

BAD_RATIOS: tuple[Any, ...] = (
    0,
    -1,
    1.0001,
    2,
    1e308,
    -0.0,
    "much",
    "0.1",
    "",
    [],
    {},
    [0.1],
    True,
    1e-9,
)
BAD_BUDGETS: tuple[Any, ...] = (0, -5, 1.5, "x", [], {}, True, 0.0)
BAD_URLS = (
    "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "ftp://example.com/a.mp4",
    "gopher://x",
    "http://[::1",
    "data:video/mp4;base64,@@@@",
    "data:video/mp4;base64",
    "data:video/mp4;base64,",
    "data:text/plain;base64,aGVsbG8=",
    "",
    "scissor-vllm:0",
)
BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"model": "demo"}',
    b'{"model": "demo", "messages": 3}',
    b'{"model": "demo", "messages": [{"role": "user", "content": [{"type": "video_url"}]}]}',
    b'{"model": "no such model", "messages": [{"role": "user", "content": "hello"}]}',
    b"\xff\xfe\x00",
    b"[" * 5000,
)


def chat(url: str | None, **fields: Any) -> bytes:
    """Return the body of a chat about a video, or of one without."""
    content: list[Any] = [{"type": "text", "text": QUESTION}]
    if url is not None:
        content.insert(0, {"type": "video_url", "video_url": {"url": url}})
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": 8,
        "temperature": 0,
        **fields,
    }
    return json.dumps(body).encode()


def data_url(data: bytes) -> str:
    """Return a file as a data URL."""
    return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"


class Requests:
    """Draws requests: (kind, body, what must come back)."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._rng = random.Random(seed)
        self._clip = CLIP.read_bytes()
        self._url = data_url(self._clip)
        sizes = ((64, 48, 2), (48, 64, 5), (320, 180, 12), (130, 70, 9), (256, 256, 33))
        self._others = [
            make_clip(
                folder / f"{number}.mp4", width=w, height=h, num_frames=n, fps=8, shown=range(n)
            ).read_bytes()
            for number, (w, h, n) in enumerate(sizes)
        ]
        self._kinds: tuple[Callable[[], tuple[str, bytes, str]], ...] = (
            self._bad_ratio,
            self._bad_budget,
            self._damaged,
            self._bad_url,
            self._bad_body,
            self._other_size,
            self._hang_up,
        )

    def draw(self) -> Iterator[tuple[str, bytes, str]]:
        """Yield requests without end."""
        while True:
            for _ in range(RIGHT_EVERY - 1):
                yield self._rng.choice(self._kinds)()
            yield "right", self.right(self._rng.choice(RATIOS)), ANSWERED

    def right(self, ratio: float) -> bytes:
        """Return a request whose answer is known."""
        return chat(self._url, retention_ratio=ratio)

    def _bad_ratio(self) -> tuple[str, bytes, str]:
        url = self._rng.choice((self._url, None))
        return "ratio", chat(url, retention_ratio=self._rng.choice(BAD_RATIOS)), REFUSED

    def _bad_budget(self) -> tuple[str, bytes, str]:
        budget = self._rng.choice(BAD_BUDGETS)
        return "budget", chat(self._url, max_retained_video_tokens=budget), REFUSED

    def _damaged(self) -> tuple[str, bytes, str]:
        data = bytearray(self._clip)
        way = self._rng.randrange(4)
        if way == 0:
            del data[self._rng.randrange(len(data)) :]
        elif way == 1:
            for _ in range(self._rng.randrange(1, 200)):
                data[self._rng.randrange(len(data))] = self._rng.randrange(256)
        elif way == 2:
            data = bytearray(self._rng.randbytes(self._rng.randrange(1, 20000)))
        else:
            begin = self._rng.randrange(len(data))
            del data[begin : begin + self._rng.randrange(1, 2000)]
        return "damaged file", chat(data_url(bytes(data)), retention_ratio=0.25), EITHER

    def _bad_url(self) -> tuple[str, bytes, str]:
        return "url", chat(self._rng.choice(BAD_URLS), retention_ratio=0.25), REFUSED

    def _bad_body(self) -> tuple[str, bytes, str]:
        return "body", self._rng.choice(BAD_BODIES), REFUSED

    def _other_size(self) -> tuple[str, bytes, str]:
        url = data_url(self._rng.choice(self._others))
        return "other size", chat(url, retention_ratio=self._rng.uniform(0.05, 1)), ANSWERED

    def _hang_up(self) -> tuple[str, bytes, str]:
        stream = self._rng.random() < 0.5
        return "hang up", chat(self._url, retention_ratio=0.25, stream=stream), GONE


class Load:
    """Requests to one server, and what came back."""

    def __init__(self, base_url: str, requests: Requests, seed: int) -> None:
        self._url = f"{base_url.rstrip('/').removesuffix('/v1')}"
        self._requests = requests
        self._rng = random.Random(seed + 1)
        self._client = httpx.AsyncClient(timeout=TIMEOUT_SECONDS)
        self._expected: dict[bytes, tuple[str, Any]] = {}
        self.statuses: dict[str, Counter[str]] = {}
        self.wrong: list[str] = []

    async def run(self, num_requests: int, concurrency: int) -> None:
        """Send them, so many at a time."""
        async with self._client:
            for ratio in RATIOS:
                body = self._requests.right(ratio)
                answer = await self._post(body)
                if answer.status_code != 200:
                    raise RuntimeError(f"the quiet server refuses a chat: {answer.text[:300]}")
                self._expected[body] = told(answer)
            drawn = islice(self._requests.draw(), num_requests)
            with tqdm(total=num_requests, unit="request", disable=None) as progress:

                async def work() -> None:
                    for request in drawn:
                        await self._send(*request)
                        progress.update()
                        if len(self.wrong) >= MAX_WRONG:
                            return

                await asyncio.gather(*(work() for _ in range(concurrency)))
            health = await self._client.get(f"{self._url}/health")
            if health.status_code != 200:
                self.wrong.append(f"/health is {health.status_code} at the end")
            for body, expected in self._expected.items():
                if told(await self._post(body)) != expected:
                    self.wrong.append("a right chat has another answer at the end")

    async def _post(self, body: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        url = f"{self._url}/v1/chat/completions"
        return await self._client.post(url, content=body, headers=headers)

    async def _send(self, kind: str, body: bytes, outcome: str) -> None:
        statuses = self.statuses.setdefault(kind, Counter())
        if outcome == GONE:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._post(body), self._rng.uniform(0, MAX_HANG_UP_SECONDS))
            statuses["gone"] += 1
            return
        try:
            answer = await self._post(body)
        except httpx.HTTPError as error:
            statuses[type(error).__name__] += 1
            self.wrong.append(f"{kind}: {error!r} for {body[-200:]!r}")
            return
        statuses[str(answer.status_code)] += 1
        is_refused, is_answered = 400 <= answer.status_code < 500, answer.status_code == 200
        is_right = {REFUSED: is_refused, ANSWERED: is_answered, EITHER: is_refused or is_answered}
        if not is_right[outcome]:
            self.wrong.append(
                f"{kind}: {answer.status_code} {answer.text[:200]} for {body[-200:]!r}"
            )
        elif body in self._expected and told(answer) != self._expected[body]:
            self.wrong.append(f"{kind}: {told(answer)}, not {self._expected[body]}")


def told(answer: httpx.Response) -> tuple[str, Any]:
    """Return an answer's text and its tokens of the video."""
    content = answer.json()
    compression = content.get("video_compression")
    return content["choices"][0]["message"]["content"], compression


def main(argv: list[str] | None = None) -> int:
    """Send requests; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--base-url", help="of a server of the demo model (default: one is started)"
    )
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the counts")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base_url = args.base_url or stack.enter_context(demo_server())
        load = Load(base_url, Requests(args.seed, folder), args.seed)
        begin = time.perf_counter()
        asyncio.run(load.run(args.num_requests, args.concurrency))
        seconds = time.perf_counter() - begin
    for kind, statuses in sorted(load.statuses.items()):
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        print(f"{kind:14}{counts}")
    total = sum(sum(statuses.values()) for statuses in load.statuses.values())
    print(f"{total} requests in {seconds:.0f} s, {len(load.wrong)} wrong")
    print(*load.wrong[:20], sep="\n")
    if args.json:
        settings = {name: getattr(args, name) for name in ("num_requests", "concurrency", "seed")}
        content = {"statuses": load.statuses, "seconds": round(seconds, 1), "wrong": load.wrong}
        write_json(args.json, {"environment": environment(), "settings": settings, **content})
    return int(bool(load.wrong))


if __name__ == "__main__":
    sys.exit(main())
