"""The memory of a process that is ended, taken down when there is time for it.

To free a gigabyte takes the kernel a tenth of a second, and until then a killed process keeps its
pid, its ports and its locks. Memory goes when its last user has gone: so we become one, by a read
of /proc/PID/mem that does not end, for what it reads is to go into a page of ours that nobody
brings (userfaultfd). The process itself then ends at once, and leaves nothing but its memory, which
nobody can reach any more; the kernel frees it when the read ends, or we do.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import signal
import threading
from collections.abc import Sequence

from . import proc
from .linux import PAGE_BYTES, address_of, uffd
from .linux.detached import take_descriptor

_PATIENCE_S = 1.0


class Remains:
    """The memory of one process, from `hold` until `let_go` or our own end."""

    def __init__(self, pid: int, pidfd: int, addresses: Sequence[int]) -> None:
        """`addresses`: where it may have something to read. Raises OSError when it cannot be held.

        What hears of that memory is held too: while it can be, closing that would look at it all.
        """
        self._listeners: list[int] = []
        self._page = mmap.mmap(-1, PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory = self._missing = -1
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        try:
            self._take_listeners(pid, pidfd)
            self._memory = os.open(f"/proc/{proc.witness(pid)}/mem", os.O_RDONLY | os.O_CLOEXEC)
            address = next(filter(self._is_readable, addresses), None)
            if address is None:
                raise OSError(errno.EFAULT, f"nothing of process {pid} can be read")
            self._missing = uffd.create()
            uffd.enable(self._missing, 0)
            uffd.register(self._missing, address_of(memoryview(self._page)), PAGE_BYTES)
            self._thread = threading.Thread(target=self._read, args=(address,), daemon=True)
            self._thread.start()
            poll = select.poll()
            poll.register(self._missing, select.POLLIN)
            poll.register(self._ended, select.POLLIN)
            if [number for number, _ in poll.poll(1000 * _PATIENCE_S)] != [self._missing]:
                raise OSError(errno.EAGAIN, f"the memory of process {pid} is not held")
        except BaseException:
            self.let_go()
            raise

    def let_go(self) -> None:
        """Have the kernel free it, and come back when it has; may be called again."""
        if self._missing >= 0:
            os.close(self._missing)  # what was missing is zeros then
            self._missing = -1
        if self._thread:
            self._thread.join()
            self._thread = None
        for number in (*self._listeners, self._memory, self._ended):
            if number >= 0:
                os.close(number)
        self._listeners, self._memory, self._ended = [], -1, -1

    def _take_listeners(self, pid: int, pidfd: int) -> None:
        folder = f"/proc/{proc.witness(pid)}/fd"
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(f"{folder}/{name}") == "anon_inode:[userfaultfd]":
                    self._listeners.append(take_descriptor(pidfd, int(name)))

    def _is_readable(self, address: int) -> bool:
        try:
            return len(os.pread(self._memory, 1, address)) == 1
        except OSError:
            return False

    def _read(self, address: int) -> None:
        # A signal that this thread took would end the read.
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        with contextlib.suppress(OSError):
            os.preadv(self._memory, (memoryview(self._page)[:1],), address)
        os.eventfd_write(self._ended, 1)


def hold_memory(pid: int, pidfd: int, addresses: Sequence[int]) -> Remains | None:
    """Hold the memory of a stopped process, if we may (CAP_SYS_PTRACE) and can."""
    try:
        return Remains(pid, pidfd, addresses)
    except OSError:
        return None
