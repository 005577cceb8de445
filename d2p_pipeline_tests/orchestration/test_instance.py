"""The Dagster instance as `d2p up` configures it: which runs wait for others, and which are given up."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.monitoring import run_monitoring
from dagster._utils.tags import TagConcurrencyLimitsCounter

from d2p_pipeline.cli.supervise import dagster_home


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(dagster_home(tmp_path))) as instance:
        yield instance


@pytest.mark.parametrize(
    ("tags", "limit"),
    [
        ({"d2p/key": "busy"}, 3),
        ({"d2p/recovery": "automatic"}, 2),
        ({"dagster/backfill": "chosen in the UI"}, 2),
    ],
)
def test_runs_of_one_kind_leave_a_place_for_others(
    instance: dg.DagsterInstance, tags: dict[str, str], limit: int
) -> None:
    queue = instance.get_concurrency_config().run_queue_config
    assert queue
    assert queue.max_concurrent_runs > limit
    counter = TagConcurrencyLimitsCounter(queue.tag_concurrency_limits, [])
    for _ in range(limit):
        run = create_run_for_test(instance, tags=tags)
        assert not counter.is_blocked(run)
        counter.update_counters_with_launched_item(run)
    assert counter.is_blocked(create_run_for_test(instance, tags=tags))
    assert not counter.is_blocked(create_run_for_test(instance, tags={"d2p/key": "quiet"}))


@pytest.mark.parametrize(("seconds", "status"), [(290, "NOT_STARTED"), (310, "FAILURE")])
def test_a_run_that_does_not_start_is_given_up(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, seconds: int, status: str
) -> None:
    assert instance.run_monitoring_enabled
    run = create_run_for_test(instance, status=dg.DagsterRunStatus.NOT_STARTED)
    monkeypatch.setattr(run_monitoring, "get_current_timestamp", lambda: time.time() + seconds)
    [record] = instance.get_run_records()
    run_monitoring.monitor_starting_run(instance, record, logging.getLogger("test"))
    found = instance.get_run_by_id(run.run_id)
    assert found
    assert found.status.value == status
