"""``process_*`` and ``python_*`` on ``/metrics`` of a server whose processes share their metrics.

prometheus_client leaves them out of what several processes write to one directory. With one API
server they are that process's own, as vLLM exports them without such a directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
    multiprocess,
)
from prometheus_client.metrics_core import Metric

PATH = "/metrics"


@dataclass(frozen=True)
class _Named:
    """Metrics with a sample of one of some names; a registry knows no names of shared ones."""

    registry: CollectorRegistry
    names: frozenset[str]

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            if any(sample.name in self.names for sample in metric.samples):
                yield metric


def add_process_metrics(app: FastAPI) -> None:
    """Put a route in place of vLLM's ``/metrics``, with its values and those of the process."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    router = APIRouter()

    @router.get(PATH, include_in_schema=False)
    def metrics(name: Annotated[list[str] | None, Query(alias="name[]")] = None) -> Response:
        """Return all metrics, or those of some names."""
        chosen: Any = _Named(registry, frozenset(name)) if name else registry
        return Response(generate_latest(chosen), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.include_router(router)
