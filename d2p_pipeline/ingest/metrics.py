"""What `GET /metrics` shows: what this host's workers did, and what Redis knows of all keys and deliveries.

Workers count in files of a directory they share (prometheus-client's multiprocess mode, chosen by PROMETHEUS_MULTIPROC_DIR
before this module is imported), so that whichever is asked answers for all, dead ones included. The buffer's side is read
from Redis, so any receiver shows it, of all hosts: sum the first, take the maximum of the second. The number of series is
bounded: routes, reasons and statuses are ours, and of the keys only those with most waiting have series of their own.
"""

import asyncio
import os
import threading
import time
from bisect import bisect_left
from collections import Counter as Counted
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from d2p_pipeline import books
from d2p_pipeline.buffer.protocol import Buffer, BufferUnavailableError
from d2p_pipeline.ingest.answers import Refusal

SHOWN_KEYS = 50
"""Keys with series of their own; the others are added up."""
OTHERS = "(others)"
LONGEST_KEY = 100
FRESH_SECONDS = 2.0
SHARE = 0.05
"""Of its time a worker reads the books no more than that."""

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_BOUNDS = [*map(str, _LATENCY), "+Inf"]
_WITHIN, _SPENT, _TIMES = "d2p_http_request_within", "d2p_http_request_spent", ("route", "le")
_GROUPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)


class Metrics:
    """One worker's counters and, together with the others', their text."""

    def __init__(self, buffer: Buffer, held: Callable[[], int] = lambda: 0) -> None:
        own = CollectorRegistry()
        self._requests = Counter(
            "d2p_http_requests", "Requests answered, by route and status.", ["route", "status"], registry=own
        )
        # A Histogram takes one time after the other only; `_Times` makes one of these.
        self._within = Counter(
            _WITHIN, "Requests by the shortest of the times they took no more than.", _TIMES, registry=own
        )
        self._spent = Counter(_SPENT, "Seconds of all requests.", ["route"], registry=own)
        self._refused = Counter(
            "d2p_http_refused", "Requests refused with nothing stored, by reason.", ["reason"], registry=own
        )
        self._records = Counter("d2p_received_records", "Records stored for requests, by fate.", ["fate"], registry=own)
        self._bytes = Counter("d2p_received_bytes", "Bytes of the bodies they came in, expanded.", registry=own)
        self._commit = Histogram(
            "d2p_commit_seconds", "Seconds of a group commit to Redis.", buckets=_LATENCY, registry=own
        )
        self._group = Histogram("d2p_commit_requests", "Requests in a group commit.", buckets=_GROUPS, registry=own)
        self._failed = Counter("d2p_commit_failures", "Group commits that Redis did not take.", registry=own)
        self._held = Gauge(
            "d2p_http_held_bytes", "Bytes of request bodies in memory.", registry=own, multiprocess_mode="livesum"
        )
        self._own = own
        self._held_now = held
        self._by_route: dict[tuple[str, int], _Answers] = {}
        self._is_counting = False
        self._new_accepted = self._new_bytes = 0
        self._accepted = self._records.labels("accepted")
        self._dead_lettered = self._records.labels("dead_lettered")
        self._side = _BufferSide(buffer)

    def answered(self, route: str, status: int, refusal: Refusal, seconds: float) -> None:
        """A request was answered. `route` is one of ours, or `other`."""
        found = self._by_route.get((route, status))
        if found is None:
            found = self._by_route[route, status] = _Answers(
                self._requests.labels(route, str(status)),
                [self._within.labels(route, bound) for bound in _BOUNDS],
                self._spent.labels(route),
            )
        found.add(seconds)
        if refusal:
            self._refused.labels(refusal).inc()
        self._count_soon()

    def stored(self, accepted: int, dead_lettered: int, size: int) -> None:
        """Redis has these records."""
        self._new_accepted += accepted
        self._new_bytes += size
        if dead_lettered:
            self._dead_lettered.inc(dead_lettered)
        self._count_soon()

    def _count_soon(self) -> None:
        """Count what was noted at the end of this turn of the event loop: to count in shared files is costly."""
        if not self._is_counting:
            self._is_counting = True
            asyncio.get_running_loop().call_soon(self._count)

    def _count(self) -> None:
        self._is_counting = False
        for answers in self._by_route.values():
            answers.count()
        self._accepted.inc(self._new_accepted)
        self._bytes.inc(self._new_bytes)
        self._new_accepted = self._new_bytes = 0

    def committed(self, requests: int, seconds: float, failed: bool) -> None:
        """A group commit ended."""
        self._commit.observe(seconds)
        self._group.observe(requests)
        self._held.set(self._held_now())
        if failed:
            self._failed.inc()

    def exposition(self) -> tuple[bytes, str]:
        """The text and its content type."""
        self._held.set(self._held_now())
        registry = CollectorRegistry()
        shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        registry.register(_Times(MultiProcessCollector(CollectorRegistry()) if shared else self._own))
        registry.register(self._side)
        return generate_latest(registry), CONTENT_TYPE_LATEST


