"""What normalization and parsing depend on, as one frozen value; built once at the edge from the settings."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal, get_args

from d2p_pipeline.records.fields import (
    BY_NAME,
    SCHEMA_VERSION,
    ColumnNames,
    Field,
    TimestampUnit,
    column_name,
    normalize_name,
    target_name,
)

RecordType = Literal["log", "dynamic"]
Fate = Literal["keep", "drop", "mask"]
"""What becomes of a field before anything is stored."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How records are read.

    For log records, field names may be given in any spelling and by an alias; they are kept normalized. Dynamic records have
    the names of `json_schema` (its text), or their own; key fields and `time_field` are kept as written, and a key field may
    be a path with dots. Hidden names match in any spelling, at every depth, or as such a path. `ignored_fields` drop and
    `masked_fields` replace by `*`: top-level fields and entries of `args` and `extra-fields` alike. A masked map has all its
    values replaced. With a `hmac_key` the column `hmac` is computed, and a `hmac` that a record brings goes to
    `extra-fields`. `transform` names the user's function as `module:function`. ValueError lists everything that cannot work.
    """

    record_type: RecordType = "log"
    key_fields: tuple[str, ...] = ("business-capability",)
    default_capability: str | None = None
    ignored_fields: frozenset[str] = frozenset()
    masked_fields: frozenset[str] = frozenset()
    timestamp_unit: TimestampUnit = "us"
    column_names: ColumnNames = "kebab"
    hmac_key: bytes | None = field(default=None, repr=False)
    transform: str | None = None
    time_field: str = "time"
    json_schema: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        is_log = self.record_type == "log"

        def meant(name: str) -> str:
            return target_name(normalize_name(name)) if is_log else normalize_name(name)

        if is_log:
            object.__setattr__(self, "key_fields", tuple(meant(name) for name in self.key_fields))
        object.__setattr__(self, "ignored_fields", frozenset(meant(name) for name in self.ignored_fields))
        object.__setattr__(self, "masked_fields", frozenset(meant(name) for name in self.masked_fields))
        problems = [*self._choice_problems(), *self._key_problems()]
        problems += self._hiding_problems() if is_log else self._dynamic_problems()
        if problems:
            raise ValueError("; ".join(problems))

    def fate_of(self, name: str, path: str) -> "Fate":
        """What becomes of a dynamic record's field, by its name and its path."""
        names = {normalize_name(name), normalize_name(path)}
        return "drop" if names & self.ignored_fields else "mask" if names & self.masked_fields else "keep"

    @property
    def time_column(self) -> str:
        """The column that places rows in hours."""
        return "time" if self.record_type == "log" else self.time_field

    @property
    def key_columns(self) -> tuple[str, ...]:
        """Columns, or paths to them, whose values make the key."""
        if self.record_type == "dynamic":
            return self.key_fields
        return tuple(column_name(name, self.column_names) for name in self.key_fields)

    @property
    def schema_version(self) -> str:
        """What tells files with other columns apart: the version of the log schema, or the digest of the JSON Schema."""
        if self.record_type == "log":
            return SCHEMA_VERSION
        if self.json_schema is None:
            return "inferred"
        return hashlib.sha256(self.json_schema.encode()).hexdigest()[:16]

    def _choice_problems(self) -> list[str]:
        problems: list[str] = []
        if self.record_type not in get_args(RecordType):
            problems.append(f"record_type: {self.record_type!r} is not one of log, dynamic")
        if self.timestamp_unit not in get_args(TimestampUnit):
            problems.append(f"timestamp_unit: {self.timestamp_unit!r} is not one of ms, us, ns")
        if self.column_names not in get_args(ColumnNames):
            problems.append(f"column_names: {self.column_names!r} is not one of kebab, snake")
        if self.default_capability == "":
            problems.append("default_capability: is empty; leave it out to reject records without a capability")
        return problems

    def _key_problems(self) -> list[str]:
        if not self.key_fields:
            return ["key_fields: is empty, name at least one field"]
        problems = [
            f"key_fields: {name} is there twice"
            for name in dict.fromkeys(self.key_fields)
            if self.key_fields.count(name) > 1
        ]
        for name in self.key_fields if self.record_type == "log" else ():
            if name not in BY_NAME:
                problems.append(f"key_fields: {name} is not a field of a log record")
            elif name == "hmac" and self.hmac_key is not None:
                problems.append("key_fields: hmac is computed by use_hmac")
            elif BY_NAME[name].kind != "string":
                problems.append(f"key_fields: {name} is a {BY_NAME[name].kind}, a key needs strings")
        return problems

    def _dynamic_problems(self) -> list[str]:
        problems: list[str] = []
        if not self.time_field:
            problems.append("time_field: is empty")
        for name in (*self.key_fields, self.time_field):
            if self.fate_of(name.rpartition(".")[2], name) != "keep":
                problems.append(f"ignored_fields, mask_fields: {name} is needed to place records")
        return problems

    def _hiding_problems(self) -> list[str]:
        problems: list[str] = []
        computed = {"hmac"} if self.hmac_key is not None else set[str]()
        for name in sorted(self.ignored_fields):
            if name in computed:
                problems.append(f"ignored_fields: {name} is computed by use_hmac")
            elif name in self.key_fields:
                problems.append(f"ignored_fields: {name} is a key field")
            elif name in BY_NAME and BY_NAME[name].required:
                problems.append(f"ignored_fields: {name} is required, every record would be rejected")
        for name in sorted(self.masked_fields):
            if name in computed:
                problems.append(f"mask_fields: {name} is computed by use_hmac")
            elif name in self.key_fields:
                problems.append(f"mask_fields: {name} is a key field")
            elif BY_NAME.get(name, Field(name)).kind not in ("string", "map"):
                problems.append(f"mask_fields: {name} is a {BY_NAME[name].kind} and cannot hold '*'; ignore it instead")
        return problems
