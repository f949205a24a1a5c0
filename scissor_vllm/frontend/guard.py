"""Refuses a ratio wherever it would be ignored, and a field whose name is nearly the ratio's.

vLLM's request classes take fields that they do not know and ignore them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.routing import APIRoute

from scissor_vllm.retention import RETENTION_RATIO

CHAT_PATH = "/v1/chat/completions"
_NESTED = "extra_body"
"""The ``openai`` client's name for fields that it does not know; in a body it means nothing."""
_SIMILARITY = 0.75
_MAX_NAME = 64


@lru_cache(maxsize=1024)
def resembles_ratio(name: str) -> bool:
    """Return whether a field's name is the ratio's, misspelt."""
    if name == RETENTION_RATIO or len(name) > _MAX_NAME:
        return False
    letters = "".join(filter(str.isalpha, name.lower()))
    wanted = RETENTION_RATIO.replace("_", "")
    if letters == "retention" or wanted in letters:
        return True
    return SequenceMatcher(None, letters, wanted).ratio() >= _SIMILARITY


def misspelt_ratio(fields: Mapping[str, Any], known: Collection[str] = ()) -> str | None:
    """Return what is wrong with a body's unknown fields, in one sentence; None for nothing.

    Args:
        fields: of the body; which of them the route takes does not matter if it takes none like it.
        known: fields that are right however they are named.
    """
    for name in fields:
        if name not in known and resembles_ratio(name):
            return f"{name[:_MAX_NAME]} is not a field of a request: send {RETENTION_RATIO}"
    nested = fields.get(_NESTED)
    if isinstance(nested, Mapping) and any(
        name == RETENTION_RATIO or (isinstance(name, str) and resembles_ratio(name))
        for name in nested
    ):
        return f"{_NESTED} is not a field of a request: send {RETENTION_RATIO} beside messages"
    return None


def guard_routes(
    app: FastAPI, *, except_paths: Iterable[str] = (), reason: str | None = None
) -> None:
    """Have all routes that take a body refuse a ratio.

    A route is added again with one more dependency, and vLLM lets it replace the first.

    Args:
        app: with all of vLLM's routes.
        except_paths: routes that serve the ratio.
        reason: why no route of this server serves it, None if ``CHAT_PATH`` does.
    """
    message = reason or f"this route serves no {RETENTION_RATIO}: send the request to {CHAT_PATH}"

    async def refuse_ratio(request: Request) -> None:
        """Raise HTTPException if the body names a ratio, or nearly."""
        if "json" not in request.headers.get("content-type", ""):
            return
        # Parsed by FastAPI before, or by the route after: the request keeps what it parsed.
        try:
            body = await request.json()
        except ValueError:
            return
        if not isinstance(body, dict):
            return
        if body.get(RETENTION_RATIO) is not None:
            raise HTTPException(400, f"{RETENTION_RATIO} is refused: {message}")
        if misspelt := misspelt_ratio(body):
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
            dependencies=[Depends(refuse_ratio), *route.dependencies],
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
