"""Sends requests to one server, and judges what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

import httpx
from tqdm import tqdm

from bench.hostile_requests.traffic import (
    ANSWERED,
    EITHER,
    ESTIMATE,
    GONE,
    REFUSED,
    TOKENIZE,
    Offer,
    Request,
    Traffic,
)

TIMEOUT_SECONDS = 300.0
MAX_HANG_UP_SECONDS = 1.0
MAX_WRONG = 100
"""After so many wrong answers no more is asked."""
BUSY = 503


class Load:
    """Requests to one server, and what came back.

    Args:
        base_url: of the server, without ``/v1``.
        traffic: what is sent.
        seed: of hang-ups.
        transport: in place of HTTP.
    """

    def __init__(
        self,
        base_url: str,
        traffic: Traffic,
        seed: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = base_url
        self._traffic = traffic
        self._rng = random.Random(seed + 1)
        # httpx's own limit is 100 connections: the others would wait here.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self._client = httpx.AsyncClient(
            timeout=TIMEOUT_SECONDS, limits=limits, transport=transport
        )
        self._expected: dict[Request, Any] = {}
        self.statuses: dict[str, Counter[str]] = {}
        self.wrong: list[str] = []
        self.burst: dict[str, Any] | None = None

    async def run(
        self, num_requests: int, concurrency: int, seconds: float, num_at_once: int
    ) -> None:
        """Ask a quiet server, send the load, and ask again what was asked first.

        Args:
            num_requests: of the load, at least.
            concurrency: requests in flight.
            seconds: that the load takes, at least.
            num_at_once: requests of a burst before the load, 0 for none.
        """
        async with self._client:
            for request in self._traffic.known:
                answer = await self._post(request)
                if answer.status_code != 200:
                    raise RuntimeError(f"the quiet server refuses a chat: {answer.text[:300]}")
                self._expected[request] = told(request, answer)
            if num_at_once:
                await self._send_at_once(num_at_once)
            await self._send_all(num_requests, concurrency, seconds)
            health = await self._client.get(f"{self._url}/health")
            if health.status_code != 200:
                self.wrong.append(f"/health is {health.status_code} at the end")
            for request, expected in self._expected.items():
                answer = await self._post(request)
                if answer.status_code != 200 or told(request, answer) != expected:
                    self.wrong.append(f"{request.kind}: another answer at the end")

    async def _send_all(self, num_requests: int, concurrency: int, seconds: float) -> None:
        drawn = self._traffic.draw()
        deadline = time.monotonic() + seconds
        num_sent = 0
        with tqdm(total=num_requests, unit="request", disable=None) as progress:

            async def work() -> None:
                nonlocal num_sent
                while num_sent < num_requests or time.monotonic() < deadline:
                    num_sent += 1
                    await self._send(next(drawn), self.statuses)
                    progress.update()
                    if len(self.wrong) >= MAX_WRONG:
                        return

            await asyncio.gather(*(work() for _ in range(concurrency)))

    async def _send_at_once(self, num_requests: int) -> None:
        """Send requests at the same time: each is answered, or told that the server is busy."""
        statuses: dict[str, Counter[str]] = {}
        begin = time.monotonic()
        drawn = islice(self._traffic.draw_answerable(), num_requests)
        await asyncio.gather(
            *(self._send(request, statuses, may_be_busy=True) for request in drawn)
        )
        seconds = round(time.monotonic() - begin, 1)
        self.burst = {"num_requests": num_requests, "seconds": seconds, "statuses": statuses}

    async def _post(self, request: Request) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return await self._client.post(
            f"{self._url}{request.path}", content=request.body, headers=headers
        )

    async def _send(
        self, request: Request, counted: dict[str, Counter[str]], may_be_busy: bool = False
    ) -> None:
        statuses = counted.setdefault(request.kind, Counter())
        if request.outcome == GONE:
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                await asyncio.wait_for(
                    self._post(request), self._rng.uniform(0, MAX_HANG_UP_SECONDS)
                )
            statuses["gone"] += 1
            return
        try:
            answer = await self._post(request)
        except httpx.HTTPError as error:
            statuses[type(error).__name__] += 1
            self._judge(request, f"{error!r}")
            return
        status = answer.status_code
        statuses[str(status)] += 1
        is_refused, is_answered = 400 <= status < 500, status == 200
        if may_be_busy and (is_refused or status == BUSY):
            return
        is_right = {REFUSED: is_refused, ANSWERED: is_answered, EITHER: is_refused or is_answered}
        if not is_right[request.outcome]:
            self._judge(request, f"{status} {answer.text[:200]}")
        elif request in self._expected and told(request, answer) != self._expected[request]:
            self._judge(request, f"{told(request, answer)}, not {self._expected[request]}")

    def _judge(self, request: Request, got: str) -> None:
        self.wrong.append(f"{request.kind}: {got} for {request.body[-200:]!r}")


def told(request: Request, answer: httpx.Response) -> Any:
    """Return what an answer says that is the same each time."""
    if request.path in (TOKENIZE, ESTIMATE):
        return answer.json()
    if request.is_stream:
        return _of_stream(answer.text.splitlines())
    content = answer.json()
    return content["choices"][0]["message"]["content"], content.get("video_compression")


def _of_stream(lines: Iterable[str]) -> tuple[str, Any]:
    """Return the text of a stream and its tokens of the video."""
    text, compression = "", None
    for line in lines:
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return f"error: {chunk['error']}", None
            compression = chunk.get("video_compression", compression)
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
    return text, compression


def offer_of(base_url: str) -> Offer:
    """Return what a server offers, as its list of models tells."""
    answer = httpx.get(f"{base_url}/v1/models", timeout=60)
    compression = answer.raise_for_status().json()["data"][0]["video_compression"]
    return Offer(compression["auto"] is not None, compression["compress_images"])
