"""Refuses our fields wherever they would be ignored, and a field whose name is nearly one of ours.

vLLM's request classes accept and ignore unknown fields.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.routing import APIRoute

from scissor_vllm.retention import COMPRESS_IMAGES, MAX_RETAINED_VIDEO_TOKENS, RETENTION_RATIO

REQUEST_FIELDS = (RETENTION_RATIO, MAX_RETAINED_VIDEO_TOKENS, COMPRESS_IMAGES)
"""Fields of a request that vLLM does not have."""
CHAT_PATH = "/v1/chat/completions"
_NESTED = "extra_body"
"""The ``openai`` client's argument for additional fields. It has no meaning in a body."""
_SIMILARITY = 0.75
_MAX_NAME = 64


def resembled_field(name: str) -> str | None:
    """Return which of our fields a field's name is, misspelt; None for none."""
    # A client's name may have any length: the cache holds only short ones.
    if name in REQUEST_FIELDS or len(name) > _MAX_NAME:
        return None
    return _resembled(name)


@lru_cache(maxsize=1024)
def _resembled(name: str) -> str | None:
    letters = "".join(filter(str.isalpha, name.lower()))
    if letters == "retention":
        return RETENTION_RATIO
    for field in REQUEST_FIELDS:
        wanted = field.replace("_", "")
        if wanted in letters or SequenceMatcher(None, letters, wanted).ratio() >= _SIMILARITY:
            return field
    return None


def misspelt_field(fields: Mapping[str, Any], known: Collection[str] = ()) -> str | None:
    """Return what is wrong with a body's unknown fields, in one sentence; None for nothing.

    Args:
        fields: the body's fields.
        known: field names of the route, which are never misspellings.
    """
    for name in fields:
        if name not in known and (field := resembled_field(name)):
            return f"{name[:_MAX_NAME]} is not a field of a request: send {field}"
    nested = fields.get(_NESTED)
    for name in nested if isinstance(nested, Mapping) else ():
        if isinstance(name, str) and (field := _field_meant(name)):
            return f"{_NESTED} is not a field of a request: send {field} beside messages"
    return None


def _field_meant(name: str) -> str | None:
    return name if name in REQUEST_FIELDS else resembled_field(name)


def guard_routes(
    app: FastAPI, *, except_paths: Iterable[str] = (), reason: str | None = None
) -> None:
    """Have all routes that take a body refuse our fields.

    Each route is added again with a dependency that refuses. vLLM lets it replace the first.

    Args:
        app: with all of vLLM's routes.
        except_paths: routes that serve them.
        reason: why no route of this server serves them, None if ``CHAT_PATH`` does.
    """

    async def refuse_fields(request: Request) -> None:
        """Raise HTTPException if the body names one of them, or nearly."""
        if "json" not in request.headers.get("content-type", ""):
            return
        # The request caches its parsed body, so it is parsed once.
        try:
            body = await request.json()
        except ValueError:
            return
        if not isinstance(body, dict):
            return
        for field in REQUEST_FIELDS:
            if body.get(field) is not None:
                why = reason or f"this route serves no {field}: send the request to {CHAT_PATH}"
                raise HTTPException(400, f"{field} is refused: {why}")
        if misspelt := misspelt_field(body):
            raise HTTPException(400, misspelt)

    router = APIRouter()
    skipped = set(except_paths)
    for route in list(app.routes):
        if not isinstance(route, APIRoute) or route.path in skipped or "POST" not in route.methods:
            continue
        router.add_api_route(
            route.path,
            route.endpoint,
            response_model=route.response_model,
            status_code=route.status_code,
            tags=route.tags,
            dependencies=[Depends(refuse_fields), *route.dependencies],
            summary=route.summary,
            description=route.description,
            responses=route.responses,
            deprecated=route.deprecated,
            name=route.name,
            methods=["POST"],
            operation_id=route.operation_id,
            include_in_schema=route.include_in_schema,
            response_class=route.response_class,
            openapi_extra=route.openapi_extra,
            route_class_override=type(route),
        )
    app.include_router(router)
