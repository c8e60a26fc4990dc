"""What was typed and no program has read yet: out of a terminal's queue, and into that of another.

The kernel shows it as it comes, tty(4), and it stands on the screen already: so it is put into the
other queue with an echo that is as long as it, which is left out of what is shown.
"""

from __future__ import annotations

import contextlib
import copy
import os
import select
import termios
import time
from pathlib import Path
from typing import Any

from ...checkpoint.kept import kept_folder

_MOST_BYTES = 4096
"""A terminal's queue has so many."""
_ECHOES_WITHIN_S = 1.0
_INPUT, _OUTPUT, _LOCAL, _KEYS = 0, 1, 3, 6
_TRANSLATED = (
    termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP | termios.IXON | termios.IXOFF
)
_SILENT = (termios.VEOF, termios.VEOL, termios.VERASE, termios.VKILL)


def unread_path(session: str, folder: Path | None = None) -> Path:
    """What a session that comes from another node had in its terminal's queue there."""
    return kept_folder(folder) / f"{session}.unread"


def take_unread(slave: int) -> bytes:
    """Take all of it out, half a line included; for who is in no session on that terminal."""
    taken = bytearray()
    with contextlib.suppress(termios.error, OSError):
        before = termios.tcgetattr(slave)
        plain = copy.deepcopy(before)
        plain[_LOCAL] &= ~termios.ICANON
        plain[_KEYS][termios.VMIN] = plain[_KEYS][termios.VTIME] = 0
        termios.tcsetattr(slave, termios.TCSANOW, plain)
        try:
            while len(taken) < _MOST_BYTES and (piece := os.read(slave, _MOST_BYTES)):
                taken += piece
        finally:
            termios.tcsetattr(slave, termios.TCSANOW, before)
    return bytes(taken).replace(b"\0", b"")  # where a line was ended without a sign


def put_unread(master: int, slave: int, typed: bytes) -> bytes:
    """Have it wait to be read, as if it had just been typed; what else was printed meanwhile.

    Its echo is as long as it is, whatever the terminal's settings: when it has come, so has it.
    """
    printed = bytearray()
    with contextlib.suppress(termios.error, OSError):
        before = termios.tcgetattr(slave)
        termios.tcsetattr(slave, termios.TCSANOW, _as_it_is(before))
        try:
            os.write(master, typed)
            deadline = time.monotonic() + _ECHOES_WITHIN_S
            while typed not in printed and (left_s := deadline - time.monotonic()) > 0:
                if select.select([master], [], [], left_s)[0]:
                    printed += os.read(master, _MOST_BYTES)
        finally:
            termios.tcsetattr(slave, termios.TCSANOW, before)
    return bytes(printed).replace(typed, b"", 1)


def _as_it_is(settings: list[Any]) -> list[Any]:
    """Settings in which bytes are queued, and shown, as they are."""
    found = copy.deepcopy(settings)
    found[_INPUT] &= ~_TRANSLATED
    found[_OUTPUT] &= ~termios.OPOST
    found[_LOCAL] &= ~(termios.ISIG | termios.IEXTEN | termios.ECHOCTL | termios.ECHOPRT)
    found[_LOCAL] |= termios.ECHO
    for key in _SILENT:
        found[_KEYS][key] = b"\0"
    return found
