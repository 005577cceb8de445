import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from d2p_pipeline.parquet.store import LocalStore


def everything(root) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_written_file_is_there_under_its_path_and_nothing_beside_it(tmp_path) -> None:
    LocalStore(tmp_path / "new").write("a=1/b=2/f.parquet", b"data")
    assert everything(tmp_path) == ["new/a=1/b=2/f.parquet"]
    assert (tmp_path / "new/a=1/b=2/f.parquet").read_bytes() == b"data"


def test_writing_again_replaces_the_file(tmp_path) -> None:
    store = LocalStore(tmp_path)
    store.write("f.parquet", b"longer data")
    store.write("f.parquet", b"data")
    assert (tmp_path / "f.parquet").read_bytes() == b"data"


def test_a_file_is_as_readable_as_the_umask_allows(tmp_path) -> None:
    LocalStore(tmp_path).write("f.parquet", b"data")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "f.parquet").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("path", ["/f", "../f", "a/../../f"])
def test_no_path_leads_out_of_the_root(tmp_path, path) -> None:
    with pytest.raises(ValueError, match="below the root"):
        LocalStore(tmp_path).write(path, b"data")


def test_an_error_names_the_file_and_leaves_nothing(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file") as caught:
        LocalStore(tmp_path).write("file/f.parquet", b"data")
    assert str(caught.value.filename).startswith(str(tmp_path))
    (tmp_path / "taken.parquet").mkdir()
    with pytest.raises(OSError, match=r"taken\.parquet"):
        LocalStore(tmp_path).write("taken.parquet", b"data")
    assert everything(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")  # noqa: PTH110
def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "d2p_pipeline.parquet.store.os.fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    )
    with pytest.raises(OSError, match=r"No space left.*f\.parquet"):
        LocalStore(tmp_path).write("f.parquet", b"data")
    assert everything(tmp_path) == []


def struck_writer(root: Path, blow: str) -> "subprocess.Popen[bytes]":
    """A process that is struck when it has written all but not renamed it."""
    program = f"""
        import os, signal
        from pathlib import Path
        from d2p_pipeline.parquet.store import LocalStore

        rename = os.replace
        def strike(*names):
            os.kill(os.getpid(), signal.{blow})
            rename(*names)
        os.replace = strike
        LocalStore(Path({str(root)!r})).write("f.parquet", b"longer data of the other")
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])


def test_what_a_killed_writer_left_is_taken_over(tmp_path) -> None:
    with struck_writer(tmp_path, "SIGKILL") as killed:
        assert killed.wait(60) == -signal.SIGKILL
    assert everything(tmp_path) == [".f.parquet.tmp"]
    assert LocalStore(tmp_path).scan() == []
    LocalStore(tmp_path).write("f.parquet", b"data")
    assert everything(tmp_path) == ["f.parquet"]
    assert (tmp_path / "f.parquet").read_bytes() == b"data"


def test_a_paused_writer_is_neither_waited_for_nor_disturbed(tmp_path) -> None:
    with struck_writer(tmp_path, "SIGSTOP") as paused:
        os.waitpid(paused.pid, os.WUNTRACED)
        LocalStore(tmp_path).write("f.parquet", b"data")
        assert (tmp_path / "f.parquet").read_bytes() == b"data"
        assert everything(tmp_path) == [".f.parquet.tmp", "f.parquet"]
        paused.send_signal(signal.SIGCONT)
        assert paused.wait(60) == 0
    assert everything(tmp_path) == ["f.parquet"]
    assert (tmp_path / "f.parquet").read_bytes() == b"longer data of the other"


def test_writers_of_one_file_at_once_leave_one_whole_file(tmp_path) -> None:
    versions = [bytes([number]) * 100_000 for number in range(4)]

    def write(data: bytes) -> None:
        for _ in range(25):
            LocalStore(tmp_path).write("f.parquet", data)
            assert (tmp_path / "f.parquet").read_bytes() in versions

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, versions))
    assert everything(tmp_path) == ["f.parquet"]


def test_a_scan_lists_finished_files_below_a_directory(tmp_path) -> None:
    store = LocalStore(tmp_path)
    for path in ("k=b/f.parquet", "k=a/h=1/f.parquet", "k=ab/f.parquet"):
        store.write(path, b"")
    (tmp_path / "k=a" / ".f.parquet").write_bytes(b"")
    (tmp_path / "k=a" / "f.txt").write_bytes(b"")
    assert store.scan() == [str(tmp_path / path) for path in ("k=a/h=1/f.parquet", "k=ab/f.parquet", "k=b/f.parquet")]
    assert store.scan("k=a") == [str(tmp_path / "k=a/h=1/f.parquet")]
    assert store.scan("k=none") == []


def test_a_file_is_read_back_and_one_that_is_not_there_is_named(tmp_path) -> None:
    LocalStore(tmp_path).write("a=1/f.zst", b"data")
    assert LocalStore(tmp_path).read("a=1/f.zst") == b"data"
    with pytest.raises(FileNotFoundError, match=r"g\.zst"):
        LocalStore(tmp_path).read("a=1/g.zst")
