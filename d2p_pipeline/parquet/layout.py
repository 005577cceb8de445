"""Where a file lies: `capability=<key>/year=YYYY/month=MM/day=DD/hour=HH/<batch>-<unit>[-<md5>].parquet`.

The path depends on nothing but its arguments, so a replay overwrites what it wrote before. Values are escaped as Hive and
Spark do (FileUtils.escapePathName): readers undo it, and no key can leave the root.
"""

import hashlib
import re
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from typing_extensions import Buffer

EMPTY = "__HIVE_DEFAULT_PARTITION__"
"""What stands for the empty value, and is read as null."""

# Hive's list, and NUL and lone dots, which Hive leaves alone.
_ESCAPED = re.compile(r"""[\x00-\x1f\x7f"#%'*/:=?\\{\[\]^]""")

# Bytes of one component of a path, on nearly every filesystem.
_LONGEST = 255
_DIGEST_LENGTH = 32

_AFTER_UNIT = re.compile(r"((?:-[0-9a-f]{32})?\.parquet)$")

_PLAIN_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*", re.ASCII)


def capability_prefix(key: str) -> str:
    """The directory with all files of a key, relative to the root."""
    return component("capability", key)


def partition_path(key: str, hour: datetime) -> str:
    """The directory for a key's records of one hour (UTC), relative to the root."""
    return (
        f"{capability_prefix(key)}/year={hour.year:04d}/month={hour.month:02d}/day={hour.day:02d}/hour={hour.hour:02d}"
    )


def file_name(batch_id: str, unit: int, md5: str | None = None) -> str:
    """The name of the file that a batch's unit puts into a partition."""
    if not _PLAIN_ID.fullmatch(batch_id):
        raise ValueError(f"batch id {batch_id!r} cannot name a file; only letters, digits, '.', '_' and '-' can")
    return f"{batch_id}-{unit}-{md5}.parquet" if md5 else f"{batch_id}-{unit}.parquet"


def file_path(key: str, hour: datetime, batch_id: str, unit: int, hashed: "Buffer | None" = None) -> str:
    """The file's path relative to the root, with the MD5 of `hashed` in its name if that is given."""
    md5 = None if hashed is None else md5_of(hashed)
    return f"{partition_path(key, hour)}/{file_name(batch_id, unit, md5)}"


def md5_of(data: "Buffer") -> str:
    """What names of files call the MD5 of their content."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def with_token(path: str, token: int) -> str:
    """The path of a file that an attempt keeps apart from those of earlier attempts: `<batch>-<unit>.<token>[-<md5>].parquet`."""
    return _AFTER_UNIT.sub(rf".{token}\1", path)


def component(name: str, value: str) -> str:
    """`name=value` as one component of a path.

    What would be longer than 255 bytes is cut and ends in `~` and a hash of the whole value: unique, the same every
    time, but no longer readable in full from the path. The records hold the value in any case.
    """
    escaped = escape(value)
    room = _LONGEST - len(name) - 1
    if len(escaped.encode()) > room:
        digest = hashlib.sha256(value.encode()).hexdigest()[:_DIGEST_LENGTH]
        start = escaped.encode()[: room - _DIGEST_LENGTH - 1].decode(errors="ignore")
        # Neither character nor escape may be cut in two.
        escaped = f"{re.sub('%.?$', '', start)}~{digest}"
    return f"{name}={escaped}"


def escape(value: str) -> str:
    """A partition value as Hive writes it."""
    if not value:
        return EMPTY
    if not value.strip("."):
        return value.replace(".", "%2E")
    escaped = _ESCAPED.sub(lambda found: f"%{ord(found[0]):02X}", value)
    return f"%5F{escaped[1:]}" if escaped == EMPTY else escaped


def unescape(escaped: str) -> str:
    """Inverse of `escape`."""
    return "" if escaped == EMPTY else unquote(escaped, errors="strict")
