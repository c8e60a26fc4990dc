"""Connections that came for a session where it lived before are passed on to where it lives now.

Where a session listened (TCP), the node that it left goes on listening from its departure on. It
takes the connections in (those that waited for it first), and passes their bytes through the
agent of the node that has it, which connects to the session; so only agents have to reach each
other, and a client on the old node, as the front end of a kernel that listens on 127.0.0.1, goes on
with the address that it knows. If the session has moved on since, that agent passes on as well. A
terminal is reached as a port is, through the socket that its keeper had: consoles go along.

    client ── port ── this agent ══ TLS, in frames ══ its agent ── port ── session

A frame is a length (u32, native) and so many bytes; none: that side has no more to say. A client
that comes while the session sleeps or moves waits for it. It goes on until the session comes back,
is there no more, or nobody has used the port for `forward_s`. If an agent ends, so do these
connections, as in a failure of the network; the next one listens again.

*Guarantee*: for another node an agent connects to nothing but where a session listens that this
node has brought, or that has gone on from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections.abc import Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.errors import Busy, LzyError, NotFound
from ..checkpoint.resources.tcp_socket import keep_listening, list_all_listening
from ..checkpoint.store import Store
from .authority import node_subject
from .http import Passage
from .peers import split_address
from .session import Session
from .state import Arrival
from .terminal.afar import (
    TERMINAL,
    await_end,
    connect_to_terminal,
    has_terminal,
    listen_for_consoles,
)

if TYPE_CHECKING:
    from .node import Agent

_PIECE_BYTES = 64 << 10
_CONNECTS_WITHIN_S = 10.0
_TRIES_AGAIN_S, _LONGEST_PAUSE_S = 0.1, 3.0
_LOOKS_EVERY_S = 5.0
_MOST_CONNECTIONS = 200
_LENGTH = struct.Struct("=I")
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Entry = dict[str, Any]


class Place(NamedTuple):
    """Where a session lives now: its node, where that's agent listens, and which life it is."""

    session: str
    node: str
    address: str
    epoch: int


