"""The SQS door: messages of a queue into the buffer by group commit, deleted when the buffer has them.

Pollers receive up to ten messages at a time and wait for the buffer as long as it takes; meanwhile their messages stay
hidden from others. The message's id names its push, so a message that SQS delivers again within the window (its poller was
killed, its deletion failed) changes nothing. What cannot be read becomes a dead letter that names the message. What is wrong
with the queue, the buffer or an object is tried again; a message is deleted for nothing but being stored.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from botocore.exceptions import BotoCoreError, ClientError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_never,
    wait_exponential_jitter,
)

from d2p_pipeline.buffer.protocol import BufferFullError, BufferUnavailableError, ForeignValueError
from d2p_pipeline.ingest.commit import GroupCommit, Request

log = logging.getLogger(__name__)

BATCH = 10
"""Messages SQS takes or gives in one call, at most."""
DELETE_ATTEMPTS = 5
EMPTY_SECONDS = 0.5
"""Pause after an empty answer, where calls do not wait for messages themselves."""
_T = TypeVar("_T")
_AWS_ERRORS = (BotoCoreError, ClientError)


class Message(NamedTuple):
    """One delivery of a message; another delivery of it has another receipt."""

    id: str
    receipt: str
    body: str


Convert = Callable[[Message], Iterator[Request]]
"""A message's records as requests, named after it, one after the other; `SourceError` when they cannot be read now."""


class SourceError(Exception):
    """What a message points to cannot be read now; the message stays in the queue."""


class Queue:
    """The calls of one queue; each blocks."""

    def __init__(self, client: Any, url: str, *, wait: int, visibility: int) -> None:
        self._client = client
        self._url = url
        self._wait = wait
        self.waits = wait > 0
        """Whether an empty answer takes its time."""
        self.visibility = visibility

    def receive(self) -> list[Message]:
        answer = self._client.receive_message(
            QueueUrl=self._url,
            MaxNumberOfMessages=BATCH,
            WaitTimeSeconds=self._wait,
            VisibilityTimeout=self.visibility,
        )
        return [Message(m["MessageId"], m["ReceiptHandle"], m["Body"]) for m in answer.get("Messages", ())]

    def delete(self, receipts: Sequence[str]) -> list[str]:
        """Delete at most `BATCH` messages; returns the receipts to try again. One that is no longer valid is not."""
        entries = [{"Id": str(n), "ReceiptHandle": receipt} for n, receipt in enumerate(receipts)]
        answer = self._client.delete_message_batch(QueueUrl=self._url, Entries=entries)
        again: list[str] = []
        for failure in answer.get("Failed", ()):
            log.warning("a message was not deleted: %s %s", failure.get("Code"), failure.get("Message", ""))
            if not failure.get("SenderFault"):
                again.append(receipts[int(failure["Id"])])
        return again

    def hide(self, receipts: Sequence[str], seconds: int) -> None:
        """Hide at most `BATCH` messages from others for so long from now; 0 gives them back."""
        entries = [
            {"Id": str(n), "ReceiptHandle": receipt, "VisibilityTimeout": seconds} for n, receipt in enumerate(receipts)
        ]
        answer = self._client.change_message_visibility_batch(QueueUrl=self._url, Entries=entries)
        for failure in answer.get("Failed", ()):
            log.warning("the visibility of a message did not change: %s", failure.get("Message", failure.get("Code")))

    def depth(self) -> int:
        """Messages that wait, about."""
        name = "ApproximateNumberOfMessages"
        answer = self._client.get_queue_attributes(QueueUrl=self._url, AttributeNames=[name])
        return int(answer["Attributes"][name])


