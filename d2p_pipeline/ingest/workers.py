"""The processes of `d2p convert`: forked from one that imports what they need while the command reads its settings.

A library takes only its own worker down, and what is decided in Python, record by record, has all cores too. A worker that
is told nothing more, whatever became of the process that told it, ends after its block: no file is left partial.
"""

import contextlib
import gc
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import TYPE_CHECKING, Self

# The sooner a process is started that imports this, the better.
if TYPE_CHECKING:
    from d2p_pipeline.ingest.task import Plan, Result, Task, Text

# Bytes of inputs for which processes of their own are worth their start.
_WORTH = 32 << 20


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_files(names: Sequence[str], count: int, *, fork: bool = False) -> "Workers | None":
    """Workers, if it is worth their start to convert those of the names that are files."""
    return Workers(count, fork=fork) if sum(map(_size, names)) >= _WORTH else None


def _size(name: str) -> int:
    """Bytes of a file; none of what is no file, or no name."""
    try:
        status = Path(name).stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


class WorkerDiedError(Exception):
    """A worker ended that should not have: killed, or by an error that it printed."""

    def __init__(self, name: str, status: int) -> None:
        cause = f"signal {-status}, perhaps for want of memory" if status < 0 else f"exit code {status}"
        super().__init__(f"the worker that converted a part of {name} ended with {cause}")


class Workers:
    """Processes that convert. The first one loads what all of them need, while its caller is busy otherwise; then it forks.

    With `fork` it is forked from this process, which is sooner there; right as long as this one has neither threads nor loaded
    the same.
    """

    def __init__(self, count: int, *, fork: bool = False) -> None:
        ours, theirs = zip(*(Pipe() for _ in range(count)), strict=True)
        descriptors = [connection.fileno() for connection in theirs]
        self.count = count
        self._connections: list[Connection] = [*ours]
        self._unused = deque(self._connections)
        self._seen: Counter[str] = Counter()
        self._unnumbered: deque[Worker] = deque()
        """Those whose blocks have no number yet, in the order of the blocks."""
        self._process = _Forked(descriptors, ours) if fork else _spawned(descriptors)
        for connection in theirs:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def one(self, plan: "Plan") -> "Worker":
        """A worker that has nothing to do yet."""
        return Worker(self._unused.popleft(), plan)

    def convert(self, worker: "Worker", task: "Task", text: "Text") -> None:
        """Hand a block to a worker that has none."""
        self._unnumbered.append(worker)
        worker.convert(task, text)

    def answers(self, told: Sequence["Worker"]) -> "Iterator[Result]":
        """Wait until at least one worker says something. WorkerDiedError if it is not there any more."""
        busy = [worker for worker in told if worker.asked]
        ready = wait([worker.connection for worker in busy])
        for worker in busy:
            if worker.connection not in ready:
                continue
            try:
                result = worker.answer()
            except (EOFError, ConnectionError):
                raise WorkerDiedError(worker.tasks[-1].name, self.end()) from None
            if not worker.asked and worker in self._unnumbered:
                self._unnumbered.remove(worker)  # its block could not be read
            if result:
                yield result
        while self._unnumbered and (batch := self._unnumbered[0].batch):
            self._unnumbered.popleft().number(self._seen[batch])
            self._seen[batch] += 1

    def end(self) -> int:
        """Wait for the end of their blocks and of themselves. The exit code, or minus the signal, of one that failed."""
        for connection in self._connections:
            connection.close()
        code = self._process.wait()
        return code - _SIGNALLED if code > _SIGNALLED // 2 else code


def _spawned(descriptors: Sequence[int]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"import {__name__} as workers; workers.work({descriptors})"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=descriptors,
        # Not that of the terminal: Ctrl-C lets them end their blocks.
        process_group=0,
    )


