"""The HTTP part: ``retention_ratio`` on chat/completions and tokenize, and what came of it.

A vLLM endpoint plugin (entry point ``vllm.endpoint_plugins``, loaded when ``VLLM_PLUGINS`` names
``scissor_vllm``). Its routes replace vLLM's of the same path, and call the same handlers.
"""

import json
import sys
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.serve.tokenize import api_router as tokenize_router
from vllm.entrypoints.serve.tokenize.protocol import (
    TokenizeCompletionRequest,
)

from scissor_vllm.frontend.outcome import Chat, count_malformed, has_video
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
)
from scissor_vllm.settings import RetentionPolicy

SWITCH_INTERVAL_SECONDS = 0.0005
"""How long the event loop, while it writes answers, keeps the interpreter from the threads that
decode and prepare videos. With Python's own 5 ms they wait that long after each call into C."""

WEB_PAGE = "web_page"
"""Of the server's arguments: whether it serves the page of ``scissor_vllm.show``."""


class CountingRoute(APIRoute):
    """A route for chats that counts those whose body it does not take."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, its refusals counted."""
        handle = super().get_route_handler()

        async def counted(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                count_malformed(request.app.state.retention_policy.method, error)
                raise

        return counted


class RetentionEndpoint:
    """The endpoint plugin: replaces ``/v1/chat/completions`` and ``/tokenize``."""

    name = "scissor_vllm"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Put our routes in place of vLLM's."""
        router = APIRouter()
        for path, stock, endpoint, route_class in (
            ("/v1/chat/completions", chat_router.router, create_chat_completion, CountingRoute),
            ("/tokenize", tokenize_router.router, tokenize, APIRoute),
        ):
            route = next(r for r in stock.routes if isinstance(r, APIRoute) and r.path == path)
            router.add_api_route(
                path,
                endpoint,
                methods=["POST"],
                dependencies=route.dependencies,
                responses=route.responses,
                response_model=None,
                route_class_override=route_class,
            )
        app.include_router(router)
        if getattr(app.state.args, WEB_PAGE, False):
            from scissor_vllm.show.web import attach_page

            attach_page(app, _check)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Keep what the routes check a ratio against."""
        sys.setswitchinterval(min(SWITCH_INTERVAL_SECONDS, sys.getswitchinterval()))
        model_config = state.vllm_config.model_config
        mm_config = model_config.multimodal_config
        state.retention_policy = RetentionPolicy.from_mm_processor_kwargs(
            mm_config.mm_processor_kwargs if mm_config else None
        )
        state.compresses_video = isinstance(
            state.online_renderer.renderer.mm_processor, RetentionProcessor
        )
        state.traces_endpoint = state.vllm_config.observability_config.otlp_traces_endpoint
        begin_requests_at_zero(state.retention_policy.method)


async def create_chat_completion(
    request: RetentionChatCompletionRequest, raw_request: Request
) -> Response | None:
    """Answer a chat. Beside ``usage``, ``video_compression`` tells what reached the model."""
    if has_video(request.messages):
        return await _answer_video(request, raw_request)
    try:
        return await _answer(request, raw_request)
    except RefusedRequestError as error:
        count_refusal(error.reason)
        raise


async def _answer_video(
    request: RetentionChatCompletionRequest, raw_request: Request
) -> Response | None:
    """Answer a chat whose end is counted."""
    state = raw_request.app.state
    raw_request, span = begin_span(raw_request, state.traces_endpoint)
    chat = Chat(state.retention_policy.method, request.retention_ratio, request.report, span)
    with chat.ended_by_errors():
        response = await _answer(request, raw_request)
    chat.follow(response)
    return response


async def _answer(request: RetentionChatCompletionRequest, raw_request: Request) -> Response | None:
    _check(request, raw_request.app.state)
    response = await chat_router.create_chat_completion(request, raw_request)
    if isinstance(response, StreamingResponse):
        response.body_iterator = _with_report(response.body_iterator, request.report)
    elif isinstance(response, JSONResponse) and response.status_code == 200:
        content = json.loads(bytes(response.body))
        _add_report(content, request.report)
        response.body = response.render(content)
        response.headers["content-length"] = str(len(response.body))
    return response


async def tokenize(
    request: RetentionTokenizeChatRequest | TokenizeCompletionRequest, raw_request: Request
) -> Response | None:
    """Return the tokens of the prompt that a chat with the same ratio would have."""
    if isinstance(request, RetentionRequest):
        _check(request, raw_request.app.state)
    return await tokenize_router.tokenize(request, raw_request)


def _check(request: Any, state: State) -> None:
    """Check the ratio against what the server allows and its model can.

    Raises:
        RefusedRequestError: below the operator's minimum, or the model's videos are not compressed
            and there is one. vLLM answers it with 400.
    """
    try:
        ratio = state.retention_policy.resolve(request.retention_ratio)
    except ValueError as error:
        reason = Reason.RATIO_BELOW_MINIMUM
        raise RefusedRequestError(str(error), parameter=RETENTION_RATIO, reason=reason) from error
    named = request.retention_ratio is not None
    if named and ratio != 1.0 and not state.compresses_video and has_video(request.messages):
        raise RefusedRequestError(
            f"{RETENTION_RATIO} must be 1.0 or absent for this model, got {ratio}: videos are "
            f"compressed for {', '.join(MODELS)} only",
            parameter=RETENTION_RATIO,
            reason=Reason.UNSUPPORTED_MODEL,
        )


def _add_report(content: dict[str, Any], report: RetentionReport) -> None:
    """Put ``video_compression`` beside ``usage``, if the request had a video."""
    described = report.as_response()
    if described is not None:
        content["video_compression"] = described


async def _with_report(
    events: AsyncIterable[Any], report: RetentionReport
) -> AsyncGenerator[Any, None]:
    """Yield a stream's events, the final usage chunk with the report.

    That chunk is the one without choices; vLLM sends it if the client asks for usage.
    """
    async for event in events:
        if isinstance(event, str) and event.startswith("data: {") and '"choices":[]' in event:
            content = json.loads(event.removeprefix("data: "))
            if content.get("usage"):
                _add_report(content, report)
                event = f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
        yield event
