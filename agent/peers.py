"""How daemons talk to agents of other nodes: the same requests, over TLS that both prove.

`Peer` blocks, for the migrator and for operations; `Contacts` is for the agent's own event loop.
Both keep a connection for a while after its answer: a handshake takes longer than most requests.
One on which the other side has said anything since, its end for instance, is not used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.errors import AccessDenied, LzyError
from . import errors
from .authority import client_context, subject_of
from .client import Client, Unanswered, explained
from .http import USER_HEADER

_CONNECTS_WITHIN_S = 5.0
_AGREES_WITHIN_S = 30.0
_KEPT_S = 20.0  # less than an agent waits for the next request
_MOST_KEPT = 4


class Unreachable(LzyError):
    """That node's agent does not answer: it is down, or the way to it is."""


class Kept:
    """Connections of a process between two requests, by whom they lead to; for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], list[tuple[float, http.client.HTTPConnection]]] = {}

    def take(self, where: tuple[str, str]) -> http.client.HTTPConnection | None:
        """One that can be used, if there is one."""
        while True:
            with self._lock:
                idle = self._idle.get(where)
                if not idle:
                    return None
                since_s, connection = idle.pop()
            silent = not select.select([connection.sock], [], [], 0)[0]
            if silent and time.monotonic() - since_s < _KEPT_S:
                return connection
            connection.close()

    def put(self, where: tuple[str, str], connection: http.client.HTTPConnection) -> None:
        """One whose answer was read to its end; it is closed if there are enough."""
        with self._lock:
            idle = self._idle.setdefault(where, [])
            if len(idle) < _MOST_KEPT:
                idle.append((time.monotonic(), connection))
                return
        connection.close()


class Peer(Client):
    """The agent (or migrator) at HOST:PORT, if it is who it should be (`subject`).

    `kept`: connections that others who talk to it may share.
    """

    def __init__(
        self,
        address: str,
        subject: str,
        context: ssl.SSLContext,
        uid: int = 0,
        *,
        kept: Kept | None = None,
    ) -> None:
        self.path = Path(address)
        self.where = f"{subject} at {address}"
        self.headers = {USER_HEADER: str(uid)}
        self._address, self._subject, self._context = address, subject, context
        self._kept = kept or Kept()

    def get(self, path: str, *, timeout_s: float | None = 30.0) -> dict[str, Any]:
        """Asked once: a node that does not answer is found out soon."""
        return self._ask("GET", path, None, timeout_s)

    def open(self, path: str, timeout_s: float) -> http.client.HTTPResponse:
        """The answer to a GET whose content is no document; its `read` gives that."""
        connection = self._connect(timeout_s)
        try:
            connection.request("GET", path, None, self.headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unanswered(f"{self.where} did not answer: {error}") from error
        if answer.status >= 300:
            document = json.loads(answer.read())
            connection.close()
            raise errors.revive(document)
        return answer

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None
    ) -> dict[str, Any]:
        where = self._address, self._subject
        connection = self._kept.take(where)
        if connection is None:
            connection = self._connect(timeout_s)
        else:
            connection.sock.settimeout(timeout_s)
        try:
            with explained(self.where):
                content = None if body is None else json.dumps(body)
                connection.request(method, path, content, self.headers)
                answer = connection.getresponse()
                document: dict[str, Any] = json.loads(answer.read())
        except BaseException:
            connection.close()
            raise
        if answer.will_close:
            connection.close()
        else:
            self._kept.put(where, connection)
        if answer.status >= 300:
            raise errors.revive(document)
        return document

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection to be kept, once both have proved who they are. Raises Unreachable."""
        return self._connect(timeout_s)

    def _connect(self, timeout_s: float | None) -> http.client.HTTPConnection:
        host, port = split_address(self._address)
        connection = http.client.HTTPSConnection(host, port, timeout=timeout_s)
        try:
            within_s = min(_CONNECTS_WITHIN_S, timeout_s or _CONNECTS_WITHIN_S)
            plain = socket.create_connection((host, port), within_s)
            notice_cuts(plain)
            secure = self._context.wrap_socket(plain, server_hostname=None)
        except OSError as error:
            raise Unreachable(
                f"{self.where} does not answer: {error}", remedy="see lzy nodes"
            ) from error
        found = subject_of(secure.getpeercert())
        if self._subject and found != self._subject:
            secure.close()
            raise AccessDenied(f"{self._address} is {found or 'nobody'}, not {self._subject}")
        secure.settimeout(timeout_s)
        connection.sock = secure
        return connection


