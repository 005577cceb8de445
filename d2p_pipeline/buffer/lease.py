"""Keeps a run's claims alive: one thread renews every lease a third of its length before it ends, and says that the run lives.

A claim that was lost meanwhile (the process was paused for longer than the lease) is dropped here and logged; the work done
under it is refused by its stale token when it comes to be acknowledged.
"""

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from d2p_pipeline.buffer.protocol import BatchRef, Buffer, BufferUnavailableError, Claim

log = logging.getLogger(__name__)


class Leases:
    """Claims of one owner, renewed until released. `run`: the run that says that it lives, if any."""

    def __init__(self, buffer: Buffer, owner: str, lease_ms: int, run: str | None = None) -> None:
        self._buffer = buffer
        self._owner = owner
        self._run = run
        self._lease_ms = lease_ms
        self._claims: dict[BatchRef, Claim] = {}
        self._keys: Sequence[str] = ()
        self._attend_until = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="d2p-leases", daemon=True)

    def take(self, ref: BatchRef) -> Claim | None:
        """Claim a batch; None when it is delivered or another owner holds it."""
        claim = self._buffer.claim(ref, self._owner, self._lease_ms)
        if claim:
            with self._lock:
                self._claims[ref] = claim
        return claim

    def drop(self, ref: BatchRef) -> None:
        """Forget a batch that was delivered; nothing is left to release."""
        with self._lock:
            self._claims.pop(ref, None)

    @property
    def keys(self) -> Sequence[str]:
        """The keys this run attends."""
        return self._keys

    def attend(self, keys: Sequence[str], seconds: float) -> None:
        """Tell others that this run looks after these keys, for at most that long; as long as it lives, that is."""
        with self._lock:
            self._keys, self._attend_until = keys, time.monotonic() + seconds
        self._attend()

    def _attend(self) -> None:
        with self._lock:
            keys = self._keys if time.monotonic() < self._attend_until else ()
        self._buffer.attend(keys, self._buffer.now() + self._lease_ms)

    def _live(self) -> None:
        if self._run:
            self._buffer.lives(self._run, self._buffer.now() + self._lease_ms)

    def _keep(self) -> None:
        while not self._stop.wait(self._lease_ms / 3000):
            try:
                self._live()
                self._attend()
            except BufferUnavailableError as error:
                log.warning("not said that this run lives: %s", error)
            with self._lock:
                claims = list(self._claims.values())
            for claim in claims:
                try:
                    held = self._buffer.renew(claim, self._lease_ms)
                except BufferUnavailableError as error:
                    log.warning("key=%s batch=%s lease not renewed: %s", *claim.batch, error)
                    continue
                if not held:
                    log.warning("key=%s batch=%s token=%d claim lost", *claim.batch, claim.token)
                    self.drop(claim.batch)

    def __enter__(self) -> "Leases":
        self._live()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._buffer.leave(self._keys)
            if self._run:
                self._buffer.ends(self._run)
        except BufferUnavailableError as reason:
            log.warning("not said that this run ends, which others learn by themselves: %s", reason)
        for claim in self._claims.values():
            try:
                self._buffer.release(claim)
            except BufferUnavailableError as reason:
                log.warning("key=%s batch=%s not released, its lease ends by itself: %s", *claim.batch, reason)
        self._claims.clear()
