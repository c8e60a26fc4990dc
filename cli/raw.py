"""This terminal as somebody else's for a while: raw, and given back as it was whatever happens."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import termios
import tty
from collections.abc import Callable, Iterator
from typing import Any

STDIN, STDOUT = 0, 1


def window_size() -> tuple[int, int]:
    """Rows and columns of our terminal; 0 where there is none."""
    with contextlib.suppress(OSError):
        packed = fcntl.ioctl(STDOUT, termios.TIOCGWINSZ, bytes(8))
        rows, columns, _, _ = struct.unpack("HHHH", packed)
        return rows, columns
    return 0, 0


def write(data: bytes) -> None:
    while data:
        try:
            data = data[os.write(STDOUT, data) :]
        except BlockingIOError:
            select.select([], [STDOUT], [], 1)


@contextlib.contextmanager
def signals(*more: int) -> Iterator[int]:
    """A descriptor that tells of signals: the window's changes, those that would end us, `more`."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    numbers = (signal.SIGWINCH, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCONT, *more)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    waking = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(waking)
        for number, action in before.items():
            signal.signal(number, action)
        os.close(reading)
        os.close(writing)


class Borrowed:
    """Our terminal while it is somebody else's."""

    def __init__(self, settings: list[Any] | None = None) -> None:
        self.settings = settings
        """What it is given back with, as tcgetattr(3) tells it; at first, what it had."""

    def leave(self, how: bytes) -> None:
        """Take the program's modes off (`how`, if that is known), and go below what is shown."""
        write(how or _PLAIN + b"\x1b[999;1H\r\n")


_PLAIN = (
    b"\x1b[?1l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1006l\x1b[?2004l"
    b"\x1b[?7h\x1b>\x1b[4l\x1b[r\x1b[0m\x1b[?25h"
)


@contextlib.contextmanager
def raw_mode(is_terminal: bool, if_killed: Callable[[], None] | None = None) -> Iterator[Borrowed]:
    """Raw mode while the block runs. A child puts the settings back if we are killed.

    It then does `if_killed`, too.
    """
    if not is_terminal:
        yield Borrowed()
        return
    before = termios.tcgetattr(STDIN)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    watcher = os.fork()
    if watcher == 0:
        _watch_over(reading, writing, before, if_killed)
    os.close(reading)
    borrowed = Borrowed(before)
    try:
        tty.setraw(STDIN, termios.TCSADRAIN)
        yield borrowed
    finally:
        with contextlib.suppress(termios.error):  # it has hung up
            termios.tcsetattr(STDIN, termios.TCSADRAIN, borrowed.settings or before)
        os.write(writing, b"k")
        os.close(writing)
        os.waitpid(watcher, 0)


def _watch_over(
    reading: int, writing: int, before: list[Any], if_killed: Callable[[], None] | None
) -> None:
    """In the child: if the parent ends without a word, give the terminal back for it."""
    try:
        os.close(writing)
        os.setpgid(0, 0)  # what ends the parent's group is not for us
        for number in (signal.SIGTTOU, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if not os.read(reading, 1):
            termios.tcsetattr(STDIN, termios.TCSANOW, before)
            write(b"\x1b7" + _PLAIN + b"\x1b8\x1b[0m\x1b[J\r\n")  # taking margins off moves it
            if if_killed:
                if_killed()
    finally:
        os._exit(0)
