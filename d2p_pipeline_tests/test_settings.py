"""The settings as users meet them: flags, environment, files of every notation, and one error that lists everything."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from pydantic import SecretStr, ValidationError

from d2p_pipeline.reference import reference
from d2p_pipeline.settings import HIDDEN, RETIRED, Settings, SettingsError, fluent_name, load

SAMPLES = Path(__file__).parent / "fixtures" / "predecessors"
DOCUMENT = Path(__file__).parents[1] / "docs" / "configuration.md"

# Every key of the predecessors, in both of its forms.
PREDECESSOR_KEYS = {
    "address": "Address",
    "port": "Port",
    "buffer_size": "BufferSize",
    "buffer_type": "BufferType",
    "debug": "Debug",
    "flush_interval": "FlushInterval",
    "ignored_fields": "IgnoredFields",
    "mask_fields": "MaskFields",
    "json_schema_path": "JsonSchemaPath",
    "log_formatter": "LogFormatter",
    "record_type": "RecordType",
    "recovery_attempts": "RecoveryAttempts",
    "redis_data_prefix": "RedisDataPrefix",
    "redis_db": "RedisDB",
    "redis_dlq_prefix": "RedisDLQPrefix",
    "redis_host": "RedisHost",
    "redis_keys": "RedisKeys",
    "redis_lock_instance_name": "RedisLockInstanceName",
    "redis_lock_prefix": "RedisLockPrefix",
    "redis_lock_ttl": "RedisLockTTL",
    "redis_password": "RedisPassword",
    "redis_recovery_key": "RedisRecoveryKey",
    "redis_skip_flush": "RedisSkipFlush",
    "redis_timeout": "RedisTimeout",
    "s3_bucket_name": "S3BucketName",
    "s3_default_capability": "S3DefaultCapability",
    "s3_endpoint": "S3Endpoint",
    "s3_region": "S3Region",
    "s3_role_arn": "S3RoleARN",
    "s3_sts_endpoint": "S3STSEndpoint",
    "try_auto_recover": "TryAutoRecover",
    "use_dlq": "UseDLQ",
    "use_hash": "UseHash",
    "use_hmac": "UseHMAC",
    "writer_compression_type": "WriterCompressionType",
    "writer_file_path": "WriterFilePath",
    "writer_row_group_size": "WriterRowGroupSize",
    "writer_type": "WriterType",
}


@pytest.fixture(autouse=True, scope="module")
def no_settings_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in Settings.model_fields:
            patch.delenv(f"D2P_{name.upper()}", raising=False)
        yield


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Thousands of changes of the process' own environment would meet a library's thread that reads it, which C forbids."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, **variables})
        yield


def load_from(flags: dict[str, Any]) -> Settings:
    return load(**flags)


def values(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(exclude={"config"})


def problems(act: Callable[[], object]) -> dict[str, str]:
    with pytest.raises(SettingsError) as caught:
        act()
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return {problem.setting: str(problem) for problem in caught.value.problems}


# --- any valid settings, in any notation

whole = st.integers(1, 10**12)
whole_or_zero = st.integers(0, 10**12)
seconds = st.floats(1e-3, 1e9) | st.integers(1, 10**9)
text = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1).filter(
    lambda t: "${" not in t
)
word = st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,9}", fullmatch=True)
words = st.lists(word, min_size=1, max_size=4)
path = st.from_regex(r"(\./|/)?[a-z0-9]{1,8}(/[a-z0-9]{1,8})?", fullmatch=True)
url = st.from_regex(r"https?://[a-z]{1,9}(:[0-9]{2,4})?", fullmatch=True)

VALID: dict[str, SearchStrategy[Any]] = {
    "record_type": st.sampled_from(["log", "dynamic", "LOG"]),
    "json_schema_path": path,
    "key_fields": words,
    "time_field": text,
    "default_capability": text,
    "s3_default_capability": text,
    "ignored_fields": words,
    "mask_fields": words,
    "transform": st.sampled_from(["m:f", "package.module:function"]),
    "use_hmac": st.booleans(),
    "hmac_key": text,
    "max_record_bytes": whole,
    "buffer_type": st.sampled_from(["mem", "redis"]),
    "buffer_size": whole,
    "flush_interval": seconds,
    "flush_bytes": whole,
    "max_key_bytes": whole_or_zero,
    "max_buffer_bytes": whole_or_zero,
    "push_window": seconds,
    "home": path,
    "redis_url": st.sampled_from(
        ["redis://h:1/0", "rediss://u:p@h", "unix:///s", "redis+sentinel://a:1,b:2/m/0", "redis+cluster://h:1"]
    ),
    "redis_host": st.sampled_from(["0.0.0.0:6379", "redis:6379", "redis", "[::1]:6379"]),
    "redis_db": whole_or_zero,
    "redis_username": text,
    "redis_password": text,
    "redis_timeout": seconds | st.sampled_from([0, -1]),
    "redis_skip_flush": st.booleans(),
    "redis_lock_ttl": seconds,
    "redis_lock_instance_name": text,
    "redis_data_prefix": st.sampled_from(["data", "d2p:data"]),
    "redis_dlq_prefix": st.sampled_from(["dlq", "d2p:dlq"]),
    "redis_lock_prefix": st.sampled_from(["lock", "d2p.lock"]),
    "redis_keys": st.sampled_from(["keys", "d2p-keys"]),
    "redis_recovery_key": st.just("recovery"),
    "flush_cron": st.sampled_from(["*/5 * * * *", "0 3 1-15,20 jan mon-fri"]),
    "unit_bytes": whole,
    "run_bytes": whole,
    "max_runs_per_tick": whole,
    "unit_jobs": whole,
    "own_runs": whole_or_zero,
    "run_seconds": seconds | st.just(0),
    "run_linger": seconds | st.just(0),
    "use_dlq": st.booleans(),
    "dlq_max_records": whole,
    "dlq_max_bytes": whole,
    "write_retries": whole_or_zero,
    "write_retry_delay": seconds,
    "try_auto_recover": st.booleans(),
    "recovery_attempts": whole_or_zero,
    "recovery_delay": seconds,
    "run_attempts": whole,
    "recovery_run_batches": whole,
    "lag_limit": seconds,
    "reject_limit": st.sampled_from([0, 0.05, 1]),
    "reject_window": seconds,
    "writer_type": st.sampled_from(["file", "aws-s3"]),
    "writer_file_path": path,
    "writer_url": st.sampled_from(["gs://bucket/files", "abfs://c@a.dfs.core.windows.net/files", "memory://files"]),
    "writer_compression_type": st.sampled_from(["snappy", "zstd", "gzip", "none"]),
    "writer_row_group_size": whole,
    "timestamp_unit": st.sampled_from(["ms", "us", "ns"]),
    "column_names": st.sampled_from(["kebab", "snake"]),
    "partition_time": st.sampled_from(["event", "ingest"]),
    "use_hash": st.booleans(),
    "s3_bucket_name": st.just("data2parquet"),
    "s3_prefix": path,
    "s3_region": word,
    "s3_endpoint": url,
    "s3_path_style": st.booleans(),
    "s3_create_bucket": st.booleans(),
    "s3_role_arn": st.just("arn:aws:iam::localstack:role/localhost:4566"),
    "s3_external_id": st.sampled_from(["id", "a/b:c=d"]),
    "s3_session_name": st.sampled_from(["d2p", "writer@host"]),
    "s3_sts_endpoint": url,
    "s3_encryption": st.sampled_from(["none", "sse-s3", "sse-kms", "SSE-S3"]),
    "s3_kms_key_id": st.sampled_from(["alias/d2p", "arn:aws:kms:eu-central-1:123456789012:key/0"]),
    "s3_storage_class": st.sampled_from(["STANDARD_IA", "GLACIER_IR"]),
    "s3_acl": st.sampled_from(["private", "bucket-owner-full-control"]),
    "s3_tags": st.lists(st.sampled_from(["team=a b", "cost=1+2=3", "empty="]), min_size=1, max_size=3),
    "s3_timeout": seconds,
    "s3_attempts": whole,
    "s3_part_bytes": st.integers(5 * 2**20, 5 * 2**30),
    "address": st.sampled_from(["127.0.0.1", "localhost", "::1", "0.0.0.0", "receiver.example"]),
    "port": st.integers(1, 65535),
    "workers": whole,
    "max_body_bytes": whole,
    "max_expansion": whole,
    "max_request_keys": whole,
    "max_held_bytes": whole,
    "max_connections": whole,
    "header_timeout": seconds,
    "body_timeout": seconds,
    "access_log": st.booleans(),
    "tokens": words,
    "tokens_file": path,
    "allow_remote_without_token": st.booleans(),
    "tls_cert": path,
    "tls_key": path,
    "tls_client_ca": path,
    "forward_port": st.integers(1, 65535),
    "forward_address": st.sampled_from(["127.0.0.1", "localhost", "::1", "0.0.0.0", "receiver.example"]),
    "forward_shared_key": text,
    "forward_users": st.lists(st.sampled_from(["a:b", "user:p:w"]), min_size=1, max_size=2),
    "forward_tls": st.booleans(),
    "forward_connections": whole,
    "key_from_tag": st.sampled_from(["kube.{business-capability}.*", "{a}.{b_c}.**"]),
    "fluent_defaults": st.lists(st.sampled_from(["level=info", "business-domain=a b", "x="]), min_size=1, max_size=2),
    "sqs_queue_url": url,
    "sqs_region": word,
    "sqs_endpoint": url,
    "sqs_min_pollers": st.integers(1, 3),
    "sqs_max_pollers": st.integers(3, 10**6),
    "sqs_wait": st.integers(0, 20),
    "sqs_visibility": st.integers(10, 400),
    "sqs_window": st.integers(800, 10**6),
    "metrics_port": st.integers(1, 65535),
    "sqs_unwrap": st.lists(st.sampled_from(["sns", "s3"]), min_size=1, max_size=2),
    "dagster_port": st.integers(1, 65535),
    "dagster_postgres_url": st.sampled_from(
        ["postgresql://u:p@h:5432/dagster", "postgres://h/dagster?sslmode=require"]
    ),
    "alert_webhook_url": url,
    "keep_runs_days": seconds,
    "keep_runs": whole,
    "keep_failed_runs_days": seconds,
    "debug": st.booleans(),
    "log_formatter": st.sampled_from(["color", "text", "json", "multi"]),
}


@st.composite
def valid_settings(draw: DrawFn) -> dict[str, Any]:
    chosen = draw(st.fixed_dictionaries({}, optional=VALID))
    needed = {
        "hmac_key": bool(chosen.get("use_hmac")),
        "s3_bucket_name": chosen.get("writer_type") == "aws-s3",
        "s3_role_arn": chosen.get("writer_type") == "aws-s3" and "s3_external_id" in chosen,
        "tokens": "address" in chosen,
        "tls_cert": "tls_key" in chosen or "tls_client_ca" in chosen or bool(chosen.get("forward_tls")),
        "tls_key": "tls_cert" in chosen or "tls_client_ca" in chosen or bool(chosen.get("forward_tls")),
        "forward_shared_key": "forward_address" in chosen or "forward_users" in chosen,
    }
    for name, is_needed in needed.items():
        if is_needed and name not in chosen:
            chosen[name] = draw(VALID[name])
    if chosen.get("writer_type") == "aws-s3" and "s3_kms_key_id" in chosen:
        chosen["s3_encryption"] = "sse-kms"
    return chosen


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_properties_below_know_every_setting() -> None:
    assert set(VALID) == set(Settings.model_fields) - {"config"}


@examples(deadline=None)
@given(valid_settings())
def test_any_valid_settings_are_the_same_in_every_notation(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any]
) -> None:
    expected = values(load(**chosen))
    files = {
        "snake.json": json.dumps(chosen),
        "pascal.json": json.dumps({fluent_name(name): value for name, value in chosen.items()}),
        "d2p.toml": "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in chosen.items()),
        "fluent.conf": "[OUTPUT]\n  Name out_parquet\n  Match *\n"
        + "".join(f"  {fluent_name(name)}  {as_text(value)}  \n" for name, value in chosen.items()),
        "upper.conf": "[output]\n" + "".join(f"{name.upper()} {as_text(value)}\n" for name, value in chosen.items()),
    }
    directory = tmp_path_factory.getbasetemp()
    for name, content in files.items():
        file = directory / name
        file.write_text(content, "utf-8")
        assert values(load(file)) == expected, name
    with environment({f"D2P_{name.upper()}": as_text(value) for name, value in chosen.items()}):
        assert values(load()) == expected


@examples(deadline=None)
@given(valid_settings())
def test_a_child_process_gets_the_same_settings_through_its_environment(chosen: dict[str, Any]) -> None:
    settings = load(**chosen)
    with environment(settings.environment()):
        assert values(load()) == values(settings)


@examples(deadline=None)
@given(st.from_regex(r"[a-z][a-z_]{0,20}", fullmatch=True), text)
def test_an_unknown_key_is_an_error_that_names_a_known_one_and_hides_the_value(key: str, value: str) -> None:
    assume(key.replace("_", "") not in {name.replace("_", "") for name in (*Settings.model_fields, *RETIRED)})
    value = f"secret-{value}"
    [(name, message)] = problems(lambda: load_from({key: value})).items()
    assert name == key
    assert message.rpartition(" ")[2] in Settings.model_fields
    assert value not in message
    with environment({f"D2P_{key.upper()}": value}):
        assert f"D2P_{key.upper()}" in problems(load)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("buffer_siz", "buffer_size"), ("S3BuketName", "s3_bucket_name"), ("WriterCompresion", "writer_compression_type")],
)
def test_the_nearest_key_is_the_one_meant(tmp_path: Path, written: str, meant: str) -> None:
    file = tmp_path / "d2p.json"
    file.write_text(json.dumps({written: "x"}))
    assert problems(lambda: load(file))[written].endswith(f"the nearest is {meant}")


def test_a_misspelt_variable_is_answered_with_a_variable() -> None:
    with environment({"D2P_BUFFER_SIZ": "3"}):
        assert problems(load)["D2P_BUFFER_SIZ"].endswith("the nearest is D2P_BUFFER_SIZE")


INVALID: dict[str, Any] = {
    "buffer_type": "disk",
    "buffer_size": 0,
    "flush_interval": "soon",
    "flush_cron": "every minute",
    "key_fields": [],
    "log_formatter": "xml",
    "port": 70000,
    "record_type": "log_legacy",
    "recovery_attempts": -1,
    "redis_host": "redis://host",
    "redis_timeout": -2,
    "redis_url": "http://host",
    "s3_endpoint": "localhost:4566",
    "tokens": "tökén",
    "transform": "module.function",
    "unit_bytes": "64 furlongs",
    "use_dlq": "perhaps",
    "workers": True,
}


@examples(deadline=None)
@given(st.sets(st.sampled_from(sorted(INVALID)), min_size=1))
def test_all_invalid_values_are_listed_in_one_error(names: set[str]) -> None:
    found = problems(lambda: load(use_hmac=True, **{name: INVALID[name] for name in names}))
    assert set(found) == names | {"hmac_key"}  # what is wrong between settings is listed with the rest
    for name in names - {"redis_url", "tokens"}:
        assert found[name].startswith(f"{name} = {INVALID[name]!r}: ")


@pytest.mark.parametrize(
    "name", [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)]
)
def test_negative_numbers_are_refused(name: str) -> None:
    assert set(problems(lambda: load_from({name: -7}))) == {name}


@pytest.mark.parametrize(
    "name",
    ["buffer_size", "flush_interval", "flush_bytes", "unit_bytes", "run_bytes", "port", "workers", "redis_lock_ttl"],
)
def test_zero_is_refused_where_it_makes_no_sense(name: str) -> None:
    assert set(problems(lambda: load_from({name: 0}))) == {name}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "inf"])
def test_an_interval_is_finite(value: object) -> None:
    assert set(problems(lambda: load(flush_interval=value))) == {"flush_interval"}


# --- sources


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "d2p.json"
    file.write_text('{"BufferSize": 1, "Port": 1, "Workers": 1}')
    with environment({"D2P_CONFIG": str(file), "D2P_PORT": "2", "D2P_WORKERS": "2"}):
        settings = load(workers=3, debug=None)
    assert (settings.buffer_size, settings.port, settings.workers) == (1, 2, 3)
    assert [settings.origin(name) for name in ("buffer_size", "port", "workers", "debug", "config")] == [
        "file",
        "env",
        "flag",
        "default",
        "env",
    ]


def test_the_file_given_as_a_flag_replaces_the_one_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "d2p.toml"
    file.write_text("port = 4321\n")
    with environment({"D2P_CONFIG": str(tmp_path / "absent.toml")}):
        assert load(file).port == 4321


def test_an_empty_value_means_not_given(tmp_path: Path) -> None:
    file = tmp_path / "d2p.json"
    file.write_text('{"redis_password": "", "buffer_type": " ", "record_type": null, "port": 81}')
    with environment({"D2P_PORT": "", "D2P_HMAC_KEY": " "}):
        settings = load(file)
    assert (settings.redis_password, settings.buffer_type, settings.port, settings.hmac_key) == (
        None,
        "redis",
        81,
        None,
    )


def test_a_key_in_two_spellings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "d2p.json"
    file.write_text('{"writer_type": "file", "WriterType": "aws-s3"}')
    assert "given twice, as writer_type and as WriterType" in problems(lambda: load(file))["writer_type"]
    file.write_text('{"port": 1, "port": 2}')
    assert "port is given twice" in problems(lambda: load(file))["config"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", "[]"),
        ("broken.json", '{"port": '),
        ("broken.toml", "port = "),
        ("plain.conf", "port 8080"),
        ("binary", b"\xff\xfe\x00".decode("latin-1")),
        ("nested.json", '{"config": "other.json"}'),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content, "latin-1")
    assert str(file) in problems(lambda: load(file))["config"]


def test_variables_that_kubernetes_adds_for_a_service_are_no_settings() -> None:
    links = {
        "D2P_PORT": "tcp://10.0.0.1:8080",
        "D2P_DAGSTER_PORT": "tcp://10.0.0.2:3000",
        "D2P_SERVICE_HOST": "10.0.0.1",
        "D2P_RECEIVER_SERVICE_PORT_HTTP": "8080",
        "D2P_RECEIVER_PORT_8080_TCP_ADDR": "10.0.0.1",
    }
    with environment(links):
        assert load().port == 8080


def test_sizes_may_carry_a_unit() -> None:
    settings = load(unit_bytes="32MiB", run_bytes="1 GB", flush_bytes="1024")
    assert (settings.unit_bytes, settings.run_bytes, settings.flush_bytes) == (32 * 2**20, 10**9, 1024)


# --- Fluent Bit notation


def fluent(tmp_path: Path, content: str) -> Path:
    file = tmp_path / "fluent-bit.conf"
    file.write_text(content)
    return file


def test_of_a_whole_fluent_configuration_only_our_output_is_read(tmp_path: Path) -> None:
    settings = load(
        fluent(
            tmp_path,
            "@SET x=1\n[SERVICE]\n  Flush 1\n[INPUT]\n  Name dummy\n  Port 1\n# [OUTPUT]\n[OUTPUT]\n  Name stdout\n  Port 2\n"
            "[OUTPUT]\n  NAME out_parquet\n  Match *\n  Match_Regex .*\n  Alias x\n  Retry_Limit no_limits\n  Log_Level info\n"
            "  storage.total_limit_size 1G\n  net.keepalive on\n  tls off\n  tls.verify off\n  bUFFERsIZE 77\n  Port 3\n",
        )
    )
    assert (settings.buffer_size, settings.port) == (77, 3)
    assert settings.notes == ()


def test_two_of_our_outputs_are_refused(tmp_path: Path) -> None:
    file = fluent(tmp_path, "[OUTPUT]\n Name out_parquet\n[OUTPUT]\n Name out_parquet\n")
    assert "one [OUTPUT] section" in problems(lambda: load(file))["config"]


def test_a_fluent_value_may_come_from_the_environment(tmp_path: Path) -> None:
    file = fluent(tmp_path, "[OUTPUT]\n  Name out_parquet\n  RedisHost ${REDIS_NAME}:6379\n")
    assert "${REDIS_NAME} is not set" in problems(lambda: load(file))["config"]
    with environment({"REDIS_NAME": "cache"}):
        assert load(file).redis_host == "cache:6379"


# --- the predecessors


@pytest.mark.parametrize("name", PREDECESSOR_KEYS)
def test_every_key_of_the_predecessors_is_a_setting_in_both_forms(name: str) -> None:
    assert name in Settings.model_fields
    assert fluent_name(name) == PREDECESSOR_KEYS[name]


@pytest.mark.parametrize(
    ("sample", "expected", "notes"),
    [
        (
            "json2parquet-redis.json",
            {"buffer_size": 1000, "flush_interval": 60, "redis_host": "0.0.0.0:6379", "writer_file_path": Path("data")},
            ("log_path: logs go to standard error; ignored",),
        ),
        ("json2parquet-mem.json", {"buffer_type": "mem", "redis_lock_ttl": 90}, ()),
        (
            "fluent-output.conf",
            {
                "buffer_size": 1000,
                "debug": True,
                "use_dlq": False,
                "writer_type": "aws-s3",
                "s3_role_arn": "arn:aws:iam::localstack:role/localhost:4566",
                "redis_lock_ttl": 18,
            },
            (),
        ),
        (
            "fluent-output-earlier.conf",
            {"s3_role_arn": "arn:aws:iam::localstack:role/localstack", "s3_endpoint": "http://localhost:4566"},
            ("s3_role_name, s3_account: read as s3_role_arn = arn:aws:iam::localstack:role/localstack",),
        ),
    ],
)
def test_the_predecessors_samples_load_as_they_are(
    sample: str, expected: dict[str, object], notes: tuple[str, ...]
) -> None:
    settings = load(SAMPLES / sample)
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.notes == notes


@pytest.mark.parametrize("sample", sorted(path.name for path in SAMPLES.glob("etc-*")))
def test_the_configurations_the_predecessor_ships_need_only_the_key_of_their_hmac(sample: str) -> None:
    assert set(problems(lambda: load(SAMPLES / sample))) == {"hmac_key"}
    settings = load(SAMPLES / sample, hmac_key="k")
    assert settings.use_hmac
    assert settings.use_hash
    assert settings.redis_lock_ttl in (8, 20)  # given there, so taken
    assert settings.redis_timeout == 0


def test_a_name_behind_an_underscore_is_switched_off() -> None:
    settings = load(SAMPLES / "etc-json2parquet-config.json", hmac_key="k")
    assert (settings.buffer_type, settings.writer_type, settings.writer_compression_type) == ("mem", "aws-s3", "snappy")
    assert "_buffer_type: begins with an underscore; ignored" in settings.notes
    assert "ledis_path: there is no Ledis buffer; ignored" in settings.notes
    assert "s3_account: s3_role_arn names the account; ignored" in settings.notes


@pytest.mark.parametrize("name", sorted(set(RETIRED) - {"s3_role_name"}))
def test_a_retired_name_is_accepted_with_a_note(name: str) -> None:
    [note] = load_from({name: "anything"}).notes
    assert note.startswith(f"{name}: ")
    assert note.endswith("; ignored")


def test_a_role_name_without_account_is_an_error_because_another_identity_would_write() -> None:
    assert set(problems(lambda: load(s3_role_name="writer"))) == {"s3_role_name"}
    assert load(s3_role_name="writer", s3_role_arn="arn:aws:iam::1:role/r").s3_role_arn == "arn:aws:iam::1:role/r"


def test_disabled_log_colours_are_plain_text() -> None:
    assert load(disable_log_colors=True).log_formatter == "text"
    assert load(disable_log_colors="true", log_formatter="json").log_formatter == "json"
    assert load(disable_log_colors=False).log_formatter == "color"


def test_values_below_the_predecessors_minimum_are_taken_as_given() -> None:
    settings = load(buffer_size=10, flush_interval=1, writer_row_group_size=512, redis_lock_ttl=0.5)
    assert (settings.buffer_size, settings.flush_interval, settings.writer_row_group_size) == (10, 1, 512)
    assert settings.redis_lock_ttl == 0.5


@pytest.mark.parametrize(("interval", "ttl"), [(60, 90), (5, 7.5), (1, 5), (0.5, 5)])
def test_the_lease_lasts_one_and_a_half_flush_intervals_and_at_least_five_seconds(interval: float, ttl: float) -> None:
    assert load(flush_interval=interval).redis_lock_ttl == ttl


def test_the_older_name_of_the_default_capability_counts_where_the_present_one_is_absent() -> None:
    assert load().default_capability is None
    assert load(s3_default_capability="x").default_capability == "x"
    assert load(s3_default_capability="").default_capability is None
    assert load(s3_default_capability="x", default_capability="y").default_capability == "y"


def test_field_lists_split_at_every_separator_of_the_predecessors() -> None:
    settings = load(ignored_fields="A;b:c,d e|f/g\\user_id", mask_fields=["User_ID", "user-id"])
    assert settings.ignored_fields == ("a", "b", "c", "d", "e", "f", "g", "user-id")
    assert settings.mask_fields == ("user-id",)


# --- between settings


def test_listening_beyond_loopback_needs_a_token_or_consent() -> None:
    assert set(problems(lambda: load(address="0.0.0.0"))) == {"address"}
    assert set(problems(lambda: load(address="receiver.example"))) == {"address"}
    assert load(address="0.0.0.0", tokens="t").address == "0.0.0.0"
    assert load(address="0.0.0.0", allow_remote_without_token=True).address == "0.0.0.0"
    assert [load(address=local).tokens for local in ("127.0.0.2", "::1", "[::1]", "localhost")] == [()] * 4


def test_a_url_may_be_given_where_the_directory_is() -> None:
    assert load_from({"writer_file_path": "gs://bucket/files"}).writer_url == "gs://bucket/files"
    assert load_from({"writer_file_path": "file:///var/my%20files"}).writer_file_path == Path("/var/my files")
    assert load_from({"writer_file_path": "out"}).writer_url is None


@pytest.mark.parametrize("url", ["s3://b/k", "abfs://c:hunter2@a/x", "abfs://c@a/x?account_key=hunter2", "gs://"])
def test_a_url_of_s3_or_with_secrets_is_refused(url: str) -> None:
    [(name, message)] = problems(lambda: load_from({"writer_file_path": url})).items()
    assert name == "writer_url"
    assert "hunter2" not in message


def test_s3_settings_that_need_each_other_say_so() -> None:
    bucket: dict[str, Any] = {"writer_type": "aws-s3", "s3_bucket_name": "b-1", "s3_region": "eu-central-1"}
    assert set(problems(lambda: load(**bucket, s3_kms_key_id="alias/k", s3_external_id="id"))) == {
        "s3_kms_key_id",
        "s3_external_id",
    }


def test_another_s3_service_is_addressed_by_path_unless_told_otherwise() -> None:
    assert not load().s3_path_style
    assert load(s3_endpoint="http://minio:9000").s3_path_style
    assert not load(s3_endpoint="https://oss.example", s3_path_style=False).s3_path_style


def test_a_password_in_an_s3_url_is_refused_and_not_shown() -> None:
    assert "hunter2" not in problems(lambda: load(s3_endpoint="http://u:hunter2@minio"))["s3_endpoint"]


def test_a_bucket_is_needed_for_s3_and_its_region_may_come_from_the_environment_of_aws() -> None:
    assert set(problems(lambda: load(writer_type="aws-s3"))) == {"s3_bucket_name"}
    assert load(writer_type="aws-s3", s3_bucket_name="b-1").s3_region is None


def test_a_certificate_needs_its_key_and_the_reverse() -> None:
    assert set(problems(lambda: load(tls_cert="c.pem"))) == {"tls_key"}
    assert set(problems(lambda: load(tls_key="k.pem"))) == {"tls_cert"}
    assert set(problems(lambda: load(tls_client_ca="ca.pem"))) == {"tls_cert"}


@pytest.mark.parametrize("taken", ["data", "stats", "batch", "batches"])
def test_redis_names_do_not_collide(taken: str) -> None:
    assert set(problems(lambda: load(redis_dlq_prefix=taken))) == {"redis_dlq_prefix"}


def test_a_conflict_with_an_invalid_value_is_not_reported_on_top() -> None:
    assert set(problems(lambda: load(writer_type="aws-s3", s3_bucket_name="s3://b", s3_region="r"))) == {
        "s3_bucket_name"
    }
    assert set(problems(lambda: load(address="0.0.0.0", tokens="ö"))) == {"tokens"}


def test_settings_without_effect_are_noted() -> None:
    notes = load(redis_url="redis://h", redis_host="g:1", redis_db=1).notes
    assert [note.partition(":")[0] for note in notes] == ["redis_host", "redis_db"]
    assert load(redis_skip_flush=True).notes
    assert not load(redis_skip_flush=True, redis_host="h:1").notes


# --- Redis


@pytest.mark.parametrize(
    ("chosen", "dsn"),
    [
        ({}, None),
        ({"redis_host": "h:6379"}, "redis://h:6379/0"),
        ({"redis_host": "h:6379", "redis_db": 2, "redis_password": "a/b@c"}, "redis://:a%2Fb%40c@h:6379/2"),
        ({"redis_host": "h", "redis_username": "u", "redis_password": "p"}, "redis://u:p@h/0"),
        ({"redis_url": "rediss://u:p@h/1", "redis_password": "q", "redis_host": "g"}, "rediss://u:p@h/1"),
        ({"redis_url": "redis+cluster://h:1", "redis_password": "q"}, "redis+cluster://:q@h:1"),
        ({"redis_url": "redis+sentinel://a:1,b:2/m", "redis_password": "q"}, "redis+sentinel://:q@a:1,b:2/m"),
        ({"redis_url": "unix:///run/redis.sock", "redis_password": "q"}, "unix://:q@/run/redis.sock"),
    ],
)
def test_the_url_to_connect_to_takes_what_it_lacks_from_the_other_settings(
    chosen: dict[str, Any], dsn: str | None
) -> None:
    assert load(**chosen).redis_dsn() == dsn


@pytest.mark.parametrize(
    "bad", ["localhost:6379", "http://h", "redis://", "redis+sentinel://h:1", "redis+sentinel://h:1/"]
)
def test_a_url_that_names_no_redis_is_refused(bad: str) -> None:
    assert set(problems(lambda: load(redis_url=bad))) == {"redis_url"}


# --- secrets


@examples(deadline=None)
@given(st.text(st.sampled_from("XYZ123~+"), min_size=8))
def test_secrets_appear_in_no_representation_and_no_error(secret: str) -> None:
    chosen = {
        "redis_url": f"redis://u:{secret}@h/0?password={secret}",
        "redis_password": secret,
        "hmac_key": secret,
        "tokens": [secret, SecretStr(secret)],
        "dagster_postgres_url": f"postgresql://u:{secret}@h/dagster",
        "alert_webhook_url": f"https://hooks.example/{secret}",
    }
    settings = load(**chosen)
    shown = json.dumps({name: settings.shown(name) for name in Settings.model_fields})
    assert secret not in repr(settings) + str(settings) + shown
    assert shown.count(HIDDEN) == 8
    wrong = {
        "redis_url": f"http://u:{secret}@h",
        "redis_password": [secret],
        "hmac_key": {"key": secret},
        "tokens": f"ö{secret}",
        "dagster_postgres_url": f"mysql://u:{secret}@h/dagster",
        "alert_webhook_url": f"hooks.example/{secret}",
        "s3_endpoint": f"ftp://u:{secret}@h",
    }
    with pytest.raises(SettingsError) as caught:
        load(**wrong)
    assert {problem.setting for problem in caught.value.problems} == set(wrong)
    assert secret not in str(caught.value)
    assert caught.value.__cause__ is None


# --- the class


def test_settings_are_immutable_and_hashable() -> None:
    settings = load()
    with pytest.raises(ValidationError):
        settings.port = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(settings) == hash(load())


cron_part = st.from_regex(r"(\*|[0-7]{1,2}(-[0-9]{1,2})?|mon|jan|dec-jan)(/[0-9]{1,2})?(,[0-9]{1,2})?", fullmatch=True)


@examples(deadline=None)
@given(st.lists(cron_part, min_size=5, max_size=5).map(" ".join))
def test_a_schedule_accepted_here_is_accepted_by_dagster(cron: str) -> None:
    from dagster._utils.schedules import is_valid_cron_string

    try:
        load(flush_cron=cron)
    except SettingsError:
        return
    assert is_valid_cron_string(cron)


@pytest.mark.parametrize("cron", ["0 * * * *", "*/15 0-6 1,15 * mon-fri", "5 4 * jan,dec 7", "0-59/10 * * * *"])
def test_usual_schedules_are_accepted(cron: str) -> None:
    assert load(flush_cron=cron).flush_cron == cron


@pytest.mark.parametrize(
    "cron", ["* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "5-1 * * * *", "*/0 * * * *", "@daily"]
)
def test_other_schedules_are_refused(cron: str) -> None:
    assert set(problems(lambda: load(flush_cron=cron))) == {"flush_cron"}


def test_importing_the_settings_imports_nothing_heavy() -> None:
    heavy = {"arro3", "boto3", "dagster", "duckdb", "polars", "pyarrow", "redis"}
    code = f"import sys, d2p_pipeline.settings; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_the_reference_is_up_to_date() -> None:
    assert DOCUMENT.read_text("utf-8") == reference(), "run: python -m d2p_pipeline.reference > docs/configuration.md"


def test_the_reference_describes_every_setting() -> None:
    lines = reference().splitlines()
    for name in Settings.model_fields:
        [row] = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert row.rstrip("| ").endswith(".")
    assert set(Settings.SECTIONS) <= set(Settings.model_fields)
