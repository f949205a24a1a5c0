"""Loads stock vLLM and the plugin in turn with chats that have no video.

    python -m bench.plain_chats --stock URL --plugin URL [--max-concurrency 32] [--json FILE]

Both servers must run. A round asks each of them for the same number of answers to text chats, then
to chats with a picture. Who comes first alternates. Prompts and pictures are distinct. The table
has the requests/s of both and the mean ratio over the rounds with its range.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import statistics
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from openai import AsyncOpenAI
from PIL import Image

from scissor_vllm.loadtest.record import environment, write_json

NUM_WORDS = 400
KINDS = ("text", "image")
SERVERS = ("stock", "plugin")


def chat(kind: str, number: int) -> list[dict[str, Any]]:
    """Return the messages of a chat; no two numbers give the same."""
    rng = np.random.default_rng(number)
    words = " ".join(str(word) for word in rng.integers(0, 1000, NUM_WORDS))
    text = {"type": "text", "text": f"Go on with this list: {words}"}
    if kind == "text":
        return [{"role": "user", "content": [text]}]
    tiles = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(tiles.repeat(60, 0).repeat(60, 1)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": "What is this?"}]}]


async def requests_per_second(
    client: AsyncOpenAI, chats: list[list[dict[str, Any]]], concurrency: int, output_len: int
) -> float:
    """Return how many chats a second a server answers."""
    model = (await client.models.list()).data[0].id
    slots = asyncio.Semaphore(concurrency)

    async def ask(messages: Any) -> None:
        async with slots:
            answer = await client.chat.completions.create(
                model=model,
                messages=messages,
                max_tokens=output_len,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == output_len

    begin = time.perf_counter()
    await asyncio.gather(*map(ask, chats))
    return len(chats) / (time.perf_counter() - begin)


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each kind and round."""
    clients = {
        name: AsyncOpenAI(base_url=f"{url.rstrip('/')}/v1", api_key="none", timeout=600)
        for name, url in zip(SERVERS, (args.stock, args.plugin), strict=True)
    }
    rows = []
    first = 0
    for number in range(args.rounds + 1):
        for kind in KINDS:
            names = SERVERS if number % 2 else SERVERS[::-1]
            row: dict[str, Any] = {"kind": kind}
            for name in names:
                chats = [chat(kind, first + n) for n in range(args.num_prompts)]
                first += args.num_prompts
                row[name] = await requests_per_second(
                    clients[name], chats, args.max_concurrency, args.output_len
                )
            if number:  # the first round warms up
                rows.append(row)
    return rows


def main() -> None:
    """Measure what the command line names, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stock", required=True, metavar="URL", help="of vLLM without the plugin")
    parser.add_argument("--plugin", required=True, metavar="URL", help="of vLLM with it")
    parser.add_argument("--max-concurrency", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=96, help="in a round, for each server")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where to write all rounds")
    args = parser.parse_args()
    rows = asyncio.run(measure(args))
    settings = {
        name: getattr(args, name)
        for name in ("max_concurrency", "num_prompts", "rounds", "output_len")
    }
    if args.json:
        write_json(args.json, {"environment": environment(), "settings": settings, "runs": rows})
    print("kind    stock, requests/s    plugin    ratio    range")
    for kind in KINDS:
        chosen = [row for row in rows if row["kind"] == kind]
        ratios = [row["plugin"] / row["stock"] for row in chosen]
        stock, plugin = (statistics.mean(row[name] for row in chosen) for name in SERVERS)
        print(
            f"{kind:8}{stock:17.2f}{plugin:10.2f}{statistics.mean(ratios):9.3f}"
            f"    {min(ratios):.3f} to {max(ratios):.3f}"
        )


if __name__ == "__main__":
    main()
