"""Compression in vLLM's trace, where `--otlp-traces-endpoint` switches tracing on.

vLLM's own span of a request (``llm_request``) begins with what the client says of its trace, and
stands alone if that is nothing. A span around each chat with a video holds vLLM's, and says what
became of the video.
"""

from collections.abc import Mapping

from fastapi import Request
from vllm.tracing import extract_trace_context, is_tracing_available

from scissor_vllm.retention import RetentionReport

SPAN = "video_compression"
"""Its name; its attributes are ``scissor_vllm.`` and the names in the answer's
``video_compression``, ``method`` and ``outcome``."""


class CompressionSpan:
    """No span: tracing is off."""

    def end(self, method: str, outcome: str, report: RetentionReport) -> None:
        """End the span with what was done."""


NO_SPAN = CompressionSpan()


class _Span(CompressionSpan):
    def __init__(self, headers: Mapping[str, str]) -> None:
        from opentelemetry import trace

        context = extract_trace_context(headers)
        kind = trace.SpanKind.SERVER
        self._span = trace.get_tracer(__name__).start_span(SPAN, context=context, kind=kind)

    def headers(self) -> dict[str, str]:
        """Return the headers that make another span this one's child."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers: dict[str, str] = {}
        context = trace.set_span_in_context(self._span)
        TraceContextTextMapPropagator().inject(headers, context)
        return headers

    def end(self, method: str, outcome: str, report: RetentionReport) -> None:
        attributes = {**(report.as_response() or {}), "method": method, "outcome": outcome}
        self._span.set_attributes(
            {f"scissor_vllm.{name}": value for name, value in attributes.items()}
        )
        self._span.end()


def begin_span(request: Request, endpoint: str | None) -> tuple[Request, CompressionSpan]:
    """Return the span of a request and the request as vLLM is to see it, within that span.

    Args:
        request: whose body was read.
        endpoint: where vLLM sends its traces, None if tracing is off.
    """
    if endpoint is None or not is_tracing_available():
        return request, NO_SPAN
    span = _Span(request.headers)
    span_headers = {name.encode(): value.encode() for name, value in span.headers().items()}
    headers = [
        (name, value) for name, value in request.scope["headers"] if name not in span_headers
    ]
    scope = {**request.scope, "headers": [*headers, *span_headers.items()]}
    return Request(scope, request.receive), span
