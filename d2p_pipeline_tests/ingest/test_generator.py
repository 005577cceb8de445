import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2p_pipeline.ingest.generator import FAULTS, Fault, Profile, capability_of, generate, paced

START = datetime(2024, 5, 1, 12, tzinfo=UTC)
PROFILES: list[Profile] = ["canonical", "d2p"]
REQUIRED = {
    *("time", "level", "message"),
    *("business-capability", "business-domain", "business-service", "application-service"),
}
OPTIONAL = (
    "correlation-id args audit auto-index az cloud-provider device-id duration error error-code extra-fields HMAC "
    "http-response logger-name message-id person-id region resource-type session-id source-id stack-trace tags "
    "thread-name trace-ip transaction-message-reference ttl user-id"
)
KNOWN = REQUIRED | set(OPTIONAL.split())
ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


def no_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def records(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line, object_pairs_hook=no_repeated_names) for line in lines]


def unreadable(record: dict[str, Any]) -> bool:
    try:
        datetime.fromisoformat(record["time"])
    except ValueError:
        return True
    return False


def is_not_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return True
    return False


def is_bad(line: bytes) -> bool:
    if is_not_json(line):
        return True
    record = json.loads(line)
    return not isinstance(record, dict) or any(record.get(name) is None for name in REQUIRED) or unreadable(record)


@pytest.mark.parametrize("profile", PROFILES)
@given(count=st.integers(0, 1200), seed=st.integers(), keys=st.integers(1, 50))
@settings(max_examples=10, deadline=None)
def test_every_record_is_one_line_of_valid_json_with_known_fields(
    profile: Profile, count: int, seed: int, keys: int
) -> None:
    lines = list(generate(count, seed=seed, profile=profile, keys=keys))
    assert len(lines) == count
    assert not any(b"\n" in line for line in lines)
    for record in records(lines):
        assert set(record) >= REQUIRED
        assert set(record) <= KNOWN
        assert datetime.fromisoformat(record["time"]).utcoffset() == timedelta(0)
        assert all(isinstance(value, str) for value in record["args"].values())
        assert type(record["audit"]) is type(record["auto-index"]) is bool
        others = {name: value for name, value in record.items() if name not in ("args", "audit", "auto-index")}
        assert all(isinstance(v, list if name in ("tags", "trace-ip") else str) for name, v in others.items())


@pytest.mark.parametrize("profile", PROFILES)
def test_the_same_seed_and_start_make_the_same_bytes(profile: Profile) -> None:
    def made(seed: int) -> list[bytes]:
        return list(generate(2500, seed=seed, profile=profile, start=START, bad_ratio=0.1, extra_field=True))

    assert made(7) == made(7)
    assert made(7) != made(8)


@pytest.mark.parametrize("profile", PROFILES)
def test_without_a_start_only_what_comes_from_the_clock_differs(profile: Profile) -> None:
    one, other = (records(list(generate(50, seed=3, profile=profile, start=start))) for start in (None, START))
    assert [r["message"] for r in one] == [r["message"] for r in other]
    assert [r["message-id"][10:] for r in one] == [r["message-id"][10:] for r in other]


def test_without_a_start_records_carry_the_moment_they_were_made() -> None:
    before = datetime.now(UTC)
    times = [datetime.fromisoformat(record["time"]) for record in records(list(generate(20)))]
    # Record times have microseconds, cut off.
    assert before - timedelta(microseconds=1) <= times[0] <= times[-1] <= datetime.now(UTC)


@pytest.mark.parametrize("profile", PROFILES)
def test_times_run_evenly_from_start_over_the_span(profile: Profile) -> None:
    zone = datetime.fromisoformat("2024-05-01T09:00:00-03:00")
    lines = list(generate(1440, profile=profile, start=zone, span=timedelta(days=1)))
    times = [datetime.fromisoformat(record["time"]) for record in records(lines)]
    assert times == [START + timedelta(minutes=i) for i in range(1440)]


@pytest.mark.parametrize("profile", PROFILES)
def test_message_ids_are_unique_ulids_of_the_records_time(profile: Profile) -> None:
    made = records(list(generate(5000, profile=profile, start=START, span=timedelta(milliseconds=5))))
    ids = [record["message-id"] for record in made]
    assert len(set(ids)) == 5000
    assert all(ULID.fullmatch(each) for each in ids)
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    milliseconds = sum(alphabet.index(digit) << 5 * (9 - place) for place, digit in enumerate(ids[0][:10]))
    assert milliseconds == START.timestamp() * 1000


def test_canonical_records_are_about_870_bytes_and_take_the_keys_in_turn() -> None:
    lines = list(generate(4000, keys=20))
    assert 855 < sum(map(len, lines)) / len(lines) < 905
    counts = Counter(capability_of(line) for line in lines)
    assert len(counts) == 20
    assert set(counts.values()) == {200}


def test_canonical_records_vary_as_logs_do() -> None:
    made = records(list(generate(3000)))
    assert {record["level"] for record in made} == {"INFO", "DEBUG", "WARN", "ERROR"}
    assert len({record["message"] for record in made}) > 700
    assert {len(record["http-response"]) for record in made} == {3}
    assert all(("error" in record) == (record["level"] == "ERROR") for record in made)


