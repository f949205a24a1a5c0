"""A real engine and HTTP server of the demo model, driven by the ``openai`` client."""

from __future__ import annotations

import itertools
import json
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from bench.hostile_requests.command import main as send_hostile_requests
from bench.hostile_requests.traffic import Offer, known_requests
from bench.numbered_clips import make_audio, make_clip
from scissor_vllm import num_retained_tokens
from scissor_vllm.settings import DEFAULT_VIDEO_COMPRESSION
from tests.conftest import NUM_FRAMES, TOKENS_PER_FRAME, stock_questions
from tests.serving import Server, message, same_answer, steps

RATIOS = (0.5, 0.25, 0.1, 0.05)


def num_video_tokens(name: str) -> int:
    return NUM_FRAMES[name] * TOKENS_PER_FRAME


# Law 4: ratio 1.0 is stock vLLM.


@pytest.mark.parametrize("ratio", [1.0, 1])
def test_ratio_one_answers_as_vllm_without_the_plugin(
    plugin_server: Server,
    stock_answers: dict[str, Any],
    clips: dict[str, Path],
    ratio: float,
) -> None:
    questions = stock_questions(clips)
    # The integer is the same ratio: one question shows it.
    for name in questions if isinstance(ratio, float) else ["tall"]:
        parts = questions[name]
        # A salt of its own: a prompt that is found in the prefix cache is computed in other shapes,
        # which round otherwise.
        salt = {"cache_salt": f"{name} {ratio!r}"}
        answer = plugin_server.ask(*parts, ratio=ratio, extra_body=salt)
        stock = stock_answers[name]
        assert answer.usage == stock.usage, name
        assert answer.choices[0].message == stock.choices[0].message, name
        # Equal to the bit wherever this was run; the margin is for libraries that round by how
        # their operands lie in memory.
        assert same_answer(answer, stock, tolerance=1e-6), (name, steps(answer), steps(stock))


def test_a_low_ratio_before_and_beside_leaves_ratio_one_as_it_is(
    plugin_server: Server, stock_answers: dict[str, Any], clips: dict[str, Path]
) -> None:
    plugin_server.ask(clips["tall"], "What is this?", ratio=0.1)
    salt = {"cache_salt": "after a low ratio"}
    answer = plugin_server.ask(clips["tall"], "What is this?", ratio=1.0, extra_body=salt)
    assert same_answer(answer, stock_answers["tall"], tolerance=1e-6)


# The number of tokens.


@pytest.mark.parametrize("name", NUM_FRAMES)
def test_exactly_k_tokens_of_each_video_reach_the_model(
    server: Server, clips: dict[str, Path], name: str
) -> None:
    text_only = server.ask("What is this?").usage.prompt_tokens
    num_tokens = num_video_tokens(name)
    for ratio in (1.0, *RATIOS):
        answer = server.ask(clips[name], "What is this?", ratio=ratio)
        kept = num_retained_tokens(num_tokens, ratio)
        assert answer.usage.prompt_tokens == text_only + kept + 1
        assert answer.video_compression == {
            "retention_ratio": ratio,
            "num_video_tokens": num_tokens,
            "num_retained_video_tokens": kept,
        }


def test_the_ratio_applies_to_every_video_and_to_nothing_else(
    server: Server, clips: dict[str, Path]
) -> None:
    parts = (clips["short"], clips["picture"], clips["tall"], "Compare.")
    whole = server.ask(*parts, ratio=1.0).usage.prompt_tokens
    answer = server.ask(*parts, ratio=0.1)
    counts = [num_video_tokens("short"), num_video_tokens("tall")]
    kept = [num_retained_tokens(count, 0.1) for count in counts]
    assert whole - answer.usage.prompt_tokens == sum(counts) - sum(kept)
    assert answer.video_compression["num_video_tokens"] == sum(counts)
    assert answer.video_compression["num_retained_video_tokens"] == sum(kept)


def budgeted(server: Server, *parts: Path | str, budget: int, **options: Any) -> Any:
    return server.ask(*parts, extra_body={"max_retained_video_tokens": budget}, **options)


