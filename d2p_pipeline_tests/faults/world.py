"""Real processes under a schedule of faults, and the books at its end: where every numbered record is.

Redis with its append-only file, receivers, runs of the flush job and ticks of the buffer sensor are processes of their own,
killed and paused by signals. Only the daemon's clockwork is played: a step of the schedule is a tick, the runs it asked for, and
a few tenths of a second of traffic. Where time would have to pass (until a dead run's lease ends, until the next look at a
batch) it is made to.
"""

import contextlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from redis import Redis
from redis.exceptions import RedisError

from d2p_pipeline.buffer.connect import connect
from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import BatchRef
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline_tests.faults.producers import KEYS, Account, HttpProducer, Producer, PushProducer, is_bad
from d2p_pipeline_tests.faults.schedule import OTHER_SETTINGS, Fault, Schedule
from d2p_pipeline_tests.faults.struck_run import Struck, StruckRun, tick
from d2p_pipeline_tests.receiving import RunningReceiver

STEP_SECONDS = 0.25
SETTLE_SECONDS = 120
LEASE_SECONDS = "6"
"""Long enough that no lease ends by itself while its run lives: those that shall are ended."""


@dataclass
class Books:
    """What became of the records of one schedule."""

    seed: int
    faults: Counter[str]
    accepted: int = 0
    refused: int = 0
    unknown: int = 0
    rows: int = 0
    dead_letters: int = 0
    runs: int = 0
    killed: int = 0
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list[str])
    doubled: list[str] = field(default_factory=list[str])
    refused_but_there: list[str] = field(default_factory=list[str])
    invented: list[str] = field(default_factory=list[str])
    out_of_order: list[str] = field(default_factory=list[str])

    @property
    def balance(self) -> bool:
        return not (self.lost or self.doubled or self.refused_but_there or self.invented or self.out_of_order)


