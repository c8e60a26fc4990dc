"""What a terminal shows: the screen, which takes in what was printed when there is time for it."""

from __future__ import annotations

import contextlib
import fcntl
import struct
from typing import Any

from ...checkpoint.kept import screen_path
from ...checkpoint.linux import descriptors as kernel
from .loop import Loop
from .screen import Screen
from .tokens import skim

MOST_BACKLOG_BYTES = 512 << 10
"""So much of what was printed is looked at; of more only the end."""

_DIGEST_S = 0.03
_SAVE_S = 3.0


class Display:
    """The screen of one session, in the window of the terminal behind `master`."""

    def __init__(self, loop: Loop, session: str, master: int) -> None:
        self._loop = loop
        self._path = screen_path(session)
        self._master = master
        self._backlog: list[bytes] = []
        self._screen = self._load()

    def _load(self) -> Screen:
        """The screen as it was saved last, in the window that there is now."""
        packed = fcntl.ioctl(self._master, kernel.TIOCGWINSZ, bytes(kernel.WINSIZE_BYTES))
        rows, columns = struct.unpack("=HHHH", packed)[:2]
        try:
            screen = Screen.load(self._path.read_bytes())
        except (OSError, ValueError):
            return Screen(rows, columns)
        screen.resize(rows, columns)
        return screen

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._screen.rows, self._screen.columns

    def add(self, output: bytes) -> None:
        """This was printed."""
        self._backlog.append(output)
        self._loop.soon(self.digest, _DIGEST_S)
        self._loop.soon(self.save, _SAVE_S)

    def digest(self) -> bytes:
        """Have the screen take in what was printed; what a terminal answers to that."""
        output = b"".join(self._backlog)
        self._backlog = []
        if len(output) > MOST_BACKLOG_BYTES:
            cut = len(output) - MOST_BACKLOG_BYTES
            cut = max(output.find(b"\n", cut) + 1, cut)
            output = skim(output[:cut]) + output[cut:]
        self._screen.feed(output)
        answers = b"".join(self._screen.answers)
        self._screen.answers.clear()
        return answers

    def resize(self, window: tuple[int, int]) -> None:
        """Give the terminal another window."""
        self.digest()
        self._screen.resize(*window)
        fcntl.ioctl(self._master, kernel.TIOCSWINSZ, struct.pack("=HHHH", *window, 0, 0))
        self._loop.soon(self.save, _SAVE_S)

    def paint(self) -> bytes:
        """What makes another terminal show the same."""
        self.digest()
        return self._screen.paint() + self._screen.unfinished()

    def unpaint(self) -> str:
        """What leaves a terminal that shows it as it was found."""
        return self._screen.unpaint().decode()

    def save(self) -> None:
        """Write the screen down, for another host, or another machine."""
        self._loop.never_mind(self.save)
        self.digest()
        new = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk: the terminal goes on
            new.write_bytes(self._screen.save())
            new.rename(self._path)

    def describe(self) -> dict[str, Any]:
        """The screen for who reads no escape sequences."""
        self.digest()
        y, x = self._screen.cursor
        return {
            "rows": self._screen.rows,
            "columns": self._screen.columns,
            "cursor": {"row": y, "column": x},
            "is_alternate": self._screen.is_alternate,
            "title": self._screen.title,
            "screen": self._screen.text(),
            "leave": self.unpaint(),
            "modes_off": self._screen.leave_modes().decode(),
        }
