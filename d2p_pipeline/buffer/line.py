"""Calls scripts of one Redis server from an event loop, without the threads and retries of `server`: for many small pushes.

Whatever goes wrong is told as it is; who calls has another way, where everything may be repeated.
"""

# redis-py leaves the types of its connections open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import asyncio
from typing import Any

from hiredis import pack_command
from redis.asyncio import ConnectionPool

from d2p_pipeline.buffer.server import SHAS, Call


class Line:
    """As many connections as there are calls at a time. `seconds`: what a call may take."""

    def __init__(self, url: str, seconds: float) -> None:
        self._pool = ConnectionPool.from_url(url, socket_timeout=None)
        self._seconds = seconds
        self._idle: list[Any] = []

    async def ask(self, call: Call) -> Any:
        """The reply; raises RedisError, among them NoScriptError, OSError or TimeoutError."""
        keys = call.keys or ()
        async with asyncio.timeout(self._seconds):
            connection = self._idle.pop() if self._idle else await self._pool.get_connection()
            try:
                # redis-py packs in Python here, which takes as long as all the rest.
                words: Any = ("EVALSHA", SHAS[call.name], len(keys), *keys, *call.args)
                await connection.send_packed_command(pack_command(words), check_health=False)
                return await connection.read_response()
            finally:
                self._idle.append(connection)

    async def close(self) -> None:
        """Hang up."""
        await self._pool.disconnect()
