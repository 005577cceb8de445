"""Opens a Redis server, Sentinel group or Cluster by URL, and refuses one that could lose acknowledged records.

redis://  rediss://  unix://             one server; user, password, database and TLS options as redis-py reads them
redis+cluster://  rediss+cluster://      a Cluster, by any of its nodes
redis+sentinel://host:port,host:port/master-name/db      a Sentinel group
"""

# redis-py leaves the types of its options open.
# pyright: reportUnknownMemberType=false

import re
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from redis import Redis
from redis.cluster import RedisCluster
from redis.exceptions import RedisClusterException, RedisError
from redis.sentinel import Sentinel

from d2p_pipeline.buffer.line import Line
from d2p_pipeline.buffer.server import Client

MINIMUM_VERSION = (6, 2)
_LINE_SECONDS = 5.0
"""redis-py's own default."""


class RedisRefusedError(Exception):
    """The server cannot be used; the message says which, why, and what to do."""


def connect(url: str, timeout: float | None = None) -> Client:
    """A client for `url`; `timeout` in seconds, None for the library's default. Connects to a Cluster at once, else lazily."""
    options: dict[str, Any] = {} if timeout is None else {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    scheme, separator, rest = url.partition("+cluster://")
    try:
        if separator:
            return RedisCluster.from_url(f"{scheme}://{rest}", **options)
        if url.startswith("redis+sentinel://"):
            return _sentinel_master(url, options)
        return Redis.from_url(url, **options)
    except (RedisError, RedisClusterException, ValueError) as error:
        raise RedisRefusedError(f"{without_password(url)}: {error}") from error


def line(url: str, timeout: float | None = None) -> Line | None:
    """A line to the one server of `url`; None to more than one."""
    return None if "+" in url.partition("://")[0] else Line(url, timeout or _LINE_SECONDS)


def _sentinel_master(url: str, options: dict[str, Any]) -> Redis:
    parts = urlsplit(url)
    credentials, _, addresses = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    hosts = [address.rpartition(":") for address in addresses.split(",")]
    master, _, database = parts.path.strip("/").partition("/")
    if not master or not all(host and port.isdigit() for host, _, port in hosts):
        raise ValueError("a Sentinel URL reads redis+sentinel://host:port,host:port/master-name/db")
    options |= dict(parse_qsl(parts.query))
    if password:
        options |= {"username": unquote(username) or None, "password": unquote(password)}
    sentinel = Sentinel([(host, int(port)) for host, _, port in hosts])
    return sentinel.master_for(master, db=int(database or 0), **options)


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    url = re.sub(r"(?<=[?&])((?:ssl_)?password=)[^&]*", r"\1********", url)
    parts = urlsplit(url)
    credentials, separator, address = parts.netloc.rpartition("@")
    if ":" not in credentials:
        return url
    return parts._replace(netloc=f"{credentials.partition(':')[0]}:********{separator}{address}").geturl()


def check(client: Client, url: str) -> list[str]:
    """Prove that the server answers and never evicts; returns warnings about what its persistence settings can lose."""
    shown = without_password(url)
    try:
        info = _info(client)
    except RedisError as error:
        raise RedisRefusedError(
            f"{shown}: Redis does not answer ({error}); check that it runs, the address, the password and TLS, "
            "or leave redis_url and redis_host unset to use the embedded server"
        ) from error
    version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    if version < MINIMUM_VERSION:
        raise RedisRefusedError(f"{shown}: Redis {info['redis_version']} is too old; 6.2 or newer is needed")
    policy = info["maxmemory_policy"]
    if policy != "noeviction":
        raise RedisRefusedError(
            f"{shown}: maxmemory-policy is {policy}, so Redis may delete records that were acknowledged; "
            "set it with `CONFIG SET maxmemory-policy noeviction` and in redis.conf"
        )
    return _persistence_warnings(client, info, shown)


def _info(client: Client) -> dict[str, Any]:
    anyone = cast(Any, client)  # redis-py's annotations differ between the two clients
    if isinstance(client, RedisCluster):
        return anyone.info(target_nodes=RedisCluster.RANDOM)
    return anyone.info()


def _persistence_warnings(client: Client, info: dict[str, Any], shown: str) -> list[str]:
    warnings: list[str] = []
    if info.get("connected_slaves") and _configured(client, "min-replicas-to-write") == "0":
        warnings.append(
            f"{shown}: a replica that takes over may lack the last writes (`CONFIG SET min-replicas-to-write 1` bounds what a "
            "master that was cut off still accepts; see docs/scaling.md)"
        )
    if not info.get("aof_enabled"):
        warnings.append(
            f"{shown}: append-only persistence is off; a crash of Redis loses every buffered record since the last snapshot "
            "(`CONFIG SET appendonly yes`)"
        )
    elif (fsync := _configured(client, "appendfsync")) not in ("always", None):
        warnings.append(
            f"{shown}: appendfsync is {fsync}; a power failure loses up to the last second's records "
            "(`CONFIG SET appendfsync always`; a crash of the Redis process alone loses nothing)"
        )
    return warnings


def _configured(client: Client, name: str) -> str | None:
    """An option of the server; None where a managed service keeps it to itself."""
    try:
        return cast(Any, client).config_get(name).get(name)
    except RedisError:
        return None
