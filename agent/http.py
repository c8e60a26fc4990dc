"""HTTP/1.1 over a unix socket or TLS, as little of it as clients need, on the agent's one thread.

Who asks is known from the kernel (SO_PEERCRED, unix(7)) or by certificate, not from what is sent;
only the migrator may ask on behalf of a user, whom it knows. Requests are bounded in size and in
time; what is not understood is answered with 400, and the connection closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import ssl
import struct
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from .authority import subject_of

USER_HEADER = "x-lzy-uid"
MOST_HEAD_BYTES = 16 << 10
MOST_BODY_BYTES = 64 << 10
_MOST_OF_NODES_BYTES = 4 << 20
"""A session that comes from another node brings the screen of its terminal."""
_MOST_CONNECTIONS = 256
_PIECE_BYTES = 256 << 10
_HEAD_WITHIN_S = 30.0
_LINE = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]{0,4000}) HTTP/1\.[01]")
_CREDENTIALS = struct.Struct("=3i")
_REASONS = {
    200: "OK",
    202: "Accepted",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Content Too Large",
    422: "Unprocessable Content",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Request(NamedTuple):
    """One request. `uid` and `pid` are those of who connected, by a socket of this machine.

    `peer`: what the certificate of who connected by TLS says; then `uid` is that of the user for
    whom the migrator asks, -1 for all other daemons.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    uid: int
    pid: int
    peer: str = ""


class Content(NamedTuple):
    """Bytes of an open file, which is closed at the end; `pause` waits until so many may go."""

    descriptor: int
    offset: int
    length_bytes: int
    pause: Callable[[int], Awaitable[None]]


Passage = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Response(NamedTuple):
    """An answer: a document, text, bytes of a file, or lines that follow as they come.

    Or 101 and a `passage`, which uses the connection from then on, for whatever it likes.
    """

    status: int = 200
    document: Any = None
    text: str | None = None
    lines: AsyncIterator[Any] | None = None
    content: Content | None = None
    passage: Passage | None = None
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed in place


class BadRequest(Exception):
    """What was sent is no request; (status, message)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """Listens on a socket in the file system, and for other nodes, and answers by `handler`."""

    def __init__(self, handler: Handler, *, asks_for_users: str = "migrator") -> None:
        self._handler = handler
        self._asks_for_users = asks_for_users
        self._servers: list[asyncio.Server] = []
        self._open: set[asyncio.Task[None]] = set()

    async def listen(self, path: Path, mode: int) -> None:
        """Take the place of whatever socket is there; the caller is the only agent of its home."""
        draft = path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listening.bind(str(draft))
        draft.chmod(mode)
        listening.listen(128)
        draft.rename(path)  # whoever finds it can connect
        self._servers.append(
            await asyncio.start_unix_server(self._serve, sock=listening, limit=MOST_HEAD_BYTES)
        )

    async def listen_to_nodes(self, address: str, context: ssl.SSLContext) -> None:
        """Answer at HOST:PORT, too, whoever shows a certificate of the fleet."""
        host, _, port = address.rpartition(":")
        self._servers.append(
            await asyncio.start_server(
                self._serve, host.strip("[]"), int(port), ssl=context, limit=MOST_HEAD_BYTES
            )
        )

    async def close(self) -> None:
        """Stop listening and close every connection."""
        for server in self._servers:
            server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._open.add(task)
        try:
            if len(self._open) > _MOST_CONNECTIONS:
                await _answer_error(writer, 503, "too many connections", "try again later")
                return
            peer, uid, pid = "", -1, -1
            if writer.get_extra_info("ssl_object"):
                peer = subject_of(writer.get_extra_info("peercert")) or "a guest"
            else:
                told = writer.get_extra_info("socket").getsockopt(
                    socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
                )
                pid, uid, _ = _CREDENTIALS.unpack(told)
            while await self._serve_one(reader, writer, uid, pid, peer):
                pass
        except (TimeoutError, ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
            pass  # it has gone, or says nothing
        except asyncio.CancelledError:  # the agent stops
            writer.transport.abort()  # TLS would wait for who keeps the connection, and is idle
        finally:
            self._open.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _serve_one(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        uid: int,
        pid: int,
        peer: str,
    ) -> bool:
        """Read a request and answer it; whether the connection goes on."""
        try:
            async with asyncio.timeout(_HEAD_WITHIN_S):  # wait_for may lose that we are to end
                most_bytes = _MOST_OF_NODES_BYTES if peer else MOST_BODY_BYTES
                request = await _read(reader, uid, pid, most_bytes)
            if request and peer:
                request = request._replace(peer=peer)
                user = request.headers.get(USER_HEADER, "")
                if peer == self._asks_for_users and re.fullmatch(r"[0-9]{1,10}", user):
                    request = request._replace(uid=int(user))
        except BadRequest as error:
            await _answer_error(writer, error.status, str(error), "see /v1/openapi.json")
            return False
        if request is None:
            return False
        try:
            response = await self._handler(request)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            words = f"the agent failed: {type(error).__name__}: {error}"
            response = Response(500, {"error": words, "remedy": "see the agent's log"})
        if response.passage:
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: lzy\r\n\r\n")
            await response.passage(reader, writer)
            return False
        await _answer(writer, response)
        return response.lines is None and request.headers.get("connection") != "close"


async def _read(
    reader: asyncio.StreamReader, uid: int, pid: int, most_bytes: int
) -> Request | None:
    """The next request; None when there is none."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise BadRequest(400, "the request ends in its head") from None
        return None
    except asyncio.LimitOverrunError:
        raise BadRequest(413, f"a head may have {MOST_HEAD_BYTES} bytes") from None
    first, *rest = head[:-4].split(b"\r\n")
    line = _LINE.fullmatch(first)
    if line is None:
        raise BadRequest(400, "the first line is none of HTTP/1.1")
    headers: dict[str, str] = {}
    for text in rest:
        name, colon, value = text.partition(b":")
        if not colon or not name or name != name.strip():
            raise BadRequest(400, "a header is none of HTTP/1.1")
        headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
    if "transfer-encoding" in headers:
        raise BadRequest(400, "send the body with a Content-Length")
    length = headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,9}", length):
        raise BadRequest(400, "the Content-Length is no number")
    if int(length) > most_bytes:
        raise BadRequest(413, f"a body may have {most_bytes} bytes")
    body = await reader.readexactly(int(length))
    target = urlsplit(line[2].decode("ascii"))
    query = dict(parse_qsl(target.query, keep_blank_values=True))
    return Request(line[1].decode(), unquote(target.path), query, headers, body, uid, pid)


