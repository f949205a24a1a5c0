"""What an operator sees of a server: counters in Prometheus, the dashboard and traces.

``page_server`` has two API-server processes and a metrics directory that the operator named.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.numbered_clips import make_clip
from scissor_vllm import num_retained_tokens
from scissor_vllm.metrics import METRICS
from scissor_vllm.settings import DEFAULT_VIDEO_COMPRESSION
from tests.collector import Collector, TraceSpan
from tests.conftest import NUM_FRAMES, TOKENS_PER_FRAME, observed_server
from tests.prometheus import (
    PrometheusError,
    Span,
    ask,
    ask_target,
    buckets,
    find_prometheus,
    load_panels,
    scraping,
)
from tests.serving import OneServer, Server, message

PANELS = [panel for panel in load_panels() if panel["type"] != "row"]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
WAIT_SECONDS = 60


@pytest.fixture(scope="module")
def prometheus_program() -> Path:
    try:
        return find_prometheus()
    except PrometheusError as error:
        pytest.skip(str(error))


# The dashboard.


@pytest.mark.slow
def test_every_panel_has_data_and_the_counters_are_the_requests_that_were_sent(
    servers: OneServer,
    collector: Collector,
    prometheus_program: Path,
    clips: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Through two API-server processes, by a real Prometheus."""
    fresh = observed_server(servers, collector, tmp_path)
    with scraping(prometheus_program, f"http://127.0.0.1:{fresh.port}") as url:
        start = time.time()
        # The first values, before there are any requests.
        wait_for(url, "sum(scissor_vllm:video_requests_total) == 0")
        # What vLLM tries at its start is no request's.
        wait_for(url, "sum(scissor_vllm:video_stage_seconds_count) == 0")
        ratios = [0.5, 0.25, 0.1, 1.0, None] * 2
        for number, ratio in enumerate(ratios):
            # A prompt of its own that begins alike: vLLM's prefix cache is asked and has it.
            fresh.ask(clips["short"], f"What is this, {number}?", ratio=ratio)
        fresh.ask("No video.")
        for ratio in (2, 0.001):
            with pytest.raises(Exception, match="retention_ratio"):
                fresh.ask(clips["tall"], "What?", ratio=ratio)
        wait_for(url, f"sum(scissor_vllm:video_requests_total) == {len(ratios) + 2}")
        span = Span(start, time.time())

        num_tokens = NUM_FRAMES["short"] * TOKENS_PER_FRAME
        kept = [num_retained_tokens(num_tokens, 1.0 if r is None else r) for r in ratios]
        assert counters(url, span) == {
            "video_tokens_total": num_tokens * len(ratios),
            "retained_video_tokens_total": sum(kept),
            "requested_retention_ratio_count": 8 + 1,
            "retention_ratio_count": 10,
            'refused_requests_total{reason="invalid_ratio"}': 1,
            'refused_requests_total{reason="ratio_below_minimum"}': 1,
            "video_cache_cross_ratio_hits_total": 2,
            "similarity_threshold_count": 3,
        }
        for panel in PANELS:
            for target in panel["targets"]:
                assert has_data(url, target, span), (panel["title"], target["expr"])
        (both,) = [panel for panel in PANELS if panel["title"] == "Encoder or language model"]
        parts = {line.legend: line.values for line in ask(url, both, span)}
        assert set(parts) == {"decode", "preprocess", "tower", "compress", "language model"}
        # One engine's second; no number before there is an engine.
        assert 0 < max(filter(math.isfinite, parts["language model"])) <= 1
        (asked,) = [panel for panel in PANELS if panel["title"] == "Ratios asked for"]
        lines = ask_target(url, asked["targets"][0], span)
        assert buckets(lines)[0] == ["0.01", "0.1", "0.25", "0.5", "1.0"]


def counters(url: str, span: Span) -> dict[str, float]:
    """Return the values that are not 0 of what the test counts, summed over `method`."""
    names = "video_tokens_total|retained_video_tokens_total|requested_retention_ratio_count"
    names += "|retention_ratio_count|refused_requests_total|similarity_threshold_count"
    names += "|video_cache_cross_ratio_hits_total"
    query = f'{{__name__=~"scissor_vllm:({names})"}}'
    lines = ask_target(url, {"expr": query, "legendFormat": "", "instant": True}, span)
    values = {}
    for line in lines:
        name = line.labels["__name__"].removeprefix("scissor_vllm:")
        reason = line.labels.get("reason")
        values[name + (f'{{reason="{reason}"}}' if reason else "")] = line.values[-1]
    return {name: value for name, value in values.items() if value}


def has_data(url: str, target: dict[str, Any], span: Span) -> bool:
    values = [value for line in ask_target(url, target, span) for value in line.values]
    return any(math.isfinite(value) for value in values)