@pytest.mark.parametrize("names", [("tall",), ("tall", "short"), ("long", "one", "short")])
def test_a_requests_videos_together_keep_exactly_its_budget(
    server: Server, clips: dict[str, Path], names: tuple[str, ...]
) -> None:
    videos = tuple(clips[name] for name in names)
    total = sum(map(num_video_tokens, names))
    text_only = server.ask("What?").usage.prompt_tokens
    for budget in (total // 100 + len(names), 137, total - 1):
        # Again, the videos are found in the cache.
        for _ in range(2):
            answer = budgeted(server, *videos, "What?", budget=budget)
            assert answer.usage.prompt_tokens == text_only + budget + len(names)
            assert answer.video_compression == {
                "retention_ratio": budget / total,
                "num_video_tokens": total,
                "num_retained_video_tokens": budget,
                "max_retained_video_tokens": budget,
            }
    for budget in (total, 10**9):
        answer = budgeted(server, *videos, "What?", budget=budget)
        assert answer.video_compression["num_retained_video_tokens"] == total
        assert answer.video_compression["retention_ratio"] == 1.0


def test_of_a_ratio_and_a_budget_the_smaller_holds(server: Server, clips: dict[str, Path]) -> None:
    videos = (clips["tall"], clips["webm"])
    by_ratio = sum(num_retained_tokens(num_video_tokens(name), 0.2) for name in ("tall", "webm"))
    for budget, expected in ((by_ratio - 1, by_ratio - 1), (by_ratio, by_ratio), (9999, by_ratio)):
        answer = budgeted(server, *videos, "x", ratio=0.2, budget=budget)
        assert answer.video_compression["num_retained_video_tokens"] == expected
        assert (answer.video_compression["retention_ratio"] == 0.2) == (budget >= by_ratio)


def test_a_video_of_one_k_by_ratio_and_by_budget_answers_alike(
    server: Server, clips: dict[str, Path]
) -> None:
    num_retained = num_retained_tokens(num_video_tokens("tall"), 0.15)
    by_ratio = server.ask(clips["tall"], "Alike?", ratio=0.15)
    by_budget = budgeted(server, clips["tall"], "Alike?", budget=num_retained)
    assert same_answer(by_ratio, by_budget)


def test_a_budget_below_the_least_is_refused_with_the_least(
    server: Server, clips: dict[str, Path]
) -> None:
    least = sum(num_retained_tokens(num_video_tokens(name), 0.01) for name in ("tall", "one"))
    videos = (clips["tall"], clips["one"])
    rule = f"at least {least} for 2 videos of {21 * TOKENS_PER_FRAME} tokens .* got {least - 1}"
    with pytest.raises(openai.BadRequestError, match=rule) as refused:
        budgeted(server, *videos, "x", budget=least - 1)
    assert refused.value.param == "max_retained_video_tokens"
    answer = budgeted(server, *videos, "x", budget=least)
    assert answer.video_compression["num_retained_video_tokens"] == least


def test_a_budget_with_a_video_that_is_named_alone_asks_for_its_data(
    server: Server, clips: dict[str, Path]
) -> None:
    named = message(clips["short"], "Once more?")
    named["content"][0].update(video_url=None, uuid="another-clip")
    body = {"model": "demo", "messages": [named], "max_retained_video_tokens": 50}
    status, content = server.post("/v1/chat/completions", json.dumps(body).encode())
    assert status == 400
    assert "video 0 is named by its uuid alone: send its data" in str(content)


def test_requests_of_different_budgets_at_the_same_time_answer_as_alone(
    server: Server, clips: dict[str, Path]
) -> None:
    jobs = [(pair, budget) for pair in (("tall", "short"), ("webm", "tall")) for budget in (90, 91)]

    def ask(job: tuple[tuple[str, str], int], salt: str) -> Any:
        names, budget = job
        body = {"max_retained_video_tokens": budget, "cache_salt": salt}
        return server.ask(*(clips[name] for name in names), "Budget?", extra_body=body)

    alone = [ask(job, "alone") for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: ask(job, "together"), jobs))
    for job, expected, actual in zip(jobs, alone, together, strict=True):
        assert expected.video_compression["num_retained_video_tokens"] == job[1]
        assert same_answer(expected, actual), (job, steps(expected), steps(actual))


def test_tokenize_counts_the_prompt_of_a_chat_with_the_same_ratio(
    server: Server, clips: dict[str, Path]
) -> None:
    budget = {"max_retained_video_tokens": 77}
    for fields in ({}, {"retention_ratio": 1.0}, {"retention_ratio": 0.1}, budget):
        body: dict[str, Any] = {"model": "demo", "messages": [message(clips["tall"], "Why?")]}
        status, content = server.post("/tokenize", json.dumps({**body, **fields}).encode())
        answer = server.ask(clips["tall"], "Why?", extra_body=fields)
        assert status == 200
        assert json.loads(content)["count"] == answer.usage.prompt_tokens
    status, content = server.post("/tokenize", b'{"model": "demo", "prompt": "abc"}')
    assert (status, json.loads(content)["count"]) == (200, 3)


