"""The servers that the receiver is compared with, each a program: `python -m benchmarks.receivers NAME PORT`.

    silent   the receiver itself, with a buffer that forgets everything at once: what HTTP, JSON and compression cost
    plain    what one would write first: a Starlette handler under uvicorn that does one RPUSH per request
    aiohttp  the same for aiohttp under uvloop

Redis is the one of D2P_REDIS_URL.
"""

import os
import sys
from collections.abc import Sequence

from d2p_pipeline.buffer.protocol import Push


class Forgetful:
    """Takes pushes and keeps nothing."""

    def push(self, pushes: Sequence[Push]) -> None:
        del pushes

    async def push_async(self, pushes: Sequence[Push]) -> None:
        del pushes

    async def end_async(self) -> None: ...

    def close(self) -> None: ...


def silent(port: int) -> None:
    from d2p_pipeline import wiring
    from d2p_pipeline.ingest.server import serve
    from d2p_pipeline.settings import load

    # Workers are forked: what is put here is there.
    wiring.open_buffer = lambda settings: (Forgetful(), [])  # type: ignore[assignment]
    serve(load(port=port))


def plain(port: int) -> None:
    import uvicorn
    from redis.asyncio import Redis
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    redis = Redis.from_url(os.environ["D2P_REDIS_URL"])

    async def store(request: Request) -> Response:
        await redis.rpush("plain", await request.body())  # type: ignore[misc]
        return Response(status_code=201)

    app = Starlette(routes=[Route("/record/", store, methods=["POST"])])
    uvicorn.run(app, port=port, loop="uvloop", http="httptools", access_log=False, log_level="warning")


def aiohttp(port: int) -> None:
    import uvloop
    from aiohttp import web  # pyright: ignore[reportMissingImports]  # installed for this comparison alone
    from redis.asyncio import Redis

    redis = Redis.from_url(os.environ["D2P_REDIS_URL"])

    async def store(request: web.Request) -> web.Response:
        await redis.rpush("plain", await request.read())  # type: ignore[misc]
        return web.Response(status=201)

    app = web.Application()
    app.router.add_post("/record/", store)
    web.run_app(app, port=port, loop=uvloop.new_event_loop(), access_log=None, print=None)


if __name__ == "__main__":
    {"silent": silent, "plain": plain, "aiohttp": aiohttp}[sys.argv[1]](int(sys.argv[2]))