def notice_cuts(sock: Any) -> None:
    """Have a connection fail some ten seconds after the other side can be reached no more; tcp(7).

    Else an answer that takes long to come, and one that never will, would look the same.
    """
    for option, value in (
        (socket.TCP_KEEPIDLE, 4),
        (socket.TCP_KEEPINTVL, 2),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, 10_000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT as both. Raises LzyError."""
    host, colon, port = address.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535 or not host:
        raise LzyError(f"{address[:200]!r} is no HOST:PORT")
    return host.strip("[]"), int(port)


class _Way(NamedTuple):
    """A connection of the event loop's."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    since_s: float

    @property
    def is_fit(self) -> bool:
        """Whether it can be used again."""
        late = time.monotonic() - self.since_s > _KEPT_S
        return not (late or self.reader.at_eof() or self.writer.is_closing())

    def close(self) -> None:
        self.writer.close()


class Contacts:
    """The agent's own way to others: its certificate, read once, and connections that are kept."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._context: ssl.SSLContext | None = None
        self._idle: dict[tuple[str, str], list[_Way]] = {}

    def context(self) -> ssl.SSLContext:
        """TLS with our certificate. Raises NotFound where this node is in no fleet."""
        if self._context is None:
            self._context = client_context(self.place)
        return self._context

    async def ask(
        self,
        address: str,
        subject: str,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float = 30.0,
    ) -> dict[str, Any]:
        """What that agent answers. Raises Unreachable, Unanswered, or what it answered.

        It may hear it twice: should it die over it while its end is on the way.
        """
        where = address, subject
        idle = self._idle.setdefault(where, [])
        while idle:
            way = idle.pop()
            if not way.is_fit:
                way.close()
                continue
            with contextlib.suppress(_NotHeard):
                return await self._talk(where, way, method, path, body, timeout_s)
        way = await self._connect(address, subject)
        try:
            return await self._talk(where, way, method, path, body, timeout_s)
        except _NotHeard as error:
            raise Unanswered(f"{subject} at {address} did not answer: {error}") from error

    @contextlib.asynccontextmanager
    async def open(
        self, address: str, subject: str, path: str
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection to that agent for a block's own use, once it has agreed to POST `path`.

        Raises Unreachable, Unanswered, or what it answered.
        """
        where = f"{subject} at {address}"
        way = await self._connect(address, subject)
        try:
            try:
                async with asyncio.timeout(_AGREES_WITHIN_S):
                    status, document = await _exchange(way, "POST", path, None)
            except (_NotHeard, OSError, TimeoutError) as error:
                raise Unanswered(f"{where} did not answer: {error}") from error
            if status >= 300:
                raise errors.revive(document)
            if status != _SWITCHES:
                raise Unanswered(f"{where} does not pass anything on")
            yield way.reader, way.writer
        finally:
            way.close()

    def close(self) -> None:
        """Let go of all connections."""
        for idle in self._idle.values():
            for way in idle:
                way.close()
        self._idle.clear()

    async def _connect(self, address: str, subject: str) -> _Way:
        host, port = split_address(address)
        try:
            async with asyncio.timeout(_CONNECTS_WITHIN_S):
                reader, writer = await asyncio.open_connection(
                    host, port, ssl=self.context(), server_hostname=""
                )
        except (OSError, TimeoutError) as error:
            words = f"{subject} at {address} does not answer: {error or 'it takes too long'}"
            raise Unreachable(words, remedy="see lzy nodes") from error
        notice_cuts(writer.get_extra_info("socket"))
        found = subject_of(writer.get_extra_info("peercert"))
        if found != subject:
            writer.close()
            raise AccessDenied(f"{address} is {found or 'nobody'}, not {subject}")
        return _Way(reader, writer, time.monotonic())

    async def _talk(
        self,
        where: tuple[str, str],
        way: _Way,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout_s: float,
    ) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout_s):
                status, document = await _exchange(way, method, path, body)
        except (OSError, TimeoutError) as error:
            way.close()
            words = f"{where[1]} at {where[0]} did not answer: {error or 'it takes too long'}"
            raise Unanswered(words) from error
        except BaseException:
            way.close()
            raise
        idle = self._idle.setdefault(where, [])
        if len(idle) < _MOST_KEPT:
            idle.append(way._replace(since_s=time.monotonic()))
        else:
            way.close()
        if status >= 300:
            raise errors.revive(document)
        return document


_SWITCHES = 101


class _NotHeard(Exception):
    """It ended before anything was answered."""


async def _exchange(
    way: _Way, method: str, path: str, body: dict[str, Any] | None
) -> tuple[int, dict[str, Any]]:
    """Send a request, and read all of its answer. Raises _NotHeard, OSError."""
    content = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: lzy\r\nContent-Length: {len(content)}\r\n\r\n"
    try:
        way.writer.write(head.encode() + content)
        await way.writer.drain()
        told = await way.reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            raise _NotHeard("it ended") from error
        raise ConnectionError("its answer was cut") from error
    except (ConnectionError, ssl.SSLError) as error:
        raise _NotHeard(str(error)) from error
    status = int(told.split(b" ", 2)[1])
    if status == _SWITCHES:
        return status, {}
    found = re.search(rb"\r\ncontent-length: (\d+)\r\n", told, re.IGNORECASE)
    try:
        document: dict[str, Any] = json.loads(
            await way.reader.readexactly(int(found[1]) if found else 0)
        )
    except (ValueError, asyncio.IncompleteReadError) as error:
        raise ConnectionError("its answer was cut") from error
    return status, document
