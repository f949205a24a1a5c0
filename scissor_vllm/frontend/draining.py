"""Restarts that cut no answer: after SIGTERM a server answers what it has and takes nothing new.

vLLM ends the renderer and the engine's client first, so that a chat whose video is still prepared
fails. Here the end waits for the requests in flight, at most ``--shutdown-timeout``. Meanwhile
``/health`` and new requests get 503, so that a load balancer sends them elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(f"vllm.{__name__}")

IN_FLIGHT = "in_flight"
"""Of an app's state: its :class:`InFlight`."""
RETRY_AFTER_SECONDS = 5
HEALTH_PATHS = ("/health", "/ping")
ENGINE_FAILED = threading.Event()
"""Set once the engine of this process's API server has failed, which ends the server."""
_MARGIN_SECONDS = 2.0
"""Of the timeout, at most half of it: left for the server to close its connections."""
_BODY = json.dumps(
    {
        "error": {
            "message": "the server is shutting down and takes no new request: send it again, it "
            "will reach another server or this one after its restart",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": 503,
        }
    }
).encode()


class InFlight:
    """Requests that are being answered, of one API server."""

    def __init__(self) -> None:
        self.is_draining = False
        self.is_cut = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changed = threading.Condition()

    def add(self, task: asyncio.Task[Any]) -> bool:
        """Count a request by the task that answers it, and return whether it is taken."""
        with self._changed:
            if not self.is_draining:
                self._tasks.add(task)
            return not self.is_draining

    def remove(self, task: asyncio.Task[Any]) -> None:
        """Count it no more."""
        with self._changed:
            self._tasks.discard(task)
            self._changed.notify_all()

    def drain(self, timeout: float) -> float:
        """Take no new requests, and wait until those in flight are answered.

        Called off the event loop.

        Args:
            timeout: seconds to wait at most; 0 to wait for none.

        Returns:
            Seconds of the timeout that are left.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            self.is_draining = True
            wait = timeout - min(_MARGIN_SECONDS, timeout / 2)
            if self._tasks and timeout > 0:
                logger.info(
                    "scissor_vllm: %d requests in flight, waiting up to %g s for their answers",
                    len(self._tasks),
                    wait,
                )
            if not self._changed.wait_for(lambda: not self._tasks, wait) and timeout > 0:
                logger.warning(
                    "scissor_vllm: %d requests were not answered within %g s and are cut: raise "
                    "--shutdown-timeout, and the time that the process is given to stop",
                    len(self._tasks),
                    wait,
                )
        return max(0.0, deadline - time.monotonic())

    def cut(self) -> None:
        """Close the connections of those that are still in flight: no client waits for ever."""
        self.is_cut = True
        with self._changed:
            for task in self._tasks:
                task.get_loop().call_soon_threadsafe(task.cancel)


class DrainingMiddleware:
    """Counts requests in flight, and refuses new ones while the server drains."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        is_work = scope["type"] == "http" and scope["method"] == "POST"
        if is_work:
            await self._answer(scope, receive, send)
        elif self._in_flight.is_draining and _asks_for_health(scope):
            await _refuse(send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        if not self._in_flight.add(task):
            await _refuse(send)
            return
        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            if not self._in_flight.is_cut:
                raise
            if not has_begun:
                await _refuse(send)
        finally:
            self._in_flight.remove(task)


def _asks_for_health(scope: Scope) -> bool:
    if scope["type"] != "http":
        return False
    return scope["path"].removeprefix(scope.get("root_path", "")) in HEALTH_PATHS


async def _refuse(send: Send) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_BODY)).encode()),
        (b"retry-after", str(RETRY_AFTER_SECONDS).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": _BODY})


def add_draining(app: FastAPI) -> None:
    """Have an app count its requests in flight."""
    in_flight = InFlight()
    setattr(app.state, IN_FLIGHT, in_flight)
    app.add_middleware(DrainingMiddleware, in_flight=in_flight)