class _Answers:
    """Answers of one route and status that were not counted yet."""

    def __init__(self, requests: Counter, within: list[Counter], spent: Counter) -> None:
        self._requests = requests
        self._within = within
        self._spent = spent
        self._new: list[float] = []
        self.add = self._new.append

    def count(self) -> None:
        if not self._new:
            return
        self._requests.inc(len(self._new))
        self._spent.inc(sum(self._new))
        for place, count in Counted(bisect_left(_LATENCY, seconds) for seconds in self._new).items():
            self._within[place].inc(count)
        self._new.clear()


class _Collector(Protocol):
    def collect(self) -> Iterable[Metric]: ...


class _Times:
    """Shows what another collects, and the times of requests as a histogram."""

    def __init__(self, of: _Collector) -> None:
        self._of = of

    def collect(self) -> Iterator[Metric]:
        within: dict[str, dict[str, float]] = {}
        spent: dict[str, float] = {}
        for metric in self._of.collect():
            totals = [sample for sample in metric.samples if sample.name == f"{metric.name}_total"]
            if metric.name == _WITHIN:
                for sample in totals:
                    within.setdefault(sample.labels["route"], {})[sample.labels["le"]] = sample.value
            elif metric.name == _SPENT:
                spent = {sample.labels["route"]: sample.value for sample in totals}
            else:
                yield metric
        times = HistogramMetricFamily("d2p_http_request_seconds", "Seconds to an answer.", labels=["route"])
        for route, counts in within.items():  # what another worker is only about to count first may be missing
            sums = accumulate(counts.get(bound, 0) for bound in _BOUNDS)
            times.add_metric([route], list(zip(_BOUNDS, sums, strict=True)), spent.get(route, 0))
        yield times


