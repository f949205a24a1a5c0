"""Sends requests with vLLM's benchmark client, and keeps fields that it drops.

``vllm.benchmarks.serve.benchmark`` paces, sends and times the requests. It drops the server's
``video_compression`` and the reason of a refusal. A wrapper around its HTTP session keeps both
outside of the timed section.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import uuid
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from scissor_vllm.loadtest.workload import Cell, VideoRequest

BACKEND = "scissor-vllm-chat"
"""Name of our request function in vLLM's benchmark."""
CHAT_PATH = "/v1/chat/completions"
_MAX_REASON = 300


@dataclass(frozen=True)
class ChatSettings:
    """Settings shared by all requests of a run."""

    base_url: str
    """Base URL of the server, without ``/v1``."""
    model: str
    question: str
    output_len: int
    ignore_eos: bool
    seed: int
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Fields of every request's body."""


@dataclass
class Measured:
    """Results of a cell."""

    duration_seconds: float
    requests: list[dict[str, Any]]
    """Raw values of each request, in the order they were sent."""

    @property
    def num_completed(self) -> int:
        """Number of complete answers."""
        return sum(request["error"] is None for request in self.requests)


async def measure(
    requests: Sequence[VideoRequest],
    cell: Cell,
    settings: ChatSettings,
    *,
    progress: Any = None,
    keep_itl: bool = False,
) -> Measured:
    """Send the requests of a cell and return their results.

    Args:
        requests: the requests, in order.
        cell: concurrency and request rate; the requests hold the ratios.
        settings: settings of all requests.
        progress: a tqdm bar, advanced by each answer.
        keep_itl: keep inter-token latencies.
    """
    import numpy as np
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS
    from vllm.benchmarks.serve import benchmark

    samples = _samples(requests, settings)
    recorder = _Recorder(progress)
    # vLLM draws the times between arrivals from numpy's global generator.
    np.random.seed(settings.seed)
    ASYNC_REQUEST_FUNCS[BACKEND] = recorder
    try:
        with _quiet(), _no_garbage_collection_of_what_is_there():
            result = await benchmark(
                input_requests=list(samples.values()),
                request_rate=math.inf if cell.request_rate is None else cell.request_rate,
                max_concurrency=cell.max_concurrency,
                **_benchmark_settings(settings),
            )
    finally:
        del ASYNC_REQUEST_FUNCS[BACKEND]
    answers = [recorder.answers[request_id] for request_id in samples]
    begin = min((answer.output.start_time for answer in answers), default=0.0)
    rows = [
        _row(request, answer, begin, keep_itl)
        for request, answer in zip(requests, answers, strict=True)
    ]
    return Measured(round(result["duration"], 6), rows)


def _samples(requests: Sequence[VideoRequest], settings: ChatSettings) -> dict[str, Any]:
    """Return vLLM's form of the requests by their ids, in order; ids are unique to this call."""
    from vllm.benchmarks.datasets import SampleRequest

    run = uuid.uuid4().hex[:8]
    return {
        f"bench-{run}-{number}": SampleRequest(
            prompt="",
            prompt_len=0,
            expected_output_len=settings.output_len,
            chat_messages=request.messages(settings.question),
            request_overrides={**settings.extra_body, **request.body()},
            request_id=f"bench-{run}-{number}",
        )
        for number, request in enumerate(requests)
    }


def _benchmark_settings(settings: ChatSettings) -> dict[str, Any]:
    """Return the arguments of vLLM's ``benchmark`` that are the same for all cells of a run."""
    from vllm.benchmarks.serve import TaskType

    return {
        "task_type": TaskType.GENERATION,
        "endpoint_type": BACKEND,
        "api_url": settings.base_url + CHAT_PATH,
        "base_url": settings.base_url,
        "model_id": settings.model,
        "model_name": settings.model,
        "tokenizer": None,
        "logprobs": None,
        "burstiness": 1.0,
        "disable_tqdm": True,
        "num_warmups": 0,
        "profile": False,
        "selected_percentile_metrics": [],
        "selected_percentiles": [],
        "ignore_eos": settings.ignore_eos,
        "goodput_config_dict": {},
        "lora_modules": None,
        "extra_headers": None,
        "extra_body": {"temperature": 0},
        "ready_check_timeout_sec": 0,
    }


