"""Ratios by alias and by key for LiteLLM's gateway, and keys without a database.

``limits`` is a callback: it fills in the default ratio, refuses ratios below the floor of the
key or of the alias, and gives clients the server's headers under their own names. A key has its
default and its floor in its metadata, an alias in its ``model_info``.

``user_api_key_auth`` knows the keys of ``keys.yaml``, or of the file that ``GATEWAY_KEYS`` names.
With a database, leave ``custom_auth`` and that file out, and set the metadata by ``/key/generate``.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import Any

import yaml
from fastapi import HTTPException, Request
from litellm.integrations.custom_logger import CustomLogger
from litellm.proxy._types import UserAPIKeyAuth, hash_token

RATIO, BUDGET, IMAGES = "retention_ratio", "max_retained_video_tokens", "compress_images"
DEFAULT, FLOOR = "default_retention_ratio", "min_retention_ratio"
HEADERS = ("x-video-retention-ratio", "x-video-tokens", "x-retained-video-tokens")
FROM_SERVER = "llm_provider-"
"""LiteLLM's prefix of the headers that it got from a server."""
CHATS = ("completion", "acompletion")


class RetentionLimits(CustomLogger):
    """Applies the ratios of aliases and keys to chats."""

    async def async_pre_call_hook(
        self, user_api_key_dict: UserAPIKeyAuth, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Return the request with its default ratio, or refuse it.

        Raises:
            HTTPException: 400, the request asks for less than it may.
        """
        nested = data.get("extra_body")
        for field in (RATIO, BUDGET, IMAGES):
            if call_type not in CHATS and data.get(field) is not None:
                raise refused(f"this route serves no {field}: send it to /v1/chat/completions")
            if isinstance(nested, dict) and field in nested:
                raise refused(
                    f"extra_body is not a field of a request: send {field} beside messages"
                )
        if call_type not in CHATS:
            return data
        of_key, of_alias = user_api_key_dict.metadata or {}, alias(data.get("model"))
        floor = max(of_key.get(FLOOR) or 0.0, of_alias.get(FLOOR) or 0.0)
        ratio = data.get(RATIO)
        if ratio is None:
            ratio = of_key.get(DEFAULT) or of_alias.get(DEFAULT)
            if floor:
                data[RATIO] = max(ratio, floor) if is_number(ratio) else floor
            elif ratio is not None:
                data[RATIO] = ratio
        elif floor and not (is_number(ratio) and ratio >= floor):
            raise refused(
                f"{RATIO} must be a number of at least {floor} for this key and model, got "
                f"{ratio!r}: send more, or leave it out"
            )
        if floor and data.get(BUDGET) is not None:
            raise refused(
                f"{BUDGET} must be absent for this key and model, which have a least {RATIO} of "
                f"{floor}: send {RATIO}"
            )
        return data

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: UserAPIKeyAuth,
        response: Any,
        request_headers: dict[str, str] | None = None,
        litellm_call_info: dict[str, Any] | None = None,
    ) -> dict[str, str]:
        """Return the server's headers under the names that the server gave them."""
        hidden = getattr(response, "_hidden_params", None) or {}
        headers = hidden.get("additional_headers") or {}
        return {
            name: str(headers[FROM_SERVER + name])
            for name in HEADERS
            if FROM_SERVER + name in headers
        }


def alias(name: Any) -> dict[str, Any]:
    """Return the ``model_info`` of an alias of the gateway's configuration."""
    from litellm.proxy.proxy_server import llm_router

    deployments = llm_router.get_model_list(model_name=name) if llm_router else None
    return (deployments or [{}])[0].get("model_info") or {}


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def refused(message: str) -> HTTPException:
    """Return a client's mistake."""
    return HTTPException(400, {"error": message})


def read_keys(path: Path) -> list[tuple[str, UserAPIKeyAuth]]:
    """Return each key of a file, and what LiteLLM knows of it.

    Raises:
        ValueError: a key's environment variable is not set.
    """
    keys = []
    for entry in yaml.safe_load(path.read_text()):
        key = os.environ.get(entry["key"])
        if not key:
            raise ValueError(f"{entry['key']} must be the key of {entry['name']}: set it")
        metadata = {name: entry.pop(name) for name in (DEFAULT, FLOOR) if name in entry}
        known = UserAPIKeyAuth(
            api_key=hash_token(key),
            key_alias=entry.pop("name"),
            metadata=metadata,
            **{name: value for name, value in entry.items() if name != "key"},
        )
        keys.append((key, known))
    return keys


limits = RetentionLimits()
KEYS_FILE = Path(os.environ.get("GATEWAY_KEYS") or Path(__file__).with_name("keys.yaml"))
KEYS = read_keys(KEYS_FILE) if KEYS_FILE.exists() else []


async def user_api_key_auth(request: Request, api_key: str) -> UserAPIKeyAuth:
    """Return whose key this is.

    Raises:
        HTTPException: 401, nobody's.
    """
    for key, known in KEYS:
        if hmac.compare_digest(api_key.removeprefix("Bearer ").encode(), key.encode()):
            return known.model_copy(deep=True)
    raise HTTPException(401, "a valid key is required")
