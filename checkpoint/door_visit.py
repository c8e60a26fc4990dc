"""Going in: the main thread waits where it holds nothing, and is borrowed to start a thread."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from . import door_machine, machine, proc
from .door_functions import is_libc
from .door_machine import Stacks
from .door_region import (
    ANSWER_BYTES,
    CODE,
    OUR_CODE,
    REGION_BYTES,
    STACK_BYTES,
    Region,
    fingerprint,
    leftovers,
    unmap_abandoned,
)
from .errors import AccessDenied, Busy, Unsupported
from .linux import PAGE_BYTES, memory, process, ptrace
from .linux.visit import WAITS, holds_signal_frame, is_condition_wait
from .machine import Call
from .proc import Vma
from .stages import reach
from .symbols import read_memory
from .tracee import Thread, Tracee

POLL_S: Final = 0.0005
_TRACED_FOR_S: Final = 1.0
_RESTORERS: Final = (bytes.fromhex("48c7c00f0000000f05"), bytes.fromhex("b80f0000000f05"))


class Patience(NamedTuple):
    """How long to wait, in seconds: for the main thread to idle, for the GIL, for the answer.

    `list_s`: how long the visitor keeps the GIL at most while lzy lists what is free.
    """

    idle_s: float = 0.5
    begin_s: float = 2.0
    end_s: float = 60.0
    list_s: float = 2.0


def refuse_closed(pid: int) -> None:
    """Raise Unsupported if code from outside was forbidden to it (PEP 768), or has no way in."""
    if proc.witness(pid) != pid:
        raise Unsupported(
            f"the main thread of pid {pid} has ended, by which lzy asks an interpreter",
            remedy="dump it without --trim",
            pid=pid,
        )
    environment = proc.read_bytes(pid, "environ").split(b"\0")
    words = proc.read_bytes(pid, "cmdline").split(b"\0")
    if any(word.startswith(b"PYTHON_DISABLE_REMOTE_DEBUG=") for word in environment) or any(
        word in (b"disable-remote-debug", b"-Xdisable-remote-debug") for word in words
    ):
        raise Unsupported(
            f"pid {pid} was started with remote debugging disabled, and is not asked",
            remedy="start it without PYTHON_DISABLE_REMOTE_DEBUG and -X disable-remote-debug",
            pid=pid,
        )


def await_idle(pid: int, within_s: float) -> None:
    """Wait until the main thread waits; looks from outside and stops nobody."""
    deadline = time.monotonic() + within_s
    while True:
        words = proc.read_bytes(pid, f"task/{pid}/syscall").split()
        if len(words) > 2 and _may_borrow(int(words[0]), int(words[2], 16)):
            return
        if time.monotonic() > deadline:
            raise _busy(pid, words[0].decode() if words else "")
        time.sleep(0.01)


def _may_borrow(number: int, second_argument: int) -> bool:
    """Whether a thread in that system call holds nothing of libc; see the top of this page."""
    return number in WAITS or is_condition_wait(number, second_argument)


def _busy(pid: int, where: str) -> Busy:
    doing = "computes" if where in ("", "running") else f"is in system call {where}"
    return Busy(
        f"pid {pid} is busy: its main thread {doing}",
        remedy="try again when it waits for something: input, a timer, a request",
        pid=pid,
    )


class Visited(Tracee):
    """A tracee of which one wait may have an end, so that no lock can hold lzy up."""

    deadline_s = float("inf")

    def _wait_for(self, tid: int) -> int:
        pause_s = 0.0
        while True:
            waited, status = os.waitpid(tid, ptrace.WALL | os.WNOHANG)
            if waited:
                return status
            if tid == self.pid and pause_s and proc.stat(tid, tid)[2] in "ZX":
                return 0
            if time.monotonic() > self.deadline_s:
                raise TimeoutError
            time.sleep(pause_s)
            pause_s = min(pause_s + 0.00005, 0.002)

    def release_others(self) -> None:
        """Let all threads but the main one go on: what they hold, it may have to wait for."""
        for tid in [tid for tid in self.threads if tid != self.pid]:
            thread = self.threads.pop(tid)
            with contextlib.suppress(ProcessLookupError):
                self._put_back(thread)
                ptrace.detach(tid)

    def borrow(self, thread: Thread, code: int, context: int, mailbox: int, within_s: float) -> int:
        """Run `door_machine.BORROW` on a thread; the result of pthread_create.

        TimeoutError: it is not done in time, and finds its way back without us.
        """
        engine, self.code = self.code, code
        content = bytearray(self._context(thread))
        memory.write_process(self.pid, [(context, len(content))], memoryview(content))
        self.deadline_s = time.monotonic() + within_s
        try:
            self._launch(thread, OUR_CODE + door_machine.BORROW, context, {"rbx": mailbox})
            reach("door.borrowed")
            result = self._await_notice(thread)
            self._put_back(thread)
            return result
        except TimeoutError:
            self.deadline_s = float("inf")  # it stops as soon as it is asked to
            if not self._leave_to_itself(thread):
                raise
            there = ptrace.read_register_set(thread.tid, ptrace.NT_PRSTATUS)
            self._put_back(thread)
            return machine.place_and_result(there)[1]
        finally:
            self.deadline_s = float("inf")
            self.code = engine

    def _leave_to_itself(self, thread: Thread) -> bool:
        """Detach from a thread in our code; True if it came back just now and was not."""
        thread.runs = False
        ptrace.interrupt(thread.tid)
        status = self._wait_for(thread.tid)
        if os.WIFSTOPPED(status) and not status >> 16 and os.WSTOPSIG(status) == self._signal:
            return True
        del self.threads[thread.tid]
        ptrace.detach(thread.tid, 0 if status >> 16 else os.WSTOPSIG(status))
        return False


@contextlib.contextmanager
def visited(pid: int) -> Iterator[Visited]:
    """The process with all threads stopped; it runs on when the block is left.

    Another lzy that traces it is waited for: it does so for milliseconds.
    """
    deadline = time.monotonic() + _TRACED_FOR_S
    denials = 0
    while True:
        tracee = Visited(pid)
        try:
            tracee.seize()
            break
        except (Busy, Unsupported) as error:
            if "tracer" not in error.facts or time.monotonic() > deadline:
                raise
        except AccessDenied:  # or the other has let go of it before we could see who it was
            denials += 1
            if denials > 3:
                raise
        time.sleep(POLL_S)
    try:
        yield tracee
    finally:
        tracee.let_go()


def enter(
    pid: int,
    token: int,
    text: bytes,
    functions: dict[str, int],
    patience: Patience,
    *,
    pauses: bool,
) -> Region:
    """Have the process start a thread that runs `text`; where its mailbox is."""
    deadline = time.monotonic() + patience.idle_s
    restorers = _restorers(pid, proc.mappings(pid, with_flags=False))
    while True:
        vmas = proc.mappings(pid, with_flags=False)
        abandoned = leftovers(pid, vmas)
        with visited(pid) as tracee:
            leader = tracee.speaker
            try:
                _refuse_busy(tracee, leader, vmas, restorers)
            except Busy:
                if time.monotonic() > deadline:
                    raise
            else:
                tracee.prepare(arena_bytes=REGION_BYTES, vmas=vmas)
                reach("door.prepared")
                unmap_abandoned(tracee, abandoned)
                return _start_thread(tracee, token, text, functions, patience, pauses)
        time.sleep(0.02)  # it had just been woken


def _refuse_busy(tracee: Tracee, leader: Thread, vmas: list[Vma], restorers: list[int]) -> None:
    """Raise Busy unless the stopped main thread waits where it may be borrowed."""
    registers = leader.registers
    if registers["cs"] != machine.USER_CS_64:
        raise Unsupported(f"pid {tracee.pid} runs 32-bit code", pid=tracee.pid)
    if any(thread.in_group_stop for thread in tracee.threads.values()):
        raise Busy(
            f"pid {tracee.pid} is stopped (SIGSTOP or Ctrl-Z)",
            remedy="let it go on with SIGCONT (`fg`) first",
            pid=tracee.pid,
        )
    number = machine.signed(registers["orig_rax"])
    result = machine.signed(registers["rax"])
    interrupted = -516 <= result <= -512 or result == machine.EINTR
    if number < 0 or not interrupted or not _may_borrow(number, registers["rsi"]):
        raise _busy(tracee.pid, str(number) if number >= 0 else "running")
    top = next((v.end for v in vmas if v.path == "[stack]" and v.start <= registers["rsp"]), 0)
    if not registers["rsp"] < top:
        raise Busy(
            f"pid {tracee.pid} is busy: its main thread runs on a stack of its own making",
            remedy="try again when it has come back from there",
            pid=tracee.pid,
        )
    bottom = registers["rsp"] & ~7
    if holds_signal_frame(read_memory(tracee.pid, bottom, top - bottom), bottom, restorers):
        raise Busy(
            f"pid {tracee.pid} is busy: its main thread handles a signal",
            remedy="try again when it has done so",
            pid=tracee.pid,
        )


def _restorers(pid: int, vmas: list[Vma]) -> list[int]:
    """Where handlers of signals return to, in libc: what stands on a stack that one runs on."""
    found: list[int] = []
    for vma in vmas:
        if "x" not in vma.permissions or not is_libc(vma.path):
            continue
        with contextlib.suppress(OSError):
            text = read_memory(pid, vma.start, vma.length)
            for pattern in _RESTORERS:
                place = text.find(pattern)
                while place >= 0:
                    found.append(vma.start + place)
                    place = text.find(pattern, place + 1)
    return found


def _start_thread(
    tracee: Visited,
    token: int,
    text: bytes,
    functions: dict[str, int],
    patience: Patience,
    pauses: bool,
) -> Region:
    pid = tracee.pid
    leader = tracee.speaker
    region = Region(tracee.arena)
    calls = [
        *(Call(process.SYS_MPROTECT, (guard, PAGE_BYTES, 0)) for guard in region.guards),
        Call(
            process.SYS_MMAP,
            (
                region.code,
                PAGE_BYTES,
                memory.PROT_READ | memory.PROT_EXEC,
                memory.MAP_PRIVATE | memory.MAP_ANONYMOUS | memory.MAP_FIXED,
                -1,
                0,
            ),
        ),
    ]
    for call in calls:
        if -4095 <= (result := tracee.run_one(leader, call)) < 0:
            raise Unsupported(
                f"pid {pid} may not map code ({os.strerror(-result)})",
                remedy="a security module forbids it; nothing was run",
                pid=pid,
            )
    os.pwrite(tracee.memory, CODE, region.code)
    content = door_machine.pack_mailbox(
        region.mailbox,
        text,
        functions,
        Stacks(region.stack, STACK_BYTES, region.mailbox),
        (region.answer, ANSWER_BYTES),
        region.code + OUR_CODE + door_machine.VISIT,
        region.code + machine.NOTIFY,
        token,
        fingerprint(os.getpid()),
        pause_ms=round(patience.list_s * 1000) if pauses else 0,
    )
    os.pwrite(tracee.memory, content, region.mailbox)
    reach("door.mapped")
    context = region.borrowed_stack  # the stack grows down to here, and is far from using it up
    tracee.release_others()
    try:
        result = tracee.borrow(leader, region.code, context, region.mailbox, patience.begin_s)
    except TimeoutError:
        tracee.arena = 0  # in use, whatever becomes of it: the mailbox will tell
        return region
    reach("door.returned")
    if result:
        raise Busy(
            f"pid {pid} could not start a thread: {os.strerror(abs(result))}",
            remedy="see its limits (ulimit -u, -v; pids.max of its cgroup)",
            pid=pid,
        )
    tracee.arena = 0  # stays when the block is left
    return region