class _Way:
    """What leads to one session: sockets that listen, and connections that are passed on."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.servers: list[asyncio.Server] = []
        self.connections: set[asyncio.Task[Any]] = set()
        self.consoles: set[asyncio.Task[Any]] = set()
        """The connections to its terminal: which end when that tells them that it goes."""
        self.is_closed = False
        self.used_s = time.monotonic()

    def close(self) -> None:
        self.is_closed = True
        for server in self.servers:
            server.close()
        for task in self.connections - self.consoles:
            task.cancel()


class Passages:
    """What one agent passes on, by session."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._ways: dict[str, _Way] = {}
        self._known: tuple[str, list[Entry], bool] = "", [], False
        """An image, where its session listens, and whether it has a terminal: asked again soon."""

    def start(self) -> None:
        """Lead where ports led before the agent was started again."""
        for name, *_ in self._agent.state.forwarded():
            if name not in self._agent.sessions:  # else it was on its way back
                self.resume(name, [])

    def suspend(self, session: str) -> None:
        """Leave its ports and its terminal to the session, which may be about to come back."""
        if way := self._ways.pop(session, None):
            way.close()

    def resume(self, session: str, kept: list[socket.socket]) -> None:
        """Lead to it as was noted, if that was: it did not come back. `kept`: as for `keep`."""
        for name, epoch, node, told in self._agent.state.forwarded():
            if name == session:
                self.keep(Place(name, node, told["address"], epoch), told, kept)
                return
        self.keep(Place(session, "", "", 0), {}, kept)

    def describe(self, session: Session, address: str) -> dict[str, Any]:
        """What a departure to `address` says of what leads there from here; empty if nothing does.

        An agent beside us on this machine has the ports of the session itself.
        """
        own = self._agent.identity.address
        if self._agent.settings.forward_s <= 0:
            return {}
        with contextlib.suppress(LzyError, KeyError, TypeError, ValueError):
            _, listening, is_shown = self._read_image(session.record.image)
            if own and split_address(address)[0] == split_address(own)[0]:
                listening = []
            if listening or is_shown:
                owner = {"terminal_of_uid": session.record.owner_uid} if is_shown else {}
                return {"address": address, "listening": listening, **owner}
        return {}

    def keep(self, place: Place, told: dict[str, Any], kept: list[socket.socket]) -> None:
        """Lead to a session that lives there now, as `describe` told.

        `kept`: sockets that listened for it until now, which become ours.
        """
        if told:
            self._agent.spawn(self._keep(place, told, kept))
            return
        for sock in kept:
            sock.close()

    def end(self, session: str) -> None:
        """Lead to it no longer; connections that are passed on end."""
        if way := self._ways.pop(session, None):
            way.close()
            self._agent.state.end_forwarding(session)

    def close(self) -> None:
        """As the agent ends; the next one leads there again."""
        for way in self._ways.values():
            way.close()
        self._ways.clear()

    # -- here: clients that come ---------------------------------------------------------------

    async def _keep(self, place: Place, told: dict[str, Any], kept: list[socket.socket]) -> None:
        if old := self._ways.pop(place.session, None):
            old.close()
        way = self._ways[place.session] = _Way(place)
        there = {sock.getsockname()[1]: sock for sock in kept}
        for entry in told["listening"]:
            port = entry["name"][1]
            with contextlib.suppress(OSError):  # somebody else's by now
                sock = there.pop(port, None) or keep_listening(entry)
                way.servers.append(
                    await asyncio.start_server(partial(self._pass, way, str(port)), sock=sock)
                )
        for sock in there.values():
            sock.close()
        if "terminal_of_uid" in told:
            await self._keep_terminal(way, told["terminal_of_uid"])
        while self._ways.get(place.session) is way:
            await asyncio.sleep(_LOOKS_EVERY_S)
            if way.connections:
                way.used_s = time.monotonic()
            elif time.monotonic() - way.used_s > self._agent.settings.forward_s:
                self.end(place.session)

    async def _keep_terminal(self, way: _Way, owner_uid: int) -> None:
        """Listen for consoles, once the keeper that they are connected to has gone."""
        session, home = way.place.session, self._agent.home
        with contextlib.suppress(OSError, TimeoutError):
            await await_end(session, home)
            if self._ways.get(session) is way:
                sock = listen_for_consoles(session, home, owner_uid)
                take = partial(self._pass, way, TERMINAL)
                way.servers.append(await asyncio.start_unix_server(take, sock=sock))

    async def _pass(
        self, way: _Way, port: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One connection, to its end."""
        task = asyncio.current_task()
        assert task
        if len(way.connections) >= _MOST_CONNECTIONS:
            writer.transport.abort()
            return
        way.connections.add(task)
        if port == TERMINAL:
            way.consoles.add(task)
        try:
            async with contextlib.AsyncExitStack() as held:
                far = await self._reach(held, way, port, reader, writer)
                await join(reader, writer, *far)
        except NotFound:  # it has ended there
            if self._ways.get(way.place.session) is way:
                asyncio.get_running_loop().call_soon(self.end, way.place.session)
            writer.transport.abort()
        except (LzyError, OSError, asyncio.CancelledError):
            writer.transport.abort()  # as from a server that has died; the port is free at once
        finally:
            way.connections.discard(task)
            way.consoles.discard(task)
            writer.close()

    async def _reach(
        self,
        held: contextlib.AsyncExitStack,
        way: _Way,
        port: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> Pair:
        """The way to the session, as soon as there is one, for as long as the client waits."""
        pause_s = _TRIES_AGAIN_S
        while True:
            try:
                return await held.enter_async_context(self._open(way.place, port))
            except NotFound:
                raise
            except LzyError:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if way.is_closed or reader.at_eof() or writer.is_closing():
                raise ConnectionError("the client has gone, or the session is back")

    def _open(self, place: Place, port: str) -> contextlib.AbstractAsyncContextManager[Pair]:
        path = f"/v1/passages/{place.session}/{place.epoch}/{port}"
        return self._agent.contacts.open(place.address, node_subject(place.node), path)

    # -- there: connections from the node that it left -----------------------------------------

    async def enter(self, arrival: Arrival, port: str) -> Passage:
        """A connection to a session that has arrived, or has gone on since, for who brought it.

        Raises NotFound (it is not here any more, or listens nowhere there), Busy (not now).
        """
        if port != TERMINAL and not re.fullmatch(r"[0-9]{1,5}", port):
            raise NotFound(f"it does not listen at port {port[:20]}")
        session, way = self._agent.sessions.get(arrival.name), self._ways.get(arrival.name)
        if session and session.record.epoch >= arrival.epoch - 1:  # one that came asleep sleeps yet
            if port == TERMINAL:
                reader, writer = await connect_to_terminal(self._agent, session)
            else:
                reader, writer = await self._connect(session, int(port))

            async def serve(far_reader: asyncio.StreamReader, far: asyncio.StreamWriter) -> None:
                try:
                    await join(reader, writer, far_reader, far)
                except ConnectionError:
                    writer.transport.abort()
                finally:
                    writer.close()

            return serve
        if way is None or way.place.epoch <= arrival.epoch:
            raise NotFound("there is no such session here", remedy="see lzy ps")
        held = contextlib.AsyncExitStack()
        further = await held.enter_async_context(self._open(way.place, port))

        async def go_on(far_reader: asyncio.StreamReader, far: asyncio.StreamWriter) -> None:
            async with held:
                with contextlib.suppress(OSError):
                    await _all(_copy(far_reader, further[1]), _copy(further[0], far))

        way.used_s = time.monotonic()
        return go_on

    async def _connect(self, session: Session, port: int) -> Pair:
        record = session.record
        _, listening, _ = self._read_image(record.image)
        entry = next((entry for entry in listening if entry["name"][1] == port), None)
        if entry is None:
            raise NotFound(f"session {record.name} does not listen at port {port}")
        if not session.is_living and port not in self._agent.ports.numbers(record.name):
            raise Busy(f"session {record.name} is {record.state}")
        host = entry["name"][0]
        try:
            async with asyncio.timeout(_CONNECTS_WITHIN_S):
                return await asyncio.open_connection(_LOOPBACK.get(host, host), port)
        except (OSError, TimeoutError) as error:
            raise Busy(f"session {record.name} does not answer at port {port}") from error

    def _read_image(self, image: str) -> tuple[str, list[Entry], bool]:
        """An image, where its session listens, and whether it has a terminal."""
        if self._known[0] != image:
            with Store.open(self._agent.store) as store, store.load_unchecked(image) as opened:
                listening = list_all_listening(opened.document["descriptors"])
                self._known = image, listening, has_terminal(opened)
        return self._known


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

    try:
        await _all(frame(), unframe())
    except (asyncio.IncompleteReadError, OSError) as error:
        raise ConnectionError("the connection was cut") from error


async def _all(*ways: Coroutine[Any, Any, None]) -> None:
    """Until all have ended, or one has failed."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Frames as they are; where they end nothing more comes from the other side either."""
    while piece := await reader.read(_PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
    raise ConnectionError("it has ended")
