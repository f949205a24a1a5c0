"""``process_*`` and ``python_*`` metrics for a server with a shared metrics directory.

prometheus_client omits them in multiprocess mode. With one API server they are the values of its
process, as vLLM exports them without multiprocess mode.
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
    """Metrics filtered by sample name, because a registry knows no names in multiprocess mode."""

    registry: CollectorRegistry
    names: frozenset[str]

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            if any(sample.name in self.names for sample in metric.samples):
                yield metric


def add_process_metrics(app: FastAPI) -> None:
    """Replace vLLM's ``/metrics`` with a route that adds the metrics of the process."""
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
