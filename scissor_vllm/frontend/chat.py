"""Our fields on chat/completions and tokenize, and what came of them.

The routes replace vLLM's of the same path and call the same handlers. A request with neither a
video nor one of our fields goes straight to vLLM's.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.serve.tokenize import api_router as tokenize_router
from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest

from scissor_vllm.cpus import share_cpus
from scissor_vllm.frontend.auto_ratio import begin_auto, chooser
from scissor_vllm.frontend.checks import check_request
from scissor_vllm.frontend.draining import ENGINE_FAILED, IN_FLIGHT, add_draining
from scissor_vllm.frontend.estimate import ESTIMATE_PATH, attach_estimate
from scissor_vllm.frontend.guard import CHAT_PATH
from scissor_vllm.frontend.image_runs import check_media_connector, compress_images
from scissor_vllm.frontend.models_route import attach_models
from scissor_vllm.frontend.outcome import Chat, count_malformed
from scissor_vllm.frontend.patch_anchors import compiled_comparison
from scissor_vllm.frontend.processor import RetentionProcessor
from scissor_vllm.frontend.refusal import RefusedRequestError
from scissor_vllm.frontend.request import (
    RetentionChatCompletionRequest,
    RetentionRequest,
    RetentionTokenizeChatRequest,
)
from scissor_vllm.frontend.response import documented, tell_compression
from scissor_vllm.frontend.tracing import begin_span
from scissor_vllm.metrics import begin_requests_at_zero, count_refusal
from scissor_vllm.models import MODELS
from scissor_vllm.settings import RetentionPolicy, TowerMerging, check_keys
from scissor_vllm.vllm_compat import max_engine_tokens, num_api_servers, wait_before_shutdown

SWITCH_INTERVAL_SECONDS = 0.0001
"""Longest time that the event loop holds the interpreter lock while threads decode and prepare
videos. With Python's default of 5 ms these threads wait that long after each call into C. Beside an
event loop that is always busy, a thread decodes 11 videos a second with 0.1 ms, 6 with 0.5 ms and 1
with 5 ms, and the loop does a sixth less than with 0.5 ms."""

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
    """Put our routes in place of those that the server has.

    Returns:
        Paths of the routes that take our fields.
    """
    add_draining(app)
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
        responses = stock[path].responses
        router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            dependencies=stock[path].dependencies,
            responses=documented(responses) if path == CHAT_PATH else responses,
            response_model=None,
            route_class_override=route_class,
        )
    app.include_router(router)
    attach_models(app)
    if TOKENIZE_PATH in stock:
        attach_estimate(app, stock[TOKENIZE_PATH])
        paths.append(ESTIMATE_PATH)
    if getattr(app.state.args, WEB_PAGE, False):
        from scissor_vllm.show.web import PICTURE_PATH, attach_page

        attach_page(app, check_request)
        paths.append(PICTURE_PATH)
    return paths


def init_state(engine_client: Any, state: State) -> None:
    """Keep what the routes check a ratio against, and have a shutdown wait for answers.

    Args:
        engine_client: of the API server, None where there is no engine.
        state: of the app.

    Raises:
        ValueError: a setting of the operator is misspelt, or the model does not support it.
    """
    sys.setswitchinterval(min(SWITCH_INTERVAL_SECONDS, sys.getswitchinterval()))
    share_cpus(num_api_servers(state.vllm_config))
    model_config = state.vllm_config.model_config
    mm_config = model_config.multimodal_config
    kwargs = (mm_config.mm_processor_kwargs if mm_config else None) or {}
    state.retention_policy = RetentionPolicy.from_mm_processor_kwargs(kwargs)
    state.compresses_video = isinstance(
        state.online_renderer.renderer.mm_processor, RetentionProcessor
    )
    check_keys(kwargs, state.compresses_video, MODELS)
    if state.compresses_video and TowerMerging.from_mm_processor_kwargs(kwargs).max_ratio > 0:
        # Here, because the first video would wait for it.
        compiled_comparison()
    if state.retention_policy.allows_compress_images:
        check_media_connector()
    state.traces_endpoint = state.vllm_config.observability_config.otlp_traces_endpoint
    state.auto_ratio = begin_auto(engine_client, state)
    state.max_engine_tokens = max_engine_tokens(engine_client)
    if engine_client is not None and hasattr(state, IN_FLIGHT):
        wait_before_shutdown(engine_client, state.in_flight, ENGINE_FAILED.set)
    begin_requests_at_zero(state.retention_policy.method)


async def create_chat_completion(
    request: RetentionChatCompletionRequest, raw_request: Request
) -> Response | None:
    """Answer a chat. Headers, and ``video_compression`` beside ``usage``, tell what was kept."""
    if request.has_video or request.compresses_images:
        return await _answer_video(request, raw_request)
    if request.names_fields:
        try:
            check_request(request, raw_request.app.state)
        except RefusedRequestError as error:
            count_refusal(error.reason)
            raise
    return await chat_router.create_chat_completion(request, raw_request)


async def _answer_video(
    request: RetentionChatCompletionRequest, raw_request: Request
) -> Response | None:
    """Answer a chat with a video, or with images that become one, and count its outcome."""
    state = raw_request.app.state
    report = request.begin_report(chooser(state, is_counted=True), state.max_engine_tokens)
    raw_request, span = begin_span(raw_request, state.traces_endpoint)
    chat = Chat(state.retention_policy.method, request.valid_ratio, report, span)
    with chat.ended_by_errors():
        check_request(request, state)
        response = None
        if not request.compresses_images or await _compress_images(request, raw_request):
            response = await chat_router.create_chat_completion(request, raw_request)
    tell_compression(response, report)
    chat.follow(response)
    return response


async def _compress_images(request: RetentionRequest, raw_request: Request) -> bool:
    """Put videos in the place of images. Returns False if the client has hung up.

    vLLM's ``with_cancellation`` is for whole routes: it ends a request's count of load, and what it
    returns after a hang-up differs by version.
    """
    work = asyncio.create_task(compress_images(request, raw_request.app.state))
    gone = asyncio.create_task(_hung_up(raw_request))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        return work.done()
    finally:
        work.cancel()
        gone.cancel()


async def _hung_up(raw_request: Request) -> None:
    """Wait until the client has."""
    while (await raw_request.receive())["type"] != "http.disconnect":
        pass


async def tokenize(
    request: RetentionTokenizeChatRequest | TokenizeCompletionRequest, raw_request: Request
) -> Response | None:
    """Return the prompt's tokens for a chat with the same ratio."""
    if not isinstance(request, RetentionRequest):
        return await tokenize_router.tokenize(request, raw_request)
    if request.names_fields:
        check_request(request, raw_request.app.state)
    if request.compresses_images and not await _compress_images(request, raw_request):
        return None
    if request.has_video:
        request.begin_report(chooser(raw_request.app.state, is_counted=False))
    return await tokenize_router.tokenize(request, raw_request)
