"""The plugin inside plain vLLM: its server, and offline; both checkpoint namings; mismatches."""

from __future__ import annotations

import asyncio
import json
import os
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
from tests.conftest import DEMO_FLAGS, NUM_FRAMES, TOKENS_PER_FRAME
from tests.serving import STOCK, OneServer, Server, same_answer, steps

DEFAULT_RATIO = 0.3
MIN_RATIO = 0.05
MAX_TOKENS = 31 * TOKENS_PER_FRAME


@pytest.fixture
def plain_server(servers: OneServer) -> Server:
    """vLLM's own command with our plugins named, and clients trusted."""
    settings = {
        "retention_ratio": DEFAULT_RATIO,
        "min_retention_ratio": MIN_RATIO,
        "max_video_tokens": MAX_TOKENS,
        "video_compression": "uniform",
    }
    return servers.get(
        *STOCK,
        str(demo_model_path()),
        *DEMO_FLAGS,
        f"--mm-processor-kwargs={json.dumps(settings)}",
        "--trust-request-mm-kwargs",
        environment={"VLLM_PLUGINS": "scissor_vllm", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )


def kept(answer: Any) -> tuple[float, int]:
    compression = answer.video_compression
    return compression["retention_ratio"], compression["num_retained_video_tokens"]


@pytest.mark.server
def test_the_operators_default_applies_where_a_request_names_no_ratio(
    plain_server: Server, clips: dict[str, Path]
) -> None:
    num_tokens = NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    default = plain_server.ask(clips["tall"], "x")
    assert kept(default) == (DEFAULT_RATIO, num_retained_tokens(num_tokens, DEFAULT_RATIO))
    assert kept(plain_server.ask(clips["tall"], "x", ratio=1.0)) == (1.0, num_tokens)
    named = plain_server.ask(clips["tall"], "x", ratio=DEFAULT_RATIO)
    assert same_answer(named, default)


@pytest.mark.server
def test_the_operators_minimum_is_enforced(plain_server: Server, clips: dict[str, Path]) -> None:
    with pytest.raises(openai.BadRequestError, match=f"at least {MIN_RATIO}"):
        plain_server.ask(clips["one"], "x", ratio=MIN_RATIO / 2)
    with pytest.raises(openai.BadRequestError, match=f"at least {MIN_RATIO}"):
        plain_server.ask(
            clips["one"], "x", extra_body={"mm_processor_kwargs": {"retention_ratio": 0.01}}
        )


@pytest.mark.server
def test_a_video_of_more_tokens_than_the_operator_allows_is_served_whole_or_refused(
    plain_server: Server, clips: dict[str, Path]
) -> None:
    num_tokens = NUM_FRAMES["long"] * TOKENS_PER_FRAME
    for ratio in (None, 0.05):
        with pytest.raises(openai.BadRequestError, match=rf"{MAX_TOKENS} tokens.*got {num_tokens}"):
            plain_server.ask(clips["long"], "x", ratio=ratio)
    # What is not compressed is bounded by the model's length, as in stock vLLM.
    assert kept(plain_server.ask(clips["long"], "x", ratio=1.0)) == (1.0, num_tokens)
    assert kept(plain_server.ask(clips["tall"], "x", ratio=0.5))[0] == 0.5


@pytest.mark.server
def test_trusted_clients_may_name_the_ratio_among_processor_options(
    plain_server: Server, clips: dict[str, Path]
) -> None:
    options = {"mm_processor_kwargs": {"retention_ratio": 0.2}}
    by_options = plain_server.ask(clips["tall"], "x", extra_body=options)
    by_field = plain_server.ask(clips["tall"], "x", ratio=0.2)
    assert same_answer(by_options, by_field)
    both = plain_server.ask(clips["tall"], "x", ratio=0.4, extra_body=options)
    assert kept(both)[0] == 0.4


@pytest.mark.server
def test_settings_of_the_server_are_no_clients_to_change(
    plain_server: Server, clips: dict[str, Path]
) -> None:
    options = {"mm_processor_kwargs": {"video_compression": "scc"}}
    with pytest.raises(openai.BadRequestError, match="whole server only"):
        plain_server.ask(clips["one"], "x", extra_body=options)


@pytest.mark.server
def test_counters_are_the_requests_sent_without_a_metrics_directory(
    plain_server: Server, clips: dict[str, Path]
) -> None:
    """What API servers count: the worker's values do not reach vLLM's own command then."""

    def counted() -> dict[str, float]:
        names = ("video_tokens_total", "retained_video_tokens_total", "retention_ratio_sum")
        values = {name: plain_server.counter(f"scissor_vllm:{name}") for name in names}
        for outcome in ("answered", "refused"):
            values[outcome] = plain_server.counter(
                "scissor_vllm:video_requests_total", method="uniform", outcome=outcome
            )
        for reason in ("video_too_long", "processor_options", "ratio_below_minimum"):
            values[reason] = plain_server.counter(
                "scissor_vllm:refused_requests_total", reason=reason
            )
        return values

    before = counted()
    plain_server.ask(clips["tall"], "x")
    plain_server.ask(clips["tall"], "x", ratio=0.2)
    with pytest.raises(openai.BadRequestError):
        plain_server.ask(clips["long"], "x", ratio=0.5)
    with pytest.raises(openai.BadRequestError):
        plain_server.ask(clips["tall"], "x", ratio=MIN_RATIO / 2)
    options = {"mm_processor_kwargs": {"min_retention_ratio": 0.01}}
    with pytest.raises(openai.BadRequestError):
        plain_server.ask(clips["one"], "x", extra_body=options)
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
    assert "scissor_vllm:similarity_threshold" not in plain_server.get("/metrics")


@pytest.mark.server
def test_a_mismatch_of_tokens_fails_its_request_and_names_both_numbers(
    plain_server: Server, clips: dict[str, Path]
) -> None:
    # Frames dropped after they were counted: in stock vLLM this ends the engine.
    options = {"mm_processor_kwargs": {"do_sample_frames": True, "num_frames": 4}}
    counted, prepared = 20 * TOKENS_PER_FRAME, 4 * TOKENS_PER_FRAME
    for ratio in (0.2, 1.0):
        with pytest.raises(openai.BadRequestError, match=rf"{counted} tokens.*give {prepared}"):
            plain_server.ask(clips["tall"], "x", ratio=ratio, extra_body=options)
    assert plain_server.ask(clips["tall"], "x", ratio=0.2).usage.prompt_tokens > 0


@pytest.mark.server
def test_both_checkpoint_namings_give_the_same_model(
    plain_server: Server, clips: dict[str, Path], offline: dict[str, Any]
) -> None:
    # The server has the hub's names, the offline engine those that transformers 5 saves.
    answer = plain_server.ask("Hello", clips["picture"])
    online = [value for _, value in steps(answer)]
    assert online == pytest.approx(offline["picture"]["logprobs"], abs=1e-4)


OFFLINE = """
    import base64, json, sys

    from vllm import LLM, SamplingParams

    def part(path):
        kind, media = ("image", "image/png") if path.endswith("png") else ("video", "video/mp4")
        data = base64.b64encode(open(path, "rb").read()).decode()
        return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{media};base64,{data}"}}

    if __name__ == "__main__":
        model, video, picture = sys.argv[1:]
        llm = LLM(model, enforce_eager=True, dtype="float32", max_model_len=8192,
                  max_num_batched_tokens=8192)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)

        def ask(parts, **options):
            message = {"role": "user", "content": parts}
            (out,) = llm.chat([message], params, use_tqdm=False, **options)
            chosen = zip(out.outputs[0].token_ids, out.outputs[0].logprobs)
            return {
                "prompt_tokens": len(out.prompt_token_ids),
                "logprobs": [step[token].logprob for token, step in chosen],
            }

        text = {"type": "text", "text": "Why?"}
        results = {
            str(ratio): ask([part(video), text], mm_processor_kwargs={"retention_ratio": ratio})
            for ratio in (1.0, 0.1)
        }
        results["default"] = ask([part(video), text])
        results["picture"] = ask([{"type": "text", "text": "Hello"}, part(picture)])
        try:
            ask([part(video), text], mm_processor_kwargs={"retention_ratio": 1.5})
        except Exception as error:
            results["error"] = str(error)
        print("RESULT" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def offline(
    servers: OneServer,
    clips: dict[str, Path],
    resaved_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What ``LLM(...).chat`` answers with our plugin found by its entry point alone."""
    servers.stop()
    script = tmp_path_factory.mktemp("offline") / "offline.py"
    script.write_text(textwrap.dedent(OFFLINE))
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
    arguments = [str(resaved_model), str(clips["tall"]), str(clips["picture"])]
    run = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**environment, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    result: dict[str, Any] = json.loads(run.stdout.split("RESULT")[1].splitlines()[0])
    return result


@pytest.mark.server
def test_offline_chat_takes_the_ratio(offline: dict[str, Any]) -> None:
    num_tokens = NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    saved = num_tokens - num_retained_tokens(num_tokens, 0.1)
    assert offline["1.0"]["prompt_tokens"] - offline["0.1"]["prompt_tokens"] == saved
    assert offline["default"]["prompt_tokens"] == offline["1.0"]["prompt_tokens"]
    # The second found its prefix in the cache: computed in other shapes, it rounds otherwise.
    assert offline["default"]["logprobs"] == pytest.approx(offline["1.0"]["logprobs"], abs=1e-4)
    assert "retention_ratio must be" in offline["error"]


@pytest.mark.parametrize("before", [0.005, 0.0001])
def test_an_api_server_lets_threads_that_prepare_videos_have_the_interpreter_sooner(
    before: float,
) -> None:
    state: Any = Namespace(
        vllm_config=Namespace(
            model_config=Namespace(multimodal_config=None),
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
