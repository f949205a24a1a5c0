"""Prints which third-party clients can send our fields to a server and read them in its answers.

``python -m bench.clients --base-url http://127.0.0.1:8000/v1 --model demo --video clip.mp4`` tests
the installed ones of openai, litellm and langchain-openai. ``--gateway-url`` adds a litellm gateway
in front of the server. ``bench/clients.mjs`` tests openai's JavaScript client. A cell is what an
answer had, not what a client documents.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RATIO = 0.25
FIELDS = {"retention_ratio": RATIO}
HEADER = "x-retained-video-tokens"


def messages_of(video: Path) -> list[dict[str, Any]]:
    """Return a chat about a video."""
    url = f"data:video/mp4;base64,{base64.b64encode(video.read_bytes()).decode()}"
    video_part = {"type": "video_url", "video_url": {"url": url}}
    return [{"role": "user", "content": [video_part, {"type": "text", "text": "What is this?"}]}]


def header_in(headers: Mapping[str, Any]) -> str | None:
    """Return the name of our header among these, without a prefix if it is there; else None."""
    return min((name for name in headers if name.lower().endswith(HEADER)), key=len, default=None)


def row(name: str, answer: Any, headers: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the table's row of an answer, or of the last chunk of a stream."""
    compression = getattr(answer, "video_compression", None)
    header = None if headers is None else header_in(headers)
    return {
        "client": name,
        "field in the answer": "yes" if compression else "no",
        "header": f"`{header}`" if header else "no",
        "ratio arrived": str(_ratio(compression, headers) == RATIO).lower(),
    }


def _ratio(compression: Any, headers: Mapping[str, Any] | None) -> float | None:
    if compression:
        return float(compression["retention_ratio"])
    for name, value in (headers or {}).items():
        if name.lower().endswith("x-video-retention-ratio"):
            return float(value)
    return None


def by_openai(url: str, key: str, model: str, messages: Any, name: str) -> list[dict[str, str]]:
    """Return the rows of the openai client."""
    import openai

    create = openai.OpenAI(
        base_url=url, api_key=key, max_retries=0
    ).chat.completions.with_raw_response.create
    options: Any = {"model": model, "messages": messages, "max_tokens": 4, "extra_body": FIELDS}
    whole = create(**options)
    streamed = create(**options, stream=True, stream_options={"include_usage": True})
    *_, last = streamed.parse()
    return [
        row(f"{name}, whole", whole.parse(), whole.headers),
        row(f"{name}, streamed", last, streamed.headers),
    ]


def by_litellm(url: str, key: str, model: str, messages: Any) -> list[dict[str, str]]:
    """Return the rows of litellm's Python package."""
    import litellm  # type: ignore[import-not-found]

    options: Any = {
        "model": f"openai/{model}",
        "api_base": url,
        "api_key": key,
        "messages": messages,
        "max_tokens": 4,
        "extra_body": FIELDS,
    }
    whole = litellm.completion(**options)
    streamed = litellm.completion(**options, stream=True, stream_options={"include_usage": True})
    *_, last = streamed
    return [
        row("litellm, whole", whole, _litellm_headers(whole)),
        row("litellm, streamed", last, _litellm_headers(streamed)),
    ]


def by_langchain(url: str, key: str, model: str, messages: Any) -> list[dict[str, str]]:
    """Return the rows of langchain-openai."""
    from langchain_openai import ChatOpenAI  # type: ignore[import-not-found]

    chat = ChatOpenAI(
        model=model,
        base_url=url,
        api_key=key,
        max_tokens=4,
        extra_body=FIELDS,
        include_response_headers=True,
        stream_usage=True,
    )
    whole = chat.invoke(messages)
    first, *_ = chat.stream(messages)
    return [
        row(f"langchain-openai, {name}", answer, answer.response_metadata.get("headers"))
        for name, answer in (("whole", whole), ("streamed", first))
    ]


def _litellm_headers(answer: Any) -> dict[str, Any]:
    hidden = getattr(answer, "_hidden_params", {}) or {}
    return {**(hidden.get("additional_headers") or {}), **(hidden.get("headers") or {})}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--gateway-url", help="of a litellm gateway in front of it, with /v1")
    parser.add_argument("--gateway-key", default="x")
    parser.add_argument("--api-key", default="x")
    parser.add_argument("--model", required=True)
    parser.add_argument("--video", type=Path, required=True)
    args = parser.parse_args()
    chat = messages_of(args.video)
    base = (args.base_url, args.api_key, args.model, chat)
    trials: list[tuple[str, Callable[[], list[dict[str, str]]]]] = []
    if find_spec("openai"):
        trials.append(("openai", lambda: by_openai(*base, "openai")))
    if find_spec("litellm"):
        trials.append(("litellm", lambda: by_litellm(*base)))
    if find_spec("langchain_openai"):
        trials.append(("langchain-openai", lambda: by_langchain(*base)))
    if args.gateway_url:
        gateway = (args.gateway_url, args.gateway_key, args.model, chat)
        trials.append(("gateway", lambda: by_openai(*gateway, "openai through a litellm gateway")))
    rows: list[dict[str, str]] = []
    for name, ask in trials:
        try:
            rows += ask()
        except Exception as error:  # A client's failure is its row.
            rows.append({"client": name, "field in the answer": f"failed: {error!r}"[:200]})
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for cells in rows:
        print(f"| {' | '.join(cells.get(column, '') for column in columns)} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
