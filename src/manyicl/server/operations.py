"""Health, readiness and metrics: what a supervisor asks of a server."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from manyicl.errors import UserError
from manyicl.server.problems import ProblemError
from manyicl.server.routes.bodies import HealthBody, ReadyBody
from manyicl.server.settings import ServerSettings
from manyicl.service import Service

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What Prometheus reads: requests over HTTP as the gate counts them, and the service's own numbers.

    They have a registry of their own, so that two servers in one process do not mix theirs.
    """

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "manyicl_http_requests", "Requests over HTTP.", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "manyicl_http_request_seconds", "Seconds of a request.", ["route"], buckets=_BUCKETS, registry=self.registry
        )

        self.registry.register(_ServiceNumbers(service))

    def observe(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request. route: its path with names of parameters, so that their number is limited."""
        known = method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        return generate_latest(self.registry)


class _ServiceNumbers(Collector):
    """The numbers that the service counts itself, read when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield them; none of a service that is closed."""
        try:
            stats = self._service.stats()
        except UserError:
            return
        yield _gauge("manyicl_ready", "Whether /readyz says ready.", float(self._service.is_ready))
        yield _gauge("manyicl_tasks", "Tasks in the library.", stats.num_tasks)
        yield _gauge("manyicl_queue_length", "Inputs that wait.", sum(stats.waiting.values()))
        yield _gauge("manyicl_measuring", "Whether a task is being measured.", float(stats.measuring is not None))
        yield _counter("manyicl_requests", "Requests to the model.", stats.requests, "outcome")
        yield _counter("manyicl_answers", "Inputs that were answered.", {"": stats.num_answers})
        yield _counter("manyicl_passes", "Passes of the model that answered them.", {"": stats.num_passes})
        yield _counter("manyicl_prefix_events", "What became of encoded prefixes.", stats.prefixes, "event")
        yield _gauge("manyicl_prefix_memory_bytes", "Memory of encoded prefixes.", stats.prefix_bytes)
        yield _gauge("manyicl_prefix_disk_bytes", "Disk of encoded prefixes.", stats.spilled_bytes)
        yield _counter("manyicl_tokens", "Tokens.", stats.tokens, "kind")
        latency = HistogramMetricFamily("manyicl_answer_seconds", "From a request to its answer.")
        buckets = [("+Inf" if math.isinf(end) else str(end), count) for end, count in stats.latency_counts.items()]
        latency.add_metric([], buckets, stats.latency_sum_s)
        yield latency


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(name, about, value=value)


def _counter(name: str, about: str, values: Mapping[str, float], label: str | None = None) -> Metric:
    """Return a counter with a value for each value of its label, or with one value if it has no label."""
    family = CounterMetricFamily(name, about, labels=[label] if label else None)
    for key, value in values.items():
        family.add_metric([key] if label else [], value)
    return family


def make_operation_routes(service: Service, settings: ServerSettings, metrics: Metrics) -> APIRouter:
    """Return the routes for supervisors."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def health() -> HealthBody:
        """Say that the process is up; it asks neither the model nor the library."""
        return HealthBody(status="ok")

    @router.get("/readyz")
    def ready() -> ReadyBody:
        """Say whether the model answers and the library can be read; 503 if not."""
        if not service.is_ready:
            headers = {"retry-after": "1"}
            fault = service.calls.fault
            detail = f"the server of the model does not answer ({fault})" if fault else "the model has not answered yet"
            raise ProblemError("not-ready", 503, f"{detail}; try again in a moment", headers=headers)
        info = service.info
        return ReadyBody(
            status="ready",
            model=info.base_name,
            version=info.version,
            num_tasks=len(service.tasks()),
            read_only=settings.read_only,
        )

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def read_metrics() -> Response:
        """Return numbers for Prometheus."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
