"""A keeper's questions to the agent: one request at a time, without ever waiting for the answer."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

_WAKE = b'{"wait": false, "anywhere": true, "reason": "a key at its terminal"}'
"""The session may wake on another node: who is connected to the terminal goes along."""


class Asked:
    """A request that is under way; readable means `take`."""

    def __init__(self, path: Path, session: str, *, wake: bool) -> None:
        """Ask how the session is, or to wake it. Raises OSError where there is no agent."""
        self.is_wake = wake
        self._answer = bytearray()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self.socket.connect(str(path))
            place = f"/v1/sessions/{quote(session, safe='@')}"
            body = _WAKE if wake else b""
            head = f"{'POST' if wake else 'GET'} {place}{'/wake' if wake else ''} HTTP/1.1\r\n"
            head += f"Host: lzy\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            self.socket.send(head.encode() + body)
        except OSError:
            self.socket.close()
            raise

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self.socket.fileno()

    def take(self) -> tuple[int, dict[str, Any]] | None:
        """The answer's status and document once it is whole, status 0 if there was none."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while piece := self.socket.recv(65536):
                self._answer += piece
        head, found, body = bytes(self._answer).partition(b"\r\n\r\n")
        status, document = 0, {}
        with contextlib.suppress(ValueError, IndexError):
            status = int(head.split(None, 2)[1])
        if found:
            try:
                document = json.loads(body)
            except ValueError:
                if not self._is_over():
                    return None
                status = 0
        elif not self._is_over():
            return None
        self.socket.close()
        return status, document if isinstance(document, dict) else {}

    def _is_over(self) -> bool:
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
