import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from d2p_pipeline.cli.app import app
from d2p_pipeline.ingest.convert import block_for
from d2p_pipeline.ingest.generator import generate
from d2p_pipeline.ingest.workers import cores

D2P = [sys.executable, "-m", "d2p_pipeline.cli.main"]
EAGER = """
import sys
from d2p_pipeline.cli.main import main
from d2p_pipeline.ingest import workers

class Told(workers.Workers):
    def __init__(self, count, *, fork=False):
        print("after" if "typer" in sys.modules else "before", "forked" if fork else "spawned", file=sys.stderr)
        super().__init__(count, fork=fork)

workers._WORTH = 0
workers.Workers = Told
main()
"""
EAGER_D2P = [sys.executable, "-c", EAGER]
"""Takes any file for a large one, and says how workers are started, and whether before the command is read."""

LIMIT = 384 << 20


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with nothing configured."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("D2P_")]:
        monkeypatch.delenv(name)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def put(name: str, lines: list[bytes]) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines))
    return name


def rows(root: str = "out") -> int:
    query = f"SELECT count(*) FROM read_parquet('{root}/**/*.parquet', hive_partitioning = true)"
    with duckdb.connect() as connection:
        [count] = connection.execute(query).fetchone() or [0]
        return count


def temporary_files() -> list[Path]:
    return [path for path in Path("out").rglob(".*") if path.is_file()]


