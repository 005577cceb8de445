"""Real parts for every test: one embedded Redis server per test process, emptied before each use."""

import atexit
import gc
import os
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from redis import Redis

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.memory import MemoryBuffer
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import Buffer
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline_tests.fixtures.s3 import SMALL_PART

pytest_plugins = [
    "d2p_pipeline_tests.pipeline",
    "d2p_pipeline_tests.receiving",
    "d2p_pipeline_tests.redis_servers",
    "d2p_pipeline_tests.system",
]

# What tests import stays: looking for garbage in it would take a third of collecting them, and again later.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # libraries expect that Python cleans up at its end


# How long an example takes says nothing on a machine that does other things too.
settings.register_profile(
    "d2p",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=100 if os.environ.get("FULL_SIZE") == "1" else 40,
)
settings.load_profile("d2p")
# moto reads it when it is imported: uploads of many parts need not be large where only their number matters.
os.environ["S3_UPLOAD_PART_MIN_SIZE"] = str(SMALL_PART)

TESTS = Path(__file__).parent
WAITING = (
    ("e2e/test_repair.py",),
    ("e2e/test_celery.py", "e2e/test_up.py"),
    ("faults/test_failover.py", "faults/test_broken_uploads.py", "faults/test_schedules.py"),
)
"""Tests that mostly wait, in lanes that take about as long."""

FULL_RECORDS = 100
FULL_BYTES = 10_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that mostly wait come first, each lane on a worker of its own, while others use the processor.

    `--dist worksteal` gives each worker one run of consecutive tests to begin with.
    """
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    lanes = [[item for name in lane for item in by_file.pop(TESTS / name, [])] for lane in WAITING]
    others = (item for some in by_file.values() for item in some)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ordered: list[pytest.Item] = []
    for number, lane in enumerate(lanes):
        begin = len(items) * min(number, workers - 1) // workers
        ordered += [*islice(others, max(0, begin - len(ordered))), *lane]
    items[:] = [*ordered, *others]


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    with tempfile.TemporaryDirectory() as directory, EmbeddedRedis(Path(directory), durable=False) as server:
        yield server


@pytest.fixture
def redis_client(redis_server: EmbeddedRedis) -> Iterator[Redis]:
    with Redis.from_url(redis_server.url) as client:
        client.flushall()
        yield client
        client.config_set("maxmemory", 0)


@pytest.fixture
def redis_buffer(redis_client: Redis) -> RedisBuffer:
    return RedisBuffer(redis_client, Names(), full_records=FULL_RECORDS, full_bytes=FULL_BYTES)


@pytest.fixture(params=["redis", "memory"])
def buffer(request: pytest.FixtureRequest) -> Buffer:
    if request.param == "memory":
        return MemoryBuffer(full_records=FULL_RECORDS, full_bytes=FULL_BYTES)
    return request.getfixturevalue("redis_buffer")
