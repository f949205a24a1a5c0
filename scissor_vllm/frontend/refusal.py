"""Why a request is refused: one word of few, for whoever counts them."""

import re

from vllm.exceptions import VLLMValidationError

from scissor_vllm.metrics import Reason


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
        for pattern, matched in _IN_MESSAGES.items():
            if pattern.search(str(error)):
                return matched
        error = error.__cause__
    return Reason.OTHER


class RefusedRequestError(VLLMValidationError):
    """A client's mistake, which vLLM answers with 400, and its reason for who counts them."""

    def __init__(
        self, message: str, *, parameter: str | None = None, reason: Reason = Reason.OTHER
    ) -> None:
        super().__init__(message, parameter=parameter)
        self.reason = reason
