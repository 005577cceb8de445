"""Delivers batches of lines over several connections at a time, each repeated until it is answered for.

A batch keeps its name over its repetitions, so a receiver that knows names stores it once.
"""

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_exponential_jitter,
)

_MAX_WAIT = 30.0  # seconds between two attempts, whatever the receiver asks for


@dataclass(frozen=True, slots=True)
class Sent:
    """What the receiver answered for: records by fate, requests answered with success, attempts beyond the first."""

    accepted: int = 0
    dead_lettered: int = 0
    requests: int = 0
    retries: int = 0


class Undelivered(Exception):
    """A batch was refused for good, or not answered in time. `sent` is what was delivered before and beside it."""

    def __init__(self, target: str, records: int, reason: str, sent: Sent) -> None:
        super().__init__(f"{target} did not take a batch of {records} records: {reason}")
        self.target = target
        self.records = records
        self.reason = reason
        self.sent = sent


class Answer(NamedTuple):
    """What became of a batch's records."""

    accepted: int
    dead_lettered: int = 0


class Refused(Exception):
    """Repeating the batch would not help."""


class Busy(Exception):
    """Repeating it will, `retry_after` seconds from now if the receiver said so."""

    def __init__(self, answered: str, retry_after: float | None = None) -> None:
        super().__init__(answered)
        self.retry_after = retry_after


Post = Callable[[list[bytes], str], Answer]
"""Sends one batch under its name; raises `Refused`, `Busy`, or an error of the transport."""


def deliver(
    batches: Iterator[list[bytes]],
    target: str,
    posts: Sequence[Post],
    *,
    transient: tuple[type[Exception], ...],
    permanent: tuple[type[Exception], ...] = (),
    patience: float = 60.0,
    on_progress: Callable[[int], object] = lambda records: None,
) -> Sent:
    """Send every batch over one of `posts`, each of which has a thread of its own.

    `Busy` and `transient` errors are repeated for at most about `patience` seconds a batch. `on_progress` is told the
    records of each answered batch, from one thread at a time. Batches are drawn as senders come free.

    Raises Undelivered at the first batch refused for good or not taken in time: no further batch is begun, and one that
    waits for its next attempt gets a last one.
    """
    delivery = _Delivery(batches, transient, permanent, patience, on_progress)
    with ThreadPoolExecutor(len(posts), thread_name_prefix="send") as pool:
        workers = [pool.submit(delivery.work, post) for post in posts]
        try:
            for worker in as_completed(workers):
                worker.result()
        finally:
            delivery.halt.set()
    if delivery.failure:
        raise Undelivered(target, *delivery.failure, delivery.sent)
    return delivery.sent


def batches(lines: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    """`size` lines at a time."""
    remaining = iter(lines)
    while batch := list(islice(remaining, size)):
        yield batch


class _Delivery:
    """What the senders share: the batches still to go, and the account of those that went."""

    def __init__(
        self,
        batches: Iterator[list[bytes]],
        transient: tuple[type[Exception], ...],
        permanent: tuple[type[Exception], ...],
        patience: float,
        on_progress: Callable[[int], object],
    ) -> None:
        self.sent = Sent()
        self.failure: tuple[int, str] | None = None
        self.halt = threading.Event()
        self._batches = batches
        self._transient = transient
        self._errors = transient + permanent
        self._drawing = threading.Lock()
        self._counting = threading.Lock()
        self._patience = patience
        self._on_progress = on_progress

    def work(self, post: Post) -> None:
        """Send batches until there are none left, or until `halt`."""
        while lines := self._draw():
            self._deliver(post, lines)

    def _draw(self) -> list[bytes]:
        with self._drawing:
            return [] if self.halt.is_set() else next(self._batches, [])

    def _deliver(self, post: Post, lines: list[bytes]) -> None:
        attempts = Retrying(
            retry=retry_if_exception_type((Busy, *self._transient)),
            stop=stop_any(stop_after_delay(self._patience), stop_when_event_set(self.halt)),
            wait=_wait,
            sleep=sleep_using_event(self.halt),
            reraise=True,
        )
        answer, reason = None, ""
        try:
            answer = attempts(post, lines, str(uuid.uuid4()))
        except (Busy, Refused) as error:
            reason = str(error)
        except self._errors as error:
            reason = f"{type(error).__name__}: {error}"
        retries = attempts.statistics["attempt_number"] - 1
        with self._counting:
            if answer:
                self.sent = Sent(
                    self.sent.accepted + answer.accepted,
                    self.sent.dead_lettered + answer.dead_lettered,
                    self.sent.requests + 1,
                    self.sent.retries + retries,
                )
                self._on_progress(len(lines))
            else:
                self.sent = replace(self.sent, retries=self.sent.retries + retries)
                self.failure = self.failure or (len(lines), reason)
                self.halt.set()


_backoff = wait_exponential_jitter(multiplier=0.2, max=10, jitter=0.2)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, Busy) and error.retry_after is not None:
        return min(error.retry_after, _MAX_WAIT)
    return _backoff(state)