@dataclass
class _Answer:
    """The measurements of vLLM's client and the body that the session saw."""

    output: Any
    video_compression: dict[str, Any] | None
    error: str | None


def _row(request: VideoRequest, answer: _Answer, begin: float, keep_itl: bool) -> dict[str, Any]:
    output, error = answer.output, answer.error
    if error is None and not output.success:
        error = _last_line(output.error) or "no reason given"
    row: dict[str, Any] = {
        "video": request.clip.path.name,
        "video_seconds": request.clip.seconds,
        "retention_ratio": request.retention_ratio,
        "start_seconds": round(output.start_time - begin, 6),
        "client_queue_seconds": round(output.client_queue_time, 6),
        "error": error,
    }
    if error is not None:
        return row
    compression = answer.video_compression or {}
    row |= {
        "ttft_seconds": round(output.ttft, 6),
        "e2e_seconds": round(output.latency, 6),
        "prompt_tokens": output.prompt_len,
        "output_tokens": output.output_tokens,
        "video_tokens": compression.get("num_video_tokens"),
        "retained_video_tokens": compression.get("num_retained_video_tokens"),
    }
    if keep_itl:
        row["itl_seconds"] = [round(seconds, 6) for seconds in output.itl]
    return row


@dataclass
class _Recorder:
    """A request function for vLLM's benchmark: vLLM's own, observed."""

    progress: Any = None
    answers: dict[str, _Answer] = field(default_factory=dict)

    async def __call__(self, request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        """Send one request and keep its answer under its id."""
        from vllm.benchmarks.lib.endpoint_request_func import async_request_openai_chat_completions

        observed = _ObservedSession(session)
        output = await async_request_openai_chat_completions(request_func_input, observed, pbar)
        compression, error = read_stream(observed.body)
        self.answers[request_func_input.request_id] = _Answer(output, compression, error)
        if self.progress is not None:
            self.progress.update(1)
        return output


class _ObservedSession:
    """An aiohttp session that keeps the body of its one answer."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.body = b""

    @asynccontextmanager
    async def post(self, *args: Any, **kwargs: Any) -> AsyncIterator[_ObservedResponse]:
        """Post as aiohttp does; a refusal's reason is the server's message."""
        async with self._session.post(*args, **kwargs) as response:
            if response.status == 200:
                yield _ObservedResponse(self, response, response.reason)
            else:
                reason = f"{response.status} {response.reason}: {refusal(await response.text())}"
                yield _ObservedResponse(self, response, reason)


class _ObservedResponse:
    """The part of a response that vLLM's client uses."""

    def __init__(self, session: _ObservedSession, response: Any, reason: str) -> None:
        self._session, self._response = session, response
        self.status, self.reason = response.status, reason
        self.content = self

    async def iter_any(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        async for chunk in self._response.content.iter_any():
            self._session.body += chunk
            yield chunk


def read_stream(body: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """Return a stream's ``video_compression`` and error, None for each that is missing.

    vLLM's client counts a stream that breaks off after its first token as an answer.
    """
    compression = error = None
    for line in body.decode(errors="replace").splitlines():
        if not line.startswith("data: {"):
            continue
        if '"video_compression"' in line or '"error"' in line:
            try:
                event = json.loads(line.removeprefix("data: "))
            except ValueError:  # The connection broke within the line; vLLM's client reports that.
                continue
            compression = event.get("video_compression", compression)
            if "error" in event:
                error = f"stream broken off: {refusal(line.removeprefix('data: '))}"
    return compression, error


def refusal(text: str) -> str:
    """Return the message of a refusal on one line."""
    with contextlib.suppress(ValueError, AttributeError):
        content = json.loads(text)
        error = content.get("error") or content
        text = str(error.get("message") or error.get("detail") or text)
    return " ".join(text.split())[:_MAX_REASON]


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:_MAX_REASON] if lines else ""


@contextlib.contextmanager
def _quiet() -> Any:
    """Suppress vLLM's report of each run, which the table replaces."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All requests failed")
        yield


@contextlib.contextmanager
def _no_garbage_collection_of_what_is_there() -> Any:
    """Freeze existing objects, so that garbage collection does not traverse them while timing."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
