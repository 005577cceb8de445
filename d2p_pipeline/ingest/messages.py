"""What a message of a queue holds, as requests for the buffer: records, an SNS notification, or an S3 event.

An S3 event's objects are read, decompressed and cut into blocks by their content alone. So each delivery of a message makes
the same requests under the same names, and one that comes again is recognised part by part.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any, Protocol, TypeVar, cast
from urllib.parse import unquote_plus

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from d2p_pipeline.ingest.bodies import BodyError, records
from d2p_pipeline.ingest.commit import Request
from d2p_pipeline.ingest.documents import Content, ForeignError, blocks
from d2p_pipeline.ingest.intake import Intake
from d2p_pipeline.ingest.sqs import Message, SourceError

BLOCK_BYTES = 4 << 20
"""Bytes of an object that make one request."""
_GONE = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "InvalidObjectState", "PreconditionFailed", "404", "412"}


class _Notification(msgspec.Struct):
    """https://docs.aws.amazon.com/sns/latest/dg/sns-message-and-json-formats.html"""

    type: str = msgspec.field(name="Type")
    message: str = msgspec.field(name="Message")
    topic: str = msgspec.field(name="TopicArn")


class _Named(msgspec.Struct):
    name: str


class _Object(msgspec.Struct):
    key: str
    version: str | None = msgspec.field(name="versionId", default=None)
    etag: str | None = msgspec.field(name="eTag", default=None)


class _S3(msgspec.Struct):
    bucket: _Named
    object: _Object


class _Change(msgspec.Struct):
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html"""

    event: str = msgspec.field(name="eventName")
    s3: _S3


class _Event(msgspec.Struct):
    changes: list[_Change] = msgspec.field(name="Records")


class _TestEvent(msgspec.Struct):
    service: str = msgspec.field(name="Service")
    event: str = msgspec.field(name="Event")


class Objects(Protocol):
    """Where the objects of S3 events are."""

    def open(self, bucket: str, key: str, version: str | None, etag: str | None) -> IO[bytes]:
        """The whole object. LookupError if there is none, or another by now; `SourceError` if it cannot be read now."""
        ...


class S3Objects:
    """Objects by a client of botocore; each is fetched whole into a temporary file."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def open(self, bucket: str, key: str, version: str | None, etag: str | None) -> IO[bytes]:
        # What was put in its place has an event of its own: read for both, it would be stored twice.
        which = {"VersionId": version} if version else {"IfMatch": f'"{etag}"'} if etag else {}
        file = tempfile.TemporaryFile()  # noqa: SIM115  # whoever reads it closes it
        try:
            shutil.copyfileobj(self._client.get_object(Bucket=bucket, Key=key, **which)["Body"], file, 1 << 20)
        except ClientError as error:
            file.close()
            if error.response.get("Error", {}).get("Code") in _GONE:
                raise LookupError(str(error)) from error
            raise SourceError(f"s3://{bucket}/{key}: {error}") from error
        except (BotoCoreError, OSError) as error:
            file.close()
            raise SourceError(f"s3://{bucket}/{key}: {error}") from error
        file.seek(0)
        return file


class Messages:
    """Reads messages by fixed rules; a callable of the type `sqs.Convert`. Without `objects`, S3 events are records."""

    def __init__(
        self, intake: Intake, *, max_record_bytes: int, sns: bool = False, objects: Objects | None = None
    ) -> None:
        self._intake = intake
        self._max_record_bytes = max_record_bytes
        self._sns = sns
        self._objects = objects

    def __call__(self, message: Message) -> Iterator[Request]:
        body = message.body.encode("utf-8", "replace")
        if self._sns and (notification := _read(body, _Notification)) and notification.type == "Notification":
            body = notification.message.encode("utf-8", "replace")
        if self._objects and (event := _read(body, _Event)) is not None:
            yield from self._read_objects(message, body, event, self._objects)
        elif not (self._objects and _is_test(body)):
            yield self._records(message, body)

    def _records(self, message: Message, body: bytes) -> Request:
        request = Request(id=f"sqs-{message.id}", size=len(body))
        try:
            raws = list(records(body)) or [body]
        except BodyError as error:
            self._refuse(body, str(error), request, message)
        else:
            for raw in raws:
                self._intake.take(raw, request, _now(), source=_source(message))
        return request

    def _read_objects(self, message: Message, body: bytes, event: _Event, objects: Objects) -> Iterator[Request]:
        for number, change in enumerate(event.changes):
            if not change.event.removeprefix("s3:").startswith("ObjectCreated:"):
                continue
            bucket, named = change.s3.bucket.name, change.s3.object
            key = unquote_plus(named.key)
            name = f"sqs-{message.id}-{number}"
            try:
                with objects.open(bucket, key, named.version, named.etag) as file:
                    content = Content(cast(Any, file))
                    yield from self._blocks(message, content, name, f"s3://{bucket}/{key}: ")
                damage = content.damage
            except (LookupError, ForeignError) as error:
                damage = str(error)
            if damage:
                request = Request(id=f"{name}-end")
                self._refuse(body, f"s3://{bucket}/{key}: {damage}", request, message)
                yield request

    def _blocks(self, message: Message, content: Content, name: str, source: str) -> Iterator[Request]:
        for number, block in enumerate(blocks(content, BLOCK_BYTES, self._max_record_bytes)):
            request = Request(id=f"{name}-{number}", size=len(block.text))
            for line in bytes(block.text).split(b"\n"):
                if line and not line.isspace():
                    self._intake.take(line, request, _now(), source=_source(message) + source)
            for broken in block.breaks:
                self._refuse(broken.raw, f"{source}byte {broken.offset}: {broken.reason}", request, message)
            yield request

    def _refuse(self, raw: bytes, reason: str, request: Request, message: Message) -> None:
        self._intake.refuse(raw, _source(message) + reason, request, _now())


_T = TypeVar("_T")


def _read(body: bytes, kind: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError):
        return None


def _is_test(body: bytes) -> bool:
    """What S3 sends when a notification is set up."""
    test = _read(body, _TestEvent)
    return test is not None and test.event == "s3:TestEvent"


def _source(message: Message) -> str:
    return f"SQS message {message.id}: "


def _now() -> int:
    return time.time_ns() // 1_000_000
