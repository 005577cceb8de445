"""The same job done by others: an NDJSON file to Parquet files below capability/year/month/day/hour, snappy.

    python -m benchmarks.contenders <name> <input> <directory> <threads>

None of them checks a record; each reads into the record schema as far as it can.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from benchmarks.measure import NOT_INSTALLED

PARTITIONS = ("capability", "year", "month", "day", "hour")
_BLOCK = 16 << 20  # bytes of text that d2p converts at once


def bare(source: Path, target: Path, threads: int) -> None:
    """The decoder and the encoder of d2p and nothing else, block by block; the files are not made durable."""
    import io

    import arro3.core
    import arro3.io
    import pyarrow as pa

    from d2p_pipeline.parquet.encode import Encoding, encode, split
    from d2p_pipeline.parquet.layout import file_path
    from d2p_pipeline.records.fields import arrow_schema
    from d2p_pipeline.records.rules import Rules

    schema, rules, encoding = arro3.core.Schema.from_arrow(arrow_schema()), Rules(), Encoding()
    number, rest = 0, b""
    with source.open("rb", buffering=0) as file:
        while read := file.read(_BLOCK - len(rest)):
            text = rest + read
            end = text.rfind(b"\n") + 1
            text, rest = text[:end], text[end:]
            table = pa.table(arro3.io.read_json(io.BytesIO(text), schema, batch_size=1024))
            for key, hour, rows in split(table, rules):
                path = target / file_path(key, hour, "bare", number)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(rows, encoding, {}))
            number += 1


def duckdb(source: Path, target: Path, threads: int) -> None:
    """One COPY statement."""
    import duckdb

    from d2p_pipeline.records.fields import LOG_FIELDS

    types = {"string": "VARCHAR", "bool": "BOOLEAN", "map": "MAP(VARCHAR, VARCHAR)", "list": "VARCHAR[]"}
    columns = ", ".join(f"'{field.name}': '{types.get(field.kind, 'TIMESTAMP')}'" for field in LOG_FIELDS)
    connection = duckdb.connect(config={"threads": threads, "preserve_insertion_order": False})
    connection.execute(f"""
        COPY (
            SELECT *, "business-capability" AS capability, year(time) AS year, month(time) AS month, day(time) AS day,
                hour(time) AS hour
            FROM read_json('{source}', format = 'newline_delimited', columns = {{{columns}}})
        ) TO '{target}' (FORMAT parquet, COMPRESSION snappy, PARTITION_BY ({", ".join(PARTITIONS)}))
    """)


def polars(source: Path, target: Path, threads: int) -> None:
    """Lazily from NDJSON to files. Maps as structs of the names that the first records show: its own maps take longer."""
    import polars as pl

    from d2p_pipeline.records.fields import LOG_FIELDS

    types = {"string": pl.String(), "bool": pl.Boolean(), "list": pl.List(pl.String()), "timestamp": pl.String()}
    shown = pl.read_ndjson(source, n_rows=10_000, infer_schema_length=None).schema
    maps = {field.name: shown[field.name] for field in LOG_FIELDS if field.kind == "map" and field.name in shown}
    schema = {field.name: types[field.kind] for field in LOG_FIELDS if field.kind in types}
    frame = pl.scan_ndjson(source, schema=schema | maps).with_columns(
        pl.col("time").str.to_datetime("%+", time_unit="us", time_zone="UTC")
    )
    time = pl.col("time").dt
    frame.with_columns(
        pl.col("business-capability").alias("capability"),
        year=time.year(),
        month=time.month(),
        day=time.day(),
        hour=time.hour(),
    ).sink_parquet(pl.PartitionBy(target, key=list(PARTITIONS)), compression="snappy", mkdir=True)


def pyarrow(source: Path, target: Path, threads: int) -> None:
    """Arrow's own reader, which cannot read maps: they become structs of the names it finds."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    import pyarrow.json as pj

    from d2p_pipeline.records.fields import LOG_FIELDS, arrow_schema

    maps = {field.name for field in LOG_FIELDS if field.kind == "map"}
    schema = pa.schema([field for field in arrow_schema() if field.name not in maps])
    pa.set_cpu_count(threads)
    table = pj.read_json(
        source,
        read_options=pj.ReadOptions(use_threads=threads > 1, block_size=_BLOCK),
        parse_options=pj.ParseOptions(explicit_schema=schema),
    )
    table = table.append_column("capability", table.column("business-capability"))
    for part in PARTITIONS[1:]:
        table = table.append_column(part, pc.call_function(part, [table.column("time")]))
    format = ds.ParquetFileFormat()
    ds.write_dataset(
        table,
        target,
        format=format,
        file_options=format.make_write_options(compression="snappy"),
        partitioning=ds.partitioning(pa.schema([table.schema.field(name) for name in PARTITIONS]), flavor="hive"),
        use_threads=threads > 1,
    )


