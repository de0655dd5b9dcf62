"""Prometheus metrics of the endpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class EndpointMetrics:
    """Prometheus metrics of one endpoint, with a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("monge_endpoint_requests", "Requests answered", ["route", "model", "status"], **own)
        self.seconds = Histogram("monge_endpoint_seconds", "Time to answer", ["route"], buckets=_SECONDS, **own)
        self.batch = Histogram("monge_endpoint_batch_images", "Images in a batch", buckets=_SIZES, **own)
        self.model_version = Gauge("monge_endpoint_model_version", "Version served", ["model", "alias"], **own)
        self.load_failures = Counter("monge_endpoint_load_failures", "Versions not loaded", ["model"], **own)
        self.registry_up = Gauge("monge_endpoint_registry_up", "Whether the registry responds", **own)
        self._queued = Gauge("monge_endpoint_queued_images", "Images waiting for a batch", **own)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Report the length of a queue, read at each scrape."""
        self._queued.set_function(length)
