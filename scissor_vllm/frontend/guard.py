"""Refuses ratios on routes that would ignore them, and misspelt ratio fields.

vLLM's request classes accept and ignore unknown fields.
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
"""The ``openai`` client's argument for additional fields. It has no meaning in a body."""
_SIMILARITY = 0.75
_MAX_NAME = 64


@lru_cache(maxsize=1024)
def resembles_ratio(name: str) -> bool:
    """Return whether a field's name is a misspelt ``retention_ratio``."""
    if name == RETENTION_RATIO or len(name) > _MAX_NAME:
        return False
    letters = "".join(filter(str.isalpha, name.lower()))
    wanted = RETENTION_RATIO.replace("_", "")
    if letters == "retention" or wanted in letters:
        return True
    return SequenceMatcher(None, letters, wanted).ratio() >= _SIMILARITY


def misspelt_ratio(fields: Mapping[str, Any], known: Collection[str] = ()) -> str | None:
    """Return an error message if a body has a misspelt ratio, else None.

    Args:
        fields: the body's fields.
        known: field names of the route, which are never misspellings.
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
    """Make all POST routes refuse a ratio.

    Each route is added again with a dependency that refuses. vLLM lets it replace the first.

    Args:
        app: the application with all of vLLM's routes.
        except_paths: routes that serve the ratio.
        reason: why this server serves no ratio, None if ``CHAT_PATH`` does.
    """
    message = reason or f"this route serves no {RETENTION_RATIO}: send the request to {CHAT_PATH}"

    async def refuse_ratio(request: Request) -> None:
        """Raise HTTPException if the body has a ratio or a misspelt one."""
        if "json" not in request.headers.get("content-type", ""):
            return
        # The request caches its parsed body, so it is parsed once.
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