def test_d2p_records_have_the_fields_and_distributions_of_the_go_generator() -> None:
    made = records(list(generate(120, profile="d2p", start=START, span=timedelta(seconds=12))))
    for i, record in enumerate(made):
        assert record["business-capability"] == f"buscap-{i % 10:02d}"
        assert record["business-domain"] == f"busdom-{i % 10:02d}"
        assert record["business-service"] == f"bussvc-{i % 20:02d}"
        assert record["application-service"] == f"appsvc-{i % 30:02d}"
        assert record["duration"] == str(i * 100)
        assert record["message"].count(".") == 5
        assert set(record) == KNOWN - {"error", "extra-fields", "ttl"}
    fixed = {
        "level": "INFO",
        "args": {f"arg{n}": f"val{n}" for n in range(1, 11)},
        "tags": [f"tag{n}" for n in range(1, 11)],
        "audit": True,
        "auto-index": True,
        "az": "us-east-1a",
        "cloud-provider": "aws",
        "HMAC": "",
        "http-response": "200",
        "logger-name": "data2parquet",
        "region": "us-east-1",
        "resource-type": "ec2",
        "thread-name": "data2parquet.main",
        "trace-ip": ["192.168.0.1", "0.0.0.1"],
    }
    assert all(record | fixed == record for record in made)
    identifiers = (
        *("correlation-id", "session-id", "message-id", "person-id", "user-id", "device-id", "source-id"),
        *("error-code", "transaction-message-reference"),
    )
    ids = [record[name] for record in made for name in identifiers]
    assert len(set(ids)) == 9 * 120
    assert all(ULID.fullmatch(each) for each in ids)
    assert all(record["stack-trace"].startswith("goroutine ") for record in made)


def test_d2p_records_have_the_size_of_the_go_generators() -> None:
    document = json.dumps({"logs": records(list(generate(1000, profile="d2p")))}, indent="\t")
    assert 2550 < len(document) / 1000 < 2750


def test_an_extra_field_is_one_the_schema_does_not_know() -> None:
    for record in records(list(generate(10, extra_field=True))):
        assert set(record) - KNOWN == {"build-number"}


@pytest.mark.parametrize("profile", PROFILES)
@given(count=st.integers(0, 2500), ratio=st.floats(0, 1), seed=st.integers())
@settings(max_examples=15, deadline=None)
def test_exactly_the_asked_fraction_is_bad_and_the_rest_is_untouched(
    profile: Profile, count: int, ratio: float, seed: int
) -> None:
    lines = list(generate(count, seed=seed, profile=profile, bad_ratio=ratio, start=START))
    good = list(generate(count, seed=seed, profile=profile, start=START))
    changed = [line for line, original in zip(lines, good, strict=True) if line != original]
    assert len(changed) == round(count * ratio)
    assert all(is_bad(line) for line in changed)
    assert not any(is_bad(line) for line in good)


def test_bad_records_are_spread_over_the_keys_and_the_run() -> None:
    places = [i for i, line in enumerate(generate(5000, keys=10, bad_ratio=0.1, start=START)) if is_bad(line)]
    assert len(places) == 500
    assert min(Counter(place % 10 for place in places).values()) > 20
    assert set(Counter(place // 1000 for place in places).values()) == {100}


SYMPTOMS: dict[Fault, Callable[[bytes], bool]] = {
    "missing-field": lambda line: len(REQUIRED - set(json.loads(line))) == 1,
    "null-field": lambda line: [json.loads(line)[name] for name in REQUIRED].count(None) == 1,
    "unreadable-time": lambda line: unreadable(json.loads(line)),
    "truncated": is_not_json,
    "not-an-object": lambda line: not isinstance(json.loads(line), dict),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_makes_its_kind_of_bad_record_and_keeps_the_capability(profile: Profile, fault: Fault) -> None:
    lines = list(generate(100, profile=profile, bad_ratio=1, faults=[fault]))
    assert all(SYMPTOMS[fault](line) for line in lines)
    if fault != "not-an-object":
        good = generate(100, profile=profile)
        assert [capability_of(line) for line in lines] == [capability_of(line) for line in good]


def test_the_faults_come_in_turn() -> None:
    lines = list(generate(50, bad_ratio=1))
    assert all(SYMPTOMS[FAULTS[i % 5]](line) for i, line in enumerate(lines))


def test_a_line_may_name_no_capability() -> None:
    assert capability_of(b"null") is None
    assert capability_of(b'{"business-capability": "a b"}') == "a b"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"count": -1}, "count=-1"),
        ({"count": 1, "keys": 0}, "keys=0"),
        ({"count": 1, "bad_ratio": 1.5}, r"bad_ratio=1\.5"),
        ({"count": 1, "faults": []}, "faults is empty"),
        ({"count": 1, "start": datetime(2024, 1, 1)}, "no time zone"),
    ],
)
def test_arguments_out_of_range_are_refused_at_the_call(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        generate(**arguments)


def test_a_paced_stream_is_the_same_stream() -> None:
    lines = [b"%d" % i for i in range(300)]
    assert list(paced(lines, 0)) == lines
    assert list(paced(lines, 1e9)) == lines
