"""Each chat's outcome is counted exactly once, with the reason of a refusal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import REGISTRY
from vllm.exceptions import VLLMServerError, VLLMValidationError

from scissor_vllm.frontend.outcome import Chat, count_malformed
from scissor_vllm.frontend.refusal import RefusedRequestError, RefusedVideoError
from scissor_vllm.frontend.request import has_video
from scissor_vllm.metrics import (
    REFUSED_REQUESTS,
    RETAINED_VIDEO_TOKENS,
    VIDEO_REQUESTS,
    VIDEO_TOKENS,
    Outcome,
    Reason,
)
from scissor_vllm.retention import RetentionReport

METHOD = "method-of-this-test"
NO_ROOM = (
    "The decoder prompt contains a(n) {} item with 3873 embedding tokens, which exceeds the "
    "pre-allocated encoder cache size 2048."
)
"""vLLM's error for media that are too large for any step of the engine."""
VIDEO = {"type": "video_url", "video_url": {"url": "data:"}}


class Counted:
    """Counts since the object was made."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> dict[str, float]:
        labels: dict[str, tuple[str, dict[str, str]]] = {
            **{o: (VIDEO_REQUESTS, {"method": METHOD, "outcome": o}) for o in Outcome},
            **{r: (REFUSED_REQUESTS, {"reason": r}) for r in Reason},
            "before": (VIDEO_TOKENS, {"method": METHOD}),
            "after": (RETAINED_VIDEO_TOKENS, {"method": METHOD}),
        }
        return {
            str(name): REGISTRY.get_sample_value(f"{metric}_total", wanted) or 0.0
            for name, (metric, wanted) in labels.items()
        }

    def since(self) -> dict[str, float]:
        now = self._now()
        added = {name: value - self._before[name] for name, value in now.items()}
        return {name: value for name, value in added.items() if value}


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def chat() -> Chat:
    """A chat with a video of 100 tokens, of which 10 are kept."""
    report = RetentionReport()
    report.add(0.1, 100, 10)
    return Chat(METHOD, 0.1, report)


def stream(*events: str) -> StreamingResponse:
    async def sent() -> AsyncIterator[str]:
        for event in events:
            yield event

    return StreamingResponse(sent())


def read(response: StreamingResponse, num_events: int = 100) -> None:
    async def run() -> None:
        events: Any = response.body_iterator
        async for _ in events:
            nonlocal num_events
            num_events -= 1
            if num_events == 0:
                break
        await events.aclose()

    asyncio.run(run())


ANSWER = 'data: {"choices":[{"index":0}]}\n\n'
DONE = "data: [DONE]\n\n"
SAVED = {"before": 100, "after": 10}


def error_event(code: int, message: str) -> str:
    return f'data: {{"error":{{"code":{code},"message":"{message}"}}}}\n\n'


@pytest.mark.parametrize(
    ("events", "num_read", "expected"),
    [
        ((ANSWER, DONE), 9, {"answered": 1, **SAVED}),
        ((ANSWER, DONE), 1, {"aborted": 1, **SAVED}),
        ((ANSWER, DONE), 2, {"answered": 1, **SAVED}),
        ((ANSWER,), 9, {"aborted": 1, **SAVED}),
        ((ANSWER, error_event(500, "broken"), DONE), 9, {"failed": 1, **SAVED}),
        (
            (error_event(400, "the model's maximum context length"), DONE),
            9,
            {"refused": 1, "prompt_too_long": 1},
        ),
    ],
)
def test_a_stream_ends_as_its_events_say(
    counted: Counted, chat: Chat, events: tuple[str, ...], num_read: int, expected: dict[str, float]
) -> None:
    response = stream(*events)
    chat.follow(response)
    read(response, num_read)
    assert counted.since() == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (JSONResponse({}), {"answered": 1, **SAVED}),
        (None, {"aborted": 1, **SAVED}),
        (Response(), {"aborted": 1, **SAVED}),
        (JSONResponse({}, status_code=404), {"refused": 1, "other": 1}),
        (JSONResponse({}, status_code=503), {"failed": 1, **SAVED}),
    ],
)
def test_an_answer_ends_as_its_status_says(
    counted: Counted, chat: Chat, response: Response | None, expected: dict[str, float]
) -> None:
    chat.follow(response)
    assert counted.since() == expected


def caused_by(error: Exception) -> Exception:
    outer = ValueError("around it")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RefusedVideoError("no video"), "unreadable_video"),
        (RefusedVideoError("large", reason=Reason.VIDEO_TOO_LARGE), "video_too_large"),
        (RefusedRequestError("long", reason=Reason.VIDEO_TOO_LONG), "video_too_long"),
        (caused_by(RefusedVideoError("no video")), "unreadable_video"),
        (ValueError("Input exceeds model's maximum context length (8)."), "prompt_too_long"),
        (VLLMValidationError(NO_ROOM.format("video")), "video_too_long"),
        (VLLMValidationError(NO_ROOM.format("image")), "other"),
        (VLLMValidationError("vLLM's own", parameter="temperature"), "other"),
    ],
)
def test_a_clients_mistake_is_refused_for_its_reason(
    counted: Counted, chat: Chat, error: Exception, expected: str
) -> None:
    with pytest.raises(type(error)), chat.ended_by_errors():
        raise error
    assert counted.since() == {"refused": 1, expected: 1}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError, "failed"),
        (VLLMServerError, "failed"),
        (asyncio.CancelledError, "aborted"),
    ],
)
def test_what_is_not_the_clients_mistake_is_no_refusal(
    counted: Counted, chat: Chat, error: Callable[[], BaseException], expected: str
) -> None:
    with pytest.raises(BaseException), chat.ended_by_errors():  # noqa: B017, PT011
        raise error()
    assert counted.since() == {expected: 1, **SAVED}


def test_a_chat_ends_once(counted: Counted, chat: Chat) -> None:
    for outcome in (Outcome.FAILED, Outcome.ANSWERED, Outcome.REFUSED):
        chat.end(outcome)
    assert counted.since() == {"failed": 1, **SAVED}


def malformed(field: str, body: Any) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", field), "msg": "wrong"}], body=body)


@pytest.mark.parametrize(
    ("field", "body", "expected"),
    [
        ("top_p", {"messages": [{"content": [VIDEO]}]}, {"refused": 1, "other": 1}),
        ("top_p", {"messages": [{"content": "text"}]}, {}),
        ("messages", [1], {}),
        ("messages", None, {}),
        ("messages", {"messages": 3}, {}),
        ("messages", {"messages": [3, {"content": 4}, {"content": [5]}]}, {}),
    ],
)
def test_a_body_that_is_not_taken_counts_if_it_has_a_video(
    counted: Counted, field: str, body: Any, expected: dict[str, float]
) -> None:
    count_malformed(METHOD, malformed(field, body))
    assert counted.since() == expected


def test_a_video_is_found_among_a_chats_parts() -> None:
    assert has_video([{"content": "text"}, {"content": [{"type": "text"}, VIDEO]}])
    assert has_video([{"content": [{"video_url": {"url": "data:"}}]}])
    assert has_video([{"content": [{"video_url": None, "uuid": "a"}]}])
    assert has_video([{"content": [{"type": "video_embeds"}]}])
    assert not has_video([{"content": [{"type": "image_url", "video_url": None}]}])
    assert not has_video([])
