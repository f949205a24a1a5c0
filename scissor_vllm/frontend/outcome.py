"""Records the outcome of a chat with a video: in metrics, and in vLLM's trace if tracing is on.

Only chats of ``/v1/chat/completions`` are counted. vLLM's other routes for chats with a video
(``/v1/chat/completions/batch``, ``/invocations``) refuse a ratio and use the server's default.
``/tokenize`` returns no answer.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.responses import Response
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from scissor_vllm.frontend.refusal import reason_of
from scissor_vllm.frontend.request import has_video
from scissor_vllm.frontend.tracing import NO_SPAN, CompressionSpan
from scissor_vllm.metrics import (
    Outcome,
    Reason,
    count_patches,
    count_refusal,
    count_request,
    count_tokens,
)
from scissor_vllm.retention import RETENTION_RATIO, RetentionReport, ratio_or_none

_LAST_EVENT = "data: [DONE]"
_ERROR_EVENT = 'data: {"error"'


class Chat:
    """Records a chat's outcome exactly once: the first one reported."""

    def __init__(
        self,
        method: str,
        requested_ratio: float | None,
        report: RetentionReport,
        span: CompressionSpan = NO_SPAN,
    ) -> None:
        """Begin a chat with a video.

        Args:
            method: the server's compression method.
            requested_ratio: the request's valid ratio, None without one.
            report: filled by the processor.
            span: of the trace.
        """
        self._method = method
        self._requested_ratio = requested_ratio
        self._report = report
        self._span = span
        self._has_ended = False

    def end(self, outcome: Outcome, reason: Reason = Reason.OTHER) -> None:
        """Record the outcome, and the reason of a refusal; later calls do nothing."""
        if self._has_ended:
            return
        self._has_ended = True
        count_request(self._method, outcome, self._requested_ratio)
        ratio = self._report.retention_ratio
        if outcome is Outcome.REFUSED:
            count_refusal(reason)
        elif ratio is not None:
            num_tokens, num_retained = self._report.num_tokens, self._report.num_retained
            count_tokens(self._method, ratio, sum(num_tokens), sum(num_retained))
            count_patches(sum(self._report.num_patches), sum(self._report.num_computed_patches))
        self._span.end(self._method, outcome.value, self._report)

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """Record the outcome if the block raises."""
        try:
            yield
        except asyncio.CancelledError:
            self.end(Outcome.ABORTED)
            raise
        except Exception as error:
            if create_error_response(error).error.code < 500:
                self.end(Outcome.REFUSED, reason_of(error))
            else:
                self.end(Outcome.FAILED)
            raise

    def follow(self, response: Response | None) -> None:
        """Record the outcome of a response; that of a stream is recorded when the stream ends."""
        if response is None or type(response) is Response:
            # The client has disconnected: vLLM 0.32 returns nothing, 0.33 an empty response.
            self.end(Outcome.ABORTED)
        elif response.status_code >= 500:
            self.end(Outcome.FAILED)
        elif response.status_code >= 400:
            self.end(Outcome.REFUSED)
        elif isinstance(response, StreamingResponse):
            response.body_iterator = self._followed(response.body_iterator)
        else:
            self.end(Outcome.ANSWERED)

    async def _followed(self, events: AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
        try:
            async for event in events:
                if isinstance(event, str) and event.startswith(_LAST_EVENT):
                    self.end(Outcome.ANSWERED)
                elif isinstance(event, str) and event.startswith(_ERROR_EVENT):
                    self._end_by_event(json.loads(event.removeprefix("data: "))["error"])
                yield event
        finally:
            self.end(Outcome.ABORTED)

    def _end_by_event(self, error: Mapping[str, Any]) -> None:
        """Record an error that occurred after the stream's status 200 was sent."""
        if error["code"] < 500:
            self.end(Outcome.REFUSED, reason_of(ValueError(error["message"])))
        else:
            self.end(Outcome.FAILED)


def count_malformed(method: str, error: RequestValidationError) -> None:
    """Count a chat with a video whose body fails the route's validation."""
    body = error.body if isinstance(error.body, Mapping) else {}
    if has_video(body.get("messages")):
        count_request(method, Outcome.REFUSED, ratio_or_none(body.get(RETENTION_RATIO)))
        count_refusal(Reason.OTHER)
