"""Two engines behind one server, by vLLM's data parallelism: answers of one, counts of both."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving import SCISSOR, OneServer, Server

pytestmark = pytest.mark.slow

RATIOS = (1.0, 0.5, 0.25, 0.1)
QUESTION = "What happens?"


def ask_all(server: Server, clips: dict[str, Path]) -> list[tuple[Any, list[str]]]:
    """Ask about every clip at every ratio, twice and all at once; return counts and tokens."""

    def ask(asked: tuple[str, float]) -> tuple[Any, list[str]]:
        name, ratio = asked
        answer = server.ask(clips[name], QUESTION, ratio=ratio)
        report = answer.model_dump()["video_compression"]
        counts = (report["num_video_tokens"], report["num_retained_video_tokens"])
        return counts, [token.token for token in answer.choices[0].logprobs.content]

    asked = [(name, ratio) for name in ("long", "short", "tall") for ratio in RATIOS] * 2
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, asked))


def test_two_engines_answer_as_one_and_their_counts_add_up(
    servers: OneServer, clips: dict[str, Path]
) -> None:
    expected = ask_all(servers.get(*SCISSOR, "demo"), clips)
    server = servers.get(*SCISSOR, "demo", "--data-parallel-size=2", "--max-model-len=8192")
    answers = ask_all(server, clips)
    assert [counts for counts, _ in answers] == [counts for counts, _ in expected]
    same = sum(tokens == others for (_, tokens), (_, others) in zip(answers, expected, strict=True))
    # Batches differ, so a near tie may turn.
    assert same >= len(answers) - 1
    # Both engines have worked.
    finished = {
        engine: float(value)
        for engine, value in re.findall(
            r'^vllm:request_success_total\{engine="(\d)",finished_reason="length"[^}]*\} (\S+)$',
            server.get("/metrics"),
            re.M,
        )
    }
    assert sum(finished.values()) == len(answers)
    assert sorted(finished) == ["0", "1"]
    assert min(finished.values()) > 0
    for name, place in (("video_tokens", 0), ("retained_video_tokens", 1)):
        total = server.counter(f"scissor_vllm:{name}_total")
        assert total == sum(counts[place] for counts, _ in answers), name
    # Each engine has its own feature cache: a video of both is encoded by both, at most.
    encoded = server.counter("scissor_vllm:video_stage_seconds_count", stage="tower")
    assert 0 < encoded <= len(answers)
