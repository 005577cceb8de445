"""Files behind any other URL: what Arrow reaches itself (`gs://`, `abfs://`, `hdfs://`), then what an installed fsspec
package does (`memory://`, `sftp://`, …).

A file is written under a name that `scan` passes over and then renamed, because leaving one of Arrow's streams by an
exception ends the file instead of dropping it, and because Azure shows an empty file from the moment one is opened. Arrow's
filesystems neither rename everywhere nor tell errors apart well: where Azure has no rename, a copy and a deletion stand in.
"""

import contextlib
import posixpath
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, PyFileSystem

from d2p_pipeline.parquet.errors import PermanentStoreError, TransientStoreError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WITHOUT_DIRECTORIES = ("abfs", "gcs")
"""Here a directory is made by the name of a file, and making one by itself could make a bucket."""


class FilesystemStore:
    """The directory that a URL names. Raises PermanentStoreError for a missing right or directory, TransientStoreError for
    whatever else Arrow tells; what is wrong with the URL comes out when the store is opened.
    """

    def __init__(self, url: str) -> None:
        # Both may hold secrets.
        self._url = re.sub(r"(://[^:/@]*):[^/@]*@", r"\1@", url.partition("?")[0]).rstrip("/")
        self._filesystem, root = _open(url, self._url)
        self._root = root.rstrip("/")

    def write(self, path: str, data: "Buffer", metadata: Mapping[str, str] | None = None) -> None:
        """Make `data` as durable under `path` as the service makes it; on a local disk LocalStore does better."""
        target = f"{self._root}/{path}"
        directory = posixpath.dirname(target)
        temporary = f"{directory}/.{secrets.token_hex(8)}.tmp"
        with _telling("write", f"{self._url}/{path}"):
            if self._filesystem.type_name not in _WITHOUT_DIRECTORIES:
                self._filesystem.create_dir(directory, recursive=True)
            try:
                with self._filesystem.open_output_stream(temporary) as file:
                    file.write(data)
                self._rename(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._filesystem.delete_file(temporary)
                raise

    def read(self, path: str) -> bytes:
        """The content of a file."""
        with (
            _telling("read", f"{self._url}/{path}"),
            self._filesystem.open_input_stream(f"{self._root}/{path}", compression=None) as file,
        ):
            return file.read()

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        with _telling("remove", f"{self._url}/{path}"):
            target = f"{self._root}/{path}"
            if self._filesystem.get_file_info(target).type != FileType.NotFound:
                self._filesystem.delete_file(target)

    def scan(self, prefix: str = "") -> list[str]:
        """URL of every Parquet file below the directory `prefix`, sorted."""
        directory = f"{self._root}/{prefix.strip('/')}".rstrip("/")
        with _telling("list", f"{self._url}/{prefix}"):
            found = self._filesystem.get_file_info(FileSelector(directory, recursive=True, allow_not_found=True))
        files = [info for info in found if info.type == FileType.File and _is_parquet(info.base_name)]
        return sorted(f"{self._url}/{info.path.removeprefix(self._root).lstrip('/')}" for info in files)

    def storage_options(self) -> None:
        """Readers find their credentials where Arrow does: in the environment."""
        return

    def check(self) -> None:
        """Prove that files can be written and deleted."""
        path = f"_d2p/check-{secrets.token_hex(8)}"
        self.write(path, b"d2p")
        with _telling("delete", f"{self._url}/{path}"):
            self._filesystem.delete_file(f"{self._root}/{path}")

    def _rename(self, source: str, target: str) -> None:
        try:
            self._filesystem.move(source, target)
        except NotImplementedError:
            self._filesystem.copy_file(source, target)
            self._filesystem.delete_file(source)


def _open(url: str, shown: str) -> tuple[FileSystem, str]:
    try:
        return FileSystem.from_uri(url)
    except pa.ArrowInvalid as of_arrow:
        import fsspec

        try:
            filesystem, root = fsspec.url_to_fs(url)
        except (ValueError, ImportError) as error:
            reason = f"{of_arrow}; {error}".replace(url, shown)
            raise PermanentStoreError("open", shown, type(error).__name__, None, reason, "correct the URL") from None
        return PyFileSystem(FSSpecHandler(filesystem)), root


@contextlib.contextmanager
def _telling(doing: str, target: str) -> Iterator[None]:
    try:
        yield
    except (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise PermanentStoreError(doing, target, type(error).__name__, None, str(error)) from error
    except (pa.ArrowInvalid, NotImplementedError) as error:
        raise PermanentStoreError(doing, target, type(error).__name__, None, str(error)) from error
    except OSError as error:
        raise TransientStoreError(doing, target, type(error).__name__, None, str(error)) from error


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith((".", "_"))
