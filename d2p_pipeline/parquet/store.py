"""Where files go. A file is there whole and durable, or not at all; writing it again replaces it.

Paths are relative to the store's root, with `/`, as parquet/layout.py makes them.
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Store(Protocol):
    """A place for Parquet files. What fails raises OSError or StoreError (parquet/errors.py), which name the file."""

    def write(self, path: str, data: "Buffer", metadata: Mapping[str, str] | None = None) -> None:
        """Make `data` durable under `path`; `metadata` goes with it where files can carry any."""
        ...

    def read(self, path: str) -> bytes:
        """The content of a file."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file for good, if it is there."""
        ...

    def scan(self, prefix: str = "") -> list[str]:
        """Every Parquet file below the directory `prefix`, sorted, as paths or URLs that readers take."""
        ...

    def storage_options(self) -> dict[str, str] | None:
        """What Polars needs beside the URLs, secrets included; good for minutes, so ask for each scan."""
        ...

    def check(self) -> None:
        """Prove that files can be written; leaves nothing behind."""
        ...


class LocalStore:
    """A directory. Readers see no partial file: data is written beside the target under a name that begins with a dot
    and does not end in `.parquet`, then renamed. What a killed writer leaves is taken over by the next one of its file."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, path: str, data: "Buffer", metadata: Mapping[str, str] | None = None) -> None:
        target = self._root / _inside(path)
        try:
            _make_directory(target.parent)
            with _temporary(target) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, target)  # noqa: PTH105 (fault tests strike at os.replace)
            _sync_directory(target.parent)
        except OSError as error:
            # A full disk does not tell which file it refused.
            if error.filename is None:
                raise OSError(error.errno, error.strerror, str(target)) from error
            raise

    def read(self, path: str) -> bytes:
        return (self._root / _inside(path)).read_bytes()

    def remove(self, path: str) -> None:
        target = self._root / _inside(path)
        try:
            target.unlink()
        except FileNotFoundError:
            return
        _sync_directory(target.parent)

    def scan(self, prefix: str = "") -> list[str]:
        directory = self._root / _inside(prefix)
        return sorted(str(file) for file in directory.rglob("*.parquet") if not file.name.startswith((".", "_")))

    def storage_options(self) -> None:
        return

    def check(self) -> None:
        path = f".check-{secrets.token_hex(8)}"
        self.write(path, b"")
        (self._root / path).unlink()


def _inside(path: str) -> PurePosixPath:
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{path!r} is not a path below the root")
    return relative


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[IO[bytes]]:
    """An empty file beside `target` to be renamed to it; when that fails, it is removed.

    Its name depends on the target's only, so that a writer finds what a killed one left. Its lock, which ends with its
    process, tells that from the file of another live writer, which is left alone.
    """
    file = (target.parent / f".{target.name}.tmp").open("ab")
    if not _is_mine(file):
        file.close()
        file = (target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp").open("xb")
    with file:
        file.truncate(0)
        try:
            yield file
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _is_mine(file: IO[bytes]) -> bool:
    """Lock a file; false when another process has it, or has renamed it since it was opened."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())
    except OSError:  # taken, renamed, or a file system without locks
        return False


def _make_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    if directory.parent != directory:
        _make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
