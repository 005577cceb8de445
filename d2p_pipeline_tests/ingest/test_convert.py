import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pytest
import zstandard

from d2p_pipeline.ingest.convert import Summary, block_for, convert, memory_needed
from d2p_pipeline.ingest.documents import Content, Range, ranges
from d2p_pipeline.ingest.generator import generate
from d2p_pipeline.ingest.task import Converter, Failure, Plan, Task
from d2p_pipeline.parquet.encode import Encoding
from d2p_pipeline.parquet.store import LocalStore
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline.records.rules import Rules

RECORD: dict[str, Any] = {
    "time": "2026-11-21T10:30:00Z",
    "level": "info",
    "message": "m",
    "business-capability": "payments",
    "business-domain": "d",
    "business-service": "s",
    "application-service": "a",
}


def line(message: str = "m", **fields: Any) -> bytes:
    return json.dumps(RECORD | {"message": message} | fields).encode()


class Directory:
    """Inputs, and the files that became of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path / "out"

    def put(self, content: bytes, name: str = "in.ndjson") -> str:
        (self.path / name).write_bytes(content)
        return str(self.path / name)

    def convert(self, *contents: bytes | str, rules: Rules | None = None, **options: Any) -> Summary:
        names = [
            self.put(content, f"in-{n}") if isinstance(content, bytes) else content
            for n, content in enumerate(contents)
        ]
        given = {name: options.pop(name) for name in ("jobs", "block_bytes") if name in options}
        summary = convert(names, Plan(rules or Rules(), Encoding(), LocalStore(self.root), **options), **given)
        rows = len(self.messages())
        assert (summary.rows, summary.records) == (rows, rows + len(self.dead_letters()))
        assert summary.dead_letters == len(self.dead_letters())
        return summary

    def messages(self) -> list[str]:
        if not any(self.root.rglob("*.parquet")):
            return []
        query = f"SELECT message FROM read_parquet('{self.root}/**/*.parquet', hive_partitioning = true)"
        with duckdb.connect() as connection:
            return sorted(message for (message,) in connection.execute(query).fetchall())

    def dead_letters(self) -> list[DeadLetter]:
        files = sorted((self.root / "_dead_letters").glob("*.ndjson"))
        return [DeadLetter.from_json(text) for file in files for text in file.read_bytes().splitlines()]

    def tree(self) -> dict[str, bytes]:
        return {str(file.relative_to(self.root)): file.read_bytes() for file in self.root.rglob("*") if file.is_file()}


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path)


# --- forms

THREE = [line("a"), line("b", unknown={"x": 1}), line('c\\"]},{')]
FORMS = {
    "lines": b"\n".join(THREE),
    "lines and a last newline": b"\n".join(THREE) + b"\n",
    "blank lines": b"\n\n" + b"\n \t\n\r\n".join(THREE),
    "CRLF": b"\r\n".join(THREE) + b"\r\n",
    "byte order mark": b"\xef\xbb\xbf" + b"\n".join(THREE),
    "array": b"[" + b",".join(THREE) + b"]",
    "pretty array": json.dumps([json.loads(text) for text in THREE], indent=2).encode(),
    "logs": b'{"logs":[' + b",".join(THREE) + b"]}",
    "pretty logs": json.dumps({"logs": [json.loads(text) for text in THREE]}, indent="\t").encode(),
    "objects": b"\n".join(json.dumps(json.loads(text), indent=2).encode() for text in THREE),
    "array with byte order mark": b"\xef\xbb\xbf\n[" + b",\n".join(THREE) + b"\n]\n",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_every_form_plain_or_compressed_becomes_the_same_rows(directory: Directory, form: str, compress: Any) -> None:
    summary = directory.convert(compress(FORMS[form]))
    assert directory.messages() == ["a", "b", 'c\\"]},{']
    assert (summary.failed, summary.stopped, summary.records) == ({}, None, 3)


@pytest.mark.parametrize("name", ["a.gz", "a.zst", "a.json"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_the_first_bytes_decide_about_compression_not_the_name(directory: Directory, name: str, compress: Any) -> None:
    assert directory.convert(directory.put(compress(line("a")), name)).rows == 1


# --- odd content


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_an_empty_file_is_said_to_be_empty(directory: Directory, compress: Any) -> None:
    summary = directory.convert(compress(b""), b"\n")
    assert (summary.inputs, summary.empty, summary.records, summary.files) == (2, 1, 0, 0)
    assert not summary.failed
    assert not directory.root.exists()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (line("x")[:-9], "invalid JSON"),
        (b'"text"', "str"),
        (b"17", "int"),
        (b"null", "null"),
        (line("x").replace(b'"x"', b'"\xff"'), "UTF-8"),
        (line("x").replace(b'"x"', b'"\0"'), "invalid JSON"),
        (b"\0\0", "invalid JSON"),
        (line("x") + line("y"), "invalid JSON"),
        (line("x", time="yesterday"), "time"),
        (line("x", level=None), "level"),
        (b"\x28\xb5\x2f\xfdnot zstd", "invalid"),
    ],
)
def test_a_bad_line_is_a_dead_letter_and_spoils_no_other(directory: Directory, bad: bytes, reason: str) -> None:
    directory.convert(b"\n".join([line("a"), bad, line("b"), bad]))
    assert directory.messages() == ["a", "b"]
    assert [letter.raw for letter in directory.dead_letters()] == [bad, bad]
    assert all(reason in letter.reason for letter in directory.dead_letters())


def test_a_block_that_begins_like_zstd_is_text(directory: Directory) -> None:
    magic = zstandard.ZstdCompressor().compress(line("hidden")).replace(b"\n", b"")
    directory.convert(line("a") + b"\n" + magic + b"\n" + line("b") + b"\n", block_bytes=len(line("a")) + 1)
    assert directory.messages() == ["a", "b"]
    assert [letter.raw for letter in directory.dead_letters()] == [magic]


def test_nul_in_a_record_as_an_escape_is_a_value(directory: Directory) -> None:
    directory.convert(line("a\0b"))
    assert directory.messages() == ["a\0b"]


def test_a_document_that_breaks_off_is_converted_up_to_there_and_fails(directory: Directory) -> None:
    document = b'{"logs":[' + line("a") + b",\n" + line("b") + b",\n" + line("c")[:30]
    summary = directory.convert(document)
    offset = document.rindex(b"{")
    assert directory.messages() == ["a", "b"]
    [letter] = directory.dead_letters()
    assert letter.raw == line("c")[:30]
    assert f"breaks off at byte {offset}" in letter.reason
    assert list(summary.failed.values()) == [f"the array breaks off at byte {offset}"]


def test_a_corrupt_end_of_gzip_loses_nothing_before_it_and_fails(directory: Directory) -> None:
    content = b"\n".join([line("a"), line("b"), b""])
    summary = directory.convert(gzip.compress(content)[:-5], line("c"))
    assert directory.messages() == ["a", "b", "c"]
    assert [Path(name).name for name in summary.failed] == ["in-0"]
    assert "end-of-stream" in next(iter(summary.failed.values()))


def test_inputs_that_cannot_be_read_do_not_keep_the_others_from_it(directory: Directory) -> None:
    missing, folder = str(directory.path / "missing"), str(directory.path)
    summary = directory.convert(missing, line("a"), folder, b"PAR1" + bytes(20), line("b"))
    assert directory.messages() == ["a", "b"]
    assert "No such file" in summary.failed[missing]
    assert "directory" in summary.failed[folder]
    assert "Parquet" in summary.failed[str(directory.path / "in-3")]
    assert summary.inputs == 5


@pytest.mark.parametrize("block_bytes", [200, 1 << 20])
def test_a_record_of_more_bytes_than_allowed_is_rejected(directory: Directory, block_bytes: int) -> None:
    long = line("x" * 600)
    content = b"\n".join([line("a"), long, line("b")])
    summary = directory.convert(content, max_record_bytes=500, block_bytes=block_bytes)
    assert directory.messages() == ["a", "b"]
    assert [letter.raw for letter in directory.dead_letters()] == [long]
    assert list(summary.reasons.values()) == [1]
    assert "max_record_bytes (500)" in directory.dead_letters()[0].reason


@pytest.mark.parametrize(
    "content",
    [
        line("x", level=None, **{"user-id": "secret"}),
        b"[" + line("x", **{"user-id": "secret"})[:-1],
        line("x" * 2000, **{"user-id": "secret"}),
    ],
)
def test_what_is_hidden_is_hidden_in_dead_letters_too(directory: Directory, content: bytes) -> None:
    rules = Rules(masked_fields=frozenset({"user-id"}))
    directory.convert(content, rules=rules, max_record_bytes=1000)
    assert directory.dead_letters()
    assert all(b"secret" not in letter.raw for letter in directory.dead_letters())


# --- names


def test_a_second_run_writes_the_same_files_with_the_same_bytes(directory: Directory) -> None:
    records = list(generate(400, bad_ratio=0.1, seed=3))
    name = directory.put(b"\n".join(records))
    first = directory.convert(name, block_bytes=50_000)
    tree = directory.tree()
    assert directory.convert(name, block_bytes=50_000).files == first.files
    assert directory.tree() == tree


def test_the_number_of_jobs_changes_nothing_in_the_files(directory: Directory) -> None:
    lines = list(generate(600, bad_ratio=0.05, seed=4))
    inputs = (
        b"\n".join(lines[:400]),
        b"[" + b",".join(map(as_json, lines[400:])) + b"]",
        gzip.compress(b"\n".join(lines)),
    )
    names = [directory.put(content, f"file-{n}") for n, content in enumerate(inputs)]
    one = directory.convert(*names, block_bytes=60_000)
    tree = directory.tree()
    two = Directory(directory.path / "two")
    two.path.mkdir()
    summary = two.convert(*names, block_bytes=60_000, jobs=2)
    assert two.tree() == tree
    assert (summary.records, summary.rows, summary.reasons) == (one.records, one.rows, one.reasons)
    assert summary.bytes_out == one.bytes_out


def as_json(text: bytes) -> bytes:
    try:
        json.loads(text)
    except ValueError:
        return b'"cut off"'
    return text


@pytest.mark.parametrize("jobs", [1, 2])
def test_equal_inputs_and_equal_blocks_all_arrive(directory: Directory, jobs: int) -> None:
    name = directory.put((line("a") + b"\n") * 6)
    other = directory.put(line("a") + b"\n", "other")
    directory.convert(name, other, name, jobs=jobs, block_bytes=2 * len(line("a")) + 2)
    assert directory.messages() == ["a"] * 13
    units = sorted(file.name for file in directory.root.rglob("*.parquet"))
    assert len({name.rpartition("-")[0] for name in units}) == 2
    assert Counter(name.rpartition("-")[2] for name in units) == Counter(
        ["0.parquet"] * 2 + [f"{n}.parquet" for n in range(1, 6)]
    )


SECOND_FIRST = """
import os
from pathlib import Path
from d2p_pipeline.ingest import task, workers
from d2p_pipeline.ingest.convert import convert
from d2p_pipeline.parquet.encode import Encoding
from d2p_pipeline.parquet.store import LocalStore
from d2p_pipeline.records.rules import Rules

