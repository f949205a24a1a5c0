"""A collector of OpenTelemetry traces over HTTP that stores their spans."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

WAIT_SECONDS = 60


@dataclass(frozen=True)
class TraceSpan:
    """A received span."""

    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    seconds: float


@dataclass
class Collector:
    """An OTLP collector over HTTP that stores spans."""

    url: str = ""
    spans: list[TraceSpan] = field(default_factory=list)

    def take(self, body: bytes) -> None:
        """Store the spans of an export."""
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += [
                    TraceSpan(
                        name=span.name,
                        trace=span.trace_id.hex(),
                        id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        attributes={
                            attribute.key: getattr(
                                attribute.value, str(attribute.value.WhichOneof("value"))
                            )
                            for attribute in span.attributes
                        },
                        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                    )
                    for span in scope.spans
                ]

    def of_trace(self, trace: str, num_spans: int) -> dict[str, TraceSpan]:
        """Return a trace's spans by name; wait until there are as many as given."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            spans = [span for span in self.spans if span.trace == trace]
            if len(spans) >= num_spans:
                break
            time.sleep(0.2)
        assert len(spans) == num_spans, spans
        return {span.name: span for span in spans}


@contextmanager
def collecting() -> Iterator[Collector]:
    """Yield a running collector."""
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kept
    server.shutdown()
