"""From settings to parts: the only place that knows which setting feeds what.

Each part is imported where it is made, so that a conversion does without Redis and a receiver without a writer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2p_pipeline.records.rules import Rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from d2p_pipeline.buffer.embedded import EmbeddedRedis
    from d2p_pipeline.buffer.redis import RedisBuffer
    from d2p_pipeline.dead_letters import DeadLetters
    from d2p_pipeline.ingest.fluent import Completion
    from d2p_pipeline.parquet.encode import Encoding
    from d2p_pipeline.parquet.s3 import Bucket
    from d2p_pipeline.parquet.store import Store
    from d2p_pipeline.settings import Settings
    from d2p_pipeline.spill import Limits


def rules(settings: Settings) -> Rules:
    """What normalization depends on."""
    return Rules(
        record_type=settings.record_type,
        key_fields=settings.key_fields,
        default_capability=settings.default_capability,
        ignored_fields=frozenset(settings.ignored_fields),
        masked_fields=frozenset(settings.mask_fields),
        timestamp_unit=settings.timestamp_unit,
        column_names=settings.column_names,
        hmac_key=settings.hmac_key.get_secret_value().encode() if settings.use_hmac and settings.hmac_key else None,
        transform=settings.transform,
        time_field=settings.time_field,
        json_schema=settings.json_schema_path.read_text("utf-8-sig") if settings.json_schema_path else None,
    )


def check_records(settings: Settings) -> None:
    """Find out now what would otherwise fail when records come: field names, JSON Schema, the user's function.

    Raises SettingsError.
    """
    from d2p_pipeline.settings import Problem, SettingsError

    try:
        found = rules(settings)
        if found.json_schema is not None and found.record_type == "dynamic":
            from d2p_pipeline.records.dynamic.schema import compiled

            compiled(found)
        if found.transform is not None:
            _check_transform(found.transform)
    except OSError as error:
        raise SettingsError([Problem("json_schema_path", str(error.filename), error.strerror or str(error))]) from error
    except UnicodeDecodeError as error:  # of rules(): nothing else reads text
        raise SettingsError(
            [Problem("json_schema_path", str(settings.json_schema_path), f"is no UTF-8 text: {error}")]
        ) from error
    except ValueError as error:
        raise SettingsError([Problem("records", None, str(error))]) from error


def _check_transform(name: str) -> None:
    from d2p_pipeline.records.transform import TransformError, load
    from d2p_pipeline.settings import Problem, SettingsError

    try:
        load(name)
    except TransformError as error:
        raise SettingsError([Problem("transform", repr(error.name), error.reason)]) from error


def completion(settings: Settings) -> Completion:
    """What Fluent records get that they lack."""
    from d2p_pipeline.ingest.fluent import Completion

    defaults = dict(entry.split("=", 1) for entry in settings.fluent_defaults)
    return Completion(rules(settings), pattern=settings.key_from_tag, defaults=defaults)


def embedded(settings: Settings) -> EmbeddedRedis:
    """The server that stands in when no Redis is configured; `buffer_type = "mem"` runs it without persistence."""
    from d2p_pipeline.buffer.embedded import EmbeddedRedis

    return EmbeddedRedis(settings.home / "redis", durable=settings.buffer_type == "redis")


def redis_url(settings: Settings) -> str:
    """Where the buffer is: the configured Redis, else the embedded server's socket."""
    return settings.redis_dsn() or embedded(settings).url


def open_buffer(settings: Settings) -> tuple[RedisBuffer, list[str]]:
    """The buffer after its start-up checks, and their warnings; raises RedisRefusedError."""
    from d2p_pipeline.buffer.connect import check, connect, line
    from d2p_pipeline.buffer.names import Names
    from d2p_pipeline.buffer.redis import RedisBuffer

    url = redis_url(settings)
    timeout = settings.redis_timeout or None
    client = connect(url, timeout)
    warnings = check(client, url)
    names = Names(
        data=settings.redis_data_prefix,
        dlq=settings.redis_dlq_prefix,
        lock=settings.redis_lock_prefix,
        keys=settings.redis_keys,
        recovery=settings.redis_recovery_key,
    )
    buffer = RedisBuffer(
        client, names, full_records=settings.buffer_size, full_bytes=settings.flush_bytes, line=line(url, timeout)
    )
    return buffer, warnings


