"""What an answer tells of compression: a field in its body, headers, and both in OpenAPI.

K is known before the first token, so that the headers of a stream tell it too. Clients that drop
fields which they do not know, and gateways that rewrite bodies, leave headers.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterable
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

from scissor_vllm.retention import RetentionReport

VIDEO_COMPRESSION = "video_compression"
"""Field of an answer, and of the last chunk of a stream that has usage."""
RATIO_HEADER = "x-video-retention-ratio"
TOKENS_HEADER = "x-video-tokens"
RETAINED_HEADER = "x-retained-video-tokens"
HEADERS = {
    RATIO_HEADER: ("number", "Retention ratio in force for the request's videos."),
    TOKENS_HEADER: ("integer", "Tokens of the request's videos before compression."),
    RETAINED_HEADER: ("integer", "Tokens of the request's videos after compression."),
}
"""Name of each header, with the type and the meaning of its value."""


class VideoCompressionReport(BaseModel):
    """What reached the language model of a request's videos."""

    retention_ratio: float = Field(
        description="Ratio in force, or the fraction that the budget leaves."
    )
    num_video_tokens: int = Field(description="Tokens of all videos before compression.")
    num_retained_video_tokens: int = Field(description="Tokens of all videos after compression.")
    max_retained_video_tokens: int | None = Field(
        default=None, description="Budget in force; absent without one."
    )
    num_compressed_images: int | None = Field(
        default=None,
        description="Images that are compressed as frames of these videos; absent without any.",
    )


class RetentionChatCompletionResponse(ChatCompletionResponse):
    """vLLM's answer to a chat with ``video_compression``, for OpenAPI."""

    video_compression: VideoCompressionReport | None = Field(
        default=None, description="Absent where the chat has no video."
    )


def documented(responses: dict[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    """Return a route's responses, as FastAPI takes them, with ours of a chat."""
    answered = {
        **responses.get(200, {}),
        "description": "An answer, or a stream of its chunks.",
        "model": RetentionChatCompletionResponse,
        "headers": {
            name: {"schema": {"type": kind}, "description": f"{meaning} Absent without a video."}
            for name, (kind, meaning) in HEADERS.items()
        },
    }
    return {**responses, 200: answered}


def tell_compression(response: Response | None, report: RetentionReport) -> None:
    """Put into an answer what compression did to its request's videos, if it is one."""
    described = report.as_response()
    if response is None or response.status_code != 200 or described is None:
        return
    values = (
        described["retention_ratio"],
        described["num_video_tokens"],
        described["num_retained_video_tokens"],
    )
    response.headers.update({name: str(v) for name, v in zip(HEADERS, values, strict=True)})
    # Scripts in a browser read no others of another origin.
    response.headers["access-control-expose-headers"] = ", ".join(HEADERS)
    if isinstance(response, StreamingResponse):
        response.body_iterator = _with_field(response.body_iterator, described)
    elif isinstance(response, JSONResponse):
        response.body = _beside_usage(bytes(response.body), described)
        response.headers["content-length"] = str(len(response.body))


def _beside_usage(body: bytes, described: dict[str, float | int]) -> bytes:
    """Return an object in JSON with ``video_compression`` as its last field.

    An answer with log probabilities has megabytes: it is not parsed.
    """
    if not body.endswith(b"}"):
        return body
    added = json.dumps({VIDEO_COMPRESSION: described}, separators=(",", ":"))
    return b"".join((body[:-1], b",", added[1:].encode()))


async def _with_field(
    events: AsyncIterable[Any], described: dict[str, float | int]
) -> AsyncGenerator[Any, None]:
    """Yield a stream's events, the final usage chunk with ``video_compression``.

    That chunk is the one without choices; vLLM sends it if the client asks for usage.
    """
    async for event in events:
        if (
            isinstance(event, str)
            and event.startswith("data: {")
            and '"choices":[]' in event
            and '"usage":{' in event
        ):
            event = f"{_beside_usage(event.rstrip().encode(), described).decode()}\n\n"
        yield event