def wait_for(url: str, query: str) -> None:
    """Wait until a query that compares is true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        now = time.time()
        if ask_target(url, {"expr": query, "legendFormat": "", "instant": True}, Span(now, now)):
            return
        time.sleep(0.5)
    raise AssertionError(f"never true: {query}")


def test_the_dashboard_shows_every_metric_of_ours() -> None:
    shown = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    assert [name for name in METRICS if name not in shown] == []


# Two API servers.

VALUES = (
    "video_tokens_total",
    "retained_video_tokens_total",
    "requested_retention_ratio_count",
    "retention_ratio_count",
    "similarity_threshold_count",
)


def counted(server: Server) -> dict[str, float]:
    """Return what all API servers counted together."""
    of_worker = "scissor_vllm:video_stage_seconds_count"
    lookups = "scissor_vllm:video_cache"
    return {
        **{name: server.counter(f"scissor_vllm:{name}") for name in VALUES},
        **{
            reason: server.counter("scissor_vllm:refused_requests_total", reason=reason)
            for reason in ("invalid_ratio", "ratio_below_minimum")
        },
        **{
            outcome: server.counter(
                "scissor_vllm:video_requests_total",
                outcome=outcome,
                method=DEFAULT_VIDEO_COMPRESSION,
            )
            for outcome in ("answered", "refused")
        },
        **{stage: server.counter(of_worker, stage=stage) for stage in ("decode", "tower")},
        "frames queries": server.counter(f"{lookups}_queries_total", cache="frames"),
        "frames hits": server.counter(f"{lookups}_hits_total", cache="frames"),
        "features hits": server.counter(f"{lookups}_hits_total", cache="features"),
    }


def test_two_api_servers_count_and_cache_as_one(
    page_server: Server, clips: dict[str, Path], tmp_path: Path
) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=64, height=48, num_frames=6)
    before = counted(page_server)
    # A client has a connection of its own each time: the system chooses who takes it.
    ratios = (0.71, 0.53, 0.37, 0.29, 0.17, 0.11)
    num_tokens = 6 * TOKENS_PER_FRAME
    kept = [num_retained_tokens(num_tokens, ratio) for ratio in ratios]
    for ratio, num_retained in zip(ratios, kept, strict=True):
        answer = page_server.ask(clip, "Two?", ratio=ratio)
        assert answer.video_compression["num_retained_video_tokens"] == num_retained
    page_server.ask("No video.", ratio=0.5)
    for ratio in (2, 0.001):
        with pytest.raises(openai.BadRequestError, match="retention_ratio"):
            page_server.ask(clips["tall"], "What?", ratio=ratio)
    after = counted(page_server)
    added = {name: round(after[name] - before[name], 6) for name in after}
    decoded, num_hits = added.pop("decode"), added.pop("frames hits")
    # Each API server keeps frames of its own, the one worker the features.
    assert 1 <= decoded <= 2
    assert num_hits == len(ratios) - decoded
    assert added == {
        "video_tokens_total": num_tokens * len(ratios),
        "retained_video_tokens_total": sum(kept),
        "requested_retention_ratio_count": len(ratios) + 1,
        "retention_ratio_count": len(ratios),
        "similarity_threshold_count": len(ratios),
        "invalid_ratio": 1,
        "ratio_below_minimum": 1,
        "answered": len(ratios),
        "refused": 2,
        "tower": 1,
        "frames queries": len(ratios),
        "features hits": len(ratios) - 1,
    }


# Traces.


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_with_a_video_is_a_span_around_vllms(
    page_server: Server, collector: Collector, clips: dict[str, Path], stream: bool
) -> None:
    trace = f"{TRACE[:-1]}{int(stream)}"
    answer = page_server.ask(
        clips["short"],
        "What is this?",
        ratio=0.25,
        stream=stream,
        logprobs=None,
        top_logprobs=None,
        extra_headers={"traceparent": f"00-{trace}-{PARENT}-01"},
    )
    for _ in answer if stream else ():
        pass
    spans = collector.of_trace(trace, 2)
    ours, stock = spans["video_compression"], spans["llm_request"]
    assert ours.parent == PARENT
    assert stock.parent == ours.id
    assert 0 < stock.seconds <= ours.seconds
    num_tokens = NUM_FRAMES["short"] * TOKENS_PER_FRAME
    assert ours.attributes == {
        "scissor_vllm.retention_ratio": 0.25,
        "scissor_vllm.num_video_tokens": num_tokens,
        "scissor_vllm.num_retained_video_tokens": num_retained_tokens(num_tokens, 0.25),
        "scissor_vllm.method": DEFAULT_VIDEO_COMPRESSION,
        "scissor_vllm.outcome": "answered",
    }


def test_without_a_trace_of_the_client_both_spans_are_of_one(
    page_server: Server, collector: Collector, tmp_path: Path
) -> None:
    before = len(collector.spans)
    clip = make_clip(tmp_path / "clip.mp4", width=64, height=64, num_frames=3)
    page_server.ask(clip, "What is this?", ratio=0.5)
    deadline = time.monotonic() + WAIT_SECONDS
    ours: list[TraceSpan] = []
    while not ours and time.monotonic() < deadline:
        time.sleep(0.2)
        ours = [span for span in collector.spans[before:] if span.name == "video_compression"]
    assert ours[0].parent == ""
    spans = collector.of_trace(ours[0].trace, 2)
    assert spans["llm_request"].parent == ours[0].id


def test_a_refused_chat_is_in_the_trace_and_one_without_a_video_is_vllms_alone(
    page_server: Server, collector: Collector, clips: dict[str, Path]
) -> None:
    refused, text = f"{TRACE[:-1]}2", f"{TRACE[:-1]}3"
    with pytest.raises(Exception, match="must be at least"):
        page_server.client.chat.completions.create(
            model="demo",
            messages=[message(clips["short"])],  # type: ignore[list-item]
            extra_body={"retention_ratio": 0.001},
            extra_headers={"traceparent": f"00-{refused}-{PARENT}-01"},
        )
    page_server.ask("Hello", extra_headers={"traceparent": f"00-{text}-{PARENT}-01"})
    (ours,) = collector.of_trace(refused, 1).values()
    assert ours.attributes == {
        "scissor_vllm.method": DEFAULT_VIDEO_COMPRESSION,
        "scissor_vllm.outcome": "refused",
    }
    (stock,) = collector.of_trace(text, 1).values()
    assert (stock.name, stock.parent) == ("llm_request", PARENT)
