"""Prometheus metrics of the transport service."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_MILLISECONDS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
_GAPS = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class TransportMetrics:
    """Prometheus metrics of one engine, with a separate registry."""

    def __init__(self, queue_length: Callable[[], int], cache_bytes: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        ProcessCollector(namespace="monge_transport", registry=own)
        self.solves = Counter("monge_transport_solves", "Problems solved", ["solver"], registry=own)
        self.failures = Counter("monge_transport_failures", "Problems not solved", ["error"], registry=own)
        self.refusals = Counter("monge_transport_refusals", "Problems refused", ["error"], registry=own)
        self.milliseconds = Histogram(
            "monge_transport_milliseconds", "Time in each stage", ["stage"], buckets=_MILLISECONDS, registry=own
        )
        self.gap = Histogram(
            "monge_transport_relative_gap", "Relative duality gap of plans", buckets=_GAPS, registry=own
        )
        self.hits = Counter("monge_transport_cache_hits", "Problems answered without a solve", ["how"], registry=own)
        self.misses = Counter("monge_transport_cache_misses", "Problems that needed a solve", registry=own)
        self.timeouts = Counter(
            "monge_transport_rendezvous_timeouts", "Global problems that missed a rank", registry=own
        )
        self.meetings = Gauge("monge_transport_meetings", "Global problems without a plan", registry=own)
        queue = Gauge("monge_transport_queue_length", "Waiting problems", registry=own)
        queue.set_function(queue_length)
        held = Gauge("monge_transport_cache_bytes", "Bytes of cached plans", registry=own)
        held.set_function(cache_bytes)