def chdb(source: Path, target: Path, threads: int) -> None:
    """One INSERT statement of ClickHouse inside the process."""
    import chdb  # pyright: ignore[reportMissingImports] (not a dependency)

    from d2p_pipeline.records.fields import LOG_FIELDS

    types = {
        "string": "Nullable(String)",
        "bool": "Nullable(Bool)",
        "map": "Map(String, String)",
        "list": "Array(String)",
        "timestamp": "DateTime64(6, \\'UTC\\')",
    }
    structure = ", ".join(f"`{field.name}` {types[field.kind]}" for field in LOG_FIELDS)
    for partition in _partitions(source):
        (target / partition).mkdir(parents=True)
    chdb.query(f"""
        INSERT INTO FUNCTION file('{target}/{{_partition_id}}/0.parquet', Parquet, '{structure}')
        PARTITION BY concat('capability=', assumeNotNull(`business-capability`),
            formatDateTime(time, '/year=%Y/month=%m/day=%d/hour=%H'))
        SELECT * FROM file('{source}', JSONEachRow, '{structure}')
        SETTINGS max_threads = {threads}, date_time_input_format = 'best_effort',
            output_format_parquet_compression_method = 'snappy', engine_file_truncate_on_insert = 1
    """)


def dlt(source: Path, target: Path, threads: int) -> None:
    """A pipeline with files as destination and a table per capability, which takes Arrow tables of pyarrow's reader, as its
    guide advises."""
    os.environ |= {
        "RUNTIME__DLTHUB_TELEMETRY": "false",
        "NORMALIZE__WORKERS": str(threads),
        "LOAD__WORKERS": str(threads),
    }
    import dlt  # pyright: ignore[reportMissingImports] (not a dependency)
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.json as pj

    from d2p_pipeline.records.fields import LOG_FIELDS, arrow_schema

    pa.set_cpu_count(threads)
    maps = {field.name for field in LOG_FIELDS if field.kind == "map"}
    schema = pa.schema([field for field in arrow_schema() if field.name not in maps])

    @dlt.resource
    def records() -> Iterator[object]:
        reader = pj.open_json(source, pj.ReadOptions(block_size=_BLOCK), pj.ParseOptions(explicit_schema=schema))
        for batch in reader:
            table = pa.Table.from_batches([batch])
            for capability in table.column("business-capability").unique():
                rows = table.filter(pc.call_function("equal", [table.column("business-capability"), capability]))
                yield dlt.mark.with_table_name(rows, capability.as_py())

    with tempfile.TemporaryDirectory() as directory:
        pipeline = dlt.pipeline(
            "bench",
            pipelines_dir=directory,
            dataset_name="bench",
            destination=dlt.destinations.filesystem(
                str(target), layout=f"capability={{table_name}}/{_hour(source)}/{{load_id}}.{{file_id}}.{{ext}}"
            ),
        )
        pipeline.run(records(), loader_file_format="parquet")


def _first(source: Path) -> list[dict[str, str]]:
    with source.open("rb") as file:
        return [json.loads(line) for line, _ in zip(file, range(1000), strict=False)]


def _hour(source: Path) -> str:
    """All records of a benchmark lie in the hour of the first."""
    return datetime.fromisoformat(_first(source)[0]["time"]).strftime("year=%Y/month=%m/day=%d/hour=%H")


def _partitions(source: Path) -> list[str]:
    """ClickHouse makes no directories."""
    capabilities = {record["business-capability"] for record in _first(source)}
    return [f"capability={capability}/{_hour(source)}" for capability in capabilities]


CONTENDERS: dict[str, Callable[[Path, Path, int], None]] = {
    "bare": bare,
    "duckdb": duckdb,
    "polars": polars,
    "pyarrow": pyarrow,
    "chdb": chdb,
    "dlt": dlt,
}


def main() -> None:
    name, source, target, threads = sys.argv[1:]
    try:
        CONTENDERS[name](Path(source).absolute(), Path(target).absolute(), int(threads))
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        sys.exit(NOT_INSTALLED)


if __name__ == "__main__":
    main()