async def _answer(writer: asyncio.StreamWriter, response: Response) -> None:
    if response.lines is not None:
        await _answer_lines(writer, response.lines)
        return
    if response.content is not None:
        await _answer_content(writer, response.content)
        return
    if response.text is not None:
        content, kind = response.text.encode(), "text/plain; version=0.0.4; charset=utf-8"
    else:
        content, kind = json.dumps(response.document).encode() + b"\n", "application/json"
    writer.write(_head(response.status, kind, response.headers, f"Content-Length: {len(content)}"))
    writer.write(content)
    await writer.drain()


async def _answer_lines(writer: asyncio.StreamWriter, lines: AsyncIterator[Any]) -> None:
    """Documents, a line each, in chunks as they come, until there are no more."""
    writer.write(_head(200, "application/x-ndjson", {}, "Transfer-Encoding: chunked"))
    await writer.drain()
    async with contextlib.aclosing(lines) as following:  # type: ignore[type-var]  # it has aclose
        async for document in following:
            line = json.dumps(document).encode() + b"\n"
            writer.write(b"%x\r\n%s\r\n" % (len(line), line))
            await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def _answer_content(writer: asyncio.StreamWriter, content: Content) -> None:
    """Bytes of a file, no faster than they may."""
    try:
        length = f"Content-Length: {content.length_bytes}"
        writer.write(_head(200, "application/octet-stream", {}, length))
        at, end = content.offset, content.offset + content.length_bytes
        while at < end:
            piece = os.pread(content.descriptor, min(_PIECE_BYTES, end - at), at)
            if not piece:
                raise ConnectionError("the file is shorter than it was")
            await content.pause(len(piece))
            writer.write(piece)
            await writer.drain()
            at += len(piece)
    finally:
        os.close(content.descriptor)


async def _answer_error(
    writer: asyncio.StreamWriter, status: int, message: str, remedy: str
) -> None:
    document = {"kind": "LzyError", "error": message, "remedy": remedy, "exit_status": 1}
    response = Response(status, document, headers={"Connection": "close"})
    await _answer(writer, response)


def _head(status: int, kind: str, headers: dict[str, str], length: str) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}", f"Content-Type: {kind}"]
    lines += [length, *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()
