"""What a console hears of its session: what the program prints, whether it sleeps, or moves.

The connection is made again where another host takes the place of one that was killed, and follows
the session to another node, by way of the agent that had it (`passages`).
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import time
from pathlib import Path
from typing import Any

from ..agent.terminal.frames import (
    ANSWER,
    CONTROL,
    HELLO,
    INPUT,
    OUTPUT,
    TOLD,
    Frames,
    pack,
    pack_json,
    socket_path,
)
from ..checkpoint.kept import find_kept
from .raw import window_size

_COMES_BACK_WITHIN_S = 5.0
_MOVES_WITHIN_S = 20.0
_PAUSE_S = 0.05
_ANSWERS_WITHIN_S = 0.5
_MOST_SENT_BYTES = 64 << 10
_LIVING = ("running", "dozing")


class Gone(Exception):
    """There is nothing to show here any more; `args` say why, if somebody is to know."""


class Link:
    """A connection to the host of a session's terminal; see the module."""

    def __init__(self, session: str, place: Path | None = None, *, paints: bool = False) -> None:
        """`place`: the home with its files; `paints`: have the screen painted at once.

        Raises OSError where nobody keeps one.
        """
        self._session, self._place, self._paints = session, place, paints
        self.has_moved = False
        """It is on a terminal of another node, or was."""
        self._frames = Frames()
        self._sent, self._sent_bytes = b"", 0
        """The end of what was typed on this connection, and how much it was."""
        self._socket = self._connect()
        self._output: list[bytes] = []
        self._answer: dict[str, Any] = {}
        self._is_greeted = True
        self._typed = bytearray()
        """What is to be sent to who greets us next: on another node, or in a killed one's place."""
        self.state = "" if paints else "running"
        self.since = ""
        """The time of day at which it fell asleep."""
        self.news: str | None = None
        """The state has changed: what has failed, or nothing. Whoever has read it makes it None."""
        self._cut_s = 0.0
        """Since when nothing can be heard."""
        self.status: int | None = None
        """How the program has ended for good, as waitpid(2) has it; None where nobody knows."""
        self.leave = b""
        """Once it has: what takes the program's modes off."""

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    @property
    def end(self) -> int | None:
        """How the program has ended for good, as a shell is told it; None where it has not."""
        if self.state != "ended":
            return None
        return int(signal.SIGKILL) if self.status is None else self.status

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
        self._cut_s = 0.0
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

    def type(self, typed: bytes) -> None:
        """Send what was typed, once somebody is there to take it. Raises Gone."""
        if self._is_greeted:
            try:
                self._socket.sendall(pack(INPUT, typed))
                self._sent_bytes += len(typed)
                self._sent = (self._sent + typed)[-_MOST_SENT_BYTES:]
                return
            except OSError:  # what there is still to hear tells why
                self._is_greeted = False
        self._typed += typed

    def send(self, frame: bytes) -> None:
        """Send a frame, unless nobody is there; `hear` finds out."""
        with contextlib.suppress(OSError):
            self._socket.sendall(frame)

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
            self.status, self.leave = told.get("exit_status"), str(told.get("leave", "")).encode()
            if self.status is None and before in ("migrating", "moving"):
                self.state, self.has_moved, self.news = "moving", True, ""
                self._is_greeted = False
                lost_bytes = self._sent_bytes - int(told.get("taken_bytes", self._sent_bytes))
                lost = self._sent[-lost_bytes:] if lost_bytes > 0 else b""
                self._typed[:0] = str(told.get("unread", "")).encode("latin-1") + lost
                self._come_back()
                return
        if self.state == "hibernated" != before:
            self.since = time.strftime("%H:%M")
        if failure or self.state != before:
            self.news = failure
        if not self._is_greeted:
            self._is_greeted = True
            typed = bytes(self._typed)
            self._typed.clear()
            if typed:
                self.type(typed)

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        rows, columns = window_size()
        asked = {"rows": rows, "columns": columns, "paints": self._paints}
        try:
            sock.connect(str(socket_path(self._session, self._place)))
            sock.sendall(pack_json(HELLO, {**asked, "follows": self.has_moved}))
        except OSError:
            sock.close()
            raise
        self._sent, self._sent_bytes = b"", 0
        return sock

    def _come_back(self) -> None:
        """Connect again: to another host in its place, or, by way of the agent, to another node."""
        self._socket.close()
        self._cut_s = self._cut_s or time.monotonic()
        while find_kept(self._session, self._place) or self.has_moved:
            within_s = _MOVES_WITHIN_S if self.has_moved else _COMES_BACK_WITHIN_S
            if time.monotonic() > self._cut_s + within_s:
                break
            time.sleep(_PAUSE_S)
            with contextlib.suppress(OSError):
                self._frames, self._socket = Frames(), self._connect()
                return
        where = "; see lzy ps" if self.has_moved else ""
        raise Gone(f"the terminal of {self._session} is gone{where}")
