"""Prometheus metrics of the job service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.jobs.states import State


class Counts(Protocol):
    """Source of the counts; see :class:`services.jobs.store.JobStore`."""

    def counts(self) -> dict[State, int]:
        """Return the number of jobs in each state."""
        ...


class JobMetrics:
    """A Prometheus registry that reads the store at each scrape.

    Args:
        counts: source of the counts.
    """

    def __init__(self, counts: Counts) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Jobs(counts))


class _Jobs(Collector):
    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("monge_jobs", "Jobs by state", labels=["state"])
        counts = self._counts.counts()
        for state in State:
            family.add_metric([state.value], counts.get(state, 0))
        yield family
