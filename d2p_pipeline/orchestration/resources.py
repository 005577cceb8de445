"""What the ops of a run work with: settings, buffer and the run's claims; opened once per run, given back at its end."""

import contextlib
import os
from collections.abc import Iterator

import dagster as dg
from pydantic import PrivateAttr

from d2p_pipeline import wiring
from d2p_pipeline.buffer.lease import Leases
from d2p_pipeline.buffer.protocol import Buffer
from d2p_pipeline.settings import Settings, load


class DeliveryResource(dg.ConfigurableResource):
    """Settings come from `D2P_CONFIG` and the `D2P_*` environment, as everywhere."""

    _settings: Settings | None = PrivateAttr(default=None)
    _buffer: Buffer | None = PrivateAttr(default=None)
    _leases: Leases | None = PrivateAttr(default=None)

    @contextlib.contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["DeliveryResource"]:
        self._settings = settings = load()
        buffer, warnings = wiring.open_buffer(settings)
        for warning in warnings:
            if context.log:
                context.log.warning(warning)
        owner = f"{settings.redis_lock_instance_name}:{context.run.run_id if context.run else 'no-run'}:{os.getpid()}"
        self._buffer = buffer
        with contextlib.closing(buffer), Leases(buffer, owner, int(settings.redis_lock_ttl * 1000)) as self._leases:
            yield self

    @property
    def settings(self) -> Settings:
        assert self._settings
        return self._settings

    @property
    def buffer(self) -> Buffer:
        assert self._buffer
        return self._buffer

    @property
    def leases(self) -> Leases:
        assert self._leases
        return self._leases
