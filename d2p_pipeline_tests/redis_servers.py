"""Redis servers on loopback ports: single ones, Clusters, with replicas; started for one test, killed at will."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

from d2p_pipeline.buffer.embedded import binary

Start = Callable[..., int]


class RedisServers:
    """Servers by their ports."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, *options: str, program: tuple[str, ...] = (), server: str | None = None) -> int:
        """Starts a redis-server, or the binary `server`, with options; returns its port."""
        port = free_port()
        directory = self._directory / str(port)
        directory.mkdir()
        command = [server or binary(), *program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--repl-diskless-sync-delay", "0", "--dir", str(directory)]  # a replica need not wait for others
        self._processes[port] = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        if "--requirepass" not in options:
            until(lambda: Redis(port=port).ping())
        return port

    def kill(self, port: int) -> None:
        process = self._processes.pop(port)
        process.kill()
        process.wait()

    def close(self) -> None:
        for port in list(self._processes):
            self.kill(port)

    def wait_for_cluster(self) -> None:
        """Until every server that lives says that its Cluster serves all slots."""
        for node in (Redis(port=port) for port in self._processes):
            until(lambda node=node: "'cluster_state': 'ok'" in str(node.execute_command("CLUSTER INFO")))

    def cluster(self, *, replicas: bool = False) -> list[int]:
        """A Cluster of three masters, whose ports come first; with `replicas`, then that of one replica for each."""
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
        ports = [self.start(*options) for _ in range(6 if replicas else 3)]
        nodes = [Redis(port=port) for port in ports]
        for number, node in enumerate(nodes):
            if number < 3:
                slots = range(number * 5462, min(16384, (number + 1) * 5462))
                node.execute_command("CLUSTER ADDSLOTS", *slots)
            node.execute_command("CLUSTER MEET", "127.0.0.1", ports[0])
        for node in nodes:
            until(lambda node=node: len(_described(node)) == len(nodes))
        for master, replica in zip(nodes, nodes[3:], strict=False):
            replica.execute_command("CLUSTER REPLICATE", master.execute_command("CLUSTER MYID"))
            until(lambda replica=replica: replica.info("replication")["master_link_status"] == "up")  # pyright: ignore[reportIndexIssue]
        self.wait_for_cluster()
        for node in nodes:
            until(lambda node=node: sum("slave" in line for line in _described(node)) == len(nodes) - 3)
        return ports


def _described(node: Redis) -> list[str]:
    """The nodes that a node knows."""
    found: dict[str, object] = node.execute_command("CLUSTER NODES") or {}  # pyright: ignore[reportAssignmentType]
    return [str(entry) for entry in found.items()]


def replicated(port: int) -> None:
    """Wait until a master's replica has everything."""
    with Redis(port=port) as master:
        until(lambda: master.wait(1, 1000) == 1)


@pytest.fixture
def redis_servers(tmp_path: Path) -> Iterator[RedisServers]:
    servers = RedisServers(tmp_path)
    yield servers
    servers.close()


def free_port() -> int:
    """A port whose cluster bus port (10,000 above) exists too."""
    while True:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            port = listener.getsockname()[1]
        if port < 50_000:
            return port


def until(condition: Callable[[], object], error: type[Exception] = RedisError) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if condition():
                return
        except error:
            pass
        assert time.monotonic() < deadline, "the server did not get there"
        time.sleep(0.02)
