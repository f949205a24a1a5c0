"""The server's web page, and the pictures that it asks for.

``GET /scissor`` is the page; its slider covers the server's ratios and starts at the default.
``POST /v1/scissor/picture`` takes the body of a chat with one video and a ``retention_ratio``. It
answers with what was kept of the video. Under ``/v1`` vLLM asks for the API key. The video is read
and prepared as for ``/tokenize``. The workers compress it. One picture is made at a time, since
each takes as much of the engine's time as encoding does.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.datastructures import State
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalKwargsItem

from scissor_vllm.frontend.auto_ratio import chooser
from scissor_vllm.frontend.request import RetentionTokenizeChatRequest
from scissor_vllm.retention import RetentionReport
from scissor_vllm.settings import RetentionPolicy
from scissor_vllm.show.picture import (
    Grouping,
    Picture,
    all_kept,
    check_size,
    drawn_frames,
    times_of,
)
from scissor_vllm.show.worker import METHOD, Groups, encoded
from scissor_vllm.video_fields import NUM_RETAINED, NUM_VIDEO_TOKENS

PAGE_PATH = "/scissor"
PICTURE_PATH = "/v1/scissor/picture"
MAX_BODY_BYTES = 128 * 1024**2
"""The limit of the reverse proxy in ``deploy/``."""
BODY_SECONDS = 60
"""Time limit for a body to arrive, because other requests wait for it."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILES = {
    "": ("ask.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/picture.js": ("picture.js", "text/javascript"),
    "/ask.js": ("ask.js", "text/javascript"),
}
_FOLDER = Path(__file__).with_name("page")
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class VideoReport(RetentionReport):
    """Keeps a request's decoded videos."""

    videos: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    """Frames and metadata of each."""

    def look(self, videos: Any) -> None:
        """Keep the decoded videos."""
        for index, video in enumerate(videos.get_all()):
            known = videos.metadata[index] if isinstance(videos.metadata, list) else None
            frames, metadata = video if isinstance(video, tuple) else (video, known)
            self.videos.append((frames, metadata or {}))


class PictureRequest(RetentionTokenizeChatRequest):
    """A chat whose video is drawn."""

    def _new_report(self) -> RetentionReport:
        return VideoReport()


def attach_page(app: FastAPI, check: Callable[[PictureRequest, State], None]) -> None:
    """Add the routes.

    Args:
        app: the server's application.
        check: raises an error if the server refuses the request's ratio.
    """
    router = APIRouter(include_in_schema=False)
    for suffix, (name, media_type) in _FILES.items():
        content = (_FOLDER / name).read_text(encoding="utf-8")
        router.add_api_route(PAGE_PATH + suffix, _file_endpoint(content, media_type))
    gate = asyncio.Semaphore(1)

    async def picture(raw_request: Request) -> Response:
        if gate.locked():
            raise HTTPException(
                429,
                "one picture is made at a time, and one is being made: ask again",
                headers={"Retry-After": "1"},
            )
        async with gate:
            body = await read_body(raw_request, MAX_BODY_BYTES, BODY_SECONDS)
            request = await asyncio.to_thread(parse, body)
            check(request, raw_request.app.state)
            drawn = await make_picture(request, raw_request.app.state)
            text = await asyncio.to_thread(lambda: json.dumps(drawn.as_json()))
            return Response(text, media_type="application/json")

    router.add_api_route(PICTURE_PATH, picture, methods=["POST"])
    app.include_router(router)


def _file_endpoint(content: str, media_type: str) -> Callable[..., Any]:
    async def send(raw_request: Request) -> Response:
        text = with_ratios(content, raw_request.app.state.retention_policy)
        return Response(text, media_type=media_type, headers=_HEADERS)

    return send


def with_ratios(page: str, policy: RetentionPolicy) -> str:
    """Return a file of the page with the server's lowest and default ratio filled in."""
    page = page.replace("{{MIN_RATIO}}", str(policy.min_ratio))
    return page.replace("{{DEFAULT_RATIO}}", str(policy.default_ratio))


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """Return a request's body; HTTPException if it has too many bytes or takes too long."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise HTTPException(
                        413, f"a body may have {most} bytes, got more: send a smaller video"
                    )
                parts.append(part)
    except TimeoutError as error:
        raise HTTPException(
            408, f"a body must arrive within {seconds:g} s: send a smaller video"
        ) from error
    return b"".join(parts)


def parse(body: bytes) -> PictureRequest:
    """Return the request in a body; raise RequestValidationError, a 400, if it is invalid."""
    try:
        return PictureRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_context=False)) from error


async def make_picture(request: PictureRequest, state: State) -> Picture:
    """Return the picture of a request's video.

    Raises:
        VLLMValidationError: the request has not exactly one video, the video is too long to be
            drawn, or a chat with it would be refused.
    """
    if not state.compresses_video:
        raise VLLMValidationError("videos of this model are not compressed: there is no picture")
    if request.compresses_images:
        raise VLLMValidationError(
            "a picture is of a video: leave compress_images out", parameter="compress_images"
        )
    report = request.begin_report(chooser(state, is_counted=False), state.max_engine_tokens)
    assert isinstance(report, VideoReport)
    item = await _prepared_video(request, state)
    ((frames, metadata),) = report.videos
    num_tokens, num_retained = (int(item[key].data) for key in (NUM_VIDEO_TOKENS, NUM_RETAINED))
    try:
        num_frames, rows, columns = _grid(item, len(frames), num_tokens, state)
        check_size(num_frames, num_tokens)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="video_url") from error
    method = state.retention_policy.method
    if num_retained == num_tokens:
        grouping = all_kept(method, num_tokens)
    else:
        parts = await asyncio.to_thread(encoded, item)
        groups = Groups.of_reply(await state.engine_client.collective_rpc(METHOD, args=(parts,)))
        assert report.retention_ratio is not None
        grouping = Grouping(
            report.retention_ratio,
            method,
            np.frombuffer(groups.assignment, np.int32).astype(np.int64),
            np.frombuffer(groups.representatives, np.int32).astype(np.int64),
            groups.similarity_threshold,
        )
    shown = await asyncio.to_thread(drawn_frames, frames, num_frames)
    return Picture("video", shown, rows, columns, (grouping,), times_of(metadata, num_frames))


async def _prepared_video(request: PictureRequest, state: State) -> MultiModalKwargsItem:
    """Return the processor's output for the request's one video, as in ``/tokenize``."""
    renderer = state.online_renderer
    _, (prompt,) = await renderer.preprocess_chat(
        request,
        request.messages,
        default_template=renderer.chat_template,
        default_template_content_format=renderer.chat_template_content_format,
        default_template_kwargs=renderer.default_chat_template_kwargs,
        # Cached items would have no data.
        skip_mm_cache=True,
    )
    videos = prompt.get("mm_kwargs", {}).get("video", [])
    if len(videos) != 1 or videos[0] is None:
        raise VLLMValidationError(
            f"a picture is of one video, got {len(videos)}: send one", parameter="messages"
        )
    item: MultiModalKwargsItem = videos[0]
    return item


def _grid(
    item: MultiModalKwargsItem, num_frames: int, num_tokens: int, state: State
) -> tuple[int, int, int]:
    """Return T, and rows and columns of a frame's tokens."""
    if "video_grid_thw" in item:
        num_frames, height, width = item["video_grid_thw"].data.tolist()
        merge = state.vllm_config.model_config.hf_config.vision_config.spatial_merge_size
        return num_frames, height // merge, width // merge
    side = math.isqrt(num_tokens // num_frames)
    return num_frames, side, side
