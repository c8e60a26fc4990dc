"""Connections that are passed on between nodes: every byte, both ways, to both ends."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from lzy.agent.passages import join

LENGTH_BYTES = 5 << 20


async def connect() -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Both ends of a connection."""
    return [await asyncio.open_connection(sock=sock) for sock in socket.socketpair()]


def test_all_that_is_said_arrives() -> None:
    """One side has said all while the other goes on; then that ends, too."""

    async def talk() -> None:
        (client, here), (far, far_here), (there, session) = [await connect() for _ in range(3)]
        ways = [
            asyncio.ensure_future(join(*here, *far)),
            asyncio.ensure_future(join(*there, *far_here)),
        ]
        asked, answer = os.urandom(LENGTH_BYTES), os.urandom(LENGTH_BYTES)

        async def ask() -> bytes:
            client[1].write(asked)
            client[1].write_eof()
            return await client[0].read(-1)

        async def serve() -> bytes:
            session[1].write(answer[: LENGTH_BYTES // 2])
            heard = await session[0].read(-1)
            session[1].write(answer[LENGTH_BYTES // 2 :])
            session[1].write_eof()
            return heard

        assert await asyncio.gather(ask(), serve()) == [answer, asked]
        await asyncio.gather(*ways)
        for _, writer in (client, here, far, far_here, there, session):
            writer.close()

    asyncio.run(asyncio.wait_for(talk(), 30))


def test_cut_in_between_is_no_end() -> None:
    """The way between the agents breaks: nobody takes it for the end of what was said."""

    async def talk() -> None:
        (client, here), (far, far_here) = [await connect() for _ in range(2)]
        passing = asyncio.ensure_future(join(*here, *far))
        client[1].write(b"half of i")
        far_here[1].write(b"\x10\0\0\0half")
        await far_here[0].readexactly(4 + 9)
        far_here[1].close()
        with pytest.raises(ConnectionError):
            await passing
        for _, writer in (client, here, far):
            writer.close()

    asyncio.run(asyncio.wait_for(talk(), 30))
