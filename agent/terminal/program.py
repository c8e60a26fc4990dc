"""The program on a terminal, as its host knows it: which process it is, and how it ended."""

from __future__ import annotations

import contextlib
import os

from ...checkpoint import proc
from ...checkpoint.errors import LzyError
from ...checkpoint.linux.activity import exit_status
from .loop import Heard, Loop


class Program:
    """One life of it after the other; `status` is that of waitpid(2), None while it is not known.

    `ended` is called when the process has ended.
    """

    def __init__(self, loop: Loop, pid: int, status: int | None, ended: Heard) -> None:
        self._loop = loop
        self._ended = ended
        self._pidfd = -1
        self._start = 0  # clock ticks after boot: the same pid may come again
        self.pid = pid
        self.status = status

    def watch(self, pid: int) -> bool:
        """From now on it is that process; whether there is one to watch."""
        if self._pidfd >= 0:
            self._loop.forget(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self.pid, self._start = pid, _start_of(pid)
        if pid > 0:
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(pid)
                self._loop.hear(self._pidfd, self._ended)
        return self._pidfd >= 0

    def watch_no_more(self) -> None:
        """Its end was heard of."""
        self._loop.forget(self._pidfd)

    def ask_status(self) -> int | None:
        """How the process ended, which it may have not, or which somebody may have yet to say."""
        return exit_status(self._pidfd) if self._pidfd >= 0 else None

    @property
    def is_gone(self) -> bool:
        """Whether no process is known to run."""
        return self.pid <= 0 or self.status is not None or _start_of(self.pid) != self._start

    def is_another(self, pid: int) -> bool | None:
        """Whether that process is another life; None when there is no such process."""
        start = _start_of(pid)
        return start != self._start or self.status is not None if start else None


def _start_of(pid: int) -> int:
    """When the process began, proc_pid_stat(5); 0 if there is none, or it has ended."""
    try:
        return 0 if pid <= 0 or proc.has_ended(pid) else proc.start_time(pid)
    except LzyError:
        return 0
