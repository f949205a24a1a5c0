"""Why a request is refused: one word of few, for whoever counts them."""

import re
from enum import StrEnum


class Reason(StrEnum):
    """The values of the label ``reason``."""

    INVALID_RATIO = "invalid_ratio"
    """No number in (0, 1]."""
    RATIO_BELOW_MINIMUM = "ratio_below_minimum"
    UNSUPPORTED_MODEL = "unsupported_model"
    """A ratio for a model whose videos are not compressed."""
    PROCESSOR_OPTIONS = "processor_options"
    """One of our settings in a request's ``mm_processor_kwargs``."""
    UNREADABLE_VIDEO = "unreadable_video"
    """No frame of it can be decoded."""
    VIDEO_TOO_LARGE = "video_too_large"
    """In bytes, decoded."""
    VIDEO_TOO_LONG = "video_too_long"
    """In tokens: for compression, or what is kept of it for a step of the engine."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """For the model, after compression."""
    OTHER = "other"
    """vLLM's own: an unknown model, a video that cannot be fetched, a wrong parameter."""


class RefusedVideoError(ValueError):
    """What a client sent as a video is not taken, for a reason."""

    def __init__(self, message: str, *, reason: Reason = Reason.UNREADABLE_VIDEO) -> None:
        super().__init__(message)
        self.reason = reason


_IN_MESSAGES = {
    re.compile(r"maximum (context|model) length"): Reason.PROMPT_TOO_LONG,
    re.compile(r"video item .* exceeds the pre-allocated encoder cache"): Reason.VIDEO_TOO_LONG,
}
"""vLLM's own about lengths, which have no type or parameter in common."""


def reason_of(error: BaseException | None) -> Reason:
    """Return the reason of the first error in the chain of causes that has one."""
    while error is not None:
        reason = getattr(error, "reason", None)
        if isinstance(reason, Reason):
            return reason
        for pattern, found in _IN_MESSAGES.items():
            if pattern.search(str(error)):
                return found
        error = error.__cause__
    return Reason.OTHER
