"""What a run works with: settings, buffer and the run's claims; opened once per run, given back at its end.

Its methods are the steps of `d2p_pipeline.delivery` with the settings filled in, for the ops of `flush` and for recovery.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import dagster as dg
from pydantic import PrivateAttr

from d2p_pipeline import delivery, wiring
from d2p_pipeline.ahead import Ahead
from d2p_pipeline.buffer.lease import Leases
from d2p_pipeline.buffer.protocol import BatchRef
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.delivery import Announced, Delivered, ParquetFile, Planned, Rows, Text, Unit, Written
from d2p_pipeline.settings import Settings, load


class _Threads(ThreadPoolExecutor):
    """Threads that a run does not wait for at its end: what they still prepare, nobody asks for."""

    def close(self) -> None:
        self.shutdown(wait=False, cancel_futures=True)


class DeliveryResource(dg.ConfigurableResource):
    """Settings come from `D2P_CONFIG` and the `D2P_*` environment, as everywhere."""

    _settings: Settings | None = PrivateAttr(default=None)
    _buffer: RedisBuffer | None = PrivateAttr(default=None)
    _leases: Leases | None = PrivateAttr(default=None)
    _units: list[Unit] = PrivateAttr(default_factory=list)
    _refused: Mapping[BatchRef, Exception] = PrivateAttr(default_factory=dict)
    _pool: ThreadPoolExecutor | None = PrivateAttr(default=None)
    _ahead: Ahead | None = PrivateAttr(default=None)
    _began: float = PrivateAttr(default_factory=time.monotonic)

    @contextlib.contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["DeliveryResource"]:
        self._settings = settings = load()
        buffer, warnings = wiring.open_buffer(settings)
        for warning in warnings:
            if context.log:
                context.log.warning(warning)
        run = context.run.run_id if context.run else None
        owner = f"{settings.redis_lock_instance_name}:{run or 'no-run'}:{os.getpid()}"
        self._buffer, self._began = buffer, time.monotonic()
        with (
            contextlib.closing(buffer),
            contextlib.closing(_Threads(self.jobs, "d2p-unit")) as self._pool,
            Leases(buffer, owner, int(settings.redis_lock_ttl * 1000), run) as self._leases,
        ):
            yield self

    @property
    def settings(self) -> Settings:
        assert self._settings
        return self._settings

    @property
    def buffer(self) -> RedisBuffer:
        assert self._buffer
        return self._buffer

    @property
    def leases(self) -> Leases:
        assert self._leases
        return self._leases

    @property
    def jobs(self) -> int:
        """Units worked on at the same time; a user's function is never called from two threads at once."""
        return 1 if self.settings.transform else self.settings.unit_jobs

    @property
    def age(self) -> float:
        """Seconds since the run opened this."""
        return time.monotonic() - self._began

    def plan(self, refs: Iterable[BatchRef]) -> Planned:
        """Claim batches and cut them into units."""
        assert self._pool
        planned = delivery.plan(self.buffer, self.leases, refs, self.settings.unit_bytes)
        self._units, self._refused = planned.units, planned.refused
        self._ahead = Ahead(self._pool, self.jobs, planned.units, read=self._read, check=self._check, build=self._build)
        return planned

    @property
    def refused(self) -> Mapping[BatchRef, Exception]:
        """Batches of the plan that only a later version can deliver."""
        return self._refused

    def unit(self, number: int) -> Unit:
        """A unit of the plan."""
        return self._units[number]

    def read(self, unit: Unit) -> Text:
        assert self._ahead  # a unit comes from a plan
        return self._ahead.read(unit)

    def check(self, text: Text) -> Rows:
        assert self._ahead
        return self._ahead.check(text)

    def build(self, rows: Rows) -> Announced:
        """Encode the files and announce them."""
        assert self._ahead
        return delivery.announce(self.buffer, rows.unit, self._ahead.build(rows))

    def _read(self, unit: Unit) -> Text:
        return delivery.read(self.buffer, unit)

    def _check(self, text: Text) -> Rows:
        return delivery.check(text, wiring.rules(self.settings))

    def _build(self, rows: Rows) -> list[ParquetFile]:
        settings = self.settings
        return delivery.build(
            rows,
            wiring.rules(settings),
            wiring.encoding(settings),
            partition_time=settings.partition_time,
            use_hash=settings.use_hash,
        )

    def acknowledge(self, rows: Rows, written: Sequence[Written], remove: Callable[[str], None]) -> list[Delivered]:
        return delivery.acknowledge(
            self.buffer, self.leases, rows, written, remove, keep_dead_letters=self.settings.use_dlq
        )
