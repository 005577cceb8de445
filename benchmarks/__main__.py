"""Run the benchmarks and print their tables.

Every contender is a whole process, start and imports included; contenders of a table take turns (A B A B …), and the table
shows medians. Ratios are to contenders of the same run: they stay the same on a busy machine where seconds do not.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from benchmarks.data import DIRECTORY, Data
from benchmarks.flush import KEY
from benchmarks.measure import Contender, Cost, measure, median, run

CORES = os.cpu_count() or 1
_OUT = DIRECTORY / "out"
_CLI = [sys.executable, "-c", "from d2p_pipeline.cli.main import main; main()"]
_REJECTED = 1  # d2p's exit code where records were


@dataclass(frozen=True)
class Group:
    """Contenders that took turns. Wall time and CPU are compared with one of them each."""

    title: str
    records: int
    wall_of: str
    cpu_of: str
    costs: dict[str, Cost | None]

    def ratios(self, name: str) -> tuple[float, float] | None:
        """Wall time and CPU as multiples of the references'; None where one of them is not installed."""
        cost, wall, cpu = self.costs[name], self.costs[self.wall_of], self.costs[self.cpu_of]
        return (cost.wall / wall.wall, cost.cpu / cpu.cpu) if cost and wall and cpu else None


def main() -> None:
    options = _options()
    for name in [name for name in os.environ if name.startswith("D2P_")]:
        del os.environ[name]
    # An installed program has its bytecode; without it, half a second of each run would be compiling what is imported.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    suites: dict[str, Group] = {}
    alone: dict[str, dict[str, float]] = {}
    for name in options.only or [*SUITES, "alone"]:
        if name == "alone":
            alone = _alone(options.records, options.runs)
            _print_alone(alone, options.json)
        else:
            group = SUITES[name](options)
            suites[name] = group
            _print(group, options.json)
    targets = [target for target in TARGETS if target.suite in suites]
    _print_targets([(target, target.measured(suites[target.suite])) for target in targets], options.json)
    if options.json:
        described = [
            asdict(group) | {"ratios": {name: group.ratios(name) for name in group.costs}} for group in suites.values()
        ]
        print(json.dumps({"cores": CORES, "runs": options.runs, "groups": described, "alone": alone}, indent=2))


class Options(argparse.Namespace):
    """The command line."""

    records: int
    d2p_records: int
    flush_records: int
    runs: int
    only: list[str]
    json: bool


