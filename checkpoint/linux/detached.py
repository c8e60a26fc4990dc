"""Processes that outlive who started them: shared descriptor tables, names, others' descriptors."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable

from . import libc, syscall

_CLONE = 56  # system call numbers, x86-64
_PIDFD_GETFD = 438
_CLONE_FILES = 0x400
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
SO_PEEK_OFF = 42
"""Socket option (socket(7)): where in the queue MSG_PEEK looks."""

_HIGHEST_DESCRIPTOR = 0x7FFFFFFF

_held = ctypes.PyDLL(None, use_errno=True)
_syscall_held = _held.syscall
_syscall_held.restype = ctypes.c_long


def fork_sharing_descriptors() -> int:
    """fork(2), but parent and child share one descriptor table (CLONE_FILES); 0 in the child.

    What either opens the other has, and it outlives whichever dies first.

    Preconditions: the calling thread is the only one, or every other one waits for a lock of its
    own and holds none of the C library's: glibc's fork handlers, which would mend those, do not
    run (there is no fork of glibc's that takes flags). The GIL is held throughout.
    """
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    zero = ctypes.c_ulong(0)
    flags = ctypes.c_ulong(_CLONE_FILES | signal.SIGCHLD)
    pid = int(_syscall_held(ctypes.c_long(_CLONE), flags, zero, zero, zero, zero))
    number = ctypes.get_errno()
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


def take_descriptor(pidfd: int, number: int) -> int:
    """A duplicate (CLOEXEC) of descriptor `number` of another process. Source: pidfd_getfd(2)."""
    return syscall(_PIDFD_GETFD, pidfd, number, 0)


def set_name(name: str) -> None:
    """Name this thread as ps(1) and /proc/PID/comm show it: at most 15 bytes (PR_SET_NAME)."""
    libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Have ourselves killed when process `parent`, which forked us, ends (PR_SET_PDEATHSIG)."""
    libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor of this process except those in `keep`."""
    low = 0
    for number in sorted(set(keep)):
        if number > low:
            os.closerange(low, number)
        low = number + 1
    os.closerange(low, _HIGHEST_DESCRIPTOR)


def forget_signals() -> None:
    """Default action for every signal and none blocked, as a new program would have it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP) and signal.getsignal(number) not in (
            signal.SIG_DFL,
            None,
        ):
            signal.signal(number, signal.SIG_DFL)