class _Forked:
    """The same as `_spawned`, without the time a new Python takes to begin."""

    def __init__(self, descriptors: Sequence[int], others: Sequence[Connection]) -> None:
        self._status: int | None = None
        self._pid = os.fork()
        if self._pid:
            return
        try:
            for connection in others:
                connection.close()
            os.setpgid(0, 0)
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 0)
            os.dup2(nothing, 1)
            work(descriptors)
        except Exception as error:  # noqa: BLE001  # nobody else prints it
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(1)

    def wait(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status


# What is added to the number of a signal, which is negative, to make an exit code of it.
_SIGNALLED = 256


class Worker:
    """A process that converts one block after the other; what it answers is the result of an earlier one, or None."""

    def __init__(self, connection: Connection, plan: "Plan") -> None:
        self.connection = connection
        self.asked = 0
        """Answers to come."""
        self.batch: str | None = None
        """The batch that its block belongs to, while it waits for the number it has there."""
        self.tasks: deque[Task] = deque()
        """What it was told to convert and has no result of yet."""
        self._tell(plan)

    def convert(self, task: "Task", text: "Text") -> None:
        """Hand it a block."""
        self.asked += 1
        self.tasks.append(task)
        self._tell(task, None if task.range else text)

    def settle(self) -> None:
        """Ask for the next result."""
        self.asked += 1
        self._tell(None)

    def number(self, number: int) -> None:
        """Tell it how many equal blocks came before."""
        self.batch = None
        self._tell(number)

    def answer(self) -> "Result | None":
        """What it answers, once its connection has something. EOFError or ConnectionError if it is gone."""
        message = self.connection.recv()
        if isinstance(message, str):
            self.batch = message
            return None
        self.asked -= 1
        return (self.tasks.popleft(), message) if message else None

    def _tell(self, message: "Plan | Task | int | None", text: "Text | None" = None) -> None:
        # A worker that is gone is noticed where its answer is waited for.
        with contextlib.suppress(ConnectionError):
            self.connection.send(message)
            if text is not None:
                self.connection.send_bytes(text)


def work(descriptors: Sequence[int]) -> None:
    """What the first process of `Workers` does: load everything, then fork a worker for each descriptor that is used."""
    os.environ["POLARS_MAX_THREADS"] = "1"
    from d2p_pipeline.ingest.task import get_ready

    gc.disable()
    get_ready()
    gc.freeze()  # what was imported is no garbage: it need neither be looked through, nor copied for that
    gc.enable()
    gc.set_threshold(50_000)  # a block leaves hardly any garbage to look for
    unused = [Connection(descriptor) for descriptor in descriptors]
    context = multiprocessing.get_context("fork")
    workers: list[ForkProcess] = []
    while unused:
        ready = wait(unused)
        for own in [connection for connection in unused if connection in ready]:
            unused.remove(own)
            if _is_told(own):
                workers.append(context.Process(target=_work, args=(own, unused)))
                workers[-1].start()
            own.close()
    for worker in workers:
        worker.join()
    codes = [worker.exitcode or 0 for worker in workers]
    # At once, as forked processes end: somebody waits for it, and there is nothing to clean up.
    os._exit(next((code % _SIGNALLED for code in codes if code), 0))


def _is_told(connection: Connection) -> bool:
    """Whether a readable connection has something to read; else its other end was closed."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        return bool(end.recv(1, socket.MSG_PEEK))


def _work(own: Connection, others: Sequence[Connection]) -> None:
    """Convert until nobody is there any more to tell what. Errors that are no result end the process."""
    from d2p_pipeline.ingest.task import Converter

    for other in others:
        other.close()

    def number(batch: str) -> Callable[[], int]:
        own.send(batch)
        return own.recv

    with contextlib.suppress(EOFError, ConnectionError), Converter(own.recv()) as converter:
        while True:
            task = own.recv()
            if task is None:
                own.send(converter.settle())
            else:
                text = b"" if task.range else own.recv_bytes()
                own.send(converter.convert(task, text, number))
