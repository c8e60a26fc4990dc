"""Somebody who is connected to a terminal, as its host sees them: what is still to be sent."""

from __future__ import annotations

import socket
from collections import deque

from .frames import Frames


class Console:
    """Somebody connected: a person's console, or an agent with something to say."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.frames = Frames()
        self.unsent: deque[bytes] = deque()
        self.unsent_bytes = 0
        self.window: tuple[int, int] | None = None
        self.is_shown = False
        """It has said hello, and gets what is printed."""
        self.is_bridge = False
        """It stands in the terminal that the program was taken from, and shows what was there."""
        self.taken_bytes = 0
        """How much of what was typed there has come."""
        self.is_behind = False
        """It is so slow that output was left out: it is painted anew when it has caught up."""
        self.holds = False
        """It keeps input from the program as long as it is connected."""

    def send(self, frame: bytes) -> None:
        """Send as soon as it can be."""
        self.unsent.append(frame)
        self.unsent_bytes += len(frame)

    def flush(self) -> None:
        """Send what can be sent now. Raises OSError when nobody is there."""
        while self.unsent:
            frame = self.unsent[0]
            try:
                sent = self.socket.send(frame)
            except BlockingIOError:
                return
            self.unsent_bytes -= sent
            if sent < len(frame):
                self.unsent[0] = frame[sent:]
                return
            self.unsent.popleft()

    def drop_unsent(self) -> None:
        """Forget all but the frame that may have begun to be sent."""
        for _ in range(len(self.unsent) - 1):
            self.unsent_bytes -= len(self.unsent.pop())
