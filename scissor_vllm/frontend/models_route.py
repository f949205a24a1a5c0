"""``GET /v1/models`` with what a client may ask of videos: vLLM's list, one more field a model."""

from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import State
from vllm.entrypoints.openai.models import api_router as models_router
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList

from scissor_vllm.frontend.response import VIDEO_COMPRESSION

MODELS_PATH = "/v1/models"


class AutoCard(BaseModel):
    """What the server chooses for a request that asks for ``auto``."""

    min_retention_ratio: float
    max_retention_ratio: float
    target_ttft_ms: int = Field(
        description="Goal: milliseconds from a request's arrival to its first token."
    )


class VideoCompressionCard(BaseModel):
    """What the server does with videos, and what a request may ask for."""

    method: str = Field(description="Method of compression.")
    default_retention_ratio: float | Literal["auto"] = Field(
        description="Ratio of a request that names none; 1.0 keeps all."
    )
    min_retention_ratio: float = Field(description="A request below it is refused.")
    default_max_retained_video_tokens: int | None = Field(
        description="Budget of a request that names none; null for no limit."
    )
    max_video_tokens: int = Field(
        description="Most tokens, before compression, of a video that is compressed."
    )
    compress_images: bool = Field(
        description="Whether a request may have runs of images compressed as frames."
    )
    auto: AutoCard | None = Field(description="null where no ratio is chosen by the server.")


class RetentionModelCard(ModelCard):
    """vLLM's entry of a model, for OpenAPI."""

    video_compression: VideoCompressionCard | None = Field(
        description="null for a model whose videos are not compressed."
    )


class RetentionModelList(ModelList):
    """vLLM's list of models, for OpenAPI."""

    data: list[RetentionModelCard] = Field(default_factory=list)


def describe_compression(state: State) -> dict[str, Any] | None:
    """Return what a server says of its compression, None if it compresses no videos."""
    if not state.compresses_video:
        return None
    policy = state.retention_policy
    auto = None
    if policy.auto_bounds is not None:
        lowest, highest = policy.auto_bounds
        auto = AutoCard(
            min_retention_ratio=lowest,
            max_retention_ratio=highest,
            target_ttft_ms=policy.target_ttft_ms,
        )
    return VideoCompressionCard(
        method=policy.method,
        default_retention_ratio="auto" if policy.is_auto_by_default else policy.default_ratio,
        min_retention_ratio=policy.min_ratio,
        default_max_retained_video_tokens=policy.default_budget,
        max_video_tokens=policy.max_video_tokens,
        compress_images=policy.allows_compress_images,
        auto=auto,
    ).model_dump()


def attach_models(app: FastAPI) -> None:
    """Put our route in place of vLLM's."""
    router = APIRouter()

    @router.get(MODELS_PATH, responses={200: {"model": RetentionModelList}}, response_model=None)
    async def show_available_models(raw_request: Request) -> JSONResponse:
        """List the models, each with what the server does with its videos."""
        handler = models_router.models(raw_request)
        listed = (await handler.show_available_models()).model_dump()
        described = describe_compression(raw_request.app.state)
        for card in listed["data"]:
            card[VIDEO_COMPRESSION] = described
        return JSONResponse(listed)

    app.include_router(router)
