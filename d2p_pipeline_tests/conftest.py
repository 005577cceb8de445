"""Real parts for every test: one embedded Redis server per test process, emptied before each use."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from redis import Redis

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.memory import MemoryBuffer
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import Buffer
from d2p_pipeline.buffer.redis import RedisBuffer

pytest_plugins = [
    "d2p_pipeline_tests.pipeline",
    "d2p_pipeline_tests.receiving",
    "d2p_pipeline_tests.redis_servers",
    "d2p_pipeline_tests.system",
]

# How long an example takes says nothing on a machine that does other things too.
settings.register_profile("d2p", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("d2p")

TESTS = Path(__file__).parent
LONG = {TESTS / "e2e", TESTS / "faults" / "test_schedules.py", TESTS / "faults" / "test_broken_uploads.py"}

FULL_RECORDS = 100
FULL_BYTES = 10_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that mostly wait come first, on every other worker, while the others use the processor.

    `--dist worksteal` gives each worker one run of consecutive tests to begin with.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if LONG & {item.path, item.path.parent}]
    others = [item for item in items if not LONG & {item.path, item.path.parent}]
    lanes = (workers + 1) // 2
    share = len(items) * 2 // workers if workers > 1 else len(items)
    items.clear()
    for lane in range(lanes):
        first = long[lane::lanes]
        count = max(0, share - len(first)) if lane < lanes - 1 else len(others)
        items += first + others[:count]
        del others[:count]


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
