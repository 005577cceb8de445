# pyright: standard
"""What places a row in a file: its key and its time. pyarrow has no type information, hence `standard` above."""

import polars as pl
import pyarrow as pa

from d2p_pipeline.records.rules import Rules


def places(table: pa.Table, rules: Rules) -> pl.DataFrame:
    """`key` and `time` of every row; null where the row does not tell. KeyError names a column that is not there."""
    known = set(table.column_names)
    if rules.time_column not in known:
        raise KeyError(rules.time_column)
    needed = {name: _tops(name, known) for name in rules.key_columns}
    for name, tops in needed.items():
        if not tops:
            raise KeyError(name)
    tops = list(dict.fromkeys([rules.time_column, *(top for found in needed.values() for top in found)]))
    frame = pl.DataFrame(pl.from_arrow(table.select(tops)))
    parts = [_part(name, frame.schema) for name in rules.key_columns]
    return frame.select(key=pl.concat_str(parts, separator=":"), time=pl.col(rules.time_column))


def _tops(name: str, known: set[str]) -> list[str]:
    """Columns that may hold the value of a key field: that of its name, and that where its path begins."""
    return [top for top in dict.fromkeys((name, name.partition(".")[0])) if top in known]


def _part(name: str, schema: pl.Schema) -> pl.Expr:
    found: list[pl.Expr] = [pl.col(name)] if name in schema else []
    first, *rest = name.split(".")
    column, dtype = pl.col(first), schema.get(first)
    for part in rest:
        fields = {field.name: field.dtype for field in dtype.fields} if isinstance(dtype, pl.Struct) else {}
        column, dtype = column.struct.field(part), fields.get(part)
    if rest and dtype is not None:
        found.append(column)
    texts = [pl.coalesce([expression.cast(pl.String) for expression in found])] if found else [pl.lit(None, pl.String)]
    return pl.when(texts[0] != "").then(texts[0])
