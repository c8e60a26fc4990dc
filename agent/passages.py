"""Connections that came for a session where it lived before are passed on to where it lives now.

Somebody connects to a port that this agent keeps for a session, and the session wakes on another
node, which has room for it. Its socket cannot go there; so this agent goes on listening, takes the
connections in (those that waited, first), and passes their bytes through the other node's agent,
which connects to the session. So only agents have to reach each other.

    client ── port ── this agent ══ TLS, in frames ══ its agent ── port ── session

A frame is a length (u32, native) and so many bytes; none: that side has no more to say. It goes on
until the session comes back, or nobody has connected for ten minutes; if this agent ends, these
connections do, as in a failure of the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from ..checkpoint.errors import LzyError, NotFound
from ..checkpoint.image import Image
from ..checkpoint.resources.tcp_socket import list_listening
from .authority import node_subject
from .peers import Contacts

_KEPT_FOR_S = 600.0
_PIECE_BYTES = 64 << 10
_CONNECTS_WITHIN_S = 10.0
_LENGTH = struct.Struct("=I")
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}

Spawn = Callable[[Coroutine[Any, Any, None]], None]


class Place(NamedTuple):
    """Where a session lives now: its node, where that's agent listens, and which life it is."""

    session: str
    node: str
    address: str
    epoch: int


class Passages:
    """What one agent passes on, by session."""

    def __init__(self, contacts: Contacts, spawn: Spawn) -> None:
        self._contacts = contacts
        self._spawn = spawn
        self._kept: dict[str, list[socket.socket]] = {}
        self._used_s: dict[str, float] = {}

    def keep(self, place: Place, kept: list[socket.socket]) -> None:
        """Go on listening at these sockets, which become ours, for a session that lives there."""
        self.end(place.session)
        self._kept[place.session] = kept
        self._used_s[place.session] = time.monotonic()
        loop = asyncio.get_running_loop()
        for sock in kept:
            loop.add_reader(sock.fileno(), self._take, place, sock)
        self._spawn(self._end_when_unused(place.session, kept))

    def end(self, session: str) -> None:
        """Listen for it no longer; connections that are passed on go on."""
        for sock in self._kept.pop(session, []):
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()

    def close(self) -> None:
        """Listen for nobody."""
        for session in list(self._kept):
            self.end(session)

    async def _end_when_unused(self, session: str, kept: list[socket.socket]) -> None:
        while self._kept.get(session) is kept:
            left_s = self._used_s[session] + _KEPT_FOR_S - time.monotonic()
            if left_s <= 0:
                self.end(session)
                return
            await asyncio.sleep(left_s)

    def _take(self, place: Place, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = sock.accept()
                client.setblocking(False)
                self._used_s[place.session] = time.monotonic()
                self._spawn(self._pass(place, client, sock.getsockname()[1]))

    async def _pass(self, place: Place, client: socket.socket, port: int) -> None:
        """One connection, to its end."""
        reader, writer = await asyncio.open_connection(sock=client)
        path = f"/v1/passages/{place.session}/{place.epoch}/{port}"
        try:
            async with self._contacts.open(place.address, node_subject(place.node), path) as (
                far_reader,
                far_writer,
            ):
                await join(reader, writer, far_reader, far_writer)
        except (LzyError, OSError):
            writer.transport.abort()  # as from a server that has died
        finally:
            self._used_s[place.session] = time.monotonic()
            writer.close()


async def join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    framed_reader: asyncio.StreamReader,
    framed_writer: asyncio.StreamWriter,
) -> None:
    """Pass on what comes, both ways, until both have said all; what fails ends both."""

    async def frame() -> None:
        while piece := await reader.read(_PIECE_BYTES):
            framed_writer.write(_LENGTH.pack(len(piece)) + piece)
            await framed_writer.drain()
        framed_writer.write(_LENGTH.pack(0))
        await framed_writer.drain()

    async def unframe() -> None:
        while length_bytes := _LENGTH.unpack(await framed_reader.readexactly(_LENGTH.size))[0]:
            if length_bytes > _PIECE_BYTES:
                raise ConnectionError("a frame is too long")
            writer.write(await framed_reader.readexactly(length_bytes))
            await writer.drain()
        writer.write_eof()

    ways = [asyncio.ensure_future(way()) for way in (frame, unframe)]
    try:
        await asyncio.gather(*ways)
    except (asyncio.IncompleteReadError, OSError) as error:
        raise ConnectionError("the connection was cut") from error
    finally:
        for way in ways:
            way.cancel()


async def connect_to_session(
    image: Image, port: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a session of this node that was woken from `image`, where it listens.

    Raises NotFound where it does not listen at that port.
    """
    if re.fullmatch(r"[0-9]{1,5}", port):
        for entry in list_listening(image.document["descriptors"]):
            host, found = entry["name"][:2]
            if found == int(port):
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(_CONNECTS_WITHIN_S):
                        return await asyncio.open_connection(_LOOPBACK.get(host, host), found)
    raise NotFound(f"it does not listen at port {port[:20]}")
