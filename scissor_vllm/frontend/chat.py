"""``retention_ratio`` on chat/completions and tokenize, and ``video_compression`` in the answer.

The routes replace vLLM's of the same path and call the same handlers. A request with neither a
video nor a ratio goes straight to vLLM's.
"""

import json
import sys
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.serve.tokenize import api_router as tokenize_router
from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest

from scissor_vllm.frontend.guard import CHAT_PATH, misspelt_ratio
from scissor_vllm.frontend.outcome import Chat, count_malformed
from scissor_vllm.frontend.processor import RetentionProcessor
from scissor_vllm.frontend.refusal import RefusedRequestError
from scissor_vllm.frontend.request import (
    RetentionChatCompletionRequest,
    RetentionRequest,
    RetentionTokenizeChatRequest,
)
from scissor_vllm.frontend.tracing import begin_span
from scissor_vllm.metrics import Reason, begin_requests_at_zero, count_refusal
from scissor_vllm.models import MODELS
from scissor_vllm.retention import (
    RETENTION_RATIO,
    RetentionReport,
    check_retention_ratio,
)
from scissor_vllm.settings import RetentionPolicy, check_keys

SWITCH_INTERVAL_SECONDS = 0.0005
"""Longest time that the event loop holds the interpreter lock while threads decode and prepare
videos. With Python's default of 5 ms these threads wait that long after each call into C."""

WEB_PAGE = "web_page"
"""Name of the server's argument that switches the web page on."""

TOKENIZE_PATH = "/tokenize"


class CountingRoute(APIRoute):
    """A chat route that counts requests with a malformed body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler with validation errors counted."""
        handle = super().get_route_handler()

        async def counted(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                count_malformed(request.app.state.retention_policy.method, error)
                raise

        return counted


def attach_routes(app: FastAPI) -> list[str]:
    """Replace the server's chat and tokenize routes with ours, and return their paths."""
    router = APIRouter()
    stock = {
        route.path: route
        for route in app.routes
        if isinstance(route, APIRoute) and "POST" in route.methods
    }
    paths = []
    for path, endpoint, route_class in (
        (CHAT_PATH, create_chat_completion, CountingRoute),
        (TOKENIZE_PATH, tokenize, APIRoute),
    ):
        if path not in stock:
            continue
        paths.append(path)
        router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            dependencies=stock[path].dependencies,
            responses=stock[path].responses,
            response_model=None,
            route_class_override=route_class,
        )
    app.include_router(router)
    if getattr(app.state.args, WEB_PAGE, False):
        from scissor_vllm.show.web import PICTURE_PATH, attach_page

        attach_page(app, check_request)
        paths.append(PICTURE_PATH)
    return paths


def init_state(state: State) -> None:
    """Store the policy that the routes check ratios against.

    Raises:
        ValueError: a setting of the operator is misspelt, or the model does not support it.
    """
    sys.setswitchinterval(min(SWITCH_INTERVAL_SECONDS, sys.getswitchinterval()))
    model_config = state.vllm_config.model_config
    mm_config = model_config.multimodal_config
    kwargs = (mm_config.mm_processor_kwargs if mm_config else None) or {}
    state.retention_policy = RetentionPolicy.from_mm_processor_kwargs(kwargs)
    state.compresses_video = isinstance(
        state.online_renderer.renderer.mm_processor, RetentionProcessor
    )
    check_keys(kwargs, state.compresses_video, MODELS)
    state.traces_endpoint = state.vllm_config.observability_config.otlp_traces_endpoint
    begin_requests_at_zero(state.retention_policy.method)


async def create_chat_completion(
    request: RetentionChatCompletionRequest, raw_request: Request
) -> Response | None:
    """Answer a chat. ``video_compression`` beside ``usage`` has the kept tokens."""
    if request.has_video:
        return await _answer_video(request, raw_request)
    if request.names_ratio:
        try:
            check_request(request, raw_request.app.state)
        except RefusedRequestError as error:
            count_refusal(error.reason)
            raise
    return await chat_router.create_chat_completion(request, raw_request)


async def _answer_video(
    request: RetentionChatCompletionRequest, raw_request: Request
) -> Response | None:
    """Answer a chat with a video, and count its outcome."""
    state = raw_request.app.state
    report = request.begin_report()
    raw_request, span = begin_span(raw_request, state.traces_endpoint)
    chat = Chat(state.retention_policy.method, request.valid_ratio, report, span)
    with chat.ended_by_errors():
        check_request(request, state)
        response = await chat_router.create_chat_completion(request, raw_request)
    if isinstance(response, StreamingResponse):
        response.body_iterator = _with_report(response.body_iterator, report)
    elif isinstance(response, JSONResponse) and response.status_code == 200:
        response.body = _beside_usage(bytes(response.body), report)
        response.headers["content-length"] = str(len(response.body))
    chat.follow(response)
    return response


async def tokenize(
    request: RetentionTokenizeChatRequest | TokenizeCompletionRequest, raw_request: Request
) -> Response | None:
    """Return the prompt's tokens for a chat with the same ratio."""
    if not isinstance(request, RetentionRequest):
        return await tokenize_router.tokenize(request, raw_request)
    if request.names_ratio:
        check_request(request, raw_request.app.state)
    if request.has_video:
        request.begin_report()
    return await tokenize_router.tokenize(request, raw_request)


def check_request(request: Any, state: State) -> None:
    """Check a request's ratio against the server's policy and its model.

    Raises:
        RefusedRequestError: the ratio is invalid, below the operator's minimum or misspelt, or the
            model is not supported. vLLM answers it with 400.
    """
    if misspelt := misspelt_ratio(request.model_extra or {}):
        raise RefusedRequestError(misspelt, reason=Reason.INVALID_RATIO)
    if request.retention_ratio is None:
        return
    try:
        check_retention_ratio(request.retention_ratio)
    except (TypeError, ValueError) as error:
        raise _refused_ratio(error, Reason.INVALID_RATIO) from error
    try:
        ratio = state.retention_policy.resolve(request.retention_ratio)
    except ValueError as error:
        raise _refused_ratio(error, Reason.RATIO_BELOW_MINIMUM) from error
    if ratio != 1.0 and not state.compresses_video and request.has_video:
        raise RefusedRequestError(
            f"{RETENTION_RATIO} must be 1.0 or absent for this model, got {ratio}: videos are "
            f"compressed for {', '.join(MODELS)} only",
            parameter=RETENTION_RATIO,
            reason=Reason.UNSUPPORTED_MODEL,
        )


def _refused_ratio(error: Exception, reason: Reason) -> RefusedRequestError:
    return RefusedRequestError(str(error), parameter=RETENTION_RATIO, reason=reason)


def _beside_usage(body: bytes, report: RetentionReport) -> bytes:
    """Return an object in JSON with ``video_compression`` as its last field.

    The body is not parsed: an answer with log probabilities has megabytes.
    """
    described = report.as_response()
    if described is None or not body.endswith(b"}"):
        return body
    added = json.dumps({"video_compression": described}, separators=(",", ":"))
    return b"".join((body[:-1], b",", added[1:].encode()))


async def _with_report(
    events: AsyncIterable[Any], report: RetentionReport
) -> AsyncGenerator[Any, None]:
    """Yield a stream's events, with the report added to the final usage chunk.

    That chunk has no choices. vLLM sends it if the client asks for usage.
    """
    async for event in events:
        if (
            isinstance(event, str)
            and event.startswith("data: {")
            and '"choices":[]' in event
            and '"usage":{' in event
        ):
            event = f"{_beside_usage(event.rstrip().encode(), report).decode()}\n\n"
        yield event
