"""Prints what the plugin adds to a chat without our fields, and the time of a real chat.

Run ``python -m bench.stock_cost``. It times the parts of the API server that differ from vLLM for a
text chat and an image chat: request class, parameters, route and the processor's entry. Each part
alternates with vLLM's. Then a server of the demo model answers the same chats. A 7B model takes
longer, so the plugin's share is smaller. The route is also timed with an answer of 2.3 MB with log
probabilities, which passes unchanged.
"""

from __future__ import annotations

import asyncio
import base64
import json
import statistics
import time
import urllib.request
from argparse import Namespace
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from fastapi.responses import JSONResponse
from PIL import Image
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.processing.inputs import ProcessorInputs

from scissor_vllm.demo.client import demo_server
from scissor_vllm.frontend import chat
from scissor_vllm.frontend.processor import RetentionProcessor
from scissor_vllm.frontend.request import RetentionChatCompletionRequest

BATCHES, PER_BATCH = 41, 200
CHATS = 40
LARGE_ANSWER_BYTES = 2_300_000
TEXT = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "Which digit comes after eight, and why is it not ten?"},
]


def image_messages() -> list[dict[str, Any]]:
    """Return a chat with a picture of 384x384."""
    pixels = np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]


def added_microseconds(ours: Callable[[], Any], stock: Callable[[], Any]) -> float:
    """Return the difference between ours and stock, by the fastest of alternating batches."""
    taken: dict[Callable[[], Any], list[float]] = {ours: [], stock: []}
    for _ in range(BATCHES):
        for call, times in taken.items():
            begin = time.perf_counter()
            for _ in range(PER_BATCH):
                call()
            times.append((time.perf_counter() - begin) / PER_BATCH)
    return (min(taken[ours]) - min(taken[stock])) * 1e6


def request_cost(messages: list[dict[str, Any]]) -> float:
    """Return what our request class adds: validation and parameters for the renderer."""
    body = {"model": "demo", "messages": messages, "max_tokens": 16, "temperature": 0}

    def make(kind: Any) -> Callable[[], Any]:
        return lambda: kind.model_validate(body).build_chat_params(None, "auto")

    return added_microseconds(make(RetentionChatCompletionRequest), make(ChatCompletionRequest))


def route_cost(messages: list[dict[str, Any]], answer: JSONResponse) -> float:
    """Return what our route adds to vLLM's, which here answers at once."""

    async def create(request: Any, raw_request: Any) -> JSONResponse:
        return answer

    stock = chat_router.create_chat_completion
    chat_router.create_chat_completion = create
    body = {"model": "demo", "messages": messages}
    request = RetentionChatCompletionRequest.model_validate(body)
    raw: Any = Namespace()
    loop = asyncio.new_event_loop()
    run = loop.run_until_complete
    try:
        return added_microseconds(
            lambda: run(chat.create_chat_completion(request, raw)),
            lambda: run(create(request, raw)),
        )
    finally:
        chat_router.create_chat_completion = stock
        loop.close()


def processor_cost() -> float:
    """Return what our processor's entry adds for a request with an image."""
    image = np.zeros((8, 8, 3), np.uint8)
    items = MultiModalDataItems({"image": ImageProcessorItems([image])})
    inputs = ProcessorInputs(prompt=[1], mm_data_items=items)
    processor: Any = RetentionProcessor
    processor.__abstractmethods__ = frozenset()
    processor = processor.__new__(processor)
    stock = BaseMultiModalProcessor.apply
    BaseMultiModalProcessor.apply = lambda self, inputs, timing: inputs
    try:
        return added_microseconds(
            lambda: processor.apply(inputs, None),
            lambda: BaseMultiModalProcessor.apply(processor, inputs, None),
        )
    finally:
        BaseMultiModalProcessor.apply = stock


def chat_milliseconds(base_url: str, messages: list[dict[str, Any]]) -> float:
    """Return the median time of a chat of 16 tokens on a server, one at a time."""
    taken = []
    for number in range(CHATS):
        body = {
            "model": "demo",
            "messages": messages,
            "max_tokens": 16,
            "ignore_eos": True,
            "cache_salt": str(number),
        }
        request = urllib.request.Request(
            f"{base_url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        begin = time.perf_counter()
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1e3


def main() -> None:
    """Print a line for each kind of chat."""
    small = JSONResponse({"choices": []})
    large = JSONResponse({"logprobs": "x" * LARGE_ANSWER_BYTES})
    image = image_messages()
    added = {
        "text": request_cost(TEXT) + route_cost(TEXT, small),
        "image": request_cost(image) + route_cost(image, small) + processor_cost(),
    }
    print(f"text, an answer of 2.3 MB: the route adds {route_cost(TEXT, large):.1f} us")
    with demo_server() as base_url:
        whole = {
            "text": chat_milliseconds(base_url, TEXT),
            "image": chat_milliseconds(base_url, image),
        }
    for name, microseconds in added.items():
        share = microseconds / whole[name] / 10
        print(f"{name}: {microseconds:.1f} us of {whole[name]:.1f} ms for 16 tokens, {share:.3f} %")


if __name__ == "__main__":
    main()
