"""Who is connected to a terminal: all get what is printed, and what one of them sends is told."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
from collections.abc import Callable
from typing import Any

from .consoles import Console
from .display import MOST_BACKLOG_BYTES, Display
from .frames import OUTPUT, TOLD, pack, pack_json
from .loop import Heard, Loop
from .tokens import QUERY

_MOST_UNSENT_BYTES = 1 << 20


class Audience:
    """The consoles of one terminal; `front` is the one that was used last.

    `take(console, kind, content)` hears of each frame that comes, `gone` of a console that goes.
    `is_bridged`: the bridge of a session that came here has yet to follow it.
    """

    def __init__(
        self,
        loop: Loop,
        display: Display,
        listener: socket.socket,
        owner_uid: int,
        *,
        take: Callable[[Console, int, bytes], None],
        gone: Callable[[Console], None],
        is_bridged: bool,
    ) -> None:
        self._loop = loop
        self._display = display
        self._listener = listener
        self._owner_uid = owner_uid
        self._take = take
        self._gone = gone
        self._consoles: dict[socket.socket, Console] = {}
        self.front: Console | None = None
        self._unheard = bytearray() if is_bridged else None
        """What was printed here before the bridge of a session that came here has followed it."""

    @property
    def shown(self) -> list[Console]:
        """Those that get what is printed."""
        return [console for console in self._consoles.values() if console.is_shown]

    @property
    def holds(self) -> bool:
        """Whether one of them keeps input from the program."""
        return any(console.holds for console in self._consoles.values())

    def open(self) -> None:
        """Let them come."""
        self._loop.hear(self._listener, self._accept)

    def close(self) -> None:
        """Let go of them in this process, after a fork."""
        for console in self._consoles.values():
            console.socket.close()

    # -- what they get

    def show(self, output: bytes, *, asks: bool) -> None:
        """This was printed; `asks`: it has a query in it, which the foremost answers."""
        if self._unheard is not None:
            self._unheard += output
            if len(self._unheard) > MOST_BACKLOG_BYTES:
                self._unheard = None
        for console in self.shown:
            mine = QUERY.sub(b"", output) if asks and console is not self.front else output
            if console.unsent_bytes > _MOST_UNSENT_BYTES:
                console.drop_unsent()
                console.is_behind = True
            elif not console.is_behind:
                console.send(pack(OUTPUT, mine))
            self.flush(console)

    def paint(self, console: Console) -> None:
        """Have it show all of the screen."""
        console.is_behind = False
        console.send(pack(OUTPUT, self._display.paint()))

    def paint_all(self) -> None:
        """Have all show the screen anew, but bridges: these have it."""
        for console in self.shown:
            if not console.is_bridge:
                self.paint(console)
                self.flush(console)

    def tell(self, document: dict[str, Any]) -> None:
        """Tell all who are shown something how the session is."""
        for console in self.shown:
            console.send(pack_json(TOLD, document))
            self.flush(console)

    def catch_up(self, bridge: Console) -> None:
        """Show what was printed here before it came; if that is not known, all of the screen."""
        if self._unheard is None:
            rows, _ = self._display.window
            bridge.send(pack(OUTPUT, b"\x1b[999;1H" + b"\n" * rows))
            self.paint(bridge)
            return
        bridge.send(pack(OUTPUT, bytes(self._unheard)))
        self.forget_unheard()

    def forget_unheard(self) -> None:
        """No bridge has followed in time."""
        self._unheard = None

    def come_forward(self, console: Console) -> None:
        """The window is that of the console that was used last; that one answers queries, too."""
        self.front = console
        window = console.window
        if window and window != self._display.window:
            self._display.resize(window)

    def flush(self, console: Console) -> None:
        """Send it what can be sent now."""
        try:
            console.flush()
        except OSError:
            self._drop(console)
            return
        if not console.unsent and console.is_behind:
            self.paint(console)
        if console.socket in self._consoles:
            self._loop.hear_also(console.socket, writable=bool(console.unsent))

    # -- what comes from them

    def _accept(self, _: int) -> None:
        with contextlib.suppress(OSError):
            sock, _address = self._listener.accept()
            sock.setblocking(False)
            peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("=iII", peer)[1] not in (0, os.geteuid(), self._owner_uid):
                sock.close()
                return
            console = self._consoles[sock] = Console(sock)
            self._loop.hear(sock, self._reader_of(console))

    def _reader_of(self, console: Console) -> Heard:
        def heard(events: int) -> None:
            if events & selectors.EVENT_WRITE:
                self.flush(console)
            if events & selectors.EVENT_READ:
                self._hear(console)

        return heard

    def _hear(self, console: Console) -> None:
        try:
            data = console.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(console)
            return
        try:
            for kind, content in console.frames.feed(data):
                self._take(console, kind, content)
                self.flush(console)
        except (ValueError, KeyError, TypeError):
            self._drop(console)

    def _drop(self, console: Console) -> None:
        if self._consoles.pop(console.socket, None) is None:
            return
        self._loop.forget(console.socket)
        console.socket.close()
        if self.front is console:
            shown = self.shown
            self.front = shown[-1] if shown else None
        self._gone(console)
