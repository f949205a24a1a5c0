"""A server that answers as vLLM does, at once and without a model, for tests of clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NUM_VIDEO_TOKENS = 100
METRICS = """\
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="fake"}} 0.25
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="fake"}} 2.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="100"}} 1.0
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{{engine="0",model_name="fake"}} {count}.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{{engine="0",model_name="fake"}} 0.0
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{{engine="0",le="+Inf",model_name="fake"}} {count}.0
vllm:e2e_request_latency_seconds_count{{engine="0",model_name="fake"}} {count}.0
vllm:e2e_request_latency_seconds_sum{{engine="0",model_name="fake"}} {count}.0
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{{engine="0",le="+Inf",model_name="fake"}} {count}.0
vllm:request_queue_time_seconds_count{{engine="0",model_name="fake"}} {count}.0
vllm:request_queue_time_seconds_sum{{engine="0",model_name="fake"}} {half}
"""
STAGES = """\
# TYPE scissor_vllm:video_stage_seconds histogram
scissor_vllm:video_stage_seconds_bucket{{le="+Inf",stage="tower"}} {count}.0
scissor_vllm:video_stage_seconds_count{{stage="tower"}} {count}.0
scissor_vllm:video_stage_seconds_sum{{stage="tower"}} {half}
"""


@dataclass
class FakeServer:
    """The requests that the server received, and how it answers."""

    base_url: str = ""
    compresses: bool = True
    """Whether it has the plugin: it accepts ratios, and its /metrics has our stages."""
    has_metrics: bool = True
    token_seconds: float = 0.0
    """Seconds before each token."""
    metrics_seconds: float = 0.0
    """Seconds from an answer until /metrics counts it."""
    refuse: Callable[[dict[str, Any]], str | None] = lambda body: None
    """Returns the reason of a 400 for this body, None to answer it."""
    break_off: Callable[[dict[str, Any]], bool] = lambda body: False
    """Returns whether the answer to this body ends in an error after its first token."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    answer: Callable[[dict[str, Any]], str] = lambda body: "a"
    """Returns the text of an answer that is not streamed."""
    keep: Callable[[float], int] = lambda ratio: int(NUM_VIDEO_TOKENS * ratio)
    """Returns the number of video tokens kept at a ratio."""
    num_answered: int = 0
    most_in_flight: int = 0
    _in_flight: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ratios(self) -> list[float | None]:
        """The ratios of the requests."""
        return [body.get("retention_ratio") for body in self.bodies]

    @property
    def videos(self) -> list[str]:
        """The videos of the requests, as they were sent."""
        return [body["messages"][0]["content"][0]["video_url"]["url"] for body in self.bodies]

    @contextmanager
    def taking(self, body: dict[str, Any]) -> Iterator[None]:
        """Store a request, and count the requests in flight."""
        with self._lock:
            self.bodies.append(body)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
            threading.Timer(self.metrics_seconds, self._report).start()

    def _report(self) -> None:
        with self._lock:
            self.num_answered += 1

    def metrics(self) -> str:
        """Return the text of /metrics."""
        text = METRICS + (STAGES if self.compresses else "")
        return text.format(count=self.num_answered, half=self.num_answered / 2)

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream."""
        for number in range(body["max_completion_tokens"]):
            time.sleep(self.token_seconds)
            yield {"choices": [{"index": 0, "delta": {"content": "a"}}]}
            if number == 0 and self.break_off(body):
                yield {"error": {"message": "the engine is gone", "code": 500}}
                return
        yield {"choices": [], **self._usage(body)}

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return an answer that is not streamed."""
        time.sleep(self.token_seconds)
        message = {"role": "assistant", "content": self.answer(body)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        own = {"id": "1", "object": "chat.completion", "created": 0, "model": "fake"}
        return {**own, "choices": [choice], **self._usage(body)}

    def _usage(self, body: dict[str, Any]) -> dict[str, Any]:
        ratio = body.get("retention_ratio") or 1.0
        kept, num_output_tokens = self.keep(ratio), body["max_completion_tokens"]
        counts = {"prompt_tokens": 20 + kept, "completion_tokens": num_output_tokens}
        usage: dict[str, Any] = {"usage": {**counts, "total_tokens": 20 + kept + num_output_tokens}}
        if self.compresses:
            usage["video_compression"] = {
                "retention_ratio": ratio,
                "num_video_tokens": NUM_VIDEO_TOKENS,
                "num_retained_video_tokens": kept,
            }
        return usage


@contextmanager
def fake_server(port: int = 0, **how: Any) -> Iterator[FakeServer]:
    """Yield a running fake, on a free port if none is given."""
    fake = FakeServer(**how)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._send({"data": [{"id": "fake", "root": "/nowhere", "max_model_len": 4096}]})
            elif self.path == "/version":
                self._send({"version": "0.0.1"})
            elif self.path == "/health":
                self._send({})
            elif self.path == "/metrics" and fake.has_metrics:
                self._send(fake.metrics())
            else:
                self._send({"error": {"message": "not here"}}, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.taking(body):
                if reason := fake.refuse(body):
                    self._send({"error": {"message": reason, "code": 400}}, 400)
                    return
                if not body.get("stream"):
                    self._send(fake.completion(body))
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                for event in fake.events(body):
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        def _send(self, content: Any, status: int = 200) -> None:
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    listener = Listener(("127.0.0.1", port), Handler)
    fake.base_url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
