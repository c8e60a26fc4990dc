"""Takes userfaultfd away from memory that is whole, and our descriptors out of the process."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable, Sequence

from . import proc
from .contexts import Context, MemoryGone
from .errors import AccessDenied, Busy, LzyError, NotFound, Unsupported
from .journal import CLOSING, MAIN, Journal
from .learning import Lesson
from .linux import uffd as kernel
from .listening import Listener
from .supply import Supply

CloseDescriptor = Callable[[int, int], int]
"""Close descriptor `number` of process `pid` from within; 0 or -errno."""

_CLOSE_DEADLINE_S = 30
_CLOSE_AGAIN_S = 0.05


class Ending:
    """Of one restored process; `left_something` when one of our descriptors had to stay in it.

    `inside`: (number in the process, our duplicate) of the descriptors to be closed.
    """

    def __init__(
        self,
        journal: Journal,
        listener: Listener,
        supply: Supply,
        lesson: Lesson,
        *,
        pidfd: int,
        inside: Sequence[tuple[int, int]],
        close_descriptor: CloseDescriptor,
        log: Callable[[str], None],
        reach: Callable[[str], None],
    ) -> None:
        self._journal = journal
        self._pid: int = journal.facts["pid"]
        self._listener = listener
        self._supply = supply
        self._lesson = lesson
        self._pidfd = pidfd
        self._inside = inside
        self._close_descriptor = close_descriptor
        self._log = log
        self._reach = reach
        self.left_something = False

    def let_go(self, context: Context) -> None:
        """All pages of a context are in: take userfaultfd away from its memory."""
        if context.token != MAIN:
            # Nobody else holds this one: closing it unregisters everything.
            self._listener.drop(context)
            return
        self._supply.end_readers()
        self._reach("pager.loaded")
        try:
            if not self._unregister_all(context):
                return
        except MemoryGone:
            self._listener.drop(context)
            return
        self._lesson.hand_over()
        self._reach("pager.unregistered")
        self._journal.phase = CLOSING
        if not self._process_ended():
            self._close_inside()
            self._reach("pager.closed")
        self._listener.drop(context)

    def _unregister_all(self, context: Context) -> bool:
        """Unregister every VMA; False when the layout changed meanwhile and it must be redone."""
        try:
            with open(f"/proc/{proc.witness(self._pid)}/maps", "rb") as maps:
                lines = maps.readlines()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise MemoryGone from error
        for line in lines:
            start, _, end = line.split(b" ", 1)[0].partition(b"-")
            low, high = int(start, 16), int(end, 16)
            try:
                kernel.unregister(context.uffd.fd, low, high - low)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    raise MemoryGone from error
                # EINVAL: a VMA that cannot have been registered, or that is gone by now.
        changed = self._listener.attend(context)
        try:
            changed |= context.uffd.layout_is_changing()
        except OSError as error:
            raise MemoryGone from error
        return not changed and not self._listener.asked

    def _close_inside(self) -> None:
        # The userfaultfd goes last: who dumps the process waits until it sees none.
        for number, ours in reversed(self._inside):
            if not kernel.same_description(proc.witness(self._pid), number, ours):
                continue
            try:
                result = self._close_descriptor(self._pid, number)
                if result < 0 and result != -errno.EBADF:  # else it called execve meanwhile
                    raise OSError(-result, os.strerror(-result))
            except Exception as error:  # whatever it is, the process has all its memory
                if self._process_ended():
                    break
                self.left_something = True
                self._log(
                    f"all memory is in, but descriptor {number} of process {self._pid}"
                    f" could not be closed and stays until it is dumped: {error}"
                )
                self._note_left(number)

    def _note_left(self, number: int) -> None:
        from .unfinished import note_descriptor

        try:
            note_descriptor(self._pid, number)
        except (LzyError, OSError) as error:
            self._log(f"it could not be noted: {error}")

    def _process_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))


def close_descriptor(pid: int, number: int) -> int:
    """Close it from a process of its own, with a deadline: the pager never waits for a tracee."""
    child = os.fork()
    if child == 0:
        status = errno.EIO
        try:
            signal.alarm(_CLOSE_DEADLINE_S)
            from .inject import close_descriptor

            while status == errno.EIO:
                if proc.has_ended(pid):
                    raise NotFound(f"process {pid} ended", pid=pid)
                kind = os.readlink(f"/proc/{proc.witness(pid)}/fd/{number}")
                if not kind.startswith(("anon_inode:[userfaultfd]", "socket:")):
                    os._exit(errno.EBADF)  # another program's by now
                try:
                    status = -close_descriptor(pid, number) & 0xFF
                except (Busy, Unsupported):  # whoever restores it may not have let go of it yet
                    time.sleep(_CLOSE_AGAIN_S)
        except NotFound:
            status = errno.ESRCH
        except FileNotFoundError:
            status = errno.EBADF
        except AccessDenied:
            status = errno.EPERM
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    return -errno.ETIMEDOUT if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
