"""Checks our fields of a request before anything is fetched or decoded."""

from typing import Any

from starlette.datastructures import State

from scissor_vllm.frontend.guard import misspelt_field
from scissor_vllm.frontend.refusal import RefusedRequestError
from scissor_vllm.frontend.request import RetentionRequest
from scissor_vllm.metrics import Reason
from scissor_vllm.models import MODELS, NO_IMAGE_RUNS
from scissor_vllm.retention import (
    COMPRESS_IMAGES,
    MAX_RETAINED_VIDEO_TOKENS,
    RETENTION_RATIO,
    check_compress_images,
    check_retention_ratio,
    check_token_budget,
)


def check_request(request: RetentionRequest, state: State) -> None:
    """Check a request's fields against what the server allows and its model can.

    Args:
        request: of a client.
        state: of the app, with ``retention_policy`` and ``compresses_video``.

    Raises:
        RefusedRequestError: a ratio that is none in (0, 1] or below the operator's minimum, a
            budget that is no integer of at least 1, one of them under another name, or the model's
            videos are not compressed. vLLM answers it with 400.
    """
    if misspelt := misspelt_field(request.model_extra or {}):
        raise RefusedRequestError(misspelt, reason=Reason.INVALID_RATIO)
    _check_ratio(request.retention_ratio, request.has_video, state)
    _check_budget(request.max_retained_video_tokens, request.has_video, state)
    _check_images(request.compress_images, state)


def _check_ratio(ratio: Any, has_video: bool, state: State) -> None:
    if ratio is None:
        return
    try:
        if state.retention_policy.asks_for_auto(ratio):
            if has_video and not state.compresses_video:
                raise _unsupported(RETENTION_RATIO, "1.0 or absent", ratio)
            return
        check_retention_ratio(ratio)
    except (TypeError, ValueError) as error:
        raise _refused(error, RETENTION_RATIO, Reason.INVALID_RATIO) from error
    try:
        in_force = state.retention_policy.resolve(ratio)
    except ValueError as error:
        raise _refused(error, RETENTION_RATIO, Reason.RATIO_BELOW_MINIMUM) from error
    if in_force != 1.0 and has_video and not state.compresses_video:
        raise _unsupported(RETENTION_RATIO, "1.0 or absent", in_force)


def _check_budget(budget: Any, has_video: bool, state: State) -> None:
    if budget is None:
        return
    try:
        check_token_budget(budget)
    except (TypeError, ValueError) as error:
        raise _refused(error, MAX_RETAINED_VIDEO_TOKENS, Reason.INVALID_BUDGET) from error
    if has_video and not state.compresses_video:
        raise _unsupported(MAX_RETAINED_VIDEO_TOKENS, "absent", budget)


def _check_images(value: Any, state: State) -> None:
    try:
        is_asked = check_compress_images(value)
    except TypeError as error:
        raise _refused(error, COMPRESS_IMAGES, Reason.INVALID_IMAGES) from error
    if not is_asked or state.retention_policy.allows_compress_images:
        return
    processor = state.online_renderer.renderer.mm_processor
    if not state.compresses_video or not processor.info.get_num_frames_of_image():
        raise RefusedRequestError(
            f"{COMPRESS_IMAGES} must be false or absent for this model, got true: {NO_IMAGE_RUNS}; "
            "send the frames as a video",
            parameter=COMPRESS_IMAGES,
            reason=Reason.UNSUPPORTED_MODEL,
        )
    raise RefusedRequestError(
        f"{COMPRESS_IMAGES} must be false or absent on this server, got true: send the frames as a "
        "video, or have the operator set --allow-compress-images",
        parameter=COMPRESS_IMAGES,
        reason=Reason.INVALID_IMAGES,
    )


def _refused(error: Exception, field: str, reason: Reason) -> RefusedRequestError:
    return RefusedRequestError(str(error), parameter=field, reason=reason)


def _unsupported(field: str, rule: str, value: object) -> RefusedRequestError:
    return RefusedRequestError(
        f"{field} must be {rule} for this model, got {value}: videos are compressed for "
        f"{', '.join(MODELS)} only",
        parameter=field,
        reason=Reason.UNSUPPORTED_MODEL,
    )
