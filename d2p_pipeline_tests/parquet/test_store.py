import os

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


def test_a_scan_lists_finished_files_below_a_directory(tmp_path) -> None:
    store = LocalStore(tmp_path)
    for path in ("k=b/f.parquet", "k=a/h=1/f.parquet", "k=ab/f.parquet"):
        store.write(path, b"")
    (tmp_path / "k=a" / ".f.parquet").write_bytes(b"")
    (tmp_path / "k=a" / "f.txt").write_bytes(b"")
    assert store.scan() == [str(tmp_path / path) for path in ("k=a/h=1/f.parquet", "k=ab/f.parquet", "k=b/f.parquet")]
    assert store.scan("k=a") == [str(tmp_path / "k=a/h=1/f.parquet")]
    assert store.scan("k=none") == []
