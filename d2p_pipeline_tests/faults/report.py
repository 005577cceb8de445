"""A soak as something to read: Markdown with the books, and a drawing of throughput, lag, depth and memory with the faults on
the time axis.
"""

import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import altair as alt

from d2p_pipeline_tests.faults.real import Course, Sample

POINTS = 600
"""Samples are thinned out to about as many."""


def write(course: Course, directory: Path) -> Path:
    """`report.md` and `report.svg` in a directory; returns the former."""
    directory.mkdir(parents=True, exist_ok=True)
    chart(course).save(directory / "report.svg")
    path = directory / "report.md"
    path.write_text(text(course))
    return path


def text(course: Course) -> str:
    """The Markdown."""
    books, samples = course.books, course.samples
    wrong = {
        name: len(getattr(books, name)) for name in ("lost", "doubled", "refused_but_there", "invented", "out_of_order")
    }
    rates = [row["records"] for row in _rates(samples) if row["what"] == "delivered"]
    peaks: dict[str, int] = {}
    for sample in samples:
        for name, size in sample.memory.items():
            peaks[name] = max(peaks.get(name, 0), size)
    lines = [
        f"# Soak of seed {books.seed}",
        "",
        f"`d2p up` for {books.seconds / 60:.1f} minutes under load and faults, on {os.cpu_count()} cores.",
        "",
        "| records | |",
        "|---|---|",
        f"| accepted | {books.accepted:,} |",
        f"| refused, and the answer unknown | {books.refused:,} + {books.unknown:,} |",
        f"| in files, and in dead letters | {books.rows:,} + {books.dead_letters:,} |",
        *(f"| {name.replace('_', ' ')} | {count} |" for name, count in wrong.items()),
        "",
        "| | median | 95 % | most |",
        "|---|---|---|---|",
        _row("delivered per second", rates, 0),
        _row("age of the oldest record that waits, s", [sample.oldest for sample in samples], 1),
        _row("records that wait", [sample.waiting for sample in samples], 0),
        "",
        "Peak memory, MB: " + ", ".join(f"{name} {size / 1e6:.0f}" for name, size in sorted(peaks.items())) + ".",
        "",
        f"{len(course.faults)} faults: "
        + ", ".join(f"{kind} {count}" for kind, count in sorted(books.struck.items()))
        + ".",
        "",
        "![throughput, lag, depth and memory over time, with the faults](report.svg)",
        "",
    ]
    return "\n".join(lines)


def _row(what: str, values: Sequence[float], digits: int) -> str:
    ranked = sorted(values)
    shown = [ranked[int(share * (len(ranked) - 1))] for share in (0.5, 0.95, 1.0)]
    return f"| {what} | " + " | ".join(f"{value:,.{digits}f}" for value in shown) + " |"


def chart(course: Course) -> alt.VConcatChart:
    """Four drawings over one time axis, with a line for each fault."""
    step = max(1, len(course.samples) // POINTS)
    samples = course.samples[::step]
    faults = alt.Chart(alt.Data(values=[{"s": at, "fault": kind} for at, kind in course.faults]))
    lines = faults.mark_rule(opacity=0.8, strokeWidth=1).encode(
        x="s:Q",
        color=alt.Color("fault:N", legend=alt.Legend(orient="bottom", columns=5), scale=alt.Scale(scheme="tableau20")),
    )

    def drawing(values: Iterable[dict[str, Any]], field: str, title: str, kind: str | None = None) -> Any:
        x = alt.X("s:Q", title="seconds")
        line = alt.Chart(alt.Data(values=list(values))).mark_line(strokeWidth=1.2, color="black")
        y = alt.Y(f"{field}:Q", title=title)
        line = line.encode(x=x, y=y, strokeDash=f"{kind}:N") if kind else line.encode(x=x, y=y)
        return alt.layer(lines, line).properties(width=900, height=150)

    memory = [
        {"s": sample.at, "MB": size / 1e6, "process": name}
        for sample in samples
        for name, size in sample.memory.items()
    ]
    return alt.vconcat(
        drawing(_rates(samples), "records", "records per second", "what"),
        drawing(({"s": one.at, "lag": one.oldest} for one in samples), "lag", "age of the oldest record, s"),
        drawing(({"s": one.at, "depth": one.waiting} for one in samples), "depth", "records that wait"),
        drawing(memory, "MB", "memory, MB", "process"),
    ).resolve_scale(x="shared", strokeDash="independent")


def _rates(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Records per second between samples."""
    return [
        {"s": two.at, "what": what, "records": max(0, getattr(two, what) - getattr(one, what)) / (two.at - one.at)}
        for one, two in pairwise(samples)
        if two.at > one.at
        for what in ("accepted", "delivered")
    ]
