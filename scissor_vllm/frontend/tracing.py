"""A trace span for each chat with a video, if `--otlp-traces-endpoint` enables tracing.

It is the parent of vLLM's request span (``llm_request``) and a child of the client's span, if any.
Its attributes describe the compression.
"""

from collections.abc import Mapping

from fastapi import Request
from vllm.tracing import extract_trace_context, is_tracing_available

from scissor_vllm.retention import RetentionReport

SPAN = "video_compression"
"""Name of the span. Attributes are the answer's ``video_compression`` fields, ``method`` and
``outcome``, prefixed with ``scissor_vllm.``."""


class CompressionSpan:
    """The span while tracing is off: it does nothing."""

    def end(self, method: str, outcome: str, report: RetentionReport) -> None:
        """End the span with its attributes."""


NO_SPAN = CompressionSpan()


class _Span(CompressionSpan):
    def __init__(self, headers: Mapping[str, str]) -> None:
        from opentelemetry import trace

        context = extract_trace_context(headers)
        kind = trace.SpanKind.SERVER
        self._span = trace.get_tracer(__name__).start_span(SPAN, context=context, kind=kind)

    def headers(self) -> dict[str, str]:
        """Return the headers that make another span a child of this one."""
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
    """Return a request's span, and the request with headers that make vLLM's span its child.

    Args:
        request: the request, its body read.
        endpoint: vLLM's traces endpoint, None if tracing is off.
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
