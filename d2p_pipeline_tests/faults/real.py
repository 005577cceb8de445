"""The whole system as users start it, `d2p up`, under load for as long as wanted, while its processes are killed and paused at
random moments and left to come back by themselves; then the books, as for a schedule.

The seed decides which faults come, in which order and how far apart; where in its work they hit a process is chance.
"""

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import cast

from redis import Redis
from redis.exceptions import RedisError

from d2p_pipeline.buffer.connect import connect
from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import BufferUnavailableError
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline_tests.faults.books import Books, batches_of, letters_of
from d2p_pipeline_tests.faults.producers import ForwardProducer, HttpProducer, Producer, PushProducer
from d2p_pipeline_tests.system import System, free_port

PROCESSES = {
    "daemon": "dagster._daemon",
    "code server": "orchestration.code_server",
    "receiver": "cli.main receive",
    "listener": "cli.main forward",
    "webserver": "dagster_webserver",
    "run": "multiprocessing.forkserver",
}
"""What a process is, by its command line; a run is forked from one of the same."""
KINDS = [
    *(f"{name} {what}" for name in ("daemon", "code server", "receiver", "listener") for what in ("killed", "paused")),
    *("run killed", "run killed", "run paused", "Redis killed", "Redis paused", "Redis full", "everything killed"),
]
GAP_SECONDS = (3, 12)
PATIENCE_SECONDS = 20
"""How long a fault waits for a process to strike."""
LEASE_SECONDS = 8.0
BATCHES_PER_SECOND: dict[type[Producer], int] = {HttpProducer: 8, PushProducer: 4, ForwardProducer: 4}
SETTLE_SECONDS = 900
SETTINGS = {
    "flush_interval": "2",
    "buffer_size": "1000",
    "redis_lock_ttl": str(LEASE_SECONDS),
    "redis_timeout": "3",
    "run_attempts": "1000",
    "try_auto_recover": "true",
    "recovery_attempts": "1000",
    "recovery_delay": "5",
}


@dataclass
class Sample:
    """What was seen at a moment, in seconds since the start."""

    at: float
    accepted: int
    delivered: int
    waiting: int
    """Records in buffers and batches, as Redis counts them."""
    oldest: float
    """Age of the oldest of them, in seconds."""
    memory: dict[str, int]
    """Resident bytes by kind of process, and Redis's own count."""


@dataclass
class Course:
    """What happened: books, samples and the moments of faults."""

    books: Books
    samples: list[Sample] = field(default_factory=list[Sample])
    faults: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])


def run(seed: int, seconds: float, directory: Path, say: Callable[[str], None]) -> Course:
    """Load and faults for so long, then rest and books."""
    real = RealSystem(directory)
    try:
        return _Run(real, seed, say).run(seconds)
    finally:
        real.close()


class RealSystem:
    """A Redis of our own and `d2p up` over it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.root = directory, directory / "files"
        self.redis = EmbeddedRedis(directory / "redis").start()
        self.client = Redis.from_url(self.redis.url)
        self.forward_port = free_port()
        settings = {"redis_url": self.redis.url, "forward_port": str(self.forward_port)}
        self.up = System(directory, writer_file_path=str(self.root), **settings, **SETTINGS).wait()

    def processes(self) -> Iterator[tuple[str, int]]:
        """What runs under `d2p up`."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        parents = {pid: _parent(pid) for pid in pids}
        for pid in pids:
            above = pid
            while above and above != self.up.process.pid:
                above = parents.get(above, 0)
            line = _command(pid) if above else ""
            name = next((name for name, part in PROCESSES.items() if part in line), "")
            if name and (name != "run" or PROCESSES["run"] in _command(parents[pid])):
                yield name, pid

    def close(self) -> None:
        self.up.stop()
        self.client.close()
        self.redis.stop()


