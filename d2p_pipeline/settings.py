"""Every setting: its name, meaning, range and default, and how a set of them is read.

`load` merges, strongest first, explicit values (command line flags), the `D2P_*` environment and one file; processes call
it once, at their edge, and hand plain values inwards. A `Settings` that exists is valid as a whole: whatever is wrong is
raised at once, in one `SettingsError`. docs/configuration.md is written from this module (reference.py).
"""

import difflib
import ipaddress
import json
import os
import re
import socket
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import quote, unquote

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

ENV_PREFIX = "D2P_"
HIDDEN = "********"

Origin = Literal["default", "file", "env", "flag"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the settings. `value` is ready to be shown: secrets are hidden, None means there is none."""

    setting: str
    value: str | None
    allowed: str

    def __str__(self) -> str:
        return (
            f"{self.setting}: {self.allowed}"
            if self.value is None
            else f"{self.setting} = {self.value}: {self.allowed}"
        )


class SettingsError(Exception):
    """The settings cannot be used; `problems` and the message, one per line, list everything that has to change."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


_BYTE_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _read_bytes(value: object) -> object:
    match = re.fullmatch(r"(\d+) *([kmg]i?b)", value.strip(), re.IGNORECASE) if isinstance(value, str) else None
    return int(match[1]) * _BYTE_UNITS[match[2].lower()] if match else _refuse_bool(value)


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _split_at(separators: str) -> Callable[[object], object]:
    def split(value: object) -> object:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            return value
        return tuple(part for item in items for part in re.split(separators, item) if part)

    return split


def _matching(pattern: str, allowed: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"should be {allowed}")
        return text

    return AfterValidator(check)


def _not_empty(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("should name at least one field")
    return names


def _field_names(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.lower().replace("_", "-") for name in names))


def _check_token(token: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", token.get_secret_value()):
        raise ValueError("a bearer token consists of letters, digits and - . _ ~ + / = (RFC 6750)")
    return token


def _check_user(user: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[^:]+:.+", user.get_secret_value()):
        raise ValueError("should read name:password")
    return user


def _check_tag_pattern(pattern: str) -> str:
    from d2p_pipeline.ingest.fluent import tag_pattern

    tag_pattern(pattern)
    return pattern


def _check_redis_url(url: SecretStr) -> SecretStr:
    text = url.get_secret_value()
    if not re.fullmatch(r"(rediss?(\+cluster)?|redis\+sentinel|unix)://\S+", text):
        raise ValueError("should begin with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://")
    if text.startswith("redis+sentinel://") and not re.fullmatch(r"[^/]+/[^/?]+.*", text.partition("://")[2]):
        raise ValueError("should read redis+sentinel://host:port,host:port/master-name/db")
    return url


def _check_postgres_url(url: SecretStr) -> SecretStr:
    if not re.fullmatch(r"postgres(ql)?://[^\s/]*/[^\s/?]+(\?\S*)?", url.get_secret_value()):
        raise ValueError("should read postgresql://user:password@host:port/database")
    return url


def _check_webhook_url(url: SecretStr) -> SecretStr:
    if not re.fullmatch(r"https?://[^\s/]\S*", url.get_secret_value()):
        raise ValueError("should be a URL that begins with http:// or https://")
    return url


def _client_default(seconds: float) -> float:
    if seconds != -1 and seconds < 0:
        raise ValueError("should be a number of seconds, or 0 or -1 for the client's default")
    return max(seconds, 0.0)


_CRON_FIELDS = (
    (0, 59, ""),
    (0, 23, ""),
    (1, 31, ""),
    (1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    (0, 7, "sun mon tue wed thu fri sat"),
)


def _check_cron(text: str) -> str:
    fields = text.lower().split()
    if len(fields) != len(_CRON_FIELDS) or not all(map(_is_cron_field, fields, _CRON_FIELDS)):
        raise ValueError("should have five fields: minute hour day-of-month month day-of-week, such as */5 * * * *")
    return " ".join(fields)


def _is_cron_field(field: str, bounds: tuple[int, int, str]) -> bool:
    low, high, names = bounds

    def number(text: str) -> int:
        return names.split().index(text) + low if text in names.split() else int(text)

    for part in field.split(","):
        match = re.fullmatch(r"(\*|(\d{1,2}|[a-z]{3})(-(\d{1,2}|[a-z]{3}))?)(/([1-9]\d?))?", part)
        if not match or (match[5] and match[1] != "*" and not match[3]) or int(match[6] or 1) > high:
            return False
        if match[1] == "*":
            continue
        ends = [match[2], match[4] or match[2]]
        if not all(end.isdigit() or end in names.split() for end in ends):
            return False
        if not low <= number(ends[0]) <= number(ends[1]) <= high:
            return False
    return True


Count = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1)]
CountOrNone = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0)]
Bytes = Annotated[int, BeforeValidator(_read_bytes), Field(ge=1)]
BytesOrNone = Annotated[int, BeforeValidator(_read_bytes), Field(ge=0)]
Seconds = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0)]
Share = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=1)]
Days = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0)]
SecondsOrNone = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0)]
Port = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1, le=65535)]
RedisName = Annotated[str, _matching(r"[A-Za-z0-9_.:-]+", "letters, digits and _ . : -")]
RedisHost = Annotated[str, _matching(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(:\d{1,5})?", "host:port")]
HttpUrl = Annotated[str, _matching(r"https?://[^\s/]\S*", "a URL that begins with http:// or https://")]
StoreUrl = Annotated[
    str,
    _matching(
        r"(?!s3a?:)[a-z][a-z0-9+.-]*://(?![^/]*:[^/]*@)[^\s?]+",
        "a URL without password and query; for s3:// give writer_type = aws-s3, s3_bucket_name and s3_prefix",
    ),
]
S3Endpoint = Annotated[
    str, _matching(r"https?://[^\s/@]+(/\S*)?", "a URL that begins with http:// or https://, without user")
]
Bucket = Annotated[str, _matching(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", "a bucket's name, without s3:// and path")]
RoleArn = Annotated[str, _matching(r"arn:[^:\s]+:iam::[^:\s]*:role/\S+", "arn:aws:iam::ACCOUNT:role/NAME")]
ExternalId = Annotated[str, _matching(r"[\w+=,.@:/-]{2,1224}", "letters, digits and + = , . @ : / - (2 at least)")]
SessionName = Annotated[str, _matching(r"[\w+=,.@-]{2,64}", "2 to 64 letters, digits and + = , . @ -")]
StorageClass = Annotated[str, _matching(r"[A-Z][A-Z0-9_-]*", "a storage class in capitals, such as STANDARD_IA")]
CannedAcl = Annotated[str, _matching(r"[a-z]+(-[a-z]+)*", "a canned ACL, such as bucket-owner-full-control")]
Tags = Annotated[
    tuple[Annotated[str, _matching(r"[\w .:/+@-]{1,128}=[\w .:/=+@-]{0,256}", "name=value")], ...],
    BeforeValidator(_split_at(r"\s*,\s*")),
    Field(max_length=10),
]
Function = Annotated[str, _matching(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", "a Python function, as module:function")]
Users = Annotated[tuple[Annotated[SecretStr, AfterValidator(_check_user)], ...], BeforeValidator(_split_at(r"[,\s]+"))]
Defaults = Annotated[
    tuple[Annotated[str, _matching(r"\w[\w.-]*=[^,]*", "name=value")], ...], BeforeValidator(_split_at(r"\s*,\s*"))
]
Unwraps = Annotated[tuple[Literal["sns", "s3"], ...], BeforeValidator(_split_at(r"[,\s]+"))]
KeyFields = Annotated[tuple[str, ...], BeforeValidator(_split_at(r"[,\s]+")), AfterValidator(_not_empty)]
Tokens = Annotated[
    tuple[Annotated[SecretStr, AfterValidator(_check_token)], ...], BeforeValidator(_split_at(r"[,\s]+"))
]
FieldList = Annotated[tuple[str, ...], BeforeValidator(_split_at(r"[;:,\s|/\\]+")), AfterValidator(_field_names)]


class Settings(BaseSettings):
    """All settings of the project, valid together and immutable. See `load`.

    Constructing it directly reads the environment and the file too; values passed by name win.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    SECTIONS: ClassVar[dict[str, str]] = {
        "config": "Where settings come from",
        "record_type": "Records",
        "buffer_type": "Buffer",
        "redis_url": "Redis",
        "flush_cron": "Delivery",
        "writer_type": "Files",
        "s3_bucket_name": "S3",
        "address": "HTTP receiver",
        "forward_port": "Fluent",
        "sqs_queue_url": "SQS",
        "dagster_port": "Dagster and logs",
    }
    """The first setting of each section of the reference, and the section's title."""

    config: Path | None = None
    """File to read settings from: JSON, TOML, or a Fluent Bit configuration with an `[OUTPUT]` section."""

    record_type: Annotated[Literal["log", "dynamic"], BeforeValidator(_lower)] = "log"
    """`log`: the 34 columns of a log record; `dynamic`: columns from `json_schema_path`, or inferred."""
    json_schema_path: Path | None = None
    """JSON Schema of `dynamic` records."""
    key_fields: KeyFields = ("business-capability",)
    """Fields whose values, joined with `:`, separate the buffers; comma or space between names."""
    time_field: str = "time"
    """Field that holds a record's time."""
    default_capability: str | None = None
    """Capability of records that have none; without it they become dead letters."""
    s3_default_capability: str | None = None
    """Older name of `default_capability`, used where that is absent."""
    ignored_fields: FieldList = ()
    """Fields dropped before anything is stored; any of `; : , | / \\` or a space between names, case and `_`/`-` alike."""
    mask_fields: FieldList = ()
    """Fields whose values become `*` before anything is stored; written like `ignored_fields`."""
    transform: Function | None = None
    """Python function from a Polars frame to a Polars frame, called on valid records before they are written, as
    `module:function`."""
    use_hmac: bool = False
    """Fill the `hmac` column with HMAC-SHA256 of each record; needs `hmac_key`."""
    hmac_key: SecretStr | None = None
    """Key of the HMAC, as text (secret)."""
    max_record_bytes: Bytes = 16 * 2**20
    """Longest record accepted, in bytes of JSON; a longer one is rejected."""

    buffer_type: Annotated[Literal["mem", "redis"], BeforeValidator(_lower)] = "redis"
    """`redis`: durable, and an embedded server where none is configured; `mem`: lost with the process."""
    buffer_size: Count = 100
    """Records in a buffer that make it due."""
    flush_interval: Seconds = 5.0
    """Age of a buffer's oldest record that makes it due, in seconds."""
    flush_bytes: Bytes = 64 * 2**20
    """Raw bytes in a buffer that make it due."""
    max_key_bytes: BytesOrNone = 0
    """Raw bytes one key may have waiting before its requests are refused; 0: no limit."""
    max_buffer_bytes: BytesOrNone = 0
    """Raw bytes all keys together may have waiting before requests are refused; 0: no limit."""
    push_window: Seconds = 120.0
    """How long a repeated push (the same `Idempotency-Key`) is recognised, in seconds."""
    home: Path = Path(".d2p")
    """Directory of local state: the embedded Redis and DAGSTER_HOME."""

    redis_url: Annotated[SecretStr, AfterValidator(_check_redis_url)] | None = None
    """Redis to use (`redis://`, `rediss://`, `unix://`, `redis+sentinel://`, `redis+cluster://`); decides over `redis_host`
    and `redis_db`, and over user and password where it names one (secret)."""
    redis_host: RedisHost | None = None
    """Redis to use, as `host:port`."""
    redis_db: CountOrNone = 0
    """Database number on `redis_host`."""
    redis_username: str | None = None
    """ACL user."""
    redis_password: SecretStr | None = None
    """Password (secret)."""
    redis_timeout: Annotated[float, BeforeValidator(_refuse_bool), AfterValidator(_client_default)] = 0.0
    """Longest wait for an answer of Redis, in seconds; 0 or -1: the client's default."""
    redis_skip_flush: bool = False
    """Receive only: this instance seals and delivers nothing, others do."""
    redis_lock_ttl: Seconds = Field(
        default_factory=lambda data: max(5.0, 1.5 * data["flush_interval"]),
        json_schema_extra={"default": "1.5 × `flush_interval`, at least 5"},
    )
    """How long the lease on a batch outlives its last renewal, in seconds; a shorter value than 5 has to be given."""
    redis_lock_instance_name: str = Field(
        default_factory=socket.gethostname, json_schema_extra={"default": "the host's name"}
    )
    """Name of this instance in the leases it holds."""
    redis_data_prefix: RedisName = "data"
    """First part of the names of buffers."""
    redis_dlq_prefix: RedisName = "dlq"
    """First part of the names of dead letter lists."""
    redis_lock_prefix: RedisName = "lock"
    """First part of the names of leases."""
    redis_keys: RedisName = "keys"
    """Name of the index of keys."""
    redis_recovery_key: RedisName = "recovery"
    """Name of the index of batches whose delivery failed."""

    flush_cron: Annotated[str, AfterValidator(_check_cron)] = "*/5 * * * *"
    """Schedule, in UTC, on which everything buffered is flushed: minute hour day-of-month month day-of-week."""
    unit_bytes: Bytes = 32 * 2**20
    """Raw bytes that one pass converts; bounds the memory."""
    unit_jobs: Count = 2
    """Units of a run that are worked on at the same time; each takes about 7 × `unit_bytes` of memory."""
    run_bytes: Bytes = 512 * 2**20
    """Raw bytes that one run takes on: those that small keys due together share it for, and all it goes on with."""
    own_runs: CountOrNone = 4
    """Up to so many due keys, each has a run of its own; of more, only those with `unit_bytes` due, and the others share."""
    run_seconds: SecondsOrNone = 60.0
    """How long a run goes on with what became due of its keys meanwhile, in seconds from its start; 0: it ends."""
    run_linger: SecondsOrNone = 0.0
    """How long a run that has nothing left waits for more of its keys to become due, in seconds, while no other run waits."""
    max_runs_per_tick: Count = 10
    """Runs asked for in one tick of the sensor, less those that still wait to start; while that many wait, buffers grow."""
    use_dlq: bool = True
    """Keep rejected records, with the reason, as dead letters; `false`: they are counted, logged and dropped."""
    dlq_max_records: Count = 10_000
    """Dead letters of one key kept in Redis; the oldest ones beyond that move to files under `_dead_letters/`."""
    dlq_max_bytes: Bytes = 64 * 2**20
    """Memory that one key's dead letters may take in Redis before the oldest ones move to files."""
    write_retries: CountOrNone = 3
    """Repetitions of a step that failed for a reason that may pass, before its batches go into recovery."""
    write_retry_delay: Seconds = 1.0
    """Seconds before the first repetition; doubled for each further one, with jitter."""
    try_auto_recover: bool = True
    """Deliver batches in recovery again without being asked."""
    recovery_attempts: CountOrNone = 3
    """Automatic deliveries of a batch in recovery before it waits for a person."""
    run_attempts: Count = 5
    """Runs asked for a batch, none of which delivered it (killed, out of memory, lost), before it goes into recovery."""
    recovery_run_batches: Count = 100
    """Batches in recovery that one run delivers."""
    lag_limit: Seconds = 900.0
    """Seconds that a record may wait for its file before the check `oldest_record` turns red."""
    reject_limit: Share = 0.05
    """Share of a key's records that may be rejected within `reject_window` before the check `reject_share` turns red."""
    reject_window: Seconds = 3600.0
    """Seconds that the check `reject_share` looks back."""
    recovery_delay: Seconds = 60.0
    """Seconds before the first automatic delivery; doubled for each further one, up to an hour."""

    writer_type: Annotated[Literal["file", "aws-s3"], BeforeValidator(_lower)] = "file"
    """Where files go: a local directory, or a bucket."""
    writer_file_path: Path = Path("out")
    """Root directory of the files when `writer_type` is `file`; a URL is read as `writer_url`."""
    writer_url: StoreUrl | None = None
    """Root of the files when `writer_type` is `file` and it is no local directory: `gs://bucket/files`,
    `abfs://container@account.dfs.core.windows.net/files`, or what an installed fsspec package reads."""
    writer_compression_type: Annotated[Literal["snappy", "zstd", "gzip", "none"], BeforeValidator(_lower)] = "snappy"
    """Compression of the Parquet files."""
    writer_row_group_size: Bytes = 128 * 2**20
    """Largest row group, in bytes."""
    timestamp_unit: Annotated[Literal["ms", "us", "ns"], BeforeValidator(_lower)] = "us"
    """Precision of the `time` column."""
    column_names: Annotated[Literal["kebab", "snake"], BeforeValidator(_lower)] = "kebab"
    """Column names: `business-capability`, or `business_capability`, which suits Athena and Hive."""
    partition_time: Annotated[Literal["event", "ingest"], BeforeValidator(_lower)] = "event"
    """Time that places a record in its hour: its own, or that of its arrival."""
    use_hash: bool = False
    """Append the MD5 of a file's bytes to its name."""

    s3_bucket_name: Bucket | None = None
    """Bucket; required when `writer_type` is `aws-s3`."""
    s3_prefix: str = ""
    """Start of the key of every object."""
    s3_region: str | None = None
    """Region of the bucket; without it that of `AWS_REGION` or the profile, else us-east-1."""
    s3_endpoint: S3Endpoint | None = None
    """URL of another S3 service than that of AWS."""
    s3_path_style: bool = Field(
        default_factory=lambda data: data.get("s3_endpoint") is not None,
        json_schema_extra={"default": "true with `s3_endpoint`"},
    )
    """The bucket's name is part of the path, not of the host."""
    s3_create_bucket: bool = False
    """Create the bucket if there is none."""
    s3_role_arn: RoleArn | None = None
    """Role to assume; without it the credentials of the environment are used."""
    s3_external_id: ExternalId | None = None
    """External id that the role's trust policy asks for."""
    s3_session_name: SessionName = "d2p"
    """Name of the role's sessions, as audit logs show it."""
    s3_sts_endpoint: S3Endpoint | None = None
    """URL of another STS service than that of AWS."""
    s3_encryption: Annotated[Literal["none", "sse-s3", "sse-kms"], BeforeValidator(_lower)] = "none"
    """Encryption asked for with every object; `none`: whatever the bucket does by default."""
    s3_kms_key_id: str | None = None
    """Key of `sse-kms`, as id, ARN or alias; without it that of AWS for S3."""
    s3_storage_class: StorageClass | None = None
    """Storage class of every object, such as `STANDARD_IA`."""
    s3_acl: CannedAcl | None = None
    """Canned ACL of every object, such as `bucket-owner-full-control`; buckets with ACLs switched off refuse any."""
    s3_tags: Tags = ()
    """Tags of every object, as `name=value`, at most 10; comma between them."""
    s3_timeout: Seconds = 60.0
    """Longest silence of the S3 or STS service before a request is tried again, in seconds."""
    s3_attempts: Count = 5
    """Attempts of one request, with growing, random pauses, before the step fails and `write_retries` repeats it."""
    s3_part_bytes: Annotated[Bytes, Field(ge=5 * 2**20, le=5 * 2**30)] = 16 * 2**20
    """Size of the parts of a multipart upload; a file that fits into one part is a single PUT."""

    address: Annotated[str, _matching(r"\S+", "an address or a host name")] = "127.0.0.1"
    """Address to listen on; beyond loopback only with `tokens`, `tokens_file` or `allow_remote_without_token`."""
    port: Port = 8080
    """Port to listen on."""
    workers: Count = 1
    """Processes that receive."""
    max_body_bytes: Bytes = 64 * 2**20
    """Longest request body, in bytes after decompression."""
    max_expansion: Count = 1000
    """How many times its size a compressed body may expand to, beyond the first MiB."""
    max_request_keys: Count = 1000
    """Keys that the records of one request may have."""
    max_held_bytes: Bytes = 512 * 2**20
    """Bytes of request bodies that one worker holds in memory before it refuses further ones."""
    max_connections: Count = 4096
    """Connections served at a time, by all workers together; further ones wait."""
    header_timeout: Seconds = 30.0
    """Longest time a request's head may take, in seconds."""
    body_timeout: Seconds = 60.0
    """Longest time a request's body may take, in seconds, and one more for every 64 KiB it brings."""
    access_log: bool = False
    """Whether each answer of the receiver is a line of the log: method, path, status, milliseconds."""
    tokens: Tokens = ()
    """Bearer tokens, any of which a request has to carry; comma or space between them (secret)."""
    tokens_file: Path | None = None
    """File of further bearer tokens, one a line; read again within a second of a change, so tokens rotate without a restart."""
    allow_remote_without_token: bool = False
    """Listen beyond loopback though everyone who reaches the port may write."""
    tls_cert: Path | None = None
    """Certificate chain (PEM) to serve HTTPS with; needs `tls_key`."""
    tls_key: Path | None = None
    """Private key (PEM) of `tls_cert`."""
    tls_client_ca: Path | None = None
    """Certificates (PEM) of the authorities that clients' certificates have to come from; needs `tls_cert`."""

    forward_port: Port | None = None
    """Port of the Forward listener, for Fluent Bit's and Fluentd's `forward` outputs; 24224 by convention. With it, `d2p up`
    starts the listener."""
    forward_address: Annotated[str, _matching(r"\S+", "an address or a host name")] = "127.0.0.1"
    """Address the Forward listener listens on; beyond loopback only with `forward_shared_key` or
    `allow_remote_without_token`."""
    forward_shared_key: SecretStr | None = None
    """Shared key that Forward clients have to prove to know (secret)."""
    forward_users: Users = ()
    """Forward clients' users, as `name:password`, with `forward_shared_key`; comma or space between them (secret)."""
    forward_tls: bool = Field(
        default_factory=lambda data: data.get("tls_cert") is not None,
        json_schema_extra={"default": "true with `tls_cert`"},
    )
    """The Forward listener speaks TLS, with `tls_cert` and `tls_key`."""
    forward_connections: Count = 1024
    """Forward connections at a time; further ones are closed."""
    key_from_tag: Annotated[str, AfterValidator(_check_tag_pattern)] | None = None
    """Where a Fluent tag names fields that records lack, such as `kube.{business-capability}.*`: a name in braces takes what is
    between dots, `*` anything but dots, `**` anything."""
    fluent_defaults: Defaults = ()
    """Values of fields that Fluent records lack, as `name=value`; comma between them."""

    sqs_queue_url: HttpUrl | None = None
    """Queue that `d2p sqs` reads."""
    sqs_region: str | None = None
    """Region of the queue; without it that of the environment or of the queue's URL."""
    sqs_endpoint: HttpUrl | None = None
    """URL of another SQS service than that of AWS."""
    sqs_min_pollers: Count = 1
    """Receive calls at a time, at least."""
    sqs_max_pollers: Count = 8
    """Receive calls at a time, at most; between the two, as many as the queue's depth asks for and the buffer bears."""
    sqs_wait: Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, le=20)] = 20
    """Seconds a receive call waits for messages."""
    sqs_visibility: Annotated[int, BeforeValidator(_refuse_bool), Field(ge=10, le=43200)] = 60
    """Seconds a received message is hidden from others; extended as long as it waits for the buffer."""
    sqs_window: Seconds = 900.0
    """How long a message that is delivered again is recognised by its id, in seconds."""
    sqs_unwrap: Unwraps = ()
    """What is around the records: `sns` for messages of an SNS topic, `s3` for S3 events, whose objects are read; both for S3
    events over SNS."""

    metrics_port: Port | None = None
    """Port on which `d2p forward` and `d2p sqs` show their own metrics, at `address`; the receiver has its route."""

    dagster_port: Port = 3000
    """Port of the Dagster webserver."""
    dagster_postgres_url: Annotated[SecretStr, AfterValidator(_check_postgres_url)] | None = None
    """PostgreSQL database for Dagster's own storage, as `postgresql://user:password@host/name`; needs the extra `postgres`;
    without it SQLite under `home` (secret)."""
    alert_webhook_url: Annotated[SecretStr, AfterValidator(_check_webhook_url)] | None = None
    """Where alerts are posted, as JSON that Slack understands: failed runs, batches in recovery, red checks (secret)."""
    keep_runs_days: Days = 2.0
    """Days after which a successful or cancelled run is deleted from Dagster's storage."""
    keep_runs: Count = 5000
    """Successful and cancelled runs kept at most; older ones are deleted before their time."""
    keep_failed_runs_days: Days = 30.0
    """Days after which a failed run is deleted from Dagster's storage."""
    debug: bool = False
    """Log in detail."""
    log_formatter: Annotated[Literal["color", "text", "json", "multi"], BeforeValidator(_lower)] = "color"
    """Form of log lines on standard error."""

    _notes: tuple[str, ...] = PrivateAttr(default=())
    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was accepted without effect or read as something else, one sentence each."""
        return self._notes

    def origin(self, name: str) -> Origin:
        """Which source gave the value of the setting `name`."""
        return self._origins.get(name, "default")

    def shown(self, name: str) -> Any:
        """The value of `name` as JSON has it, with secrets hidden; of `redis_url`, only what is no secret."""
        value = getattr(self, name)
        if name == "redis_url" and value is not None:
            return _without_secrets(value.get_secret_value())
        if isinstance(value, tuple):
            return [HIDDEN if isinstance(item, SecretStr) else item for item in value]
        if isinstance(value, SecretStr):
            return HIDDEN
        return str(value) if isinstance(value, Path) else value

    def environment(self) -> dict[str, str]:
        """`D2P_*` variables, secrets in clear, that give a child process these settings without the file."""
        given = sorted(self.model_fields_set - {"config"})
        return {ENV_PREFIX + name.upper(): as_text(getattr(self, name)) for name in given}

    def redis_dsn(self) -> str | None:
        """URL of the configured Redis, password in clear; None when neither `redis_url` nor `redis_host` is given."""
        if self.redis_url is not None:
            url = self.redis_url.get_secret_value()
        elif self.redis_host is not None:
            url = f"redis://{self.redis_host}/{self.redis_db}"
        else:
            return None
        scheme, _, rest = url.partition("://")
        password = self.redis_password.get_secret_value() if self.redis_password else ""
        if "@" in rest.partition("/")[0] or not (self.redis_username or password):
            return url
        return f"{scheme}://{quote(self.redis_username or '', safe='')}:{quote(password, safe='')}@{rest}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        environment = _read_environment()
        path = init_settings().get("config") or environment.get("config")
        file = _read_file(Path(path)) if path else {}
        return init_settings, InitSettingsSource(settings_cls, environment), InitSettingsSource(settings_cls, file)

    @model_validator(mode="wrap")
    @classmethod
    def _find_every_problem(cls, data: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, Settings):
            return build(data)
        problems: list[Problem] = []
        given, notes = _bring_up_to_date(data, problems)
        try:
            settings = build(given)
        except ValidationError as error:
            wrong = {str(line["loc"][0]) for line in error.errors()}
            problems += _problems_of(error)
            settings = build({name: value for name, value in given.items() if name not in wrong})
        else:
            wrong = set()
        problems += [problem for involved, problem in _conflicts(settings) if not wrong & involved]
        if problems:
            raise SettingsError(problems)
        settings._notes = (*notes, *_notes_on(settings))
        return settings


def load(config: Path | None = None, **overrides: Any) -> Settings:
    """The settings in force: `overrides` by setting name (None: not given), then `D2P_*`, then the file `config` or D2P_CONFIG.

    Raises SettingsError with every problem found.
    """
    flags = {name: value for name, value in {"config": config, **overrides}.items() if value is not None}
    settings = Settings(**flags)
    environment = _read_environment()
    for name in settings.model_fields_set:
        settings._origins[name] = "flag" if name in flags else "env" if name in environment else "file"
    return settings


# --- reading the sources


def _squash(name: str) -> str:
    """`redis_dlq_prefix`, `RedisDLQPrefix` and `REDIS_DLQ_PREFIX` are one name."""
    return name.replace("_", "").lower()


# Names of the predecessors that are no settings any more; what became of them is said in a note.
RETIRED = {
    "disable_log_colors": '`log_formatter = "text"` does this',
    "ledis_path": "there is no Ledis buffer",
    "log_path": "logs go to standard error",
    "redis_sql_prefix": "it never had an effect",
    "s3_account": "`s3_role_arn` names the account",
    "s3_role_name": "`s3_role_arn` names the role",
    "wwriter_type": "the predecessors' samples switch a line off by this spelling",
}

_NAMES = {_squash(name): name for name in (*Settings.model_fields, *RETIRED)}

# What Kubernetes puts into every container about a Service called `d2p` or `d2p-…`.
_SERVICE_LINK = re.compile(r"D2P_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")


def _read_environment() -> dict[str, Any]:
    links = ("tcp://", "udp://", "sctp://")
    return _named(
        (name, name[len(ENV_PREFIX) :], value)
        for name, value in os.environ.items()
        if name.startswith(ENV_PREFIX)
        and not _SERVICE_LINK.fullmatch(name)
        and not (name.endswith("_PORT") and value.startswith(links))
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        entries = _parse(path.suffix.lower(), path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise SettingsError([Problem("config", str(path), f"cannot be read: {error}")]) from error
    values = _named((name, name, value) for name, value in entries)
    if "config" in values:
        raise SettingsError([Problem("config", str(path), "a settings file cannot name another one")])
    return values


def _named(entries: Iterable[tuple[str, str, Any]]) -> dict[str, Any]:
    """Values under the settings' own names, from (name as written, name to look up, value); empty values are left out."""
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    for name, lookup, value in entries:
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        setting = name if lookup.startswith("_") else _NAMES.get(_squash(lookup), name)
        if setting in values:
            raise SettingsError([Problem(setting, None, f"is given twice, as {written[setting]} and as {name}")])
        values[setting], written[setting] = value, name
    return values


def _parse(suffix: str, text: str) -> list[tuple[str, Any]]:
    if suffix == ".json" or (suffix != ".toml" and text.lstrip().startswith("{")):
        return _parse_json(text)
    if suffix != ".toml" and re.search(r"^\s*\[OUTPUT\]\s*$", text, re.IGNORECASE | re.MULTILINE):
        return _parse_fluent(text)
    try:
        return list(tomllib.loads(text).items())
    except tomllib.TOMLDecodeError as error:
        if suffix == ".toml":
            raise
        raise ValueError(f"neither a JSON object, nor a Fluent Bit [OUTPUT] section, nor TOML ({error})") from error


def _parse_json(text: str) -> list[tuple[str, Any]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is given twice")
        return dict(pairs)

    values = json.loads(text, object_pairs_hook=unique)
    if not isinstance(values, dict):
        raise ValueError("should be one JSON object")
    return list(values.items())


# Keys of every Fluent Bit output. `Workers` is one too, but means the same here.
_STOCK_KEYS = {"alias", "host", "match", "match_regex", "name", "no_multiplex", "processors", "retry_limit", "tls"}


def _parse_fluent(text: str) -> list[tuple[str, Any]]:
    """The keys of the one `[OUTPUT]` section that is ours: named `out_parquet`, or the only one there is.

    https://docs.fluentbit.io/manual/administration/configuring-fluent-bit/classic-mode/format-schema
    """
    sections: list[tuple[str, list[tuple[str, str]]]] = []
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if not line or line.startswith(("#", "@")):
            continue
        if line.startswith("["):
            sections.append((line.strip("[] ").lower(), []))
        elif sections:
            name, *rest = line.split(None, 1)
            sections[-1][1].append((name, rest[0] if rest else ""))
        else:
            raise ValueError(f"line {number}: a key outside of any section")
    outputs = [entries for title, entries in sections if title == "output"]
    ours = [entries for entries in outputs if ("name", "out_parquet") in [(n.lower(), v.lower()) for n, v in entries]]
    if len(ours or outputs) != 1:
        raise ValueError(f"one [OUTPUT] section should have Name out_parquet; {len(ours)} of {len(outputs)} have")
    return [(name, _interpolate(value)) for name, value in (ours or outputs)[0] if not _is_stock(name.lower())]


def _is_stock(key: str) -> bool:
    return key in _STOCK_KEYS or key.startswith(("log_level", "log_suppress_", "net.", "storage.", "tls."))


def _interpolate(value: str) -> str:
    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"{match[0]} is not set in the environment")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", variable, value)


# --- judging the values


def _bring_up_to_date(data: dict[str, Any], problems: list[Problem]) -> tuple[dict[str, Any], list[str]]:
    """Values without empty and retired ones, and the notes on those; older spellings take effect under the present ones."""
    stripped = {name: value.strip() if isinstance(value, str) else value for name, value in data.items()}
    given = {name: value for name, value in stripped.items() if value is not None and value != ""}
    notes = [f"{name}: begins with an underscore; ignored" for name in given if name.startswith("_")]
    old = {name: given.pop(name) for name in list(given) if name in RETIRED or name.startswith("_")}
    scheme, is_url, path = str(given.get("writer_file_path", "")).partition("://")
    if is_url:
        given["writer_file_path" if scheme == "file" else "writer_url"] = (
            unquote(path) if scheme == "file" else given.pop("writer_file_path")
        )
    if "s3_default_capability" in given:
        given.setdefault("default_capability", given["s3_default_capability"])
    if str(old.get("disable_log_colors")).lower() == "true" and "log_formatter" not in given:
        given["log_formatter"] = "text"
        notes.append('disable_log_colors: read as log_formatter = "text"')
        del old["disable_log_colors"]
    if "s3_role_name" in old and "s3_role_arn" not in given:
        if "s3_account" in old:
            given["s3_role_arn"] = f"arn:aws:iam::{old.pop('s3_account')}:role/{old['s3_role_name']}"
            notes.append(f"s3_role_name, s3_account: read as s3_role_arn = {given['s3_role_arn']}")
        else:
            problems.append(Problem("s3_role_name", None, "needs s3_account; or give s3_role_arn instead of both"))
        del old["s3_role_name"]
    notes += [f"{name}: {RETIRED[name].replace('`', '')}; ignored" for name in old if name in RETIRED]
    return given, notes


def _notes_on(settings: Settings) -> Iterator[str]:
    given = settings.model_fields_set
    if settings.redis_url is not None:
        yield from (f"{name}: redis_url decides; ignored" for name in ("redis_host", "redis_db") if name in given)
    elif settings.redis_skip_flush and settings.redis_host is None:
        yield "redis_skip_flush: no Redis is configured, so nothing else delivers what this instance receives"


def _problems_of(error: ValidationError) -> Iterator[Problem]:
    for line in error.errors(include_url=False):
        name = str(line["loc"][0])
        if line["type"] == "extra_forbidden":
            yield Problem(name, None, f"is no setting; the nearest is {_nearest(name)}")
        elif line["type"] != "default_factory_not_called":
            allowed = line["msg"].removeprefix("Value error, ").replace("Input should", "should")
            yield Problem(name, _shown_input(name, line["input"]), allowed)


def _nearest(name: str) -> str:
    is_variable = name.startswith(ENV_PREFIX)
    wanted = _squash(name.removeprefix(ENV_PREFIX))
    [match] = difflib.get_close_matches(wanted, map(_squash, Settings.model_fields), n=1, cutoff=0)
    return ENV_PREFIX + _NAMES[match].upper() if is_variable else _NAMES[match]


def _shown_input(name: str, value: Any) -> str:
    if _is_secret(Settings.model_fields[name]):
        return HIDDEN
    text = _without_secrets(value) if isinstance(value, str) else str(value) if isinstance(value, Path) else value
    shown = repr(text)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"


def _is_secret(field: FieldInfo) -> bool:
    return "SecretStr" in repr(field.annotation)


def _without_secrets(url: str) -> str:
    url = re.sub(r"(://[^:/@]*):?.*@", lambda match: f"{match[1]}:{HIDDEN}@", url, flags=re.DOTALL)
    return re.sub(r"((password|key|token|sig)=)[^&]*", rf"\1{HIDDEN}", url, flags=re.IGNORECASE)


def as_text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _conflicts(settings: Settings) -> Iterator[tuple[set[str], Problem]]:
    """What is wrong between settings, with all the settings involved."""
    if settings.use_hmac and settings.hmac_key is None:
        yield {"use_hmac", "hmac_key"}, Problem("hmac_key", None, "is required when use_hmac is true")
    if settings.writer_type == "aws-s3":
        yield from _s3_conflicts(settings)
    if not (
        settings.tokens or settings.tokens_file or settings.allow_remote_without_token or _is_loopback(settings.address)
    ):
        allowed = "beyond loopback, give tokens or tokens_file, or set allow_remote_without_token to let everyone write"
        involved = {"address", "tokens", "tokens_file", "allow_remote_without_token"}
        yield involved, Problem("address", repr(settings.address), allowed)
    if (settings.tls_cert is None) != (settings.tls_key is None):
        missing, other = ("tls_key", "tls_cert") if settings.tls_key is None else ("tls_cert", "tls_key")
        yield {"tls_cert", "tls_key"}, Problem(missing, None, f"is required with {other}")
    if settings.tls_client_ca is not None and settings.tls_cert is None:
        yield {"tls_client_ca", "tls_cert"}, Problem("tls_cert", None, "is required with tls_client_ca")
    yield from _forward_conflicts(settings)
    if settings.sqs_window < 2 * settings.sqs_visibility:
        problem = Problem("sqs_window", f"{settings.sqs_window:g}", "should be at least twice sqs_visibility")
        yield {"sqs_window", "sqs_visibility"}, problem
    if settings.sqs_min_pollers > settings.sqs_max_pollers:
        problem = Problem("sqs_min_pollers", str(settings.sqs_min_pollers), "is more than sqs_max_pollers")
        yield {"sqs_min_pollers", "sqs_max_pollers"}, problem
    yield from _name_conflicts(settings)


def _forward_conflicts(settings: Settings) -> Iterator[tuple[set[str], Problem]]:
    guarded = settings.forward_shared_key is not None or settings.allow_remote_without_token
    if not (guarded or _is_loopback(settings.forward_address)):
        allowed = "beyond loopback, give forward_shared_key, or set allow_remote_without_token to let everyone write"
        involved = {"forward_address", "forward_shared_key", "allow_remote_without_token"}
        yield involved, Problem("forward_address", repr(settings.forward_address), allowed)
    if settings.forward_users and settings.forward_shared_key is None:
        problem = Problem("forward_shared_key", None, "is required with forward_users")
        yield {"forward_users", "forward_shared_key"}, problem
    if settings.forward_tls and settings.tls_cert is None:
        yield {"forward_tls", "tls_cert"}, Problem("tls_cert", None, "is required with forward_tls")


def _s3_conflicts(settings: Settings) -> Iterator[tuple[set[str], Problem]]:
    if settings.s3_bucket_name is None:
        problem = Problem("s3_bucket_name", None, "is required when writer_type is aws-s3")
        yield {"writer_type", "s3_bucket_name"}, problem
    if settings.s3_kms_key_id is not None and settings.s3_encryption != "sse-kms":
        problem = Problem("s3_kms_key_id", None, "needs s3_encryption = sse-kms")
        yield {"s3_kms_key_id", "s3_encryption"}, problem
    if settings.s3_external_id is not None and settings.s3_role_arn is None:
        yield {"s3_external_id", "s3_role_arn"}, Problem("s3_external_id", None, "needs s3_role_arn")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:  # a host name
        return address == "localhost"


def _name_conflicts(settings: Settings) -> Iterator[tuple[set[str], Problem]]:
    owners = dict.fromkeys(("stats", "batch", "batch-meta", "batches"), "the buffer itself")
    for setting in ("redis_data_prefix", "redis_dlq_prefix", "redis_lock_prefix", "redis_keys"):
        name = getattr(settings, setting)
        if name in owners:
            yield {setting, owners[name]}, Problem(setting, repr(name), f"is the name that {owners[name]} uses")
        owners.setdefault(name, setting)


# --- the reference


def fluent_name(name: str) -> str:
    """`redis_dlq_prefix` as a Fluent Bit key: `RedisDLQPrefix`."""
    capitals = {"arn", "db", "dlq", "hmac", "s3", "sts", "tls", "ttl", "url"}
    return "".join(word.upper() if word in capitals else word.capitalize() for word in name.split("_"))
