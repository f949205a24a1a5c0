"""The settings in force for a request: its own ratio and budget, or the operator's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import VLLMValidationError

from scissor_vllm.frontend.refusal import RefusedRequestError
from scissor_vllm.metrics import Reason
from scissor_vllm.retention import (
    AUTO,
    MAX_RETAINED_VIDEO_TOKENS,
    RETENTION_RATIO,
    Chooser,
)
from scissor_vllm.settings import OWN_KEYS, REQUEST_KEYS, RetentionPolicy


@dataclass(frozen=True)
class RequestSettings:
    """The ratio and the budget in force for a request."""

    ratio: float | Chooser
    """The ratio, or a function that chooses it by N of the videos."""
    budget: int | None
    """Most tokens that the videos keep together, None for no limit."""
    is_default_budget: bool
    """Whether the budget is the operator's default."""


def settings_in_force(
    policy: RetentionPolicy,
    kwargs: Mapping[str, object],
    over_http: Mapping[str, Any],
    is_embedded: bool,
) -> RequestSettings:
    """Return the ratio and the budget in force for a request.

    Args:
        policy: of the operator.
        kwargs: the request's options for the processor. A trusted client, or an offline one, may
            name both here.
        over_http: fields of the request's body.
        is_embedded: whether a video is sent as embeddings.

    Raises:
        VLLMValidationError: the ratio or the budget is invalid or not allowed.
    """
    settings = sorted(OWN_KEYS & kwargs.keys() - REQUEST_KEYS)
    if settings:
        raise RefusedRequestError(
            f"{', '.join(settings)} can be set for the whole server only: leave it out of "
            "the request's mm_processor_kwargs",
            parameter="mm_processor_kwargs",
            reason=Reason.PROCESSOR_OPTIONS,
        )
    requested = {
        key: kwargs.get(key) if over_http.get(key) is None else over_http[key]
        for key in REQUEST_KEYS
    }
    try:
        ratio = _ratio(policy, requested[RETENTION_RATIO], over_http.get(AUTO))
    except (TypeError, ValueError) as error:
        raise VLLMValidationError(str(error), parameter=RETENTION_RATIO) from error
    try:
        budget = policy.resolve_budget(requested[MAX_RETAINED_VIDEO_TOKENS])
    except (TypeError, ValueError) as error:
        raise VLLMValidationError(str(error), parameter=MAX_RETAINED_VIDEO_TOKENS) from error
    if is_embedded:
        _check_embedded(requested)
    return RequestSettings(ratio, budget, requested[MAX_RETAINED_VIDEO_TOKENS] is None)


def _ratio(policy: RetentionPolicy, requested: object, choose: Chooser | None) -> float | Chooser:
    """Return a request's ratio, or the function that chooses it.

    Raises:
        TypeError: the ratio is not a number.
        ValueError: the ratio is not allowed, or is ``auto`` without an API server to choose it.
    """
    if not policy.asks_for_auto(requested):
        return policy.resolve(requested)
    if choose is None and requested is not None:
        raise ValueError(
            f"{RETENTION_RATIO} {AUTO} is chosen by an API server for chats: give a number"
        )
    return choose or policy.default_ratio


def _check_embedded(requested: Mapping[str, object]) -> None:
    """Raise RefusedRequestError if a request asks to compress videos that are embeddings."""
    if requested[RETENTION_RATIO] not in (None, 1.0):
        name, rule = RETENTION_RATIO, "1.0 or absent"
    elif requested[MAX_RETAINED_VIDEO_TOKENS] is not None:
        name, rule = MAX_RETAINED_VIDEO_TOKENS, "absent"
    else:
        return
    raise RefusedRequestError(
        f"{name} must be {rule} for videos sent as embeddings, got {requested[name]}: send their "
        "files",
        parameter=name,
        reason=Reason.UNSUPPORTED_MODEL,
    )