class _Run:
    """Producers, faults and samples, each in threads of their own."""

    def __init__(self, real: RealSystem, seed: int, say: Callable[[str], None]) -> None:
        self.real, self.random, self.say = real, Random(seed), say
        self.course = Course(Books(seed, "newer", "local", Counter()))
        self.buffer = RedisBuffer(connect(real.redis.url), Names(), full_records=1000, full_bytes=1 << 26)
        self.ending = threading.Event()
        self.sealed: dict[str, int] = {}
        url, forward = f"http://127.0.0.1:{real.up.port}", f"127.0.0.1:{real.forward_port}"
        self.producers: list[Producer] = [HttpProducer(f"h{number}", seed, [url]) for number in range(2)]
        self.producers += [PushProducer("p0", seed, real.redis.url), ForwardProducer("f0", seed, forward)]
        self.began = time.monotonic()

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    def run(self, seconds: float) -> Course:
        watching = threading.Thread(target=self.watch, daemon=True)
        for thread in (*self.producers, watching, threading.Thread(target=self.pace, daemon=True)):
            thread.start()
        # Not in a thread: what that starts would end with it.
        self.strike(seconds)
        self.ending.set()
        accounts = [producer.stop() for producer in self.producers]
        self.wait_for_rest()
        watching.join()
        books = self.course.books
        books.struck = Counter(kind for _, kind in self.course.faults)
        books.faults, books.seconds = books.struck, round(self.now, 1)
        files = self.real.root.rglob("*.parquet")
        books.balance_with(accounts, batches_of(files, self.sealed), letters_of(self.buffer))
        self.buffer.close()
        return self.course

    def pace(self) -> None:
        while not self.ending.wait(1):
            for producer in self.producers:
                producer.give_leave(BATCHES_PER_SECOND[type(producer)], at_most=True)

    def wait_for_rest(self) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            with contextlib.suppress(RedisError, BufferUnavailableError):
                self.note_seals()
                if not (
                    next(self.real.client.scan_iter("batch:{*", count=1000), None) or next(self.buffer.waiting(), None)
                ):
                    return
            assert time.monotonic() < deadline, f"it did not come to rest: {list(self.buffer.open_batches())}"
            time.sleep(1)

    # -- faults

    def strike(self, seconds: float) -> None:
        while self.now < seconds:
            time.sleep(self.random.uniform(*GAP_SECONDS))
            kind, deadline = self.random.choice(KINDS), self.now + PATIENCE_SECONDS
            while not (struck := self.strike_one(kind)) and self.now < deadline:
                time.sleep(0.1)
            if struck:
                self.course.faults.append((round(self.now, 1), kind))
                self.say(f"{self.now:7.1f} s  {kind}")

    def strike_one(self, kind: str) -> bool:
        """Whether there was something to strike."""
        name, _, what = kind.rpartition(" ")
        if name == "Redis":
            self.strike_redis(what)
        elif name == "everything":
            self.real.up.process.kill()
            self.real.up.process.wait()
            self.real.up.start()
            self.real.up.wait()
        else:
            pids = [pid for one, pid in self.real.processes() if one == name]
            return bool(pids) and self.strike_process(self.random.choice(pids), name, what)
        return True

    def strike_process(self, pid: int, name: str, what: str) -> bool:
        try:
            if what == "killed":
                os.kill(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGSTOP)
                # A run sleeps longer than its lease, so that another one takes its batches before it wakes up.
                self.ending.wait(LEASE_SECONDS * 4 if name == "run" else self.random.uniform(1, 6))
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            return False
        return True

    def strike_redis(self, what: str) -> None:
        real = self.real
        process = real.redis.process
        assert process
        if what == "killed":
            process.kill()
            process.wait()
            real.redis.stop()
            real.redis = EmbeddedRedis(real.directory / "redis").start()
        elif what == "full":
            real.client.config_set("maxmemory", 1)
            self.ending.wait(self.random.uniform(1, 4))
            real.client.config_set("maxmemory", 0)
        else:
            process.send_signal(signal.SIGSTOP)
            self.ending.wait(self.random.uniform(0.5, 2))
            process.send_signal(signal.SIGCONT)

    # -- what is seen

    def watch(self) -> None:
        samples = self.course.samples
        while not (self.ending.is_set() and samples and not samples[-1].waiting):
            with contextlib.suppress(RedisError, BufferUnavailableError):
                samples.append(self.sample())
                if len(samples) % 60 == 0:
                    self.note_seals()
            time.sleep(1)

    def sample(self) -> Sample:
        now = self.buffer.now()
        totals = [total for _, total in self.buffer.totals()]
        batches = [*self.buffer.open_batches(), *self.buffer.recovering()]
        states = list(self.buffer.waiting())
        firsts = [one.first for one in (*batches, *states)]
        memory = Counter[str]()
        for name, pid in self.real.processes():
            memory[name] += _resident(pid)
        memory["Redis"] = cast(dict[str, int], self.real.client.info("memory"))["used_memory"]
        return Sample(
            at=round(self.now, 1),
            accepted=sum(len(producer.account.good) + len(producer.account.bad) for producer in self.producers),
            delivered=sum(total.rows + total.dead_letters for total in totals),
            waiting=sum(max(0, batch.records - batch.rows - batch.dead_letters) for batch in batches)
            + sum(state.records for state in states),
            oldest=max(0, now - min(firsts)) / 1000 if firsts else 0,
            memory=dict(memory),
        )

    def note_seals(self) -> None:
        """When batches were sealed, as long as Redis knows it."""
        for name in self.real.client.scan_iter("batch-meta:*", count=1000):
            sealed = cast(bytes | None, self.real.client.hget(name, "sealed_at"))
            self.sealed[name.rpartition(b":")[2].decode()] = int(sealed or 0)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
