"""Prometheus metrics of the control plane: the controller's summary, and the calls that were answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from specforge.control_plane.wire import Summary


class Metrics:
    """One registry a server. Numbers of the summary are gauges ``specforge_<name>``, the state is a label."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, summary: Callable[[], Summary]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_SummaryCollector(summary))
        self.answered = Counter(
            "specforge_control_plane_calls", "Calls answered.", ["call", "status"], registry=self._registry
        )

    def exposition(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self._registry)


class _SummaryCollector:
    def __init__(self, summary: Callable[[], Summary]) -> None:
        self._summary = summary

    def describe(self) -> list[Metric]:
        """Nothing: names are known when they are collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        for name, value in self._summary().items():
            if isinstance(value, int | float):
                yield GaugeMetricFamily(f"specforge_{name}", f"{name} of the run's summary.", value=value)
            elif name == "state":
                state = GaugeMetricFamily("specforge_run_state", "1 for the state of the run.", labels=["state"])
                state.add_metric([str(value)], 1)
                yield state
