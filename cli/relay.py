"""A command on a terminal of its own, which is shown on ours: so it may lead a session there."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
from typing import Any

from .raw import STDIN, STDOUT, raw_mode, signals, window_size, write

_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def is_possible() -> bool:
    """Whether we are in the foreground of a terminal."""
    try:
        return os.isatty(STDOUT) and os.tcgetpgrp(STDIN) == os.getpgrp()
    except OSError:
        return False


def relay(words: list[str]) -> int:
    """Run them until they end; their exit status, as a shell tells it. Raises OSError."""
    settings = termios.tcgetattr(STDIN)
    window = _pack(window_size())
    pid, master = pty.fork()
    if pid == 0:
        try:
            termios.tcsetattr(STDIN, termios.TCSANOW, settings)
            fcntl.ioctl(STDIN, termios.TIOCSWINSZ, window)
            os.execvp(words[0], words)
        finally:
            os._exit(127)
    with signals() as woken, raw_mode(True):
        _pass(master, woken)
    os.close(master)  # which hangs up, should anything be left there
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 128 - code if code < 0 else code


def _pass(master: int, woken: int) -> None:
    """Keys, output and windows, until the other end is closed, or we are to end."""
    wanted: list[Any] = [master, woken, STDIN]
    while True:
        ready = select.select(wanted, [], [])[0]
        if woken in ready:
            if set(os.read(woken, 512)) & set(_ENDS):
                return
            fcntl.ioctl(master, termios.TIOCSWINSZ, _pack(window_size()))
        if master in ready:
            try:
                write(os.read(master, 65536))
            except OSError:
                return
        if STDIN in ready:
            typed = os.read(STDIN, 4096)
            if not typed:
                return
            while typed:
                typed = typed[os.write(master, typed) :]


def _pack(window: tuple[int, int]) -> bytes:
    return struct.pack("HHHH", *window, 0, 0)