def dead_letters(settings: Settings, buffer: RedisBuffer, store_of: Callable[[], Store] | None = None) -> DeadLetters:
    """The buffer's dead letters, with the files beside the data; `store_of` opens another store than the settings'."""
    from d2p_pipeline.dead_letters import DeadLetters

    return DeadLetters(buffer, store_of or (lambda: store(settings)))


def spill_limits(settings: Settings) -> Limits:
    """What a key's queue of dead letters may hold."""
    from d2p_pipeline.spill import Limits

    return Limits(letters=settings.dlq_max_records, size=settings.dlq_max_bytes)


def canonical(settings: Settings) -> Callable[[bytes], tuple[str, bytes]]:
    """From a record to its key and canonical line, as the receiver makes them; raises Rejected."""
    from d2p_pipeline.records.accept import acceptor

    accept = acceptor(rules(settings))

    def of(raw: bytes) -> tuple[str, bytes]:
        found = accept.canonical(raw)
        return found.key, found.line

    return of


def store(settings: Settings, s3_client: Callable[[], Any] | None = None, *, is_patient: bool = True) -> Store:
    """Where files go; `s3_client` gives the client of a bucket in place of one that the settings describe.

    One that is not patient gives up within about 20 seconds.

    Raises StoreError when S3 credentials cannot be found or a URL cannot be opened.
    """
    if settings.writer_type == "aws-s3":
        from d2p_pipeline.parquet.s3 import S3Store

        client = s3_client() if s3_client else None
        return S3Store(
            bucket(settings),
            client=client,
            timeout=settings.s3_timeout if is_patient else min(settings.s3_timeout, 10.0),
            attempts=settings.s3_attempts if is_patient else min(settings.s3_attempts, 2),
            part_bytes=settings.s3_part_bytes,
        )
    if settings.writer_url is not None:
        from d2p_pipeline.parquet.filesystem import FilesystemStore

        return FilesystemStore(settings.writer_url)
    from d2p_pipeline.parquet.store import LocalStore

    return LocalStore(settings.writer_file_path)


def check_s3_resource(settings: Settings, s3: Any) -> None:
    """Refuse settings that an S3Resource of dagster_aws replaces, and secrets in it that Dagster's UI would show.

    Raises SettingsError.
    """
    from d2p_pipeline.settings import Problem, SettingsError

    problems = [
        Problem(name, None, f"has no effect with an S3Resource, which has {own}; give it there")
        for name, own in _CONNECTING.items()
        if getattr(settings, name) is not None
    ]
    problems += [
        Problem(f"S3Resource.{name}", None, 'would be shown in the UI; give dg.EnvVar("…") or profile_name')
        for name in ("aws_secret_access_key", "aws_session_token")
        if getattr(s3, name) is not None and not hasattr(getattr(s3, name), "env_var_name")
    ]
    if problems:
        raise SettingsError(problems)


_CONNECTING = {
    "s3_region": "region_name",
    "s3_endpoint": "endpoint_url",
    "s3_role_arn": "profile_name, for a profile that has role_arn",
}
"""Settings that say how the bucket is reached, and what an S3Resource has for them."""


def bucket(settings: Settings) -> Bucket:
    """The bucket that the S3 settings describe."""
    from d2p_pipeline.parquet.s3 import Bucket, Role

    assert settings.s3_bucket_name  # settings with writer_type aws-s3 have it
    role = settings.s3_role_arn and Role(
        settings.s3_role_arn,
        session_name=settings.s3_session_name,
        external_id=settings.s3_external_id,
        sts_endpoint=settings.s3_sts_endpoint,
    )
    return Bucket(
        settings.s3_bucket_name,
        prefix=settings.s3_prefix,
        region=settings.s3_region,
        endpoint=settings.s3_endpoint,
        path_style=settings.s3_path_style,
        role=role or None,
        encryption=settings.s3_encryption,
        kms_key_id=settings.s3_kms_key_id,
        storage_class=settings.s3_storage_class,
        acl=settings.s3_acl,
        tags=tuple((name, value) for name, _, value in (tag.partition("=") for tag in settings.s3_tags)),
        create=settings.s3_create_bucket,
    )


def encoding(settings: Settings) -> Encoding:
    """How Parquet is written."""
    from d2p_pipeline.parquet.encode import Encoding

    return Encoding(compression=settings.writer_compression_type, row_group_bytes=settings.writer_row_group_size)
