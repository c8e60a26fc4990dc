"""One lzy at a time looks after what was written of a process: others wait, or are told.

Who protects memory of a process that runs makes what was written count as unwritten. Were another
dump, or a doze, just relying on that account, it would miss those writes. Whoever stops a process
has it alone; who must let it run in between holds a claim on it.

It is a lock on the process's pidfd, which goes with whoever is killed, and is one and the same for
all homes and PID namespaces. Where pidfds are no files of their own yet (before Linux 6.9) it is
one on a file of the run directory.

Lock order: a process before its descendants.
"""

from __future__ import annotations

import fcntl
import os
import time

from .errors import Busy, NotFound
from .fitness import Progress
from .home import run_directory

_PATIENCE_S = 30.0
_PAUSE_S = 0.02


class Claim:
    """A claim on process `pid`, once it is taken; a context manager that lets it go."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._lock = -1

    @property
    def is_held(self) -> bool:
        """Whether it is ours."""
        return self._lock >= 0

    def take(self, progress: Progress | None = None, *, patience_s: float | None = None) -> None:
        """Wait until nobody else has it. Raises Busy when that takes too long, NotFound.

        What is ours already stays so.
        """
        if self.is_held:
            return
        lock = _open_lock(self._pid)
        until = time.monotonic() + (_PATIENCE_S if patience_s is None else patience_s)
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pass
                else:
                    self._lock, lock = lock, -1
                    return
                if time.monotonic() >= until:
                    raise Busy(
                        f"another lzy is at work on process {self._pid}",
                        remedy="wait until it is done, and try again",
                        pid=self._pid,
                    )
                if progress:
                    progress("waiting for another lzy", 0, 0)
                time.sleep(_PAUSE_S)
        finally:
            if lock >= 0:
                os.close(lock)

    def let_go(self) -> None:
        """Others may have it. May be called again."""
        if self.is_held:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # else a forked child of ours might hold it on
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Claim:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()


def _open_lock(pid: int) -> int:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise NotFound(f"process {pid} ended", pid=pid) from None
    if _has_file_of_its_own(pidfd):
        return pidfd
    os.close(pidfd)
    folder = run_directory()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(folder / f"{pid}.claim", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _has_file_of_its_own(pidfd: int) -> bool:
    ours = os.pidfd_open(os.getpid())
    try:
        return os.fstat(pidfd).st_ino != os.fstat(ours).st_ino
    finally:
        os.close(ours)
