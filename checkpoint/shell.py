"""A shell is held for the moment in which it hears that its program has ended or has stopped.

Shells look at the settings of their terminal just then, and bash(1) keeps what it finds. Whoever
stands for the program there has changed them, and must put them back before. So the shell is
traced while it waits: it stops where wait(2) returns, before it runs one instruction, and goes on
when all is as it was. Should the tracer die, it goes on at once.
"""

from __future__ import annotations

import contextlib
import os
import signal

from . import proc
from .errors import LzyError
from .linux import process, ptrace

_WAITS = {str(process.SYS_WAIT4), str(process.SYS_WAITID), str(process.SYS_RT_SIGSUSPEND)}
_WAITS_INSIDE = (b"do_wait", b"sigsuspend", b"kernel_wait4")


class Shell:
    """The parent of a program on a terminal, which has the terminal back when the program stops."""

    def __init__(self, pid: int, program: int) -> None:
        self.pid = pid
        self.program = program
        self._is_traced = self._is_held = False

    @property
    def is_traced(self) -> bool:
        """Whether it can be held."""
        return self._is_traced

    def watch(self) -> None:
        """Hold it whenever it has waited, from now on; nothing is done where we may not trace."""
        if self._is_traced:
            return
        with contextlib.suppress(OSError):
            ptrace.seize(self.pid, ptrace.PTRACE_O_TRACESYSGOOD)
            self._is_traced = True
            ptrace.interrupt(self.pid)

    def is_held(self) -> bool:
        """Whether it stands at a system call, until `go_on`. Ask when we get a SIGCHLD."""
        while status := self._next_stop(os.WNOHANG):
            if ptrace.is_at_call(status):
                self._is_held = True
                break
            with contextlib.suppress(ProcessLookupError):
                if status >> 16 and os.WSTOPSIG(status) != signal.SIGTRAP:
                    ptrace.listen(self.pid)
                else:
                    ptrace.resume_to_call(self.pid, _signal_of(status))
        return self._is_held

    def go_on(self) -> None:
        """Let it go on to its next system call."""
        self._is_held = False
        with contextlib.suppress(ProcessLookupError):
            ptrace.resume_to_call(self.pid)

    def release(self) -> None:
        """Trace it no longer: one that is held goes on, before anything else is done to it."""
        self._is_held = False
        if not self._is_traced:
            return
        with contextlib.suppress(ProcessLookupError):
            try:
                ptrace.detach(self.pid)
            except ProcessLookupError:  # it runs, or waits
                ptrace.interrupt(self.pid)
                if status := self._next_stop():  # perhaps where its call was interrupted
                    ptrace.detach(self.pid, _signal_of(status))
        self._is_traced = False

    def _next_stop(self, flags: int = 0) -> int:
        """The status of a stop; 0 if there is none, or the shell has ended."""
        if not self._is_traced:
            return 0
        try:
            pid, status = os.waitpid(self.pid, ptrace.WALL | flags)
        except ChildProcessError:
            pid, status = self.pid, 0
        if pid and not os.WIFSTOPPED(status):
            self._is_traced = self._is_held = False
        return status if pid and self._is_traced else 0

    def has_handed_over(self) -> bool:
        """Whether it waits for the program, and has given no other group the terminal.

        A shell cannot give it to a group of another session (tcsetpgrp(3)): after `fg` its own
        group stands there, and that it waits tells the foreground from the background.
        """
        try:
            stat = proc.stat(self.pid)
        except LzyError:
            return False
        return int(stat[7]) in (self.program, int(stat[4])) and self._waits()

    def _waits(self) -> bool:
        try:
            return proc.read_bytes(self.pid, "syscall").decode().split()[0] in _WAITS
        except (LzyError, OSError, IndexError):
            with contextlib.suppress(LzyError, OSError):
                return proc.read_bytes(self.pid, "wchan").startswith(_WAITS_INSIDE)
            return False


def _signal_of(status: int) -> int:
    """What a stop keeps from the shell and is to be delivered; 0 for nothing."""
    return 0 if status >> 16 or ptrace.is_at_call(status) else os.WSTOPSIG(status)
