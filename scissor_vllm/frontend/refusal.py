"""Errors of refused requests, with the reason that the metrics count."""

import re

from vllm.exceptions import VLLMValidationError

from scissor_vllm.metrics import Reason


class RefusedVideoError(ValueError):
    """A client's video is refused."""

    def __init__(self, message: str, *, reason: Reason = Reason.UNREADABLE_VIDEO) -> None:
        super().__init__(message)
        self.reason = reason


_IN_MESSAGES = {
    re.compile(r"maximum (context|model) length"): Reason.PROMPT_TOO_LONG,
    re.compile(r"video item .* exceeds the pre-allocated encoder cache"): Reason.VIDEO_TOO_LONG,
}
"""vLLM's length errors by message, because they share no type or parameter."""


def reason_of(error: BaseException | None) -> Reason:
    """Return the reason of the first error in the chain of causes that carries a reason."""
    while error is not None:
        reason = getattr(error, "reason", None)
        if isinstance(reason, Reason):
            return reason
        for pattern, matched in _IN_MESSAGES.items():
            if pattern.search(str(error)):
                return matched
        error = error.__cause__
    return Reason.OTHER


class RefusedRequestError(VLLMValidationError):
    """A client's mistake with its refusal reason. vLLM answers it with 400."""

    def __init__(
        self, message: str, *, parameter: str | None = None, reason: Reason = Reason.OTHER
    ) -> None:
        super().__init__(message, parameter=parameter)
        self.reason = reason
