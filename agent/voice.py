"""What a daemon says goes to its log if that takes it; no daemon dies of what it cannot say.

A log on a full disk refuses, and Python's own streams raise then, in the midst of whatever was to
be told: a supervisor would end with all its daemons, an agent hang up on who asks.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys


class Voice(io.TextIOBase):
    """A text stream to a descriptor, line by line; what cannot be written is lost."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._begun = ""

    def write(self, words: str) -> int:
        """Take in `words`; every line that is whole by then is written."""
        *lines, self._begun = (self._begun + words).split("\n")
        if lines:
            text = "".join(f"{line}\n" for line in lines)
            with contextlib.suppress(OSError):
                os.write(self._descriptor, text.encode(errors="backslashreplace"))
        return len(words)

    def fileno(self) -> int:
        """The descriptor that it writes to."""
        return self._descriptor


def speak_safely() -> None:
    """Have this process say whatever it says by a `Voice`."""
    sys.stdout, sys.stderr = Voice(1), Voice(2)
