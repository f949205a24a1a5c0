"""A video of more tokens than a step of the engine takes is refused before a stream begins."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from tests.conftest import NUM_FRAMES, PAGE_STEP_TOKENS, TOKENS_PER_FRAME
from tests.serving import Server, message

NUM_TOKENS = NUM_FRAMES["long"] * TOKENS_PER_FRAME
REFUSAL = (
    f"a video may have {PAGE_STEP_TOKENS} tokens after compression on this server, got one that "
    f"has {NUM_TOKENS + 1}: ask for a retention_ratio of "
)


def test_whether_it_streams_or_not_and_the_ratio_that_is_named_is_answered(
    page_server: Server, clips: dict[str, Path]
) -> None:
    name, labels = "scissor_vllm:refused_requests_total", {"reason": "video_too_long"}
    before = page_server.counter(name, **labels)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            page_server.ask(clips["long"], "What is this?", stream=stream)
        assert REFUSAL in str(refused.value)
        assert refused.value.param == "video_url"
    body = {"model": "demo", "messages": [message(clips["long"])]}
    for route in ("/scissor/estimate", "/scissor/picture"):
        with pytest.raises(openai.BadRequestError) as refused:
            page_server.client.post(route, body=body, cast_to=object)
        assert REFUSAL in str(refused.value)
    # What goes to no engine is counted as vLLM does.
    status, content = page_server.post("/tokenize", json.dumps(body).encode())
    assert status == 200
    assert json.loads(content)["count"] > NUM_TOKENS
    assert page_server.counter(name, **labels) == before + 2
    fitting = float(str(refused.value).split(REFUSAL)[1].split(" or less")[0])
    answer = page_server.ask(clips["long"], "What is this?", ratio=fitting)
    kept = answer.video_compression["num_retained_video_tokens"]
    assert PAGE_STEP_TOKENS - 2 <= kept < PAGE_STEP_TOKENS
