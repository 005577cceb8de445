"""A proxy in front of Redis that cuts the connection after the server has executed a command and before its reply."""

import selectors
import socket
import threading
from collections.abc import Iterator

import pytest

from d2p_pipeline.buffer.embedded import EmbeddedRedis


class CuttingProxy:
    """Forwards bytes both ways; `cut_next()` drops the server's next reply together with the connection."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._armed = threading.Event()
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut_next(self) -> None:
        self._armed.set()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._upstream)
        with client, server, selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in selector.select():
                    source: socket.socket = key.fileobj  # type: ignore[assignment]
                    data = source.recv(1 << 20)
                    if source is server and self._armed.is_set():
                        self._armed.clear()
                        self.cuts += 1
                        return
                    if not data:
                        return
                    key.data.sendall(data)


@pytest.fixture
def proxy(redis_server: EmbeddedRedis) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(redis_server.url.removeprefix("unix://"))
    yield proxy
    proxy.close()