def test_an_estimate_is_what_a_chat_keeps_without_inference(
    server: Server, clips: dict[str, Path]
) -> None:
    names = ("tall", "short")
    frames = [NUM_FRAMES[name] for name in names]
    for fields in ({}, {"retention_ratio": 0.1}, {"max_retained_video_tokens": 140}):
        asked = message(*(clips[name] for name in names), "What?")
        body = {"model": "demo", "messages": [asked], "max_tokens": 3, **fields}
        before = stage_counts(server)
        status, content = server.post("/v1/scissor/estimate", json.dumps(body).encode())
        assert status == 200, content
        told = json.loads(content)
        assert stage_counts(server)["tower"] == before["tower"]
        answer = server.ask(*(clips[name] for name in names), "What?", extra_body=fields)
        videos = told.pop("videos")
        assert [video["num_frames"] for video in videos] == frames
        assert [video["num_video_tokens"] for video in videos] == [
            num_frames * TOKENS_PER_FRAME for num_frames in frames
        ]
        kept = sum(video["num_retained_video_tokens"] for video in videos)
        assert told == {
            "max_retained_video_tokens": None,
            **answer.video_compression,
            "num_prompt_tokens": answer.usage.prompt_tokens,
            "max_model_len": 8192,
        }
        assert kept == told["num_retained_video_tokens"]


def test_an_estimate_without_a_video_and_of_a_wrong_one(server: Server, tmp_path: Path) -> None:
    body = {"model": "demo", "messages": [message("Hello")], "retention_ratio": 0.5}
    status, content = server.post("/v1/scissor/estimate", json.dumps(body).encode())
    assert status == 200
    told = json.loads(content)
    assert (told["videos"], told["retention_ratio"], told["num_video_tokens"]) == ([], None, 0)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for wrong in ({"messages": [message(broken)]}, {"messages": 3}, {"retention_ratio": 2}):
        status, content = server.post(
            "/v1/scissor/estimate", json.dumps({**body, **wrong}).encode()
        )
        assert status == 400, content
    status, _ = server.post("/v1/scissor/estimate", json.dumps({**body, "model": "no"}).encode())
    assert status == 404


def test_the_list_of_models_tells_what_is_in_force(server: Server) -> None:
    (card,) = json.loads(server.get("/v1/models"))["data"]
    assert card["video_compression"] == {
        "method": DEFAULT_VIDEO_COMPRESSION,
        "default_retention_ratio": 1.0,
        "min_retention_ratio": 0.01,
        "default_max_retained_video_tokens": None,
        "max_video_tokens": 1 << 15,
        "compress_images": False,
        "auto": None,
    }


