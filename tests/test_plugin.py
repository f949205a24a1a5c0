"""The plugin inside plain vLLM: its server, and offline; both checkpoint namings; mismatches."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any

import openai
import pytest

from scissor_vllm import num_retained_tokens
from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.frontend.chat import SWITCH_INTERVAL_SECONDS
from scissor_vllm.frontend.endpoint import RetentionEndpoint
from tests.conftest import (
    DEFAULT_BUDGET,
    DEFAULT_RATIO,
    MAX_TOKENS,
    MIN_RATIO,
    NUM_FRAMES,
    TOKENS_PER_FRAME,
)
from tests.families import Answer, Chat, chat, largest_difference
from tests.preloaded import SMALL
from tests.serving import OneServer, Server, same_answer


def kept(answer: Any) -> tuple[float, int]:
    compression = answer.video_compression
    return compression["retention_ratio"], compression["num_retained_video_tokens"]


def test_the_operators_default_applies_where_a_request_names_no_ratio(
    plugin_server: Server, clips: dict[str, Path]
) -> None:
    num_tokens = NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    default = plugin_server.ask(clips["tall"], "x")
    assert kept(default) == (DEFAULT_RATIO, num_retained_tokens(num_tokens, DEFAULT_RATIO))
    assert kept(plugin_server.ask(clips["tall"], "x", ratio=1.0)) == (1.0, num_tokens)
    named = plugin_server.ask(clips["tall"], "x", ratio=DEFAULT_RATIO)
    assert same_answer(named, default)


def test_the_operators_minimum_is_enforced(plugin_server: Server, clips: dict[str, Path]) -> None:
    with pytest.raises(openai.BadRequestError, match=f"at least {MIN_RATIO}"):
        plugin_server.ask(clips["twin"], "x", ratio=MIN_RATIO / 2)
    with pytest.raises(openai.BadRequestError, match=f"at least {MIN_RATIO}"):
        plugin_server.ask(
            clips["twin"], "x", extra_body={"mm_processor_kwargs": {"retention_ratio": 0.01}}
        )


def test_the_operators_budget_applies_where_a_request_names_none(
    plugin_server: Server, clips: dict[str, Path]
) -> None:
    whole = 2 * NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    videos = (clips["tall"], clips["tall"], "x")
    assert whole > DEFAULT_BUDGET
    assert kept(plugin_server.ask(*videos, ratio=1.0))[1] == DEFAULT_BUDGET
    own = {"max_retained_video_tokens": whole}
    assert kept(plugin_server.ask(*videos, ratio=1.0, extra_body=own)) == (1.0, whole)
    # Below the default, the ratio holds.
    assert kept(plugin_server.ask(*videos, ratio=0.5)) == (0.5, whole // 2)


def test_the_least_of_a_budget_follows_the_operators_minimum(
    plugin_server: Server, clips: dict[str, Path]
) -> None:
    counts = [NUM_FRAMES[name] * TOKENS_PER_FRAME for name in ("tall", "twin")]
    least = sum(num_retained_tokens(count, MIN_RATIO) for count in counts)
    videos = (clips["tall"], clips["twin"], "x")
    with pytest.raises(openai.BadRequestError, match=f"must be at least {least} .* {least - 1}"):
        plugin_server.ask(*videos, extra_body={"max_retained_video_tokens": least - 1})
    answer = plugin_server.ask(*videos, extra_body={"max_retained_video_tokens": least})
    assert kept(answer)[1] == least


def test_a_video_of_more_tokens_than_the_operator_allows_is_served_whole_or_refused(
    plugin_server: Server, clips: dict[str, Path]
) -> None:
    num_tokens = NUM_FRAMES["long"] * TOKENS_PER_FRAME
    for ratio in (None, 0.05):
        with pytest.raises(openai.BadRequestError, match=rf"{MAX_TOKENS} tokens.*got {num_tokens}"):
            plugin_server.ask(clips["long"], "x", ratio=ratio)
    # What is not compressed is bounded by the model's length, as in stock vLLM.
    assert kept(plugin_server.ask(clips["long"], "x", ratio=1.0)) == (1.0, num_tokens)
    assert kept(plugin_server.ask(clips["tall"], "x", ratio=0.5))[0] == 0.5


def test_trusted_clients_may_name_the_ratio_among_processor_options(
    plugin_server: Server, clips: dict[str, Path]
) -> None:
    options = {"mm_processor_kwargs": {"retention_ratio": 0.2}}
    by_options = plugin_server.ask(clips["tall"], "x", extra_body=options)
    by_field = plugin_server.ask(clips["tall"], "x", ratio=0.2)
    assert same_answer(by_options, by_field)
    both = plugin_server.ask(clips["tall"], "x", ratio=0.4, extra_body=options)
    assert kept(both)[0] == 0.4
    budget = {"mm_processor_kwargs": {"max_retained_video_tokens": 137}}
    assert kept(plugin_server.ask(clips["tall"], "x", ratio=1.0, extra_body=budget))[1] == 137


def test_settings_of_the_server_are_no_clients_to_change(
    plugin_server: Server, clips: dict[str, Path]
) -> None:
    options = {"mm_processor_kwargs": {"video_compression": "scc"}}
    with pytest.raises(openai.BadRequestError, match="whole server only"):
        plugin_server.ask(clips["twin"], "x", extra_body=options)


def test_counters_are_the_requests_sent_without_a_metrics_directory(
    plugin_server: Server, clips: dict[str, Path]
) -> None:
    """What API servers count: the worker's values do not reach vLLM's own command then."""

    def counted() -> dict[str, float]:
        names = ("video_tokens_total", "retained_video_tokens_total", "retention_ratio_sum")
        values = {name: plugin_server.counter(f"scissor_vllm:{name}") for name in names}
        for outcome in ("answered", "refused"):
            values[outcome] = plugin_server.counter(
                "scissor_vllm:video_requests_total", method="uniform", outcome=outcome
            )
        for reason in ("video_too_long", "processor_options", "ratio_below_minimum"):
            values[reason] = plugin_server.counter(
                "scissor_vllm:refused_requests_total", reason=reason
            )
        return values

    before = counted()
    plugin_server.ask(clips["tall"], "x")
    plugin_server.ask(clips["tall"], "x", ratio=0.2)
    with pytest.raises(openai.BadRequestError):
        plugin_server.ask(clips["long"], "x", ratio=0.5)
    with pytest.raises(openai.BadRequestError):
        plugin_server.ask(clips["tall"], "x", ratio=MIN_RATIO / 2)
    options = {"mm_processor_kwargs": {"min_retention_ratio": 0.01}}
    with pytest.raises(openai.BadRequestError):
        plugin_server.ask(clips["twin"], "x", extra_body=options)
    after = counted()
    num_tokens = NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    assert {name: round(after[name] - before[name], 6) for name in before} == {
        "video_tokens_total": 2 * num_tokens,
        "retained_video_tokens_total": num_retained_tokens(num_tokens, DEFAULT_RATIO)
        + num_retained_tokens(num_tokens, 0.2),
        "retention_ratio_sum": DEFAULT_RATIO + 0.2,
        "answered": 2,
        "refused": 3,
        "video_too_long": 1,
        "processor_options": 1,
        "ratio_below_minimum": 1,
    }
    assert "scissor_vllm:similarity_threshold" not in plugin_server.get("/metrics")


def test_a_mismatch_of_tokens_fails_its_request_and_names_both_numbers(
    plugin_server: Server, clips: dict[str, Path]
) -> None:
    # Frames dropped after they were counted: in stock vLLM this ends the engine.
    options = {"mm_processor_kwargs": {"do_sample_frames": True, "num_frames": 4}}
    counted, prepared = 20 * TOKENS_PER_FRAME, 4 * TOKENS_PER_FRAME
    for ratio in (0.2, 1.0):
        with pytest.raises(openai.BadRequestError, match=rf"{counted} tokens.*give {prepared}"):
            plugin_server.ask(clips["tall"], "x", ratio=ratio, extra_body=options)
    assert plugin_server.ask(clips["tall"], "x", ratio=0.2).usage.prompt_tokens > 0


def test_both_checkpoint_namings_give_the_same_model(
    engines: None, clips: dict[str, Path], offline: dict[str, Any]
) -> None:
    # The demo has the hub's names, the other those that transformers 5 saves.
    question = Chat(("Hello", clips["picture"]))
    (answer,) = chat(demo_model_path(), [question], max_model_len=8192)
    assert isinstance(answer, Answer)
    assert largest_difference(answer, offline["picture"]) < 1e-4


@pytest.fixture(scope="module")
def offline(engines: None, clips: dict[str, Path], resaved_model: Path) -> dict[str, Answer | str]:
    """What ``LLM(...).chat`` answers with our plugin found by its entry point alone."""
    video = (clips["tall"], "Why?")
    chats = {
        **{str(ratio): Chat(video, ratio) for ratio in (1.0, 0.1)},
        "default": Chat(video),
        "picture": Chat(("Hello", clips["picture"])),
        "error": Chat(video, 1.5),
        "budget": Chat(video, budget=99),
        "wrong budget": Chat(video, budget=0),
    }
    options: dict[str, Any] = {"max_model_len": 8192, "max_num_batched_tokens": 8192}
    return dict(zip(chats, chat(resaved_model, list(chats.values()), **options), strict=True))


def test_offline_chat_takes_the_ratio(offline: dict[str, Any]) -> None:
    num_tokens = NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    saved = num_tokens - num_retained_tokens(num_tokens, 0.1)
    assert offline["1.0"].num_prompt_tokens - offline["0.1"].num_prompt_tokens == saved
    # The second found its prefix in the cache: computed in other shapes, it rounds otherwise.
    assert largest_difference(offline["default"], offline["1.0"]) < 1e-4
    assert "retention_ratio must be" in offline["error"]


def test_offline_chat_takes_the_budget(offline: dict[str, Any]) -> None:
    num_tokens = NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    saved = offline["1.0"].num_prompt_tokens - offline["budget"].num_prompt_tokens
    assert saved == num_tokens - 99
    assert "max_retained_video_tokens must be at least 1, got 0" in offline["wrong budget"]


SCRIPT = """
    import sys

    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        model, video = sys.argv[1:]
        llm = LLM(model, enforce_eager=True, dtype="float32", max_model_len=8192)
        parts = [{"type": "video_url", "video_url": {"url": f"file://{video}"}}]
        (out,) = llm.chat(
            [{"role": "user", "content": parts}],
            SamplingParams(max_tokens=1),
            mm_processor_kwargs={"retention_ratio": 0.1},
        )
        print(f"PROMPT {len(out.prompt_token_ids)}")
