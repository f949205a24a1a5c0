"""``POST /v1/scissor/estimate``: what a chat's videos would keep, without inference.

It takes the body of a chat or of ``/tokenize``. Videos are read and prepared as for ``/tokenize``;
the engine is not asked.
"""

from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize import api_router as tokenize_router
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from scissor_vllm.frontend.auto_ratio import chooser
from scissor_vllm.frontend.checks import check_request
from scissor_vllm.frontend.image_runs import compress_images
from scissor_vllm.frontend.refusal import RefusedRequestError
from scissor_vllm.frontend.request import RetentionTokenizeChatRequest
from scissor_vllm.frontend.video_items import num_images_of
from scissor_vllm.metrics import Reason
from scissor_vllm.models import MODELS
from scissor_vllm.retention import RetentionReport

ESTIMATE_PATH = "/v1/scissor/estimate"


class VideoEstimate(BaseModel):
    """What would be kept of a video."""

    num_frames: int | None = Field(
        description="Frames that are read of it, or images of a run of them; null where it is "
        "named by its uuid alone."
    )
    num_video_tokens: int = Field(description="Tokens before compression.")
    num_retained_video_tokens: int = Field(description="Tokens after compression.")


class Estimate(BaseModel):
    """What a chat would send to the language model."""

    retention_ratio: float | None = Field(
        description="Ratio in force, or the fraction that the budget leaves; null without a video."
    )
    max_retained_video_tokens: int | None = Field(description="Budget in force; null for none.")
    num_video_tokens: int
    num_retained_video_tokens: int
    num_prompt_tokens: int = Field(description="Of the whole prompt, after compression.")
    max_model_len: int = Field(description="Most tokens of a prompt and its answer.")
    videos: list[VideoEstimate]


@dataclass
class EstimateReport(RetentionReport):
    """Counts a request's frames too."""

    num_frames: list[int | None] = field(default_factory=list)
    """Of each video, None for one that is named by its id in the cache."""

    def look(self, videos: Any) -> None:
        """Count them."""
        for video, num_images in zip(videos.get_all(), num_images_of(videos), strict=True):
            frames = video[0] if isinstance(video, tuple) else video
            self.num_frames.append(None if frames is None else num_images or len(frames))


class EstimateRequest(RetentionTokenizeChatRequest):
    """A chat whose tokens are counted."""

    def _new_report(self) -> RetentionReport:
        return EstimateReport()


def attach_estimate(app: FastAPI, tokenize_route: APIRoute) -> None:
    """Add the route.

    Args:
        app: the server's.
        tokenize_route: vLLM's, which has the same checks of a body and the same errors.
    """
    router = APIRouter()
    router.add_api_route(
        ESTIMATE_PATH,
        estimate,
        methods=["POST"],
        response_model=None,
        dependencies=tokenize_route.dependencies,
        responses={**tokenize_route.responses, 200: {"model": Estimate}},
    )
    app.include_router(router)


@with_cancellation
async def estimate(request: EstimateRequest, raw_request: Request) -> Response:
    """Return what a chat's videos would keep, in tokens, without inference."""
    state = raw_request.app.state
    check_request(request, state)
    if request.has_video and not state.compresses_video:
        raise RefusedRequestError(
            "an estimate is of a model whose videos are compressed, which are "
            f"{', '.join(MODELS)}: count this model's tokens with /tokenize",
            parameter="model",
            reason=Reason.UNSUPPORTED_MODEL,
        )
    if request.compresses_images:
        await compress_images(request, state)
    report = request.begin_report(chooser(state, is_counted=False), state.max_engine_tokens)
    assert isinstance(report, EstimateReport)
    counted = await tokenize_router.tokenization(raw_request).create_tokenize(request, raw_request)
    if isinstance(counted, ErrorResponse):
        return JSONResponse(counted.model_dump(), status_code=counted.error.code)
    videos = zip(report.num_frames, report.num_tokens, report.num_retained, strict=True)
    told = Estimate(
        retention_ratio=report.retention_ratio,
        max_retained_video_tokens=report.max_retained,
        num_video_tokens=sum(report.num_tokens),
        num_retained_video_tokens=sum(report.num_retained),
        num_prompt_tokens=counted.count,
        max_model_len=counted.max_model_len,
        videos=[
            VideoEstimate(
                num_frames=num_frames,
                num_video_tokens=num_tokens,
                num_retained_video_tokens=num_retained,
            )
            for num_frames, num_tokens, num_retained in videos
        ],
    )
    return JSONResponse(told.model_dump())