def _options() -> Options:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--records", type=int, default=200_000, help="canonical records (%(default)s)")
    parser.add_argument("--d2p-records", type=int, default=100_000, help="records of profile d2p (%(default)s)")
    parser.add_argument("--flush-records", type=int, default=1_000_000, help="buffered records (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each contender (%(default)s)")
    parser.add_argument("--only", action="append", choices=[*SUITES, "alone"], help="one table; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser.parse_args(namespace=Options())


# --- what is compared


def _convert(options: Options) -> Group:
    data = _made(Data(options.records))
    contenders = [
        _d2p("d2p convert, 1 job", data, jobs=1),
        _d2p("d2p convert, 2 jobs", data, jobs=2),
        _other("bare", data, 1),
        *(_other("duckdb", data, threads) for threads in (1, 2)),
        *(_other(name, data, 2) for name in ("polars", "pyarrow", "chdb", "dlt")),
    ]
    return Group(
        f"{options.records:,} canonical records, 8 keys, {_size(data)}",
        options.records,
        wall_of="duckdb, 2 threads",
        cpu_of="bare",
        costs=measure(contenders, options.runs),
    )


def _variants(options: Options) -> Group:
    contenders = [
        _d2p("all canonical", _made(Data(options.records)), jobs=1),
        _d2p("1 % bad", _made(Data(options.records, bad_ratio=0.01)), jobs=1),
        _d2p("one unknown field in every record", _made(Data(options.records, extra_field=True)), jobs=1),
    ]
    costs = measure(contenders, options.runs)
    first = contenders[0].name
    return Group(f"d2p convert, 1 job, {options.records:,} records that differ", options.records, first, first, costs)


def _profile(options: Options) -> Group:
    data = _made(Data(options.d2p_records, profile="d2p"))
    contenders = [
        _d2p("d2p convert, 1 job", data, jobs=1),
        _on_one_core(_d2p("d2p convert, one core", data, jobs=1)),
        _d2p("d2p convert, 2 jobs", data, jobs=2),
        _other("bare", data, 1),
        _other("duckdb", data, 2),
    ]
    return Group(
        f"{options.d2p_records:,} records of profile d2p, {_size(data)}",
        options.d2p_records,
        wall_of=contenders[0].name,
        cpu_of="bare",
        costs=measure(contenders, options.runs),
    )


def _flush(options: Options) -> Group:
    """Runs of `d2p up`, each beside a conversion of the same records."""
    from benchmarks.runs import up

    data = _made(Data(options.flush_records, keys=1))
    convert = _d2p("d2p convert, 1 job", data, jobs=1)
    names = ("flush, from its first step on", "flush, from its launch on", convert.name)
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as directory, up(Path(directory)) as system:
        for _ in range(options.runs):
            run(Contender("fill", _module("flush", str(data.path))))
            [ran] = system.flush([KEY]).runs
            seconds = (ran.seconds, ran.with_its_start)
            for name, wall in zip(names, seconds, strict=False):
                costs[name].append(Cost(wall, ran.cpu, ran.peak))
            convert.before()
            if cost := run(convert):
                costs[convert.name].append(cost)
        assert system.rows() == options.runs * options.flush_records, system.rows()
    title = f"flush, {options.flush_records:,} buffered records of {KEY}, {_size(data)}"
    medians: dict[str, Cost | None] = {
        name: median(some, max(one.peak for one in some)) for name, some in costs.items()
    }
    return Group(title, options.flush_records, convert.name, convert.name, medians)


def _alone(records: int, runs: int) -> dict[str, dict[str, float]]:
    """Steps and small files: medians of the medians that each process found."""
    said: list[dict[str, dict[str, float]]] = []
    contender = Contender("steps", _module("steps", str(_made(Data(records)).path)))
    for _ in range(runs):
        cost = run(contender)
        assert cost
        said.append(cost.said)
    return {
        table: {name: statistics.median(one[table][name] for one in said) for name in said[0][table]}
        for table in said[0]
    }


SUITES: dict[str, Callable[[Options], Group]] = {
    "convert": _convert,
    "variants": _variants,
    "profile": _profile,
    "flush": _flush,
}


@dataclass(frozen=True)
class Target:
    """What one contender may cost: at most `most` of what another one does, or, without another one, MB of memory."""

    suite: str
    name: str
    of: str | None
    cost: Literal["wall", "cpu", "peak"]
    most: float

    def measured(self, group: Group) -> float | None:
        """The ratio or the MB; None where something is not installed."""
        cost, other = group.costs[self.name], group.costs[self.of or self.name]
        if not cost or not other:
            return None
        return getattr(cost, self.cost) / getattr(other, self.cost) if self.of else cost.peak / 1e6


TARGETS = [
    Target("convert", "d2p convert, 2 jobs", "duckdb, 2 threads", "wall", 1.0),
    Target("convert", "d2p convert, 1 job", "bare", "cpu", 1.3),
    Target("variants", "1 % bad", "all canonical", "cpu", 1.1),
    Target("variants", "one unknown field in every record", "all canonical", "cpu", 2.0),
    Target("profile", "d2p convert, 1 job", "bare", "cpu", 1.3),
    Target("profile", "d2p convert, 2 jobs", "d2p convert, one core", "wall", 0.6),
    Target("profile", "d2p convert, 1 job", None, "peak", 500),
    Target("profile", "d2p convert, 2 jobs", None, "peak", 500),
    Target("flush", "flush, from its first step on", "d2p convert, 1 job", "wall", 1 / 0.7),
    Target("flush", "flush, from its launch on", "d2p convert, 1 job", "wall", 1 / 0.7),
    Target("flush", "flush, from its launch on", None, "peak", 700),
]


# --- contenders


def _on_one_core(contender: Contender) -> Contender:
    return replace(contender, command=["taskset", "--cpu-list", "0", *contender.command])


def _d2p(name: str, data: Data, *, jobs: int) -> Contender:
    command = [*_CLI, "convert", str(data.path), "--out", str(_OUT), "--jobs", str(jobs), "--json"]
    return Contender(
        name, command, before=_emptied, exit_codes=(_REJECTED if data.bad_ratio else 0,), records=data.count
    )


def _other(name: str, data: Data, threads: int) -> Contender:
    shown = name if name == "bare" else f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    command = _module("contenders", name, str(data.path), str(_OUT), str(threads))
    environment = {"POLARS_MAX_THREADS": str(threads)} if name == "polars" else {}
    return Contender(shown, command, environment, before=_emptied)


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def _made(data: Data) -> Data:
    run(Contender("data", _module("data", *data.arguments)))
    return data


def _emptied() -> None:
    shutil.rmtree(_OUT, ignore_errors=True)


def _size(data: Data) -> str:
    return f"{data.path.stat().st_size / 1e6:,.0f} MB"


# --- tables


def _print(group: Group, as_json: bool) -> None:
    columns = ("wall s", "CPU s", "peak MiB", "records/s", f"wall ÷ {group.wall_of}", f"CPU ÷ {group.cpu_of}")
    rows: list[tuple[str, ...]] = []
    for name, cost in group.costs.items():
        if cost is None:
            rows.append((name, "not installed"))
            continue
        ratios = group.ratios(name)
        numbers = (
            f"{cost.wall:.2f}",
            f"{cost.cpu:.2f}",
            f"{cost.peak / 2**20:,.0f}",
            f"{group.records / cost.wall:,.0f}",
        )
        rows.append((name, *numbers, *(f"{ratio:.2f}" for ratio in ratios or ())))
    _table(group.title, columns, rows, as_json)


def _print_targets(measured: Sequence[tuple[Target, float | None]], as_json: bool) -> None:
    rows: list[tuple[str, ...]] = []
    for target, value in measured:
        what = f"{target.cost} ÷ {target.of}" if target.of else "MB"
        shown = "not measured" if value is None else f"{value:.2f}" if target.of else f"{value:.0f}"
        met = "" if value is None else "yes" if value <= target.most else "no"
        rows.append((target.suite, target.name, what, shown, f"{target.most:.3g}", met))
    _table("Targets", ("", "", "measured", "at most", "met"), rows, as_json)


def _print_alone(alone: dict[str, dict[str, float]], as_json: bool) -> None:
    rows = [(name, f"{seconds:.3f} CPU s per 100,000 records") for name, seconds in alone["steps"].items()]
    rows += [(f"10,000 small rows, {name}", f"{us:,.0f} µs") for name, us in alone["encode_small"].items()]
    _table("Steps alone", ("",), rows, as_json)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], as_json: bool) -> None:
    table = Table(title=title, title_justify="left", box=None)
    table.add_column(no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    # Where the standard output is for a program, people see the tables beside it.
    Console(stderr=as_json, width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