def pollers_wanted(pollers: int, *, depth: int, refused: bool, least: int, most: int) -> int:
    """How many pollers to go on with: half as many when the buffer refuses, more while the queue is deeper than they can
    take at once, one less when it has nothing for one of them."""
    if refused:
        wanted = pollers // 2
    elif depth > pollers * BATCH:
        wanted = min(pollers * 2, -(-depth // BATCH))
    elif depth <= (pollers - 1) * BATCH // 2:
        wanted = pollers - 1
    else:
        wanted = pollers
    return max(least, min(most, wanted))


@dataclass
class Counts:
    """What came through this door since it opened."""

    messages: int = 0
    records: int = 0
    dead_letters: int = 0
    deleted: int = 0
    left: int = 0
    """Messages given back to the queue, or left there, unstored."""
    refused: int = 0
    """Times the buffer took nothing."""
    errors: int = 0
    """Calls of SQS that failed."""
    pollers: int = 0
    """Receive calls wanted at a time, now."""


class Pollers:
    """Moves messages from a queue to the buffer until it is told to stop."""

    def __init__(
        self,
        queue: Queue,
        commit: GroupCommit,
        convert: Convert,
        *,
        least: int = 1,
        most: int = 8,
        adapt_seconds: float = 5.0,
    ) -> None:
        self.counts = Counts()
        self.wanted = least
        self._queue = queue
        self._commit = commit
        self._convert = convert
        self._least, self._most = least, most
        self._adapt_seconds = adapt_seconds
        self._stopping = asyncio.Event()
        self._refused = False
        self._hidden_until: dict[str, float] = {}
        # One thread for each poller's calls, and some for those beside them.
        self._threads = ThreadPoolExecutor(2 * most + 2, "d2p-sqs")
        # Others for what messages hold: objects that take long must not keep messages from staying hidden.
        self._converting = ThreadPoolExecutor(2 * most, "d2p-sqs-objects")
        self._running: dict[int, asyncio.Task[None]] = {}

    def stop(self) -> None:
        """Receive no more; what was received is stored and deleted, or given back where the buffer takes nothing."""
        self._stopping.set()

    async def run(self) -> None:
        """Returns after `stop`, when everything received is dealt with."""
        keeper = asyncio.create_task(self._keep_hidden())
        try:
            while not self._stopping.is_set():
                self.counts.pollers = self.wanted
                for number in range(self.wanted):
                    if number not in self._running:
                        self._running[number] = asyncio.create_task(self._poll(number))
                await self._pause(self._adapt_seconds)
                for number in [number for number, task in self._running.items() if task.done()]:
                    self._running.pop(number).result()
                await self._adapt()
            await asyncio.gather(*self._running.values())
        finally:
            keeper.cancel()
            self._threads.shutdown()
            self._converting.shutdown()

    async def _adapt(self) -> None:
        if self._stopping.is_set():
            return
        try:
            depth = await self._call(self._queue.depth)
        except _AWS_ERRORS as error:
            self._failed("its depth", error)
            return
        refused, self._refused = self._refused, False
        self.wanted = pollers_wanted(self.wanted, depth=depth, refused=refused, least=self._least, most=self._most)

    async def _poll(self, number: int) -> None:
        while number < self.wanted and not self._stopping.is_set():
            if messages := await self._receive():
                await self._deliver(messages)
            elif not self._queue.waits:
                await self._pause(EMPTY_SECONDS)

    async def _receive(self) -> list[Message]:
        try:
            messages = await self._retrying(_AWS_ERRORS)(self._call, self._queue.receive)
        except _AWS_ERRORS:
            return []  # it is told to stop
        self.counts.messages += len(messages)
        return messages

    async def _deliver(self, messages: Sequence[Message]) -> None:
        until = asyncio.get_running_loop().time() + self._queue.visibility
        self._hidden_until.update({message.receipt: until for message in messages})
        try:
            stored = await asyncio.gather(*map(self._store, messages))
            await self._delete([message.receipt for message, done in zip(messages, stored, strict=True) if done])
            await self._give_back([message.receipt for message, done in zip(messages, stored, strict=True) if not done])
        finally:
            for message in messages:
                self._hidden_until.pop(message.receipt, None)

    async def _store(self, message: Message) -> bool:
        """Whether the buffer has all of the message."""
        records = dead_letters = 0
        try:
            requests = self._convert(message)
            while (request := await self._call(lambda: next(requests, None), self._converting)) is not None:
                await self._retrying((BufferFullError, BufferUnavailableError))(self._commit.store, request)
                records += sum(map(len, request.lines.values()))
                dead_letters += sum(map(len, request.dead_letters.values()))
        except (BufferFullError, BufferUnavailableError):
            return False  # it is told to stop
        except (SourceError, ForeignValueError) as error:
            log.warning("message %s stays in the queue: %s", message.id, error)
            return False
        except Exception:  # one message is no reason to leave the others
            log.exception("message %s stays in the queue", message.id)
            return False
        self.counts.records += records
        self.counts.dead_letters += dead_letters
        return True

    async def _delete(self, receipts: list[str]) -> None:
        async def attempt() -> None:
            receipts[:] = await self._call(lambda: self._queue.delete(receipts))
            if receipts:
                raise _UndeletedError

        total = len(receipts)
        if not total:
            return
        try:
            await self._retrying((*_AWS_ERRORS, _UndeletedError), attempts=DELETE_ATTEMPTS)(attempt)
        except (*_AWS_ERRORS, _UndeletedError):
            log.warning("%d messages are stored, but not deleted; when they come again, nothing changes", len(receipts))
        self.counts.deleted += total - len(receipts)

    async def _give_back(self, receipts: Sequence[str]) -> None:
        """Unstored messages are for others at once if this process ends, else when their time is over."""
        self.counts.left += len(receipts)
        if receipts and self._stopping.is_set():
            try:
                await self._call(lambda: self._queue.hide(receipts, 0))
            except _AWS_ERRORS as error:
                self._failed("visibility", error)

    async def _keep_hidden(self) -> None:
        """Extend the time of whatever waits for the buffer, when half of it is over."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, self._queue.visibility / 10))
            soon = loop.time() + self._queue.visibility / 2
            due = [receipt for receipt, until in self._hidden_until.items() if until < soon]
            for part in _batches(due):
                try:
                    await self._call(lambda part=part: self._queue.hide(part, self._queue.visibility))
                except _AWS_ERRORS as error:
                    self._failed("visibility", error)
                    continue
                until = loop.time() + self._queue.visibility
                self._hidden_until.update({r: until for r in part if r in self._hidden_until})

    # -- calls and repetitions

    async def _call(self, action: Callable[[], _T], threads: ThreadPoolExecutor | None = None) -> _T:
        return await asyncio.get_running_loop().run_in_executor(threads or self._threads, action)

    def _retrying(self, errors: tuple[type[Exception], ...], attempts: int = 0) -> AsyncRetrying:
        """Repeats with growing, jittered pauses, until it is told to stop."""
        limit = stop_after_attempt(attempts) if attempts else stop_never
        return AsyncRetrying(
            retry=retry_if_exception_type(errors),
            wait=wait_exponential_jitter(multiplier=0.2, max=20, jitter=1),
            stop=lambda state: self._stopping.is_set() or limit(state),
            sleep=self._pause,
            before_sleep=self._count_failure,
            reraise=True,
        )

    def _count_failure(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, BufferFullError | BufferUnavailableError):
            self._refused = True
            self.counts.refused += 1
            log.warning("the buffer takes nothing, messages wait: %s", error)
        elif isinstance(error, _AWS_ERRORS):
            self._failed("a call", error)

    def _failed(self, what: str, error: Exception) -> None:
        self.counts.errors += 1
        log.warning("SQS: %s failed: %s", what, error)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return


class _UndeletedError(Exception):
    """Some messages of a batch were not deleted."""


def _batches(receipts: Sequence[str]) -> Iterable[Sequence[str]]:
    return (receipts[start : start + BATCH] for start in range(0, len(receipts), BATCH))
