"""What cannot be read now: people are told once, and it is tried again, ever more seldom."""

from __future__ import annotations

from collections.abc import Callable

from .journal import Journal

_FIRST_RETRY_S = 0.05
_LAST_RETRY_S = 5.0


class Backoff:
    """When to try again: `at`, by the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self.at = 0.0
        self._pause_s = _FIRST_RETRY_S

    def put_off(self, now: float) -> None:
        """Not now, but after the present pause."""
        self.at = now + self._pause_s

    def lengthen(self) -> None:
        """It was of no use: the next pause is twice as long."""
        self._pause_s = min(self._pause_s * 2, _LAST_RETRY_S)

    def shorten(self) -> None:
        """It was of use: the next pause is a short one."""
        self._pause_s = _FIRST_RETRY_S


class Trouble:
    """What is wrong at present, in the log and, for who asks how a pager does, in the journal."""

    def __init__(self, journal: Journal, log: Callable[[str], None]) -> None:
        self._journal = journal
        self._log = log
        self._message = ""

    def complain(self, error: Exception) -> None:
        """Say that this keeps memory from being loaded, unless it is what was said last."""
        message = str(error)
        if message != self._message:
            self._message = message
            pid = self._journal.facts["pid"]
            self._log(f"cannot load memory of process {pid} now, trying again: {message}")
            self._journal.set_message(message)

    def is_over(self) -> None:
        """Nobody waits any more."""
        self._log("all faults that had to wait are answered")
        self._message = ""
        self._journal.set_message("")
