"""What a bridge hears of its session: what the program prints, and whether it sleeps."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import time
from typing import Any

from ..agent.terminal.frames import (
    ANSWER,
    CONTROL,
    HELLO,
    OUTPUT,
    TOLD,
    Frames,
    pack_json,
)
from ..checkpoint.kept import find_kept
from .console import open_console
from .raw import window_size

_COMES_BACK_WITHIN_S = 5.0
_ANSWERS_WITHIN_S = 0.5
_LIVING = ("running", "dozing")


class Gone(Exception):
    """There is nothing to show here any more; `args` say why, if somebody is to know."""


class Link:
    """A connection to the host of a session's terminal, made again if another takes its place."""

    def __init__(self, session: str) -> None:
        """Raises OSError where nobody keeps one."""
        self._session = session
        self._frames = Frames()
        self._socket = self._connect()
        self._output: list[bytes] = []
        self._answer: dict[str, Any] = {}
        self.state = "running"
        self.since = ""
        """The time of day at which it fell asleep."""
        self.news: str | None = None
        """The state has changed: what has failed, or nothing. Whoever has read it makes it None."""
        self.end: int | None = None
        """How the program has ended for good, as waitpid(2) has it."""

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    @property
    def is_asleep(self) -> bool:
        """Whether the program has ended to come back: it hibernates, or moves."""
        return self.state not in (*_LIVING, "ended")

    def hear(self) -> None:
        """Take what has come. Raises Gone."""
        try:
            data = self._socket.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            self._come_back()
            return
        for kind, content in self._frames.feed(data):
            if kind == OUTPUT:
                self._output.append(content)
            elif kind == ANSWER:
                self._answer = json.loads(content)
            elif kind == TOLD:
                self._note(json.loads(content))

    def take_output(self) -> bytes:
        """What the program has printed since the last time."""
        output = b"".join(self._output)
        self._output.clear()
        return output

    def send(self, frame: bytes) -> None:
        """Send a frame. Raises Gone."""
        try:
            self._socket.sendall(frame)
        except OSError:
            self._come_back()

    def look(self) -> dict[str, Any]:
        """What the host says of the terminal; empty if it says nothing. Raises Gone."""
        self._answer = {}
        self.send(pack_json(CONTROL, {"do": "look"}))
        deadline = time.monotonic() + _ANSWERS_WITHIN_S
        while not self._answer and (left_s := deadline - time.monotonic()) > 0:
            if select.select([self._socket], [], [], left_s)[0]:
                self.hear()
        return self._answer

    def _note(self, told: dict[str, Any]) -> None:
        before, self.state = self.state, str(told["state"])
        failure = str(told.get("failure") or "")
        if self.state == "ended":
            status = told.get("exit_status")
            if status is None and before not in (*_LIVING, "ended"):
                raise Gone(f"{self._session} lives on another node now; see lzy ps")
            self.end = int(signal.SIGKILL if status is None else status)
        if self.state == "hibernated" != before:
            self.since = time.strftime("%H:%M")
        if failure or self.state != before:
            self.news = failure

    def _connect(self) -> socket.socket:
        sock = open_console(self._session)
        rows, columns = window_size()
        sock.sendall(pack_json(HELLO, {"rows": rows, "columns": columns, "paints": False}))
        return sock

    def _come_back(self) -> None:
        self._socket.close()
        deadline = time.monotonic() + _COMES_BACK_WITHIN_S
        while time.monotonic() < deadline and find_kept(self._session):
            with contextlib.suppress(OSError):
                self._frames, self._socket = Frames(), self._connect()
                return
            time.sleep(0.05)
        raise Gone(f"the terminal of {self._session} is gone")
