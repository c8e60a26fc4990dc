"""The ports of sessions that hibernate: whoever connects is heard, and wakes the session.

While a session has no process its agent listens where that listened (TCP). A connection stays in
the socket's queue; the session is woken with that very socket in the place of its own, so that it
accepts the connection and finds what was sent. Nothing is read here.

Not for notebook kernels: their clients connect again and again by themselves (ZeroMQ), which is no
use of the session.

*Guarantee*: a kept socket is closed here when the session lives or is forgotten; if the wake fails
it goes on being kept, and is listened to again after a while. When the session has gone to another
node it is handed to `passages`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

from ..checkpoint.errors import LzyError
from ..checkpoint.image import Image
from ..checkpoint.resources.tcp_socket import address_key, keep_listening, list_listening
from .state import HIBERNATED, WAKING, Record

_TRIES_AGAIN_S = 30.0


class Ports:
    """The sockets that are kept, by session."""

    def __init__(
        self, open_image: Callable[[str], Image], wake: Callable[[str, int], None]
    ) -> None:
        self._open_image = open_image
        self._wake = wake
        self._kept: dict[str, dict[str, socket.socket]] = {}
        self._deaf: dict[str, asyncio.TimerHandle] = {}

    def follow(self, record: Record) -> None:
        """Keep, or let go of, a session's ports, as its record has become."""
        if record.state == WAKING:
            self._listen(record.name, False)
        elif record.state != HIBERNATED:
            self.release(record.name)
        elif record.moving:  # whoever waits is passed on, once it lives there
            self._listen(record.name, False)
        elif record.name not in self._kept:
            if "ipykernel" not in record.command:
                self._keep(record)
        else:  # a wake has failed
            self._listen_later(record.name)

    def descriptors(self, name: str) -> dict[str, int]:
        """What a restore takes in the place of the session's own: by address."""
        return {key: sock.fileno() for key, sock in self._kept.get(name, {}).items()}

    def numbers(self, name: str) -> list[int]:
        """The ports that are kept for a session."""
        return sorted(sock.getsockname()[1] for sock in self._kept.get(name, {}).values())

    def release(self, name: str) -> None:
        """Listen no longer; who waits in a queue that nobody took over is refused."""
        self._listen(name, False)
        for sock in self._kept.pop(name, {}).values():
            sock.close()

    def hand_over(self, name: str) -> list[socket.socket]:
        """The sockets that are kept for a session, to be the caller's."""
        self._listen(name, False)
        return list(self._kept.pop(name, {}).values())

    def close(self) -> None:
        """Let go of all."""
        for name in list(self._kept):
            self.release(name)

    def _keep(self, record: Record) -> None:
        found: dict[str, socket.socket] = {}
        with contextlib.suppress(LzyError, OSError, KeyError, TypeError, ValueError):
            with self._open_image(record.image) as image:
                entries: list[dict[str, Any]] = list_listening(image.document["descriptors"])
            for entry in entries:
                with contextlib.suppress(OSError):  # somebody else's by now
                    found[address_key(entry)] = keep_listening(entry)
        if found:
            self._kept[record.name] = found
            self._listen(record.name, True)

    def _listen(self, name: str, hearing: bool) -> None:
        if timer := self._deaf.pop(name, None):
            timer.cancel()
        loop = asyncio.get_running_loop()
        for sock in self._kept.get(name, {}).values():
            if hearing:
                loop.add_reader(sock.fileno(), self._hear, name, sock.getsockname()[1])
            else:
                loop.remove_reader(sock.fileno())

    def _listen_later(self, name: str) -> None:
        self._listen(name, False)
        loop = asyncio.get_running_loop()
        self._deaf[name] = loop.call_later(_TRIES_AGAIN_S, self._listen, name, True)

    def _hear(self, name: str, port: int) -> None:
        self._listen_later(name)  # unless it wakes
        self._wake(name, port)
