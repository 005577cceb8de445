"""Functions that tests name in the setting `transform`, and for replays."""

import polars as pl

from d2p_pipeline.records.dead_letter import DeadLetter


def shout(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col("message").str.to_uppercase())


def without_debug(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("level") != "debug")


def widened(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.drop("ttl").with_columns(
        length=pl.col("message").str.len_chars(),
        kind=pl.col("level").cast(pl.Categorical),
        words=pl.col("message").str.split(" "),
        place=pl.struct(pl.col("region"), pl.col("az")),
    )


def lazily(frame: pl.DataFrame) -> pl.LazyFrame:
    return frame.lazy().filter(pl.col("level") != "debug")


def doubled(frame: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([frame, frame])


def without_rows(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.clear()


def nothing(frame: pl.DataFrame) -> None:
    del frame


def timeless(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.drop("time")


def textual(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col("time").cast(pl.String))


def keyless(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.lit("").alias("business-capability"))


def broken(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select("no such column")


def ending(frame: pl.DataFrame) -> pl.DataFrame:
    raise SystemExit(f"{frame.height} rows")


def panicking(frame: pl.DataFrame) -> pl.DataFrame:
    raise pl.exceptions.PanicException(f"{frame.height} rows")


def of_objects(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.Series("thing", [object()] * frame.height, dtype=pl.Object))


def of_huge_integers(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(huge=pl.lit(1, pl.Int128))


def of_nothing(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.Series("none", [{}] * frame.height, dtype=pl.Struct([])))


NO_FUNCTION = 5


def mended(letter: DeadLetter) -> dict[str, str] | str | None:
    """For replays: gives text that is no JSON a record around it."""
    if letter.raw.startswith(b"{"):
        return letter.raw.decode()
    if not letter.raw.startswith(b"level="):
        return None
    level, _, message = letter.raw.decode().removeprefix("level=").partition(" ")
    known = {"time": "2026-11-21T10:30:00Z", "business-capability": "payments", "business-domain": "d"}
    return {**known, "business-service": "s", "application-service": "a", "level": level, "message": message}


def wordy(letter: DeadLetter) -> int:
    return len(letter.raw)