"""


@pytest.mark.slow
def test_a_users_script_has_the_plugin_in_both_processes_of_an_engine(
    servers: OneServer, clips: dict[str, Path], tmp_path: Path
) -> None:
    servers.stop()
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(SCRIPT).replace(
            "max_model_len=8192", f'max_model_len=8192, allowed_local_media_path="{tmp_path}"'
        )
    )
    video = Path(shutil.copy(clips["tall"], tmp_path / "video.mp4"))
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
    run = subprocess.run(
        [sys.executable, str(script), str(demo_model_path()), str(video)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**environment, **SMALL},
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (num_tokens,) = re.findall(r"PROMPT (\d+)", run.stdout)
    whole = NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    assert num_retained_tokens(whole, 0.1) < int(num_tokens) < whole / 2


@pytest.mark.parametrize("before", [0.005, 0.0001])
def test_an_api_server_lets_threads_that_prepare_videos_have_the_interpreter_sooner(
    before: float,
) -> None:
    state: Any = Namespace(
        vllm_config=Namespace(
            model_config=Namespace(multimodal_config=None),
            parallel_config=Namespace(_api_process_count=1),
            observability_config=Namespace(otlp_traces_endpoint=None),
        ),
        online_renderer=Namespace(renderer=Namespace(mm_processor=None)),
    )
    usual = sys.getswitchinterval()
    try:
        sys.setswitchinterval(before)
        asyncio.run(RetentionEndpoint().init_state(None, state, Namespace()))
        wanted = min(before, SWITCH_INTERVAL_SECONDS)
        assert sys.getswitchinterval() == pytest.approx(wanted, abs=2e-6)
        assert not state.compresses_video
    finally:
        sys.setswitchinterval(usual)