class World:
    """The processes that outlast a schedule: Redis and two receivers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.redis = EmbeddedRedis(directory / "redis").start()
        self.client = Redis.from_url(self.redis.url)
        settings = {"redis_url": self.redis.url, "redis_timeout": "3"}
        self.receivers = [RunningReceiver(directory, settings) for _ in range(2)]

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.process.send_signal(signal.SIGCONT)
            receiver.stop(signal.SIGKILL)
        self.client.close()
        self.redis.stop()

    def restart_redis(self) -> None:
        assert self.redis.process
        self.redis.process.kill()
        self.redis.process.wait()
        self.redis.stop()
        self.redis = EmbeddedRedis(self.directory / "redis").start()

    def run(self, schedule: Schedule) -> Books:
        self.client.flushall()
        root = self.directory / f"files-{schedule.seed}"
        with _environment(REDIS_URL=self.redis.url, REDIS_TIMEOUT="3", WRITER_FILE_PATH=str(root), **_SETTINGS):
            books = _Course(self, schedule, root).run()
        if books.balance:
            shutil.rmtree(root, ignore_errors=True)
        return books


_SETTINGS = {
    "REDIS_LOCK_TTL": LEASE_SECONDS,
    "FLUSH_INTERVAL": "0.1",
    "BUFFER_SIZE": "60",
    "UNIT_BYTES": "4000",
    "RUN_SECONDS": "0",
    "RUN_ATTEMPTS": "1000",
}


@contextlib.contextmanager
def _environment(**settings: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({f"D2P_{name}": value for name, value in settings.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Course:
    """One schedule in a world."""

    def __init__(self, world: World, schedule: Schedule, root: Path) -> None:
        self.world, self.schedule, self.root = world, schedule, root
        self.books = Books(schedule.seed, Counter(fault.kind for fault in schedule.faults))
        self.runs: list[StruckRun] = []
        self.ticks: list[tuple[Struck, Path]] = []
        self.next_runs: list[Fault] = []
        self.lose_requests = 0
        self.undo: list[tuple[int, Any]] = []
        self.log = root.parent / f"runs-{schedule.seed}.log"
        self.started = time.monotonic()
        self.number = 0
        self.sealed: dict[str, int] = {}

    def run(self) -> Books:
        urls = [receiver.url for receiver in self.world.receivers]
        producers: list[Producer] = [HttpProducer(f"h{number}", self.schedule.seed, urls) for number in range(2)]
        producers.append(PushProducer("p0", self.schedule.seed, self.world.redis.url))
        for producer in producers:
            producer.start()
        for step in range(self.schedule.steps):
            self.undo_until(step)
            for fault in self.schedule.faults:
                if fault.at == step:
                    self.strike(fault, step)
            self.tick()
            time.sleep(STEP_SECONDS)
            self.take_requests()
        self.undo_until(None)
        accounts = [producer.stop() for producer in producers]
        self.settle()
        self.balance(accounts)
        self.books.seconds = time.monotonic() - self.started
        return self.books

    # -- the daemon's part

    def tick(self, point: str = "") -> None:
        self.number += 1
        path = self.world.directory / f"requests-{self.schedule.seed}-{self.number}"
        self.ticks.append((Struck(tick, [path], self.log, point), path))

    def take_requests(self) -> None:
        for process, path in list(self.ticks):
            if not process.has_ended():
                continue
            self.ticks.remove((process, path))
            for config in json.loads(path.read_text()) if path.exists() else []:
                batches = config["ops"]["plan_units"]["config"]["batches"]
                if self.lose_requests:
                    self.lose_requests -= 1
                else:
                    self.start([BatchRef(batch["key"], batch["id"]) for batch in batches])

    def start(self, refs: list[BatchRef]) -> None:
        self.books.runs += 1
        fault = self.next_runs.pop(0) if self.next_runs else None
        kind = fault.kind if fault else ""
        blow = signal.SIGSTOP if kind == "run paused" else signal.SIGKILL
        settings = OTHER_SETTINGS[fault.choice % len(OTHER_SETTINGS)] if fault and fault.choice % 3 == 0 else {}
        if fault and kind == "run under other settings":
            settings = OTHER_SETTINGS[fault.choice % len(OTHER_SETTINGS)]
        point = fault.point if fault and kind in ("run killed", "run paused") else ""
        self.runs.append(
            StruckRun(self.log, refs, point, blow, settings, 2000 if kind == "run without disk space" else None)
        )

    # -- faults

    def strike(self, fault: Fault, step: int) -> None:
        subject = fault.kind.partition(" ")[0]
        {
            "run": self.strike_run,
            "lease": self.lose_leases,
            "ticks": lambda *_: self.tick(),
            "tick": lambda *_: self.tick(fault.point),
            "receiver": self.strike_receiver,
            "Redis": self.strike_redis,
            "scripts": lambda *_: self.world.client.script_flush(),
            "index": lambda *_: self.world.client.delete(["keys", "batches", "recovery"][fault.choice % 3]),
            "directory": self.block,
        }[subject](fault, step + fault.lasts)

    def strike_run(self, fault: Fault, until: int) -> None:
        if fault.kind == "run request lost":
            self.lose_requests += 1
        else:
            self.next_runs.append(fault)

    def lose_leases(self, fault: Fault, until: int) -> None:
        # Not of a run that is to be killed: docs/reliability.md says why.
        for run in self.runs:
            if not run.can_be_killed and not run.has_ended():
                self.end_leases(run)

    def strike_receiver(self, fault: Fault, until: int) -> None:
        receiver = self.world.receivers[fault.choice % len(self.world.receivers)]
        if fault.kind == "receiver killed":
            receiver.process.kill()
            receiver.process.wait()
            receiver.start()
        else:
            receiver.process.send_signal(signal.SIGSTOP)
            self.undo.append((until, partial(receiver.process.send_signal, signal.SIGCONT)))

    def strike_redis(self, fault: Fault, until: int) -> None:
        if fault.kind == "Redis killed":
            self.world.restart_redis()
        elif fault.kind == "Redis full":
            self.world.client.config_set("maxmemory", 1)
            self.undo.append((until, lambda: self.world.client.config_set("maxmemory", 0)))
        else:
            process = self.world.redis.process
            assert process
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.1 * fault.lasts)
            process.send_signal(signal.SIGCONT)

    def block(self, fault: Fault, until: int) -> None:
        """A file where a key's directory should be; only as long as nothing has been written for the key."""
        place = self.root / "capability=orders"
        if not place.exists():
            self.root.mkdir(exist_ok=True)
            place.write_text("in the way")
            self.undo.append((until, lambda: place.unlink(missing_ok=True)))

    def undo_until(self, step: int | None) -> None:
        for due, action in list(self.undo):
            if step is None or due <= step:
                self.undo.remove((due, action))
                action()
        self.wake_up(step)

    def wake_up(self, step: int | None) -> None:
        """Of a run that is paused, first the leases end, then it goes on."""
        for run in self.runs:
            if run.is_paused() and (step is None or step % 2 == 0):
                self.end_leases(run)
        if step is None or step % 2 == 1:
            for run in self.runs:
                if run.is_paused():
                    run.resume()

    def end_leases(self, run: StruckRun) -> None:
        """What time does to the leases of a run that is dead or asleep."""
        with contextlib.suppress(RedisError):
            for ref in run.refs:
                self.world.client.delete(Names().of("lock", *ref))

    # -- the end

    def settle(self) -> None:
        """No more faults: let the system come to rest by its own means, faster than its clock would."""
        with Redis.from_url(self.world.redis.url) as client:
            client.config_set("maxmemory", 0)
        buffer = RedisBuffer(connect(self.world.redis.url), Names(), full_records=60, full_bytes=1 << 20)
        self.next_runs, self.lose_requests = [], 0
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            for run in self.runs:
                if run.is_paused():
                    run.resume()
                if run.has_ended() and run.process.exitcode != 0:
                    self.end_leases(run)
            if self.is_at_rest(buffer):
                break
            if not self.ticks:
                self.tick()
            time.sleep(0.1)
            self.take_requests()
            assert time.monotonic() < deadline, f"seed {self.schedule.seed} did not settle: {self.state(buffer)}"
        self.books.killed = sum(run.process.exitcode == -signal.SIGKILL for run in self.runs)
        self.sealed |= {
            name.rpartition(b":")[2].decode(): int(self.world.client.hget(name, "sealed_at") or 0)  # type: ignore[arg-type]
            for name in self.world.client.scan_iter("batch-meta:*")
        }
        buffer.close()

    def is_at_rest(self, buffer: RedisBuffer) -> bool:
        """Whether nothing is left to do; otherwise makes due what time would make due."""
        open_batches, recovering = list(buffer.open_batches()), list(buffer.recovering())
        self.sealed |= {batch.id: batch.sealed_at for batch in (*open_batches, *recovering)}
        live = [run for run in self.runs if not run.has_ended()]
        if not (live or self.ticks or open_batches or recovering or next(buffer.waiting(), None)):
            return True
        busy = buffer.claimed([batch.ref for batch in recovering]).union(*(run.refs for run in live))
        if repeat := [batch.ref for batch in recovering if batch.ref not in busy]:
            self.start(repeat)
        buffer.postpone({batch.ref: 0 for batch in open_batches if batch.ref not in busy})
        return False

    def state(self, buffer: RedisBuffer) -> str:
        return str([*buffer.open_batches(), *buffer.recovering(), *buffer.waiting()])[:2000]

    def balance(self, accounts: list[Account]) -> None:
        books = self.books
        rows = list(self.rows())
        letters = [
            json.loads(DeadLetter.from_json(letter).raw)["message"]
            for key in KEYS
            for letter in cast(list[bytes], self.world.client.lrange(Names().of("dlq", key), 0, -1))
        ]
        there = Counter([*rows, *letters])
        accepted = set[str]().union(*(account.good | account.bad for account in accounts))
        refused = set[str]().union(*(account.refused for account in accounts))
        unknown = set[str]().union(*(account.unknown for account in accounts))
        books.accepted, books.refused, books.unknown = len(accepted), len(refused), len(unknown)
        books.rows, books.dead_letters = len(rows), len(letters)
        books.lost = sorted(accepted - there.keys())
        books.doubled = sorted(number for number, count in there.items() if count > 1)
        books.refused_but_there = sorted(refused & there.keys())
        wrong = [number for number in rows if is_bad(number)] + [number for number in letters if not is_bad(number)]
        books.invented = sorted((there.keys() - accepted - refused - unknown) | set(wrong))
        place = {number: index for index, number in enumerate(rows)}
        for account in accounts:
            for numbers in account.order.values():
                places = [place[number] for number in numbers if number in place]
                books.out_of_order += [
                    number for number, (one, two) in zip(numbers, pairwise(places), strict=False) if one > two
                ]

    def rows(self) -> Iterator[str]:
        """Numbers in files, in the order of delivery: batches as they were sealed, units and rows as they are numbered."""
        found: list[tuple[int, str, int, list[str]]] = []
        for path in self.root.rglob("*.parquet"):
            file = pq.ParquetFile(path)
            metadata = file.metadata.metadata or {}
            batch, unit = metadata[b"d2p.batch"].decode(), int(metadata[b"d2p.unit"])
            found.append((self.sealed.get(batch, 0), batch, unit, file.read(["message"]).column(0).to_pylist()))
        for *_, messages in sorted(found):
            yield from messages