read, (second, is_read) = task._read, os.pipe()

def reads(name, range_):
    if name == "first":
        os.read(second, 1)
    text = read(name, range_)
    if name == "second":
        os.write(is_read, b".")
    return text

task._read = reads
plan = task.Plan(Rules(), Encoding(), LocalStore(Path("out")), by_ingest_time=True)
assert convert(["first", "second"], plan, jobs=2, workers=workers.Workers(2, fork=True)).rows == 2
"""
"""The worker that has the first input reads it after the other one has read the second."""


def test_equal_blocks_are_numbered_in_the_order_of_the_inputs_whoever_is_sooner(directory: Directory) -> None:
    for hour, name in enumerate(["first", "second"]):
        os.utime(directory.put(line("a"), name), (3600 * hour, 3600 * hour))
    subprocess.run([sys.executable, "-c", SECOND_FIRST], cwd=directory.path, check=True, timeout=60)
    places = sorted((file.parent.name, file.name.rpartition("-")[2]) for file in directory.root.rglob("*.parquet"))
    assert places == [("hour=00", "0.parquet"), ("hour=01", "1.parquet")]


@pytest.mark.parametrize("change", ["other", "shorter", "gone"])
def test_an_input_that_changes_while_it_is_converted_fails(directory: Directory, change: str) -> None:
    name = directory.put(line("a") + b"\n")
    with Path(name).open("rb", buffering=0) as file:
        [block] = ranges(Content(file), size=1000, longest=1000)
    assert isinstance(block, Range)
    if change == "gone":
        Path(name).unlink()
    else:
        directory.put(line("b") + b"\n" if change == "other" else b"\n")
    with Converter(Plan(Rules(), Encoding(), LocalStore(directory.root))) as converter:
        result = converter.convert(Task(name, block, block.size, (), 0, 0), b"", lambda batch: lambda: 0)
    assert isinstance(result, Failure)
    assert not result.fatal
    assert ("cannot be read any more" if change == "gone" else "it changed while it was converted") in result.reason
    assert not directory.root.exists()


def test_an_input_converted_again_among_others_overwrites_its_own_files(directory: Directory) -> None:
    first, second = directory.put(line("a"), "first"), directory.put(line("b"), "second")
    directory.convert(first)
    directory.convert(second, first)
    assert directory.messages() == ["a", "b"]


def test_partitions_of_ingest_time_are_those_of_the_inputs_last_change(directory: Directory) -> None:
    name = directory.put(line("a"))
    os.utime(name, (1_700_000_000, 1_700_000_000))
    directory.convert(name, by_ingest_time=True)
    [path] = directory.root.rglob("*.parquet")
    assert "year=2023/month=11/day=14/hour=22" in str(path)


# --- the user's step and the HMAC

TRANSFORMS = "d2p_pipeline_tests.records.transforms"


def test_rows_that_the_users_function_drops_are_neither_rows_nor_dead_letters(directory: Directory) -> None:
    name = directory.put(b"\n".join([line("a"), line("b", level="debug"), b"bad"]))
    plan = Plan(Rules(transform=f"{TRANSFORMS}:without_debug"), Encoding(), LocalStore(directory.root))
    summary = convert([name], plan)
    assert (summary.records, summary.rows, summary.dropped, summary.dead_letters) == (3, 1, 1, 1)
    assert directory.messages() == ["a"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_function_that_fails_stops_the_run(directory: Directory, jobs: int) -> None:
    plan = Plan(Rules(transform=f"{TRANSFORMS}:doubled"), Encoding(), LocalStore(directory.root))
    summary = convert([directory.put(line("a"))] * 4, plan, jobs=jobs)
    assert summary.stopped is not None
    assert "doubled" in summary.stopped
    assert summary.records == 0
    assert not directory.root.exists()


def test_rows_are_signed_where_there_is_a_key(directory: Directory) -> None:
    directory.convert(line("a"), rules=Rules(hmac_key=b"key"))
    with duckdb.connect() as connection:
        query = f"SELECT hmac FROM read_parquet('{directory.root}/**/*.parquet')"
        assert all(len(value) == 64 for (value,) in connection.execute(query).fetchall())


# --- what stops a run


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_root_that_cannot_be_written_stops_the_run_and_nothing_is_pretended(directory: Directory, jobs: int) -> None:
    directory.put(b"", "file")
    directory.root = directory.path / "file" / "out"
    name = directory.put(b"\n".join(line(str(n)) for n in range(100)))
    summary = convert([name] * 3, Plan(Rules(), Encoding(), LocalStore(directory.root)), jobs=jobs, block_bytes=2000)
    assert summary.stopped is not None
    assert "cannot write" in summary.stopped
    assert str(directory.root.parent) in summary.stopped
    assert (summary.records, summary.rows, summary.files) == (0, 0, 0)


def test_rejected_records_are_counted_when_they_are_not_kept(directory: Directory) -> None:
    plan = Plan(Rules(), Encoding(), LocalStore(directory.root), keep_dead_letters=False)
    assert convert([directory.put(b"nonsense")], plan).dead_letters == 1
    assert not directory.root.exists()


# --- the predecessors' losses


@pytest.mark.parametrize(("records", "keys"), [(1000, 60), (100, 1), (1, 1)])
def test_small_inputs_arrive(directory: Directory, records: int, keys: int) -> None:
    lines = [line(str(n), **{"business-capability": f"k{n % keys}"}) for n in range(records)]
    assert directory.convert(b'{"logs":[' + b",".join(lines) + b"]}").rows == records
    assert directory.messages() == sorted(map(str, range(records)))


def test_every_key_arrives_whole_however_many_records_it_has(directory: Directory) -> None:
    counts = {"A": 1001, "B": 1000, "C": 998}
    lines = [line(f"{key}{n}", **{"business-capability": key}) for key, count in counts.items() for n in range(count)]
    assert directory.convert(b'{"logs":[' + b",".join(lines) + b"]}", block_bytes=100_000).rows == 2999


def test_memory_grows_with_jobs_and_limit_and_the_default_fits() -> None:
    assert memory_needed(4, block_for(1 << 30)) <= 1 << 30
    assert memory_needed(1, block_for(256 << 20)) <= 256 << 20
    assert memory_needed(16, block_for(5 << 30)) <= 5 << 30
