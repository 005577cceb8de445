"""Every way the Go predecessor lost or doubled records on their way in, through the buffer and out, as a test that passes.

The numbers are those of its defect list. Others of that list stand where their mechanism is tested: a failed write (L3), keys
a process has not seen (L8), a poisoned record (L12) in orchestration/test_flush.py and test_sensor.py; crashes between write
and acknowledgement (D1), partial files (L15) and leases that end too early (L9, D2) in faults/test_killed_runs.py; repeated
commands (D3) in buffer/test_redis.py; SIGTERM (L5) in ingest/test_receiver.py.
"""

import signal

import pytest
from redis import Redis

from d2p_pipeline_tests.pipeline import Pipeline, line
from d2p_pipeline_tests.receiving import StartReceiver


@pytest.mark.parametrize("count", [1, 99, 100, 101])
def test_small_inputs_arrive(pipeline: Pipeline, count: int) -> None:
    """L1: up to buffer_size records vanished at close."""
    pipeline.receive([line(message=str(number)) for number in range(count)])
    assert pipeline.flush().success
    assert len(pipeline.rows()) == count


def test_more_than_a_page_per_key_arrives_at_once(pipeline: Pipeline) -> None:
    """L2: a flush emitted at most buffer_size records of each key."""
    keys = ["b"] * 1000 + ["a"] * 1001 + ["b"] * 998
    pipeline.receive([line(key, str(number)) for number, key in enumerate(keys)])
    assert pipeline.flush().success
    assert pipeline.rows('SELECT "business-capability", count(*) FROM files GROUP BY 1 ORDER BY 1') == [
        ("a", 1001),
        ("b", 1998),
    ]


def test_what_was_answered_with_201_outlives_its_receiver(
    pipeline: Pipeline, start_receiver: StartReceiver, redis_client: Redis
) -> None:
    """L4: a killed server took everything acknowledged with it."""
    receiver = start_receiver()
    assert receiver.client.post("/record/", content=line(message="acknowledged")).status_code == 201
    receiver.stop(signal.SIGKILL)
    assert pipeline.flush().success
    assert pipeline.messages() == ["acknowledged"]


def test_a_missing_redis_is_an_error_not_a_memory_buffer(start_receiver: StartReceiver) -> None:
    """L6: an unreachable Redis was silently replaced by memory."""
    with pytest.raises(AssertionError, match=r"redis://127.0.0.1:1: Redis does not answer"):
        start_receiver(redis_url="redis://127.0.0.1:1", redis_timeout="0.1")


def test_a_key_is_flushed_by_whoever_comes_after_a_restart(pipeline: Pipeline) -> None:
    """L7: the lock of a process that ended kept its key from ever being flushed again."""
    for number in range(3):
        pipeline.receive([line(message=str(number))], name=str(number))
        assert pipeline.flush().success
    assert pipeline.messages() == ["0", "1", "2"]
