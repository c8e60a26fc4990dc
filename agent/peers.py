"""How daemons talk to agents of other nodes: the same requests, over TLS that both prove.

`Peer` blocks, for the migrator and for operations; `ask` is for the agent's own event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ..checkpoint.errors import AccessDenied, LzyError
from . import errors
from .authority import client_context, subject_of
from .client import Client, Unanswered
from .http import USER_HEADER

_CONNECTS_WITHIN_S = 5.0
_AGREES_WITHIN_S = 30.0


class Unreachable(LzyError):
    """That node's agent does not answer: it is down, or the way to it is."""


class Peer(Client):
    """The agent (or migrator) at HOST:PORT, if it is who it should be (`subject`)."""

    def __init__(self, address: str, subject: str, context: ssl.SSLContext, uid: int = 0) -> None:
        self.path = Path(address)
        self.where = f"{subject} at {address}"
        self.headers = {USER_HEADER: str(uid)}
        self._address, self._subject, self._context = address, subject, context

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


class Contacts:
    """The agent's own way to others: its certificate, read once."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """TLS with our certificate. Raises NotFound where this node is in no fleet."""
        if self._context is None:
            self._context = client_context(self.place)
        return self._context

    @contextlib.asynccontextmanager
    async def open(
        self, address: str, subject: str, path: str
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection to that agent for a block's own use, once it has agreed to POST `path`.

        Raises Unreachable, Unanswered, or what it answered.
        """
        where = f"{subject} at {address}"
        reader, writer = await self._connect(address, subject)
        try:
            writer.write(f"POST {path} HTTP/1.1\r\nHost: lzy\r\n\r\n".encode())
            async with asyncio.timeout(_AGREES_WITHIN_S):
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 101 "):
                _read(head + await reader.read(-1), where)
                raise Unanswered(f"{where} does not pass anything on")
            yield reader, writer
        except (TimeoutError, asyncio.IncompleteReadError) as error:
            raise Unanswered(f"{where} did not answer") from error
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    async def _connect(
        self, address: str, subject: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to who it should be. Raises Unreachable, AccessDenied."""
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
        return reader, writer

    async def ask(
        self,
        address: str,
        subject: str,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float = 30.0,
    ) -> dict[str, Any]:
        """What that agent answers. Raises Unreachable, Unanswered, or what it answered."""
        where = f"{subject} at {address}"
        reader, writer = await self._connect(address, subject)
        try:
            content = json.dumps(body).encode() if body is not None else b""
            head = f"{method} {path} HTTP/1.1\r\nHost: lzy\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            async with asyncio.timeout(timeout_s):
                await writer.drain()
                answer = await reader.read(-1)
        except (OSError, TimeoutError) as error:
            raise Unanswered(f"{where} did not answer: {error or 'it takes too long'}") from error
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()
        return _read(answer, where)


def _read(answer: bytes, where: str) -> dict[str, Any]:
    head, _, content = answer.partition(b"\r\n\r\n")
    try:
        status = int(head.split(b" ", 2)[1])
        document: dict[str, Any] = json.loads(content)
    except (ValueError, IndexError) as error:
        raise Unanswered(f"{where} did not answer: its answer was cut") from error
    if status >= 300:
        raise errors.revive(document)
    return document