class _BufferSide:
    """What Redis knows, read at most every `FRESH_SECONDS`."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._lock = threading.Lock()
        self._shown: list[Metric] = []
        self._stale_at = 0.0

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            if time.monotonic() >= self._stale_at:
                started = time.monotonic()
                try:
                    self._shown = list(_families(self._buffer))
                except BufferUnavailableError:
                    # No figures are better than old ones.
                    self._shown = [GaugeMetricFamily("d2p_redis_up", "Whether Redis answers.", 0)]
                took = time.monotonic() - started
                self._shown.append(GaugeMetricFamily("d2p_books_seconds", "Seconds it took to read the books.", took))
                self._stale_at = time.monotonic() + max(FRESH_SECONDS, took / SHARE)
            yield from self._shown


def _families(buffer: Buffer) -> Iterator[Metric]:
    found = books.read(buffer)
    lost = books.differences(buffer, found)
    yield GaugeMetricFamily("d2p_redis_up", "Whether Redis answers.", 1)
    yield from _waiting(found)
    yield from _delivered(found, lost)
    letters = dict(buffer.dead_letter_keys())
    yield GaugeMetricFamily("d2p_dead_letters_kept", "Dead letters that wait for a person.", sum(letters.values()))


def _waiting(found: books.Books) -> Iterator[Metric]:
    records = GaugeMetricFamily("d2p_buffer_records", "Records in the buffer.", labels=["key"])
    size = GaugeMetricFamily("d2p_buffer_bytes", "Raw bytes in the buffer and in undelivered batches.", labels=["key"])
    age = GaugeMetricFamily("d2p_buffer_age_seconds", "Age of the oldest record without a file.", labels=["key"])
    busiest = sorted(found.keys.items(), key=lambda entry: (-entry[1].waiting_bytes, entry[0]))
    shown: dict[str, list[float]] = {}
    for place, (key, book) in enumerate(busiest):
        name = key if place < SHOWN_KEYS and len(key) <= LONGEST_KEY else OTHERS
        sums = shown.setdefault(name, [0, 0, 0])
        sums[0] += book.buffered
        sums[1] += book.waiting_bytes
        sums[2] = max(sums[2], (found.time - book.oldest) / 1000 if book.oldest else 0)
    for key, sums in shown.items():
        for family, value in zip((records, size, age), sums, strict=True):
            family.add_metric([key], max(0, value))
    yield from (records, size, age)
    yield GaugeMetricFamily("d2p_keys", "Keys ever seen.", len(found.keys))


def _delivered(found: books.Books, lost: dict[str, int]) -> Iterator[Metric]:
    every = list(found.keys.values())
    batches = GaugeMetricFamily("d2p_batches", "Batches not delivered yet.", labels=["state"])
    batches.add_metric(["open"], sum(book.batches for book in every))
    batches.add_metric(["recovery"], sum(book.recovering for book in every))
    yield batches
    books_of = GaugeMetricFamily(
        "d2p_books_records",
        "Records by where they are: accepted = rows + dead_letters + discarded + buffered + batches + recovery.",
        labels=["place"],
    )
    places = {
        "accepted": sum(book.totals.accepted for book in every),
        "rows": sum(book.totals.rows for book in every),
        "dead_letters": sum(book.totals.dead_letters for book in every),
        "discarded": sum(book.totals.discarded for book in every),
        "buffered": sum(book.counted for book in every),
        "batches": sum(book.in_batches for book in every),
        "recovery": sum(book.in_recovery for book in every),
    }
    for place, value in places.items():
        books_of.add_metric([place], value)
    yield books_of
    yield GaugeMetricFamily(
        "d2p_books_unbalanced_records",
        "Accepted records that are nowhere, and records that nobody accepted; anything but 0 is a defect.",
        sum(map(abs, lost.values())),
    )
    yield CounterMetricFamily("d2p_files", "Files written.", sum(book.deliveries.files for book in every))
    yield CounterMetricFamily(
        "d2p_file_bytes", "Bytes of the files written.", sum(b.deliveries.file_bytes for b in every)
    )
    yield CounterMetricFamily("d2p_rows", "Rows written.", places["rows"])
    yield CounterMetricFamily("d2p_units", "Units delivered.", sum(book.deliveries.units for book in every))
    yield CounterMetricFamily(
        "d2p_delivery_seconds",
        "Seconds from the seal of a batch to the acknowledgement of a unit, added up over the units.",
        sum(book.deliveries.delivery_ms for book in every) / 1000,
    )
    sealed = CounterMetricFamily("d2p_sealed_batches", "Batches sealed, by reason.", labels=["reason"])
    reasons: dict[str, int] = {}
    for book in every:
        for reason, number in book.deliveries.sealed.items():
            reasons[reason] = reasons.get(reason, 0) + number
    for reason in sorted(reasons):
        sealed.add_metric([reason], reasons[reason])
    yield sealed
    yield CounterMetricFamily(
        "d2p_failures", "Times a batch went into recovery.", sum(book.deliveries.failures for book in every)
    )