def test_files_and_patterns_become_rows() -> None:
    lines = list(generate(300))
    put("logs/a.ndjson", lines[:100])
    put("logs/b.ndjson", lines[100:200])
    put("logs/a[1].ndjson", lines[200:250])
    put("logs/below/c/d.ndjson", lines[250:])
    result = run("logs/[ab].ndjson", "logs/a[1].ndjson", "logs/be*/**", "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert rows() == 300
    assert "300" in result.stdout


def test_the_summary_as_json_accounts_for_everything() -> None:
    name = put("a.ndjson", list(generate(1000, bad_ratio=0.1)))
    put("empty", [])
    result = run(name, "empty", "miss\udcffing", "--json", "--out", "there", "--jobs", 1)  # named in no UTF-8
    assert result.exit_code == 1
    summary = json.loads(result.stdout)
    assert (summary["inputs"], summary["empty"], list(summary["failed"])) == (3, 1, ["miss\udcffing"])
    assert summary["records"] == 1000 == summary["rows"] + summary["dead_letters"]
    assert sum(summary["reasons"].values()) == summary["dead_letters"] == 100
    assert summary["rows"] == rows("there")
    files = list(Path("there").rglob("*.parquet"))
    assert summary["files"] == len(files)
    assert summary["bytes_out"] == sum(file.stat().st_size for file in files)
    assert summary["bytes_in"] == Path(name).stat().st_size
    assert "miss\\udcffing: it cannot be read: No such file" in result.stderr
    assert "100 records were rejected; they are kept in there/_dead_letters" in result.stderr
    letters = [
        json.loads(text) for file in Path("there/_dead_letters").iterdir() for text in file.read_text().splitlines()
    ]
    assert len(letters) == 100
    assert {"reason", "stage", "received_at", "batch"} <= set(letters[0])


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input_is_read_where_no_file_is_named(arguments: list[str]) -> None:
    data = b"\n".join(generate(50))
    subprocess.run([*D2P, "convert", *arguments], input=data, check=True, capture_output=True)
    assert rows() == 50


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_may_be_a_file(name: str) -> None:
    with Path(put("in.ndjson", list(generate(50)))).open("rb") as file:
        subprocess.run([*EAGER_D2P, "convert", name], stdin=file, check=True, capture_output=True)
    assert rows() == 50


def test_settings_come_from_flags_the_environment_and_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    name = put("a.ndjson", list(generate(10)))
    Path("d2p.json").write_text('{"WriterFilePath": "from-file", "writer_compression_type": "zstd"}')
    assert run(name, "--config", "d2p.json").exit_code == 0
    assert rows("from-file") == 10
    [file, *_] = Path("from-file").rglob("*.parquet")
    assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"
    monkeypatch.setenv("D2P_WRITER_FILE_PATH", "from-env")
    assert run(name, "--config", "d2p.json").exit_code == 0
    assert rows("from-env") == 10


@pytest.mark.parametrize(
    "arguments",
    [
        ("a", "--memory-limit", "much"),
        ("a", "--memory-limit", "10MiB"),
        ("a", "--jobs", 0),
        ("a", "--config", "missing.json"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[object, ...]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("setting", ["RECORD_TYPE=binary", "WRITER_COMPRESSION_TYPE=rar"])
def test_settings_that_cannot_work_exit_2(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = setting.split("=")
    monkeypatch.setenv(f"D2P_{name}", value)
    result = run(put("a.ndjson", [b"{}"]))
    assert result.exit_code == 2
    assert value in result.stderr


def test_jobs_that_memory_is_too_little_for_are_left_out() -> None:
    result = run(put("a.ndjson", list(generate(10))), "--jobs", 50)
    assert result.exit_code == 0
    assert "of 50 jobs" in result.stderr


def test_workers_that_are_started_at_once_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2p_pipeline.ingest.workers._WORTH", 0)
    names = [put(f"{name}.ndjson", list(generate(100, seed=seed))) for seed, name in enumerate("abc")]
    result = run(*names, "--jobs", 2)
    assert result.exit_code == 0, result.output
    assert rows() == 300


def test_workers_that_were_started_at_once_end_when_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2p_pipeline.ingest.workers._WORTH", 0)
    name = put("a.ndjson", list(generate(100)))
    monkeypatch.setenv("D2P_RECORD_TYPE", "binary")
    before = children(os.getpid())
    assert run(name, "--jobs", 2).exit_code == 2
    assert children(os.getpid()) == before


@pytest.mark.parametrize("jobs", [1, cores(), cores() + 1])
def test_workers_that_were_started_before_the_command_was_read_convert(jobs: int) -> None:
    name = put("a.ndjson", list(generate(100)))
    command = [*EAGER_D2P, "convert", name, "--jobs", str(jobs)]
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    assert rows() == 100
    # More than were started take the place of those.
    assert done.stderr.splitlines() == ["before forked", *(["after spawned"] if jobs > cores() else [])]


def test_workers_that_were_started_for_a_command_that_cannot_be_read_end_with_it() -> None:
    put("a.ndjson", list(generate(100)))
    command = [*EAGER_D2P, "convert", "a.ndjson", "--no-such-option", "no name" * 1000]
    # Standard error is theirs too: it ends when all of them have.
    result = subprocess.run(command, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 2
    assert b"--no-such-option" in result.stderr


def test_a_root_that_cannot_be_written_exits_1_and_says_so() -> None:
    put("out", [b"a file"])
    result = run(put("a.ndjson", list(generate(10))), "--jobs", 1)
    assert result.exit_code == 1
    assert "cannot write" in result.stderr


def test_a_terminal_shows_a_progress_bar() -> None:
    terminal, its_end = pty.openpty()
    name = put("a.ndjson", list(generate(100)))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([*D2P, "convert", name], stderr=its_end, stdout=subprocess.DEVNULL, check=True, env=environment)
    os.close(its_end)
    shown = b""
    while b"kB" not in shown:
        shown += os.read(terminal, 65536)  # OSError when all is read
    os.close(terminal)


def test_neither_dagster_nor_pandera_is_imported_for_good_records() -> None:
    name = put("a.ndjson", list(generate(10)))
    program = (
        "import sys; from typer.testing import CliRunner; from d2p_pipeline.cli.app import app\n"
        f"assert CliRunner().invoke(app, ['convert', '{name}']).exit_code == 0\n"
        "print([module for module in ('dagster', 'pandera') if module in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"[]\n"


# --- processes that end before their time


@contextmanager
def midway(*arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A conversion of standard input that has converted a part of it and waits for more."""
    lines = list(generate(1000))
    block = b"".join(text + b"\n" for text in lines)
    command = [*D2P, "convert", "--memory-limit", str(LIMIT), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin
        # Two workers and what is cut next hold three blocks, so that a fourth is taken only after one is finished.
        for _ in range(-(-5 * block_for(LIMIT) // len(block))):
            process.stdin.write(block)
        process.stdin.flush()
        yield process


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def assert_whole() -> None:
    assert temporary_files() == []
    files = list(Path("out").rglob("*.parquet"))
    assert files
    assert all(pq.ParquetFile(file).metadata.num_rows for file in files)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_leaves_whole_files_only_and_exits_130(jobs: str) -> None:
    with midway("--jobs", jobs) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert b"Interrupted" in errors
    assert b"Traceback" not in errors
    assert_whole()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_whole_files_when_what_started_them_is_killed(number: signal.Signals) -> None:
    with midway("--jobs", "2") as process:
        process.send_signal(number)
        # The workers hold standard error, too: it ends when they have ended.
        _, errors = process.communicate()
    assert process.returncode == -number
    assert errors == b""
    assert_whole()


def test_a_worker_that_is_killed_ends_the_run_with_exit_code_1() -> None:
    with midway("--jobs", "2") as process:
        [loader] = children(process.pid)
        workers = children(loader)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        out, errors = process.communicate()
    assert len(workers) == 2
    assert process.returncode == 1, (out, errors)
    assert b"signal 9" in errors
