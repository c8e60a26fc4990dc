"""A shell goes on waiting for a program that is not its child any more: its waits are answered.

A session that was hibernated comes back as somebody else's child, perhaps on another machine; to
the shell that it was started in it is to look as if it had been there all the time. That shell is
traced, and wherever wait4(2) is about to tell it of the program's death, or that it has no child,
the result is what it would be told if the program were there: nothing yet (it is held, or told 0 if
it would not wait), or how that has stopped or ended. Should the tracer die, the shell goes on
at once, with what the kernel has told it: that its child was killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct

from .linux import process, ptrace
from .linux.memory import write_process
from .machine import ERESTARTSYS, pack_registers, signed, unpack_registers
from .shell import Shell

STOPPED = signal.SIGTSTP << 8 | 0x7F
"""As waitpid(2) tells of a program that was stopped by its terminal."""
_NO_CHILD = -errno.ECHILD


class Stepparent:
    """The shell of a program that was its child. Precondition: it is held, and the child dead."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._news: int | None = None
        """What it is to be told as soon as it asks."""
        self._has_lost = False
        """It has been told by the kernel that its child is dead, which was kept from it."""
        self._waits = False
        """It is held in a call that waits for the program."""
        self.is_suspended = False
        """It was told that the program has stopped, and has not continued it since."""

    def attend(self) -> None:
        """Answer its calls. Ask when we get a SIGCHLD."""
        while not self._waits and self._shell.is_held():
            self._answer()
        if self._waits:
            self._shell.is_held()  # perhaps it was killed

    def tell(self, status: int) -> None:
        """Tell it how the program has stopped or ended, as waitpid(2) has it."""
        self._news = status
        self.is_suspended = os.WIFSTOPPED(status)
        if self._waits:
            self._answer()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._shell.pid, signal.SIGCHLD)  # as the kernel would

    @property
    def has_told(self) -> bool:
        """Whether it has heard all, or will never ask."""
        return self._news is None or not self._shell.is_traced

    def _answer(self) -> None:
        """It stands at a system call: before it, or with its result."""
        with contextlib.suppress(ProcessLookupError):
            content = ptrace.read_register_set(self._shell.pid, ptrace.NT_PRSTATUS)
            registers = unpack_registers(content)
            if self._find_result(registers):
                packed = pack_registers(registers)
                ptrace.write_register_set(self._shell.pid, ptrace.NT_PRSTATUS, packed)
        if not self._waits:
            self._shell.go_on()

    def _find_result(self, registers: dict[str, int]) -> bool:
        """Change the result if need be, and hold the shell if there is none yet."""
        program, result = self._shell.program, signed(registers["rax"])
        number, whom = registers["orig_rax"], _signed_int(registers["rdi"])
        if result == -errno.ENOSYS:  # it has not been made yet
            return False
        if number == process.SYS_KILL and whom in (program, -program):
            if registers["rsi"] != signal.SIGCONT:
                return False
            self.is_suspended = False
            registers["rax"] = 0  # whether it is here or not
            return True
        if number != process.SYS_WAIT4 or whom not in (-1, program):
            return False
        has_lost = result == program and (self._waits or not self._has_lost)
        self._has_lost |= has_lost  # later on, that pid is another's
        if not has_lost and result not in (0, ERESTARTSYS, _NO_CHILD):
            return False
        options, news = registers["rdx"], self._news
        if news is not None and (not os.WIFSTOPPED(news) or options & os.WUNTRACED):
            self._news, self._waits = None, False
            registers["rax"] = program
            if address := registers["rsi"]:
                told = bytearray(struct.pack("=i", news))
                write_process(self._shell.pid, [(address, len(told))], memoryview(told))
            return True
        if has_lost or result == _NO_CHILD:
            if options & os.WNOHANG:
                registers["rax"] = 0
                return True
            self._waits = True
        return False


def _signed_int(register: int) -> int:
    """An argument of type int."""
    return int.from_bytes((register & 0xFFFFFFFF).to_bytes(4, "little"), "little", signed=True)
