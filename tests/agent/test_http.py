"""The agent's server: it ends when it is told to, whatever its connections do at that moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lzy.agent.http import Request, Response, Server

ASKED = b"GET /v1/node HTTP/1.1\r\nHost: lzy\r\n\r\n"


@pytest.mark.parametrize("steps", range(8))
def test_it_ends_while_a_request_comes(tmp_path: Path, steps: int) -> None:
    """A request that comes just then on a connection that is kept does not keep it alive."""

    async def answer(_: Request) -> Response:
        return Response(document={})

    async def talk() -> None:
        server = Server(answer)
        await server.listen(tmp_path / "sock", 0o600)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "sock"))
        writer.write(ASKED)
        await reader.readuntil(b"{}")
        writer.write(ASKED)
        for _ in range(steps):  # of the loop, until it is about to read, has read, has answered
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await server.close()
        writer.close()

    asyncio.run(talk())
