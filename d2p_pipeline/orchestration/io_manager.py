"""Where outputs of ops go: files through the store, everything else in memory for as long as its unit is worked on."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl
from pydantic import PrivateAttr

from d2p_pipeline import wiring
from d2p_pipeline.delivery import Announced, Written
from d2p_pipeline.orchestration.failures import no_retry_if_permanent
from d2p_pipeline.orchestration.keys import key_of
from d2p_pipeline.orchestration.markdown import code
from d2p_pipeline.parquet.layout import capability_prefix
from d2p_pipeline.parquet.scan import scan
from d2p_pipeline.parquet.store import Store
from d2p_pipeline.settings import load

if TYPE_CHECKING:
    from dagster_aws.s3 import S3Resource


class ParquetIOManager(dg.ConfigurableIOManager):
    """Writes the files an op returns, atomically; gives the next op what was written.

    A downstream asset with `parquet_files` as its input receives a Polars LazyFrame over the files of its partition's key,
    or of all keys where it is not partitioned. Columns of dynamic records that widened from file to file are cast.

    An `s3` of dagster_aws connects to the bucket instead of what the settings say; see `definitions.build_defs`.
    """

    # Dagster takes any resource here; a type would import dagster_aws, which costs every run a second.
    s3: dg.ResourceDependency["S3Resource"] = None  # pyright: ignore[reportAssignmentType]

    _store: Store | None = PrivateAttr(default=None)
    _written: dict[str, list[Written]] = PrivateAttr(default_factory=dict)

    @property
    def store(self) -> Store:
        """Opened at its first use, by a step: what is wrong then is a failure of that step, not of the run's start."""
        if self._store is None:
            self._store = wiring.store(load(), self._s3_client())
        return self._store

    def check(self) -> None:
        """Prove within seconds that files can be written. Raises StoreError or OSError."""
        wiring.store(load(), self._s3_client(), is_patient=False).check()

    def _s3_client(self) -> Callable[[], Any] | None:
        return self.s3.get_client if self.s3 else None

    def handle_output(self, context: dg.OutputContext, obj: Announced) -> None:
        try:
            written = self.write(obj)
        finally:
            empty(obj)
        self._written[_step(context)] = written
        context.add_output_metadata(
            {
                "files": len(written),
                "dagster/row_count": sum(file.rows for file in written),
                "bytes": sum(file.size for file in written),
                "paths": dg.MetadataValue.md("\n".join(f"- {code(file.path)}" for file in written[:20])),
            }
        )

    def write(self, announced: Announced) -> list[Written]:
        """Make files durable, after what earlier attempts wrote in their stead is gone."""
        with no_retry_if_permanent():
            for path in announced.strays:
                self.store.remove(path)
            for file in announced.files:
                claim = file.part.claim
                metadata = {"d2p-batch": claim.batch.id, "d2p-unit": str(file.part.number), "d2p-key": claim.batch.key}
                self.store.write(file.path, file.data, metadata)
        return [Written(file.part, file.path, file.rows, file.data.size) for file in announced.files]

    def remove(self, path: str) -> None:
        """Remove a file that should not have been written."""
        self.store.remove(path)

    def load_input(self, context: dg.InputContext) -> list[Written] | pl.LazyFrame:
        if context.has_asset_key:
            keys = (
                [key_of(partition) for partition in context.asset_partition_keys]
                if context.has_asset_partitions
                else None
            )
            return self._scan(keys)
        upstream = context.upstream_output
        assert upstream
        return self._written.pop(_step(upstream))

    def _scan(self, keys: list[str] | None) -> pl.LazyFrame:
        prefixes = [""] if keys is None else [capability_prefix(key) for key in keys]
        paths = [path for prefix in prefixes for path in self.store.scan(prefix)]
        if not paths:
            raise dg.Failure(f"there are no files yet of {', '.join(keys) if keys else 'any key'}", allow_retries=False)
        return scan(paths, self.store.storage_options(), may_differ=load().record_type == "dynamic")


class UnitMemory(dg.IOManager):
    """Keeps a unit's values between its ops, and lets go of all of them when the unit's last op has run or one has failed.

    Dagster's own memory IO manager keeps every value until the run ends: a run's memory would grow with its units. `spent`
    tells which op's value nobody needs when an op has given its own.
    """

    def __init__(self, last_op: str, spent: Mapping[str, str]) -> None:
        self._last_op = last_op
        self._spent = spent
        self._values: dict[str | None, dict[str, Any]] = {}

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        unit = _unit(context)
        if _step(context).startswith(f"{self._last_op}["):
            self.let_go(unit)
            unit = None
        values = self._values.setdefault(unit, {})
        values[_step(context)] = obj
        op, _, rest = _step(context).partition("[")
        if op in self._spent:
            empty(values.pop(f"{self._spent[op]}[{rest}"))

    def let_go(self, unit: str | None) -> None:
        """Empty a unit's values."""
        for value in self._values.pop(unit, {}).values():
            empty(value)

    def load_input(self, context: dg.InputContext) -> object:
        output = context.upstream_output
        assert output
        for values in (self._values.get(_unit(output), {}), self._values.get(None, {})):
            if _step(output) in values:
                return values[_step(output)]
        raise KeyError(f"{_step(output)} is not in memory: run the job from its start, not from a failed step")


def empty(value: object) -> None:
    """Clear the lists in a value that nobody needs any more.

    Dagster's step contexts hold what their steps gave and refer to each other in circles, so that the value itself stays
    until Python looks for such: a run of a large batch held several units that way.
    """
    for member in getattr(value, "__dict__", {}).values():
        if isinstance(member, list):
            member.clear()


def _unit(context: dg.OutputContext) -> str | None:
    """The unit an output belongs to: its own mapping key, or the one in its step's name, `read_records[3]`."""
    return context.mapping_key or context.step_key.partition("[")[2].rstrip("]") or None


def _step(context: dg.OutputContext) -> str:
    """Names an output within its run."""
    return f"{context.step_key}:{context.mapping_key or ''}"
