"""Prints the time of metrics and traces for a chat with a video, and the time of the whole chat.

    python -m bench.metrics_cost [--base-url URL] [--repeats N] [--json FILE]

The cost is the time to record one streamed answer of 64 tokens about one new video: stages, caches,
threshold, tokens, ratios, outcome and, with tracing on, the span. Metrics go to files that several
processes share (``PROMETHEUS_MULTIPROC_DIR``). On a GPU the cost includes launches for stages and
threshold. With ``--base-url`` a server answers a whole chat of 64 tokens about the demo's clip at
ratio 0.1, streamed, with all caches warm, which is the shortest chat.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch
from fastapi import Request
from fastapi.responses import StreamingResponse
from openai import OpenAI
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from scissor_vllm import metrics
from scissor_vllm.frontend.outcome import Chat
from scissor_vllm.frontend.request import has_video
from scissor_vllm.frontend.tracing import begin_span
from scissor_vllm.loadtest.record import environment, write_json
from scissor_vllm.retention import RetentionReport
from scissor_vllm.worker.feature_cache import FeatureCache

ROOT = Path(__file__).resolve().parents[1]
NUM_EVENTS = 64
CLIP = ROOT / "scissor_vllm" / "demo" / "clip.mp4"
MESSAGES: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,"}},
            {"type": "text", "text": "What happens in this video?"},
        ],
    }
]


async def _stream() -> AsyncIterator[str]:
    event = 'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    for _ in range(NUM_EVENTS):
        yield event
    yield "data: [DONE]\n\n"


class Recorded:
    """Records one chat as the API server and the worker do."""

    def __init__(self, device: torch.device, endpoint: str | None) -> None:
        self._device = device
        self._endpoint = endpoint
        self._features = FeatureCache(1 << 21)
        self._threshold = torch.tensor(0.8, dtype=torch.float64, device=device)
        self._flags = torch.zeros((), dtype=torch.float64, device=device)
        self._number = 0

    def in_api_server(self) -> None:
        """Time the two stages before a streamed answer, and record the answer's outcome."""
        metrics.count_cache_query("frames", is_hit=False)
        for stage in ("decode", "preprocess"):
            with metrics.CLOCK.stage(stage):
                pass
        assert has_video(MESSAGES)
        request = Request({"type": "http", "headers": [(b"host", b"localhost")]})
        _, span = begin_span(request, self._endpoint)
        report = RetentionReport()
        report.add(0.1, 1568, 157)
        chat = Chat("scc", 0.1, report, span)
        response = StreamingResponse(_stream())
        with chat.ended_by_errors():
            chat.follow(response)
        asyncio.run(_read(response.body_iterator))

    def nothing_in_api_server(self) -> None:
        """Read the same answer without records."""
        asyncio.run(_read(_stream()))

    def in_worker(self) -> None:
        """Time the stages of tower and compression, and record cache queries and threshold."""
        self._number += 1
        self._features.put(self._number, torch.zeros(8))
        metrics.count_cache_query("features", is_hit=False)
        if self._features.is_for_another_ratio(self._number, 157):
            metrics.count_cross_ratio_hit()
        for stage in ("tower", "compress"):
            with metrics.CLOCK.stage(stage, self._device):
                pass
        if self._device.type == "cuda":
            threshold = torch.where(self._flags == 0, self._threshold, float("nan"))
            metrics.THRESHOLDS.read(threshold)
        else:
            metrics.record_threshold(0.8)

    def nothing_in_worker(self) -> None:
        """Cache a video's features without records."""
        self._number += 1
        self._features.put(self._number, torch.zeros(8))


async def _read(events: Any) -> None:
    async for _ in events:
        pass


def seconds_of(work: Callable[[], None], repeats: int) -> list[float]:
    """Return the seconds of each call, after warm-up calls."""
    times = []
    for number in range(repeats + repeats // 10):
        start = time.perf_counter()
        work()
        if number >= repeats // 10:
            times.append(time.perf_counter() - start)
    return times


class _Nowhere(SpanExporter):
    def export(self, spans: Any) -> Any:
        return None


def measure_cost(repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each call, by what it records."""
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(_Nowhere()))
    trace.set_tracer_provider(provider)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recorded, traced = Recorded(device, None), Recorded(device, "http://localhost")
    return {
        "API server": seconds_of(recorded.in_api_server, repeats),
        "API server, traced": seconds_of(traced.in_api_server, repeats),
        "API server, nothing recorded": seconds_of(recorded.nothing_in_api_server, repeats),
        "worker": seconds_of(recorded.in_worker, repeats),
        "worker, nothing recorded": seconds_of(recorded.nothing_in_worker, repeats),
    }


def measure_chats(base_url: str, repeats: int) -> list[float]:
    """Return the seconds of each of ``repeats`` chats, one after the other."""
    client = OpenAI(base_url=f"{base_url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "unused"))
    model = client.models.list().data[0].id
    video = base64.b64encode(CLIP.read_bytes()).decode()
    url = {"url": f"data:video/mp4;base64,{video}"}
    question = MESSAGES[0]["content"][1]
    content = [{"type": "video_url", "video_url": url}, question]
    messages: Any = [{"role": "user", "content": content}]

    def ask() -> None:
        events = client.chat.completions.create(
            model=model,
            messages=messages,
            max_completion_tokens=NUM_EVENTS,
            stream=True,
            extra_body={"retention_ratio": 0.1, "ignore_eos": True},
        )
        for _ in events:
            pass

    return seconds_of(ask, repeats)


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description="Measure what metrics and traces cost a chat.")
    parser.add_argument("--base-url", help="server to ask what a whole chat takes")
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--json", type=Path, help="file for all times")
    args = parser.parse_args()
    times = measure_cost(args.repeats)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in median.items():
        print(f"{name:30} {seconds * 1e6:8.0f} us")
    nothing = median["API server, nothing recorded"] + median["worker, nothing recorded"]
    cost = median["API server"] + median["worker"] - nothing
    traced = cost + median["API server, traced"] - median["API server"]
    print(f"{'metrics':30} {cost * 1e6:8.0f} us a chat; with traces {traced * 1e6:.0f} us")
    if args.base_url:
        times["chat"] = measure_chats(args.base_url, max(20, args.repeats // 10))
        whole = statistics.median(times["chat"])
        print(
            f"{'chat':30} {whole * 1e6:8.0f} us: metrics are {cost / whole:.2%} of it, "
            f"with traces {traced / whole:.2%}"
        )
    if args.json:
        write_json(args.json, {"environment": environment(), "unit": "seconds", "times": times})
    return 0


if __name__ == "__main__":
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        # prometheus_client chooses files or memory at its import, so the process starts again.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-cost-")
        os.execv(sys.executable, [sys.executable, "-m", "bench.metrics_cost", *sys.argv[1:]])
    sys.exit(main())
