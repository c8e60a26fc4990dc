"""Keeps readers from installing pages while it is read what their process did to its memory.

What is to be installed where is decided by who reads the messages of the kernel (`listening`). A
reader that installs it may do so only as long as no event has been read since. So whoever reads
holds the fence alone; and orders that were given before stand only if no event was among what it
read. Who installs holds the fence with others, from before it looks whether its order still stands
until the kernel has taken the pages.

It is a lock on an open file (the journal), which goes with whoever is killed. Hence, whoever is:

- *who reads, in the midst of it*: while the fence is closed no order stands; the word that says so
  stays behind, and its readers install nothing any more.
- *who reads, at another time*: the next pager holds the fence alone before it reads anything, so it
  waits for a reader that is installing just now. After that a reader of the former pager finds
  that its parent is another.
- *a reader*: the kernel has taken the pages or it has not.

Lock order: none; nobody waits for anything else while it holds the fence.
"""

from __future__ import annotations

import mmap
import os
import time

from .linux import locks

_STANDING, _WANTED = 0, 1
_NONE = (1 << 64) - 1
_MOST_YIELDS = 64
_SPIN_S = 0.0005
_NAP_S = 0.0002


class Fence:
    """Of one pager. `epoch`: how often orders were called off, as who gives them knows it."""

    def __init__(self, journal_fd: int) -> None:
        """Raises OSError where the file cannot be locked so (some network file systems)."""
        self._journal_fd = journal_fd
        self._fd = self._open()
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.epoch = 0
        try:
            while not self.close(1.0):  # readers of a pager before us are being killed
                pass
            self.open()
        except OSError:
            os.close(self._fd)
            raise

    def _open(self) -> int:
        """The file opened anew: a lock belongs to an open file, which forked children share."""
        return os.open(f"/proc/self/fd/{self._journal_fd}", os.O_RDWR | os.O_CLOEXEC)

    # -- who reads messages

    def close(self, patience_s: float) -> bool:
        """Wait until no reader installs anything; False if one does not end within that time.

        From then on until `open` no order stands.
        """
        if not locks.claim(self._fd) and not self._wait(patience_s):
            return False
        self._words[_STANDING] = _NONE
        return True

    def _wait(self, patience_s: float) -> bool:
        self._words[_WANTED] = 1
        began = time.monotonic()
        try:
            while not locks.claim(self._fd):
                took_s = time.monotonic() - began
                if took_s > patience_s:
                    return False
                if took_s < _SPIN_S:
                    os.sched_yield()
                else:
                    time.sleep(_NAP_S)
        finally:
            self._words[_WANTED] = 0
        return True

    def open(self, *, calls_off: bool = False) -> None:
        """Let readers install again; with `calls_off` nothing that was ordered until now."""
        self.epoch += calls_off
        self._words[_STANDING] = self.epoch
        locks.release(self._fd)

    # -- who installs

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it to be closed."""
        return self._words[_WANTED] != 0

    def join(self) -> None:
        """In a reader that was just forked; the journal itself it need not hold."""
        self._fd, before = self._open(), self._fd
        os.close(before)
        os.close(self._journal_fd)

    def enter(self, epoch: int) -> bool:
        """Wait until it is open, and keep it so: `leave` it soon. Whether orders of then stand."""
        if self.is_wanted:  # give way, else two readers by turns could keep it for ever
            for _ in range(_MOST_YIELDS):
                os.sched_yield()
                if not self.is_wanted:
                    break
        locks.share(self._fd)
        return self._words[_STANDING] == epoch

    def leave(self) -> None:
        """Installed, or not."""
        locks.release(self._fd)
