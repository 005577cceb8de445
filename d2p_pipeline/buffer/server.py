"""How `redis` talks to its server: calls in one round trip, scripts loaded where they are missing, the protocol's own errors.

Also walks through the names that exist, a page at a time; on a Cluster, node by node.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from redis import Redis
from redis.cluster import RedisCluster
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from d2p_pipeline.buffer.protocol import BufferFullError, BufferUnavailableError, ForeignValueError

Client = Redis | RedisCluster
_T = TypeVar("_T")

PAGE = 1000
"""Members, names or commands per round trip of whatever goes through many of them."""
_STEP = 250
"""Names per step of a walk that somebody counts the milliseconds of."""

_SCRIPTS = {path.stem: path.read_text() for path in (Path(__file__).parent / "scripts").glob("*.lua")}
SHAS = {name: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in _SCRIPTS.items()}
"""What Redis calls each script."""
# A script is missing where the server forgot it again as soon as it was loaded: it died meanwhile.
_UNAVAILABLE = (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError, ClusterDownError, NoScriptError)
_REFUSALS = re.compile(r"\b(MISCONF|NOREPLICAS|READONLY|BUSY)\b")
"""What a server says that takes no writes now; from within a script it says so as text alone."""


class Call(NamedTuple):
    """One script call, or one plain command when `keys` is None."""

    name: str
    keys: Sequence[bytes | str] | None
    args: Sequence[Any]


class Server:
    """A Redis server, Sentinel group or Cluster. Raises `BufferFullError`, `BufferUnavailableError`."""

    def __init__(self, client: Client) -> None:
        self._client: Any = client  # redis-py's annotations are too loose to check against
        self.is_cluster = isinstance(client, RedisCluster)
        self._cursors: dict[str, int | None] = {}
        self.walked = False
        """Whether `walk_lists` has seen every name."""

    def one(self, command: str, *args: Any) -> Any:
        """The reply to one command."""
        return self.run([Call(command, None, args)])[0]

    def run(self, calls: Sequence[Call], *, errors: bool = False) -> list[Any]:
        """Send calls, a page in one round trip; `errors`: return them."""
        if len(calls) > PAGE:
            return [reply for page in pages(calls) for reply in self.run(page, errors=errors)]
        if not calls:
            return []
        replies = _translated(lambda: self._send(calls))
        if missed := [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]:
            _translated(self._load)
            # Of a Cluster only some nodes may have forgotten them, and what the others said is not said twice.
            again = _translated(lambda: self._send([calls[place] for place in missed]))
            for place, reply in zip(missed, again, strict=True):
                replies[place] = reply
        for reply in replies:
            if isinstance(reply, Exception) and not errors:
                raise translate(reply) from reply
        return replies

    def _send(self, calls: Sequence[Call]) -> list[Any]:
        pipe = self._client.pipeline(transaction=False)
        for call in calls:
            if call.keys is None:
                pipe.execute_command(*call.name.split(" "), *call.args)
            else:
                pipe.execute_command("EVALSHA", SHAS[call.name], len(call.keys), *call.keys, *call.args)
        return pipe.execute(raise_on_error=False)

    def _load(self) -> None:
        for text in _SCRIPTS.values():
            self._client.script_load(text)

    def names(self, pattern: str) -> Iterator[bytes]:
        """Every name that matches; costs what exists."""
        found: Iterator[bytes] = self._client.scan_iter(match=pattern, count=PAGE)
        while page := _translated(lambda: list(islice(found, PAGE))):
            yield from page

    def walk_lists(self) -> Iterator[list[bytes]]:
        """Pages of the names of lists, from where the last call stopped to the end of the last node's names."""
        nodes: list[Any] = self._client.get_primaries() if self.is_cluster else [None]
        for node in nodes:
            place = node.name if node else ""
            options = {"target_nodes": node} if node else {}
            while (cursor := self._cursors.get(place, 0)) is not None:
                after, names = self._scan(cursor, options)
                self._cursors[place] = after or None
                if not after and node is nodes[-1]:
                    self._cursors, self.walked = {}, True
                    yield names
                    return
                yield names

    def _scan(self, cursor: int, options: dict[str, Any]) -> tuple[int, list[bytes]]:
        after, names = _translated(lambda: self._client.scan(cursor, count=_STEP, _type="list", **options))
        # A Cluster's client tells the cursor by node, and one node was asked.
        return (next(iter(after.values())) if self.is_cluster else after), names

    def close(self) -> None:
        self._client.close()


def pages(items: Iterable[_T]) -> Iterator[list[_T]]:
    """Cut into lists of at most `PAGE`."""
    iterator = iter(items)
    while page := list(islice(iterator, PAGE)):
        yield page


def _translated(action: Callable[[], _T]) -> _T:
    try:
        return action()
    except RedisError as error:
        raise translate(error) from error


def translate(error: Exception) -> Exception:
    """What an error that Redis replied with means to a buffer; itself where it means nothing of that."""
    # Inside a script or a transaction the error arrives as text.
    if isinstance(error, OutOfMemoryError) or (isinstance(error, ResponseError) and "OOM command" in str(error)):
        return BufferFullError("Redis is out of memory (maxmemory reached); nothing was stored, try again later")
    if "FOREIGN " in str(error):
        found = str(error).partition("FOREIGN ")[2]
        return ForeignValueError(f"in Redis {found}: another program wrote it; delete or rename it there")
    if "LATE " in str(error):
        return BufferUnavailableError(
            "nobody knows any more whether Redis has taken the request; it took longer than its window"
        )
    if isinstance(error, _UNAVAILABLE) or _REFUSALS.search(str(error)):
        return BufferUnavailableError(f"Redis does not take the request: {error}")
    return error
