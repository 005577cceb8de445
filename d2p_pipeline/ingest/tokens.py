"""Bearer tokens: those of the settings and those of a file, which may change while the receiver runs.

To rotate without a restart: write both tokens into the file, move the clients over, write the new one alone.
"""

import hmac
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the file is looked at."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")


class TokenFileError(Exception):
    """The file of tokens cannot be used."""


def read(path: Path) -> list[str]:
    """The tokens of a file, one a line; blank lines and lines that begin with # are passed over. TokenFileError."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TokenFileError(f"{path}: cannot be read: {error}") from error
    tokens = [line for line in lines if line and not line.startswith("#")]
    wrong = [number for number, line in enumerate(lines, 1) if line in tokens and not _TOKEN.fullmatch(line)]
    if wrong:
        raise TokenFileError(f"{path}: line {wrong[0]} is no token; letters, digits and - . _ ~ + / = are (RFC 6750)")
    if not tokens:
        raise TokenFileError(f"{path}: holds no token; to let everyone write, leave tokens_file out")
    return tokens


class Tokens:
    """What requests are checked against. An unusable file keeps the tokens it had before, which is logged."""

    def __init__(self, fixed: Sequence[str] = (), path: Path | None = None) -> None:
        self._fixed = list(fixed)
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._next_look = 0.0
        self._known: list[bytes] = _headers(self._fixed)
        if path:
            self._stamp = _stamp(path)
            self._known = _headers([*self._fixed, *read(path)])
            self._next_look = time.monotonic() + LOOK_SECONDS

    def __bool__(self) -> bool:
        return bool(self._known)

    def allow(self, authorization: str) -> bool:
        """Whether the header carries one of the tokens. Each is compared, in constant time: the delay tells nothing."""
        if self._path and time.monotonic() >= self._next_look:
            self._look(self._path)
        scheme, _, credentials = authorization.partition(" ")
        given = f"{scheme.lower()} {credentials.strip()}".encode(errors="replace")
        matches = [hmac.compare_digest(given, token) for token in self._known]
        return any(matches)

    def _look(self, path: Path) -> None:
        self._next_look = time.monotonic() + LOOK_SECONDS
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._known = _headers([*self._fixed, *read(path)])
        except TokenFileError as error:
            log.error("tokens stay as they were: %s", error)  # noqa: TRY400  # the reason is the whole story
        else:
            log.info("tokens read anew from %s", path)


def _headers(tokens: Sequence[str]) -> list[bytes]:
    return [f"bearer {token}".encode() for token in tokens]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
