"""Files behind other URLs than a bucket's: in memory through fsspec, on disk through Arrow."""

import io
import secrets
import threading
from pathlib import Path

import fsspec
import polars as pl
import pytest

from d2p_pipeline.parquet.errors import PermanentStoreError
from d2p_pipeline.parquet.filesystem import FilesystemStore


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}" if request.param == "file" else f"memory://{secrets.token_hex(8)}/files"


def content(url: str) -> bytes:
    filesystem, path = fsspec.url_to_fs(url)
    return filesystem.cat_file(path)


def everything_below(url: str) -> list[str]:
    filesystem, path = fsspec.url_to_fs(url)
    return filesystem.find(path)


def test_a_file_is_read_back_and_one_that_is_not_there_is_named(url: str) -> None:
    store = FilesystemStore(url)
    store.write("_dead_letters/capability=a/x.ndjson.zst", b"data")
    assert store.read("_dead_letters/capability=a/x.ndjson.zst") == b"data"
    store.remove("_dead_letters/capability=a/x.ndjson.zst")
    with pytest.raises(PermanentStoreError, match=r"cannot read .*x\.ndjson\.zst"):
        store.read("_dead_letters/capability=a/x.ndjson.zst")


def test_files_are_written_replaced_and_found(url: str) -> None:
    store = FilesystemStore(url)
    paths = ["capability=a b%2F😀/hour=01/x.parquet", "capability=a/y.parquet"]
    for data in (b"first", b"second, and longer", b"last"):
        for path in [*paths, "capability=a/_passed_over.parquet", "capability=ab.parquet"]:
            store.write(path, data)
            assert content(f"{url}/{path}") == data
    assert store.scan() == sorted(f"{url}/{path}" for path in [*paths, "capability=ab.parquet"])
    assert store.scan("capability=a") == [f"{url}/{paths[1]}"]
    assert store.scan("capability=none") == []
    assert len(everything_below(url)) == 4


def test_a_check_leaves_nothing_behind(url: str) -> None:
    FilesystemStore(url).check()
    assert everything_below(url) == []


def test_polars_reads_what_was_written(tmp_path: Path) -> None:
    store = FilesystemStore(f"file://{tmp_path}")
    pl.DataFrame({"x": [1, 2]}).write_parquet(file := io.BytesIO())
    store.write("capability=a b/x.parquet", file.getvalue())
    assert pl.scan_parquet(store.scan(), storage_options=store.storage_options(), glob=False).collect().height == 2


def test_a_reader_never_sees_part_of_a_file(tmp_path: Path) -> None:
    store = FilesystemStore(f"file://{tmp_path}")
    store.write("x.parquet", b"old")
    seen: list[bytes] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            seen.append((tmp_path / "x.parquet").read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    new = bytes(8 * 2**20)
    for data in (new, b"old") * 10:
        store.write("x.parquet", data)
    ended.set()
    reader.join()
    assert {len(data) for data in seen} <= {3, len(new)}


def test_a_file_in_the_way_is_a_permanent_error(tmp_path: Path) -> None:
    store = FilesystemStore(f"file://{tmp_path}")
    (tmp_path / "capability=a").write_bytes(b"a file in the way")
    with pytest.raises(PermanentStoreError, match=r"capability=a/x\.parquet"):
        store.write("capability=a/x.parquet", b"data")


@pytest.mark.parametrize("url", ["gopher://user:hunter2@host/files?key=hunter2", "gs://bucket/%zz"])
def test_a_url_that_nothing_can_open_is_an_error_without_its_secrets(url: str) -> None:
    with pytest.raises(PermanentStoreError, match="correct the URL") as caught:
        FilesystemStore(url)
    assert "hunter2" not in str(caught.value)
