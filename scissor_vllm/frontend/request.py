"""The fields that a request adds to vLLM's, and their way to the processor."""

from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import (
    TokenizeChatRequest,
)
from vllm.renderers import ChatParams

from scissor_vllm.retention import (
    RETENTION,
    RETENTION_RATIO,
    RETENTION_REPORT,
    RetentionReport,
    check_retention_ratio,
)

_DESCRIPTION = (
    "Fraction of each video's tokens that reaches the language model, above 0 and at most 1. "
    "1.0 keeps all. Leave it out for the server's default. Images and text are untouched."
)

# The bounds are the number's: pydantic would hold null to them too, and fail.
_Ratio = Annotated[float, Field(gt=0, le=1)]


def _checked(ratio: object) -> float | None:
    if ratio is None:
        return None
    try:
        return check_retention_ratio(ratio)
    except TypeError as error:
        # Pydantic reports a ValueError as the client's, and lets a TypeError through.
        raise ValueError(str(error)) from error


class RetentionRequest(BaseModel):
    """Mixin of a vLLM request: the field, and the way of its value to the processor."""

    field_names: ClassVar[set[str] | None] = None

    retention_ratio: Annotated[
        _Ratio | None,
        BeforeValidator(_checked, json_schema_input_type=_Ratio | None),
        Field(description=_DESCRIPTION),
    ] = None

    _report: RetentionReport = PrivateAttr(default_factory=RetentionReport)

    @property
    def report(self) -> RetentionReport:
        """What was done to the request's videos; complete once the prompt is rendered."""
        return self._report

    def build_chat_params(self, *args: Any, **kwargs: Any) -> ChatParams:
        """Return vLLM's parameters, the ratio and the report among them.

        They travel as ``media_io_kwargs`` of a modality of our own, which vLLM carries from here to
        the processor. The request's own ``mm_processor_kwargs`` would be refused unless the
        operator trusts clients with every option of the processor; this is one checked number.
        """
        params = super().build_chat_params(*args, **kwargs)  # type: ignore[misc]
        own = {RETENTION_RATIO: self.retention_ratio, RETENTION_REPORT: self._report}
        return replace(params, media_io_kwargs={**(params.media_io_kwargs or {}), RETENTION: own})


class RetentionChatCompletionRequest(RetentionRequest, ChatCompletionRequest):
    """vLLM's chat completion request with ``retention_ratio``."""


class RetentionTokenizeChatRequest(RetentionRequest, TokenizeChatRequest):
    """vLLM's tokenize request for a chat with ``retention_ratio``."""
