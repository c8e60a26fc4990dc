"""A link with a delay where the kernel has no queue for that: a process hands each frame on later.

    bridge ─ tap NAME ═ this process, which keeps each frame for so long ═ tap eth0 ─ node

The devices are those of the process, and go with it; it goes with who started it.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import deque
from typing import NoReturn

from ..checkpoint.errors import LzyError
from ..checkpoint.linux.detached import die_with_parent, forget_signals, set_name
from ..checkpoint.linux.namespaces import CLONE_NEWNET, enter
from ..checkpoint.linux.taps import MOST_FRAME_BYTES, open_tap

_AT_ONCE = 64
_MOST_KEPT_BYTES = 64 << 20  # what more comes is lost, as from any queue that is full


def start_relay(fabric: int, outer: str, node: int, inner: str, delay_s: float) -> int:
    """Join the namespaces of two processes by a link that delays; who keeps it, a child of ours.

    Raises LzyError.
    """
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            die_with_parent(parent)
            _relay(fabric, outer, node, inner, delay_s, writing)
        except OSError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as told:
        words = told.read().decode()
    if words != "ready":
        os.waitpid(child, 0)
        raise LzyError(f"there is no link with a delay to {outer}: {words or 'its keeper died'}")
    return child


def _relay(
    fabric: int, outer: str, node: int, inner: str, delay_s: float, writing: int
) -> NoReturn:
    forget_signals()
    set_name("lzy-link")
    taps = []
    for process, name in ((fabric, outer), (node, inner)):
        enter(f"/proc/{process}/ns/net", CLONE_NEWNET)
        taps.append(open_tap(name))
    os.write(writing, b"ready")
    os.close(writing)
    links = [_Direction(taps[0], taps[1], delay_s), _Direction(taps[1], taps[0], delay_s)]
    while True:
        due_s = min(link.due_s for link in links)
        wait_s = None if due_s == float("inf") else max(due_s - time.monotonic(), 0.0)
        ready = select.select(taps, [], [], wait_s)[0]
        for link in links:
            if link.source in ready:
                link.take()
            link.hand_on()


class _Direction:
    """What is on its way from one device to the other."""

    def __init__(self, source: int, target: int, delay_s: float) -> None:
        self.source = source
        self._target, self._delay_s = target, delay_s
        self._frames: deque[tuple[float, bytes]] = deque()
        self._kept_bytes = 0

    @property
    def due_s(self) -> float:
        """When the first of them arrives (CLOCK_MONOTONIC)."""
        return self._frames[0][0] if self._frames else float("inf")

    def take(self) -> None:
        """Read what has come."""
        with contextlib.suppress(OSError):  # no more just now, or the device is down
            for _ in range(_AT_ONCE):
                frame = os.read(self.source, MOST_FRAME_BYTES)
                if self._kept_bytes + len(frame) <= _MOST_KEPT_BYTES:
                    self._frames.append((time.monotonic() + self._delay_s, frame))
                    self._kept_bytes += len(frame)

    def hand_on(self) -> None:
        """Write what is due."""
        now_s = time.monotonic()
        while self.due_s <= now_s:
            frame = self._frames.popleft()[1]
            self._kept_bytes -= len(frame)
            with contextlib.suppress(OSError):  # the link is cut: it is lost
                os.write(self._target, frame)
