"""Shows what a door counts as Prometheus metrics, on a port of its own."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


class Counted:
    """Collects a dataclass of numbers: `d2p_{door}_{field}`, counters but for the fields named in `gauges`."""

    def __init__(self, door: str, counts: Any, gauges: tuple[str, ...] = ()) -> None:
        self._door = door
        self._counts = counts
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        for field in dataclasses.fields(self._counts):
            name, value = f"d2p_{self._door}_{field.name}", getattr(self._counts, field.name)
            if field.name in self._gauges:
                yield GaugeMetricFamily(name, f"{field.name.capitalize()} now.", value)
            else:
                yield CounterMetricFamily(name, f"{field.name.capitalize()} since the start.", value)


def expose(counted: Counted, address: str, port: int) -> None:
    """Answer `GET /metrics` in the background, as long as the process lives."""
    registry = CollectorRegistry()
    registry.register(counted)
    start_http_server(port, address, registry)