def test_the_streams_final_usage_chunk_tells_what_was_kept(
    server: Server, clips: dict[str, Path]
) -> None:
    plain = server.ask(clips["tall"], "What is this?", ratio=0.25)
    stream = list(
        server.ask(
            clips["tall"],
            "What is this?",
            ratio=0.25,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert stream[-1].choices == []
    assert stream[-1].usage.prompt_tokens == plain.usage.prompt_tokens
    assert stream[-1].video_compression == plain.video_compression
    assert not any(hasattr(chunk, "video_compression") for chunk in stream[:-1])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream[:-1])
    assert text == plain.choices[0].message.content


def test_headers_tell_what_was_kept_before_the_first_token(
    server: Server, clips: dict[str, Path]
) -> None:
    num_retained = num_retained_tokens(num_video_tokens("tall"), 0.25)
    create = server.client.chat.completions.with_raw_response.create
    options: dict[str, Any] = {"max_completion_tokens": 2, "extra_body": {"retention_ratio": 0.25}}
    for stream in (False, True):
        messages: Any = [message(clips["tall"], "x")]
        answer = create(model="demo", messages=messages, stream=stream, **options)
        assert answer.headers["x-video-retention-ratio"] == "0.25"
        assert answer.headers["x-video-tokens"] == str(num_video_tokens("tall"))
        assert answer.headers["x-retained-video-tokens"] == str(num_retained)
        # Read to its end, so that it is counted before another test counts.
        assert list(answer.parse())


def test_a_stream_without_usage_is_as_vllm_sends_it(server: Server, clips: dict[str, Path]) -> None:
    stream = list(server.ask(clips["one"], "Hm?", ratio=0.5, stream=True))
    assert all(chunk.choices for chunk in stream)
    assert not any(hasattr(chunk, "video_compression") for chunk in stream)


def test_no_ratio_and_a_ratio_of_null_are_a_ratio_of_one(
    server: Server, clips: dict[str, Path]
) -> None:
    ratios: tuple[dict[str, Any], ...] = ({}, {"retention_ratio": None}, {"retention_ratio": 1.0})
    absent, null, one = (
        # A salt of its own: a prompt found in the prefix cache is computed in other shapes.
        server.ask(clips["short"], "?", extra_body={**ratio, "cache_salt": f"null {number}"})
        for number, ratio in enumerate(ratios)
    )
    assert steps(absent) == steps(null) == steps(one)
    assert absent.usage == null.usage == one.usage


def test_pictures_and_text_are_answered_as_by_vllm_without_the_plugin(
    server: Server, stock_answers: dict[str, Any], clips: dict[str, Path]
) -> None:
    questions = stock_questions(clips)
    for name in ("picture", "text"):
        answer = server.ask(*questions[name], extra_body={"cache_salt": "as stock"})
        assert answer.usage == stock_answers[name].usage
        assert answer.choices[0].message == stock_answers[name].choices[0].message
        assert same_answer(answer, stock_answers[name], tolerance=1e-6), name


def test_a_ratio_without_a_video_changes_nothing(server: Server, clips: dict[str, Path]) -> None:
    for parts in (("Hello",), (clips["picture"], "What is this?")):
        without, with_ratio = server.ask(*parts), server.ask(*parts, ratio=0.1)
        assert same_answer(with_ratio, without)
        assert not hasattr(with_ratio, "video_compression")


def test_the_openapi_document_shows_the_field(server: Server) -> None:
    document = json.loads(server.get("/openapi.json"))
    for path in ("/v1/chat/completions", "/tokenize"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        schema = json.dumps(content["application/json"]["schema"])
        names = [part.split('"')[0] for part in schema.split("#/components/schemas/")[1:]]
        fields = [document["components"]["schemas"][name]["properties"] for name in names]
        schemas = [schema for schema in fields if "retention_ratio" in schema]
        assert schemas, path
        assert "at most 1" in schemas[0]["retention_ratio"]["description"]
        assert schemas[0]["max_retained_video_tokens"]["anyOf"][0]["minimum"] == 1


# What the server tells of itself.


def stage_counts(server: Server) -> dict[str, float]:
    name = "scissor_vllm:video_stage_seconds_count"
    stages = ("decode", "preprocess", "tower", "compress")
    return {stage: server.counter(name, stage=stage) for stage in stages}


NEW_WIDTHS = itertools.count(82, 2)


@pytest.fixture
def new_clips(tmp_path: Path) -> list[Path]:
    """Three clips that no other test has sent."""
    widths = itertools.islice(NEW_WIDTHS, 3)
    return [make_clip(tmp_path / f"{w}.mp4", width=w, height=64, num_frames=5) for w in widths]


def test_metrics_tell_the_time_of_each_stage_of_a_video(
    server: Server, clips: dict[str, Path], new_clips: list[Path]
) -> None:
    server.ask(clips["tall"], "x", ratio=0.91)
    before = stage_counts(server)
    tower = ("scissor_vllm:video_stage_seconds_sum", {"stage": "tower"})
    begin, seconds_before = time.perf_counter(), server.counter(tower[0], **tower[1])
    first, second, third = new_clips
    server.ask(first, second, "x", ratio=0.92)
    server.ask("no video", ratio=0.92)
    compressed = stage_counts(server)
    added = {stage: compressed[stage] - before[stage] for stage in before}
    assert added == {"decode": 2, "preprocess": 1, "tower": 2, "compress": 2}
    server.ask(third, "kept whole", ratio=1.0)
    whole = stage_counts(server)
    added = {stage: whole[stage] - compressed[stage] for stage in before}
    assert added == {"decode": 1, "preprocess": 1, "tower": 1, "compress": 0}
    seconds = server.counter(tower[0], **tower[1]) - seconds_before
    assert 0 < seconds < time.perf_counter() - begin


REASONS = (
    "invalid_ratio",
    "ratio_below_minimum",
    "invalid_budget",
    "budget_too_small",
    "unreadable_video",
    "prompt_too_long",
    "other",
)
OUTCOMES = ("answered", "refused", "aborted", "failed")

VALUES = (
    "video_tokens_total",
    "retained_video_tokens_total",
    "similarity_threshold_count",
    "requested_retention_ratio_count",
    "requested_retention_ratio_sum",
    "retention_ratio_count",
    "retention_ratio_sum",
)


def chat_counts(server: Server) -> dict[str, float]:
    """Return what is counted of chats and of the videos in them."""
    name = "scissor_vllm:video_requests_total"
    requests = {
        each: server.counter(name, outcome=each, method=DEFAULT_VIDEO_COMPRESSION)
        for each in OUTCOMES
    }
    name = "scissor_vllm:refused_requests_total"
    reasons = {each: server.counter(name, reason=each) for each in REASONS}
    values = {each: server.counter(f"scissor_vllm:{each}") for each in VALUES}
    return {**requests, **reasons, **values}


def counted_since(server: Server, before: dict[str, float]) -> dict[str, float]:
    """Return what was counted since, that is not 0."""
    after = chat_counts(server)
    added = {name: round(after[name] - before[name], 6) for name in before}
    return {name: value for name, value in added.items() if value}


def test_metrics_tell_ratios_tokens_and_thresholds_of_what_was_answered(
    server: Server, new_clips: list[Path]
) -> None:
    before = chat_counts(server)
    first, second, third = new_clips
    server.ask(first, second, "x", ratio=0.4)
    server.ask(third, "x")
    list(server.ask(third, "x", ratio=0.1, stream=True, logprobs=None, top_logprobs=None))
    server.ask("no video", ratio=0.4)
    body = {"model": "demo", "messages": [message(first, "x")], "retention_ratio": 0.7}
    assert server.post("/tokenize", json.dumps(body).encode())[0] == 200
    num_tokens = 5 * TOKENS_PER_FRAME
    num_retained, fewer = num_retained_tokens(num_tokens, 0.4), num_retained_tokens(num_tokens, 0.1)
    assert counted_since(server, before) == {
        "answered": 3,
        "video_tokens_total": 4 * num_tokens,
        "retained_video_tokens_total": 2 * num_retained + num_tokens + fewer,
        "requested_retention_ratio_count": 2,
        "requested_retention_ratio_sum": 0.5,
        "retention_ratio_count": 3,
        "retention_ratio_sum": 1.5,
        "similarity_threshold_count": 3,
    }


def test_metrics_tell_why_requests_were_refused(
    server: Server, clips: dict[str, Path], tmp_path: Path
) -> None:
    before = chat_counts(server)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for parts, options in (
        ((clips["one"], "x"), {"ratio": 2}),
        (("no video",), {"ratio": "half"}),
        ((clips["one"], "x"), {"ratio": 0.001}),
        (("no video",), {"ratio": 0.001}),
        ((broken, "x"), {"ratio": 0.5}),
        ((clips["one"], "x"), {"extra_body": {"max_retained_video_tokens": 0}}),
        ((clips["one"], clips["one"], "x"), {"extra_body": {"max_retained_video_tokens": 1}}),
        ((*[clips["long"]] * 6, "x"), {}),
        ((*[clips["long"]] * 6, "x"), {"stream": True, "logprobs": None, "top_logprobs": None}),
        ((clips["one"], "x"), {"model": "another"}),
        ((clips["one"], "x"), {"max_tokens": "many"}),
        (("no video",), {"max_tokens": "many"}),
    ):
        with pytest.raises(openai.APIStatusError):
            server.ask(*parts, **options)  # type: ignore[arg-type]
    assert counted_since(server, before) == {
        "refused": 9,
        "invalid_ratio": 2,
        "ratio_below_minimum": 2,
        "invalid_budget": 1,
        "budget_too_small": 1,
        "unreadable_video": 1,
        "prompt_too_long": 2,
        "other": 2,
        "requested_retention_ratio_count": 2,
        "requested_retention_ratio_sum": 0.501,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_metrics_tell_that_a_client_hung_up(
    server: Server, clips: dict[str, Path], stream: bool
) -> None:
    server.ask(clips["one"], "x", ratio=0.5)
    before = chat_counts(server)
    patient = server.client.with_options(timeout=None if stream else 1.5)
    # Long enough for any machine: one of 7000 tokens may take three seconds.
    options: dict[str, Any] = {"stream": stream, "max_completion_tokens": 7000, "n": 8}
    options |= {"logprobs": True, "top_logprobs": 10}
    options["extra_body"] = {"ignore_eos": True, "retention_ratio": 0.5}
    messages: Any = [message(clips["one"], "x")]

    def hang_up() -> None:
        answer = patient.chat.completions.create(model="demo", messages=messages, **options)
        next(iter(answer))
        answer.close()

    if stream:
        hang_up()
    else:
        with pytest.raises(openai.APITimeoutError):
            hang_up()
    deadline = time.monotonic() + 30
    while not counted_since(server, before) and time.monotonic() < deadline:
        time.sleep(0.1)
    num_retained = num_retained_tokens(TOKENS_PER_FRAME, 0.5)
    assert counted_since(server, before) == {
        "aborted": 1,
        "video_tokens_total": TOKENS_PER_FRAME,
        "retained_video_tokens_total": num_retained,
        "requested_retention_ratio_count": 1,
        "requested_retention_ratio_sum": 0.5,
        "retention_ratio_count": 1,
        "retention_ratio_sum": 0.5,
    }


# Law 6: caches, and requests side by side.


def cache_hits(server: Server) -> dict[str, float]:
    return {
        "processor": server.counter("vllm:mm_cache_hits_total"),
        "prefix": server.counter("vllm:prefix_cache_hits_total"),
    }


def test_a_ratio_hits_its_own_cache_entry_and_no_others(
    server: Server, clips: dict[str, Path]
) -> None:
    question = "A question of this test alone?"
    first = server.ask(clips["webm"], question, ratio=0.31)
    before = cache_hits(server)
    other = server.ask(clips["webm"], question, ratio=0.32)
    after_other = cache_hits(server)
    assert after_other["processor"] == before["processor"]
    # What precedes the video in the prompt is the same, and shorter than one block of the cache.
    assert after_other["prefix"] == before["prefix"]
    again = server.ask(clips["webm"], question, ratio=0.31)
    after_again = cache_hits(server)
    assert after_again["processor"] == after_other["processor"] + 1
    assert after_again["prefix"] > after_other["prefix"]
    assert same_answer(again, first)
    assert other.usage.prompt_tokens != first.usage.prompt_tokens


def test_a_video_asked_about_at_three_ratios_is_decoded_and_encoded_once(
    server: Server, new_clips: list[Path]
) -> None:
    def cached() -> dict[str, float]:
        caches, kinds = ("frames", "features"), ("queries", "hits")
        return {
            f"{cache} {kind}": server.counter(f"scissor_vllm:video_cache_{kind}_total", cache=cache)
            for cache in caches
            for kind in kinds
        } | {"other ratios": server.counter("scissor_vllm:video_cache_cross_ratio_hits_total")}

    clip, other, _ = new_clips
    server.ask(other, "x", ratio=0.5)
    stages, lookups = stage_counts(server), cached()
    answers = [server.ask(clip, "Three times?", ratio=ratio) for ratio in (0.61, 0.33, 0.12)]
    stages_after, lookups_after = stage_counts(server), cached()
    assert {name: stages_after[name] - stages[name] for name in stages} == {
        "decode": 1,
        "preprocess": 3,
        "tower": 1,
        "compress": 3,
    }
    assert {name: lookups_after[name] - lookups[name] for name in lookups} == {
        "frames queries": 3,
        "frames hits": 2,
        "features queries": 3,
        "features hits": 2,
        "other ratios": 2,
    }
    kept = [answer.video_compression["num_retained_video_tokens"] for answer in answers]
    assert kept == [num_retained_tokens(5 * TOKENS_PER_FRAME, r) for r in (0.61, 0.33, 0.12)]


def test_a_cached_video_can_be_named_without_being_sent_again(
    server: Server, clips: dict[str, Path]
) -> None:
    sent = message(clips["short"], "Once more?")
    sent["content"][0]["uuid"] = "clip-of-this-test"
    named = message(clips["short"], "Once more?")
    named["content"][0].update(video_url=None, uuid="clip-of-this-test")
    # Another, longer video under its name is answered from it too, and told of as it is.
    other_video = message(clips["tall"], "Once more?")
    other_video["content"][0]["uuid"] = "clip-of-this-test"
    text_only = server.ask("Once more?").usage.prompt_tokens
    for ratio in (0.2, 1.0):
        kept = num_retained_tokens(num_video_tokens("short"), ratio)
        for asked in (sent, named, other_video):
            body = {
                "model": "demo",
                "messages": [asked],
                "max_tokens": 1,
                "retention_ratio": ratio,
            }
            status, content = server.post("/v1/chat/completions", json.dumps(body).encode())
            assert status == 200, content
            answer = json.loads(content)
            assert answer["usage"]["prompt_tokens"] == text_only + kept + 1
            assert answer["video_compression"] == {
                "retention_ratio": ratio,
                "num_video_tokens": num_video_tokens("short"),
                "num_retained_video_tokens": kept,
            }


def test_a_video_without_a_type_is_one(server: Server, clips: dict[str, Path]) -> None:
    before = chat_counts(server)
    untyped = message(clips["short"], "What is this?")
    del untyped["content"][0]["type"]
    body = {"model": "demo", "messages": [untyped], "max_tokens": 1, "retention_ratio": 0.2}
    status, content = server.post("/v1/chat/completions", json.dumps(body).encode())
    assert status == 200, content
    compression = json.loads(content)["video_compression"]
    assert compression["num_video_tokens"] == num_video_tokens("short")
    assert counted_since(server, before)["answered"] == 1


def test_metrics_of_the_api_servers_process_are_exported(server: Server) -> None:
    exported = server.get("/metrics")
    for name in ("process_resident_memory_bytes ", "python_info{", "python_gc_collections_total{"):
        assert exported.count(f"\n{name}") >= 1, name
    assert "vllm:num_requests_running" in exported
    assert "process_open_fds " in server.get("/metrics?name[]=process_open_fds")


def test_a_video_that_cannot_be_fetched_is_refused_without_a_traceback(
    server: Server, clips: dict[str, Path]
) -> None:
    length = len(server.log.read_text())
    for url, status in (("file:///etc/passwd", 400), ("http://nowhere.invalid/a.mp4", 422)):
        asked = message(clips["short"], "What is this?")
        asked["content"][0]["video_url"]["url"] = url
        body = {"model": "demo", "messages": [asked], "max_tokens": 1}
        answered = server.post("/v1/chat/completions", json.dumps(body).encode())
        assert answered[0] == status, answered
    assert "Traceback" not in server.log.read_text()[length:]


def test_a_picture_is_cached_across_ratios(server: Server, clips: dict[str, Path]) -> None:
    server.ask(clips["picture"], clips["one"], "x", ratio=0.41)
    before = cache_hits(server)["processor"]
    server.ask(clips["picture"], clips["one"], "x", ratio=0.42)
    assert cache_hits(server)["processor"] == before + 1


def test_requests_of_different_ratios_at_the_same_time_answer_as_alone(
    server: Server, clips: dict[str, Path]
) -> None:
    jobs = [
        (name, ratio)
        for name in ("long", "tall", "short", "webm", "one")
        for ratio in (1.0, 0.6, 0.2, 0.07)
    ]

    def ask(job: tuple[str, float], salt: str) -> Any:
        # A salt of its own keeps a run from finding the prefixes of the other.
        name, ratio = job
        return server.ask(
            clips[name], "Alone or together?", ratio=ratio, extra_body={"cache_salt": salt}
        )

    alone = [ask(job, "alone") for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: ask(job, "together"), jobs))
    for job, expected, actual in zip(jobs, alone, together, strict=True):
        assert same_answer(expected, actual), (job, steps(expected), steps(actual))


def test_a_still_video_among_others_answers_as_alone(
    server: Server, clips: dict[str, Path], tmp_path: Path
) -> None:
    still = make_clip(
        tmp_path / "still.mp4", num_frames=12, shown=[3] * 8 + [4] * 4, options={"crf": "0"}
    )
    decoded, _ = VIDEO_LOADER_REGISTRY.load("opencv").load_bytes(still.read_bytes(), num_frames=32)
    assert sum(np.array_equal(*pair) for pair in itertools.pairwise(decoded)) == 10
    jobs = [(clip, ratio) for clip in (still, clips["webm"]) for ratio in (1.0, 0.5, 0.1)]

    def ask(job: tuple[Path, float], salt: str) -> Any:
        clip, ratio = job
        return server.ask(clip, "Still?", ratio=ratio, extra_body={"cache_salt": salt})

    alone = [ask(job, "alone") for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: ask(job, "together"), jobs))
    for job, expected, actual in zip(jobs, alone, together, strict=True):
        assert same_answer(expected, actual), (job, steps(expected), steps(actual))
        kept = num_retained_tokens(12 * TOKENS_PER_FRAME, job[1])
        assert expected.video_compression["num_retained_video_tokens"] == kept
    both = server.ask(still, clips["webm"], "Both?", ratio=0.5)
    assert both.video_compression["num_video_tokens"] == 2 * 12 * TOKENS_PER_FRAME


# Law 7: bounded memory.


def test_many_videos_at_a_low_ratio_leave_the_server_alive(
    server: Server, clips: dict[str, Path]
) -> None:
    names = ["long", "tall", "short"] * 8
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(
            pool.map(
                lambda job: server.ask(clips[job[1]], f"Number {job[0]}?", ratio=0.01),
                enumerate(names),
            )
        )
    for name, answer in zip(names, answers, strict=True):
        kept = num_retained_tokens(num_video_tokens(name), 0.01)
        assert answer.video_compression["num_retained_video_tokens"] == kept


# Law 8: a client's mistake is a 400 and the server lives.

BAD_RATIOS = ["0", "-0.1", "1.0001", "2", "0.009", "1e-300", "NaN", "Infinity", "-Infinity",
              '"0.5"', '"half"', "true", "false", "[0.5]", "{}", "1e999"]  # fmt: skip


@pytest.mark.parametrize("ratio", BAD_RATIOS)
def test_a_bad_ratio_is_refused_with_its_rule(
    server: Server, clips: dict[str, Path], ratio: str
) -> None:
    assert_refused(server, clips["one"], ratio, "/v1/chat/completions", stream=False)


@pytest.mark.parametrize(
    ("path", "stream"), [("/v1/chat/completions", True), ("/tokenize", False), ("/tokenize", True)]
)
def test_a_bad_ratio_is_refused_on_every_path(
    server: Server, clips: dict[str, Path], path: str, stream: bool
) -> None:
    for ratio in ("1.0001", "NaN"):
        assert_refused(server, clips["one"], ratio, path, stream)


def assert_refused(server: Server, clip: Path, ratio: str, path: str, stream: bool) -> None:
    body = {"model": "demo", "messages": [message(clip, "x")], "stream": stream}
    text = json.dumps(body)[:-1] + f', "retention_ratio": {ratio}}}'
    status, content = server.post(path, text.encode())
    error = json.loads(content)["error"]
    assert status == error["code"] == 400
    assert "retention_ratio must be" in error["message"]
    assert "retention_ratio" in error["param"]
    assert server.get("/health") == ""


def test_a_bad_ratio_is_refused_without_a_video_too(server: Server) -> None:
    for ratio in (0, 0.009, 1.5):
        with pytest.raises(openai.BadRequestError, match="retention_ratio must be"):
            server.ask("Hello", ratio=ratio)


@pytest.fixture
def bad_files(clips: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    whole = clips["long"].read_bytes()
    contents = {
        "empty": b"",
        "text": b"this is no video at all",
        "truncated": whole[: len(whole) // 2],
        "header": whole[:64],
        "picture": clips["picture"].read_bytes(),
        "noise": bytes(range(256)) * 64,
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
    paths = {name: tmp_path / f"{name}.mp4" for name in contents}
    return {**paths, "no frames": make_audio(tmp_path / "sound.mp4")}


def test_a_bad_file_is_a_bad_request_and_the_server_goes_on(
    server: Server, clips: dict[str, Path], bad_files: dict[str, Path]
) -> None:
    for name, path in bad_files.items():
        for ratio in (None, 0.1):
            with pytest.raises(openai.BadRequestError) as refused:
                server.ask(path, "x", ratio=ratio)
            assert refused.value.body["message"], name  # type: ignore[index]
    assert server.ask(clips["one"], "x", ratio=0.5).usage.prompt_tokens > 0


def test_processor_options_of_a_client_stay_refused(server: Server, clips: dict[str, Path]) -> None:
    for options in ({"retention_ratio": 0.1}, {"min_retention_ratio": 0.001}):
        with pytest.raises(openai.BadRequestError, match="mm_processor_kwargs are disabled"):
            server.ask(clips["one"], "x", extra_body={"mm_processor_kwargs": options})


def test_answers_beside_hostile_requests_stay_right(server: Server, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    arguments = ["--num-requests=40", "--concurrency=4", f"--json={result}"]
    assert send_hostile_requests([f"--base-url=http://127.0.0.1:{server.port}", *arguments]) == 0
    statuses = json.loads(result.read_text())["statuses"]
    known = {request.kind for request in known_requests(Offer(False, False))}
    assert sum(statuses[kind]["200"] for kind in known & statuses.keys()) == 4
    assert statuses["ratio"].keys() == {"400"}


def test_large_videos_leave_no_memory_behind(
    server: Server, clips: dict[str, Path], tmp_path: Path
) -> None:
    num_bytes, num_videos = 8 << 20, 24
    api_server = psutil.Process(server.process.pid)
    clip, path = clips["one"].read_bytes(), tmp_path / "padded.mp4"

    def send(count: int) -> int:
        """Send distinct files of few frames and many bytes; return the server's memory."""
        for _ in range(count):
            padding = os.urandom(num_bytes)
            path.write_bytes(clip + struct.pack(">I4s", 8 + num_bytes, b"free") + padding)
            server.ask(path, "x", ratio=0.5, max_tokens=1)
        return int(api_server.memory_info().rss)

    before = send(num_videos // 2)
    assert send(num_videos) - before < num_videos * num_bytes
