"""Our fields of a request, and how they reach the processor."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field, PrivateAttr, WithJsonSchema, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.renderers import ChatParams

from scissor_vllm.retention import (
    AUTO,
    COMPRESS_IMAGES,
    LOADED_MEDIA,
    MAX_BUDGET,
    MAX_RETAINED_VIDEO_TOKENS,
    RETENTION,
    RETENTION_RATIO,
    RETENTION_REPORT,
    Chooser,
    RetentionReport,
    ratio_or_none,
)

_RATIO_DESCRIPTION = (
    "Fraction of each video's tokens that reaches the language model, above 0 and at most 1. "
    "1.0 keeps all; auto has the server choose, where its operator offers that. Leave it out for "
    "the server's default. Images and text are untouched."
)
_RATIO_SCHEMA = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"const": AUTO},
        {"type": "null"},
    ],
    "title": "Retention Ratio",
}
_BUDGET_DESCRIPTION = (
    "Most tokens that all videos of the request keep together, shared out by their lengths. With a "
    "retention ratio the smaller of both holds. Leave it out for the server's default."
)
_BUDGET_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_BUDGET}, {"type": "null"}],
    "title": "Max Retained Video Tokens",
}


_COMPRESS_IMAGES_DESCRIPTION = (
    "Whether runs of at least 4 neighbouring images of one size in a message are compressed as the "
    "frames of a video, where the operator allows that. Leave it out for no."
)
_COMPRESS_IMAGES_SCHEMA = {
    "anyOf": [{"type": "boolean"}, {"type": "null"}],
    "title": "Compress Images",
}

_VIDEO_FIELDS = ("video_url", "video_embeds")
_IMAGE_TYPES = (None, "image_url", "input_image")


def has_video(messages: Any) -> bool:
    """Return whether a chat's messages have a video; ``messages`` may be any JSON value."""
    return _any_part(messages, is_video)


def _any_part(messages: Any, matches: Callable[[Any], object]) -> bool:
    if not isinstance(messages, list):
        return False
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list) and any(map(matches, content)):
            return True
    return False


def image_url_of(part: Any) -> str | None:
    """Return the URL of a part that vLLM reads as an image, None for any other part."""
    if not isinstance(part, Mapping) or part.get("type") not in _IMAGE_TYPES:
        return None
    url = part.get("image_url")
    if isinstance(url, Mapping):
        url = url.get("url")
    return url if isinstance(url, str) and url else None


def is_video(part: Any) -> bool:
    """Return whether vLLM reads a part as a video.

    vLLM goes by the type. Without a type, or with a ``uuid``, it goes by the fields.
    """
    if not isinstance(part, Mapping):
        return False
    kind = part.get("type")
    if isinstance(kind, str) and "video" in kind:
        return True
    by_fields = kind is None or part.get("uuid") is not None
    return by_fields and any(field in part for field in _VIDEO_FIELDS)


class RetentionRequest(BaseModel):
    """Mixin of a vLLM request: our fields, and how their values reach the processor."""

    field_names: ClassVar[set[str] | None] = None

    # The route checks the values: pydantic's errors would list Python objects.
    retention_ratio: Annotated[
        Any, WithJsonSchema(_RATIO_SCHEMA, mode="validation"), Field(description=_RATIO_DESCRIPTION)
    ] = None
    max_retained_video_tokens: Annotated[
        Any,
        WithJsonSchema(_BUDGET_SCHEMA, mode="validation"),
        Field(description=_BUDGET_DESCRIPTION),
    ] = None
    compress_images: Annotated[
        Any,
        WithJsonSchema(_COMPRESS_IMAGES_SCHEMA, mode="validation"),
        Field(description=_COMPRESS_IMAGES_DESCRIPTION),
    ] = None

    _report: RetentionReport | None = PrivateAttr(default=None)
    _choose: Chooser | None = PrivateAttr(default=None)
    _has_video: bool = PrivateAttr(default=False)
    _has_images: bool = PrivateAttr(default=False)
    _loaded: dict[str, Any] = PrivateAttr(default_factory=dict)
    _is_loaded: bool = PrivateAttr(default=False)

    @model_validator(mode="wrap")
    @classmethod
    def _look_for_videos(cls, data: Any, handler: Any) -> Any:
        """Store whether the body has a video, before pydantic turns parts into iterators."""
        request = handler(data)
        if isinstance(data, dict):
            request._has_video = has_video(data.get("messages"))
            if data.get(COMPRESS_IMAGES) is True:
                request._has_images = _any_part(data.get("messages"), image_url_of)
        return request

    @property
    def has_video(self) -> bool:
        """Whether a message has a video, or images that became one."""
        return self._has_video or self._is_loaded

    @property
    def compresses_images(self) -> bool:
        """Whether images of the request are to be compressed as frames, and are not yet."""
        return self._has_images and not self._is_loaded

    def use_loaded(self, media: dict[str, Any]) -> None:
        """Take what images became, by the names that stand in their parts in place of URLs."""
        self._loaded, self._is_loaded = media, True

    @property
    def names_fields(self) -> bool:
        """Whether the body has one of our fields or an unknown field."""
        return (
            self.retention_ratio is not None
            or self.max_retained_video_tokens is not None
            or self.compress_images is not None
            or bool(self.model_extra)
        )

    @property
    def valid_ratio(self) -> float | None:
        """The ratio if it is in (0, 1], even if this server refuses it; else None."""
        return ratio_or_none(self.retention_ratio)

    def begin_report(
        self, choose: Chooser | None = None, max_engine_tokens: int | None = None
    ) -> RetentionReport:
        """Return a report that the processor fills; it is complete once the prompt is rendered.

        Args:
            choose: chooses the ratio if the request leaves it to the server; None if this server
                offers no choice.
            max_engine_tokens: refuse a video that keeps more; None for a request that does not go
                to the engine.
        """
        self._report = self._new_report()
        self._report.max_engine_tokens = max_engine_tokens
        self._choose = choose
        return self._report

    def _new_report(self) -> RetentionReport:
        return RetentionReport()

    def build_chat_params(self, *args: Any, **kwargs: Any) -> ChatParams:
        """Return vLLM's parameters, with our fields and the report if there is a report.

        They travel as ``media_io_kwargs`` of a modality of our own, which vLLM passes on to the
        processor. vLLM refuses a request's ``mm_processor_kwargs`` unless the operator trusts
        clients with every option of the processor. Our fields are checked numbers.
        """
        params: ChatParams = super().build_chat_params(*args, **kwargs)  # type: ignore[misc]
        if self._report is None:
            return params
        fields = {
            RETENTION_RATIO: self.retention_ratio,
            MAX_RETAINED_VIDEO_TOKENS: self.max_retained_video_tokens,
            AUTO: self._choose,
            RETENTION_REPORT: self._report,
            LOADED_MEDIA: self._loaded,
        }
        return replace(
            params, media_io_kwargs={**(params.media_io_kwargs or {}), RETENTION: fields}
        )


class RetentionChatCompletionRequest(RetentionRequest, ChatCompletionRequest):
    """vLLM's chat completion request with our fields."""


class RetentionTokenizeChatRequest(RetentionRequest, TokenizeChatRequest):
    """vLLM's tokenize request for a chat with our fields."""
