"""A door into a running CPython: have it run a text of ours, as one more thread of its own would.

How it goes:

1. *Is it idle?* The main thread must wait in a system call in which nothing of libc is held
   (`WAITS`): to read, to be woken, to sleep. Who computes is busy, and is not even stopped.
2. All threads are stopped for a moment. One region is mapped: stacks, a mailbox, code. All threads
   but the main one are let go; the main one is borrowed for a single `pthread_create`, on a stack
   that is not its own, and goes on waiting as if nothing had been.
3. The new thread asks for the GIL as any thread does (`PyGILState_Ensure`), runs the text in a
   namespace that is thrown away, copies the answer, and ends. If the GIL does not come in time it
   is told not to begin: whoever sees the mailbox's state first decides.
4. When its thread is gone, the region is unmapped.

Why this is safe, and other ways are not (docs/decisions.md has more):

- glibc holds the locks that pthread_create needs (of malloc, of the list of stacks, of
  thread-local storage) only across mmap, munmap, mprotect, madvise, brk, clone and the plain futex
  wait of another such lock. None of these is in `WAITS`, and a thread in the midst of a signal
  handler, which may have interrupted anything, is refused. What *other* threads hold, they give
  back: they run.
- The text runs as a thread may run whenever the main thread has let go of the GIL. It is not run on
  top of what the main thread was doing, where a finalizer could meet a lock of its own thread.
- All that is borrowed is put back by the process itself, so lzy may be killed at any line: a
  borrowed thread finds its way back without us (see `machine`), the new thread ends without us.
  What may then be left is the region, of which the next visit gets rid.

*Guarantees*: the text runs whole or not at all; the program sees no name, no output, no signal. It
may see that garbage was collected, if that was asked for.

All functions must be called by one operating system thread: they trace.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from . import door_machine, machine, pools, proc
from .door_machine import FUNCTIONS, OF_LIBC, OF_PYTHON, Stacks
from .errors import AccessDenied, Busy, KernelError, LzyError, NotFound, Unsupported
from .linux import PAGE_BYTES, memory, process, ptrace
from .linux.visit import WAITS, holds_signal_frame, is_condition_wait
from .machine import Call
from .proc import Vma
from .stages import reach
from .symbols import Library, file_name, libraries, read_memory
from .tracee import Thread, Tracee

_STACK_BYTES: Final = 8 << 20  # what a main thread has; untouched pages cost nothing
_BORROWED_STACK_BYTES: Final = 256 << 10
_ANSWER_BYTES: Final = 1 << 20
_POOLS_LIMIT: Final = _ANSWER_BYTES // 8 - 1  # of one visit: 2 GiB
_POLL_S: Final = 0.0005
_TRACED_FOR_S: Final = 1.0
_ENDS_WITHIN_S: Final = 2.0  # a thread that has nothing left to do
_RESTORERS: Final = (bytes.fromhex("48c7c00f0000000f05"), bytes.fromhex("b80f0000000f05"))
_OPTIONAL: Final = ("malloc_trim",)


class Patience(NamedTuple):
    """How long to wait, in seconds: for the main thread to idle, for the GIL, for the answer.

    `list_s`: how long the visitor keeps the GIL at most while lzy lists what is free.
    """

    idle_s: float = 0.5
    begin_s: float = 2.0
    end_s: float = 60.0
    list_s: float = 2.0


_PATIENCE: Final = Patience()


class _Region(NamedTuple):
    """Addresses within what is mapped into the process for one visit."""

    start: int

    @property
    def stack(self) -> int:
        return self.start + PAGE_BYTES  # below it a guard, that whoever runs over it faults

    @property
    def borrowed_stack(self) -> int:
        return self.stack + _STACK_BYTES + PAGE_BYTES

    @property
    def mailbox(self) -> int:
        return self.borrowed_stack + _BORROWED_STACK_BYTES

    @property
    def answer(self) -> int:
        return self.mailbox + -(-door_machine.MAILBOX_BYTES // PAGE_BYTES) * PAGE_BYTES

    @property
    def code(self) -> int:
        return self.answer + _ANSWER_BYTES

    @property
    def guards(self) -> tuple[int, int]:
        return self.start, self.stack + _STACK_BYTES

    @property
    def end(self) -> int:
        return self.code + PAGE_BYTES


_REGION_BYTES: Final = _Region(0).end
_OUR_CODE: Final = 512  # behind `machine.CODE`, in the region's page of code
_CODE: Final = machine.CODE.ljust(_OUR_CODE, b"\0") + door_machine.CODE


def ask(
    pid: int,
    question: dict[str, int],
    *,
    trim: bool = False,
    patience: Patience = _PATIENCE,
) -> dict[str, Any]:
    """What the interpreter in process `pid` answers to `door_inside.answer_to(question)`.

    With `trim` the allocators give back what is free in them behind it: pymalloc its pools, libc by
    malloc_trim(3). Raises Unsupported (no
    CPython from 3.8 on), Busy (its main thread computes, or the GIL did not come in time; nothing
    has run), NotFound, AccessDenied; LzyError if the interpreter could not answer.
    """
    try:
        return _ask(pid, question, trim, patience)
    except ProcessLookupError as error:
        raise NotFound(f"process {pid} ended while lzy asked it", pid=pid) from error
    except OSError as error:
        if error.errno == errno.EFAULT:  # it runs while it is looked at, or somebody else asks it
            raise Busy(
                f"pid {pid} gave memory back while lzy looked at it",
                remedy="try again in a moment",
                pid=pid,
            ) from error
        raise KernelError(f"cannot ask pid {pid}: {error}", error.errno or 0, pid=pid) from error


def _ask(pid: int, question: dict[str, int], trim: bool, patience: Patience) -> dict[str, Any]:
    _refuse_closed(pid)
    text = _text_for(question)
    vmas = proc.mappings(pid, with_flags=False)
    functions, interpreter = find_functions(pid, vmas)
    variables: list[int] = []
    if trim:
        variables = pools.find_variables(pid, vmas, interpreter)
    else:
        functions.pop("malloc_trim", None)
    _await_idle(pid, patience.idle_s)
    token = int.from_bytes(os.urandom(8), "little")
    region = _enter(pid, token, text, functions, patience, pauses=trim)
    reach("door.entered")
    outcome, content = _await_answer(pid, region, token, patience, variables)
    reach("door.answered")
    with contextlib.suppress(Busy, NotFound):
        _clear(pid, region, token)
    reach("door.cleared")
    if outcome != door_machine.ANSWERED:
        why = {
            door_machine.NO_INTERPRETER: "its interpreter is not running yet, or no more",
            door_machine.TOO_LONG: "its answer is too long",
        }
        raise LzyError(
            f"the interpreter in pid {pid} did not answer: {why.get(outcome, 'it failed')}",
            remedy="it runs on as before; try again later",
            pid=pid,
        )
    return _read_answer(pid, content)


def _text_for(question: dict[str, int]) -> bytes:
    inside = Path(__file__).with_name("door_inside.py").read_text(encoding="utf-8")
    return f"{inside}\nanswer = answer_to({question!r})\n".encode()


def _read_answer(pid: int, content: bytes) -> dict[str, Any]:
    """The literal the process gave; it is another's, and believed to be nothing but a literal."""
    try:
        told = ast.literal_eval(content.decode())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise LzyError(f"the interpreter in pid {pid} answered gibberish", pid=pid) from error
    if not isinstance(told, dict) or "error" in told:
        words = told.get("error") if isinstance(told, dict) else "no table"
        raise LzyError(f"the interpreter in pid {pid} could not answer: {words}", pid=pid)
    return told


# -- what is called, and when --------------------------------------------------------------------


def find_functions(pid: int, vmas: list[Vma]) -> tuple[dict[str, int], str]:
    """Addresses of the functions called inside, and the path of the interpreter.

    Unsupported for what is no CPython from 3.8 on.
    """
    likely = sorted(vmas, key=lambda vma: "python" not in file_name(vma.path))
    python = next(filter(lambda it: it.function(OF_PYTHON[1]), libraries(pid, likely)), None)
    if python is None:
        raise Unsupported(
            f"pid {pid} ({proc.stat(pid)[1]}) runs no CPython that lzy could ask",
            remedy="only interpreters that export the C interface of Python can be asked",
            pid=pid,
        )
    if not python.function("PyConfig_InitPythonConfig"):  # came with Python 3.8
        raise Unsupported(
            f"pid {pid} runs a Python before 3.8 ({file_name(python.path)})",
            remedy="lzy asks Python 3.8 and later",
            pid=pid,
        )
    found = _look_up(OF_PYTHON, [python])
    found |= _look_up(OF_LIBC, list(libraries(pid, [v for v in vmas if _is_libc(v.path)])))
    missing = [name for name in FUNCTIONS if not found.get(name) and name not in _OPTIONAL]
    if missing:
        raise Unsupported(
            f"pid {pid} has no {', '.join(missing)} in its libraries",
            remedy="only dynamically linked interpreters can be asked",
            pid=pid,
        )
    if "xsave" not in proc.cpu_features():
        raise Unsupported("this processor has no XSAVE", remedy="use a newer machine", pid=pid)
    return found, python.path


def _look_up(names: tuple[str, ...], places: list[Library]) -> dict[str, int]:
    return {
        name: next(filter(None, (library.function(name) for library in places)), 0)
        for name in names
    }


def _is_libc(path: str) -> bool:
    name = file_name(path)
    return name.startswith(("libc.so", "libc-", "libpthread", "ld-musl"))


def _refuse_closed(pid: int) -> None:
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


def _await_idle(pid: int, within_s: float) -> None:
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


# -- going in ------------------------------------------------------------------------------------


class _Visited(Tracee):
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
            self._launch(thread, _OUR_CODE + door_machine.BORROW, context, {"rbx": mailbox})
            reach("door.borrowed")
            after = self._await_notice(thread)
            self._put_back(thread)
            return machine.signed(after["r12"])
        except TimeoutError:
            self.deadline_s = float("inf")  # it stops as soon as it is asked to
            if not self._leave_to_itself(thread):
                raise
            there = ptrace.read_register_set(thread.tid, ptrace.NT_PRSTATUS)
            self._put_back(thread)
            return machine.signed(machine.unpack_registers(there)["r12"])
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
def _visited(pid: int) -> Iterator[_Visited]:
    """The process with all threads stopped; it runs on when the block is left.

    Another lzy that traces it is waited for: it does so for milliseconds.
    """
    deadline = time.monotonic() + _TRACED_FOR_S
    denials = 0
    while True:
        tracee = _Visited(pid)
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
        time.sleep(_POLL_S)
    try:
        yield tracee
    finally:
        tracee.let_go()


def _enter(
    pid: int,
    token: int,
    text: bytes,
    functions: dict[str, int],
    patience: Patience,
    *,
    pauses: bool,
) -> _Region:
    """Have the process start a thread that runs `text`; where its mailbox is."""
    deadline = time.monotonic() + patience.idle_s
    restorers = _restorers(pid, proc.mappings(pid, with_flags=False))
    while True:
        vmas = proc.mappings(pid, with_flags=False)
        abandoned = leftovers(pid, vmas)
        with _visited(pid) as tracee:
            leader = tracee.speaker
            try:
                _refuse_busy(tracee, leader, vmas, restorers)
            except Busy:
                if time.monotonic() > deadline:
                    raise
            else:
                tracee.prepare(arena_bytes=_REGION_BYTES, vmas=vmas)
                reach("door.prepared")
                _unmap_abandoned(tracee, abandoned)
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
        if "x" not in vma.permissions or not _is_libc(vma.path):
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
    tracee: _Visited,
    token: int,
    text: bytes,
    functions: dict[str, int],
    patience: Patience,
    pauses: bool,
) -> _Region:
    pid = tracee.pid
    leader = tracee.speaker
    region = _Region(tracee.arena)
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
    os.pwrite(tracee.memory, _CODE, region.code)
    content = door_machine.pack_mailbox(
        region.mailbox,
        text,
        functions,
        Stacks(region.stack, _STACK_BYTES, region.mailbox),
        (region.answer, _ANSWER_BYTES),
        region.code + _OUR_CODE + door_machine.VISIT,
        region.code + machine.NOTIFY,
        token,
        _fingerprint(os.getpid()),
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


# -- the answer, and going out -------------------------------------------------------------------


def _await_answer(
    pid: int, region: _Region, token: int, patience: Patience, variables: list[int]
) -> tuple[int, bytes]:
    """(outcome, answer); Busy if it did not begin in time and never will, or does not end."""
    began = time.monotonic()
    content = b""
    while True:
        state = _read_state(pid, region, token)
        if state.state in (door_machine.DONE, door_machine.PAUSED) and not content:
            if state.outcome == door_machine.ANSWERED and state.answer_bytes <= _ANSWER_BYTES:
                content = read_memory(pid, region.answer, state.answer_bytes)
            _read_state(pid, region, token)  # it was that of our mailbox
            if state.state == door_machine.PAUSED:
                reach("door.paused")
                _hand_pools(pid, region, token, content, variables)
        if state.state == door_machine.DONE:
            return state.outcome, content
        waited_s = time.monotonic() - began
        if state.state == door_machine.WAITING and waited_s > patience.begin_s:
            if _give_up(pid, region, token, door_machine.WAITING):
                raise Busy(
                    f"pid {pid} is busy: another thread keeps the interpreter (its GIL) "
                    f"for more than {patience.begin_s:g} s",
                    remedy="try again later; nothing was run in it",
                    pid=pid,
                )
        elif waited_s > patience.begin_s + patience.end_s and _give_up(
            pid, region, token, door_machine.RUNNING
        ):
            raise Busy(
                f"the interpreter in pid {pid} has not answered after {waited_s:.0f} s",
                remedy="it goes on, and ends what it was asked for by itself",
                pid=pid,
            )
        time.sleep(_POLL_S if waited_s < 0.05 else 10 * _POLL_S)


def _hand_pools(
    pid: int, region: _Region, token: int, content: bytes, variables: list[int]
) -> None:
    """Tell the visitor, which keeps the GIL and waits, which pools of pymalloc are free."""
    found: list[int] = []
    with contextlib.suppress(LzyError, OSError, ValueError):  # it is waiting: hand it none then
        version = str(_read_answer(pid, content).get("python")).split(".")
        if version[0] == "3" and int(version[1]) in pools.VERSIONS:
            found = pools.list_free_pools(pid, proc.mappings(pid, with_flags=False), variables)
    table = bytearray(struct.pack(f"<{len(found[:_POOLS_LIMIT]) + 1}Q", *found[:_POOLS_LIMIT], 0))
    with _visited(pid):
        if _read_state(pid, region, token).state != door_machine.PAUSED:
            return  # we were too slow: others have the GIL again
        memory.write_process(pid, [(region.answer, len(table))], memoryview(table))
        head = bytearray(read_memory(pid, region.mailbox, door_machine.STATE_BYTES))
        door_machine.hand_pools(head)
        memory.write_process(pid, [(region.mailbox, len(head))], memoryview(head))
    reach("door.handed")


def _read_state(pid: int, region: _Region, token: int) -> door_machine.State:
    """The state of our mailbox; NotFound or Busy if it is not there any more."""
    with contextlib.suppress(OSError):
        content = read_memory(pid, region.mailbox, door_machine.STATE_BYTES)
        state = door_machine.unpack_state(content)
        if state.token == token:
            return state
    if proc.is_ending(pid):
        raise NotFound(f"process {pid} ended while lzy asked it", pid=pid)
    raise Busy(
        f"another lzy has asked pid {pid} meanwhile, and cleared up", remedy="try again", pid=pid
    )


def _give_up(pid: int, region: _Region, token: int, while_in: int) -> bool:
    """Give up on the visitor, which will not begin if it has not; False if its state is another.

    All threads stand still, so that either it or we come first.
    """
    with _visited(pid):
        if _read_state(pid, region, token).state != while_in:
            return False
        _write_given_up(pid, region)
        reach("door.cancelled")
    return True


def _write_given_up(pid: int, region: _Region) -> None:
    content = bytearray(read_memory(pid, region.mailbox, door_machine.STATE_BYTES))
    door_machine.give_up(content)
    memory.write_process(pid, [(region.mailbox, len(content))], memoryview(content))


def _clear(pid: int, region: _Region, token: int) -> None:
    """Unmap the region once the visitor's thread is gone, which it is a moment after it is done."""
    deadline = time.monotonic() + _ENDS_WITHIN_S
    while True:
        vmas = proc.mappings(pid, with_flags=False)
        with _visited(pid) as tracee:
            tracee.prepare(arena_bytes=PAGE_BYTES, vmas=vmas)
            _read_state(pid, region, token)
            if _unmap(tracee, region):
                return
            if time.monotonic() > deadline:  # whoever comes next may
                _write_given_up(pid, region)
                return
        time.sleep(_POLL_S)


def _unmap(tracee: Tracee, region: _Region) -> bool:
    """Unmap a region unless a thread is in it; whether it was unmapped."""
    for thread in tracee.threads.values():
        if any(region.start <= thread.registers[name] < region.end for name in ("rsp", "rip")):
            return False
    call = Call(process.SYS_MUNMAP, (region.start, _REGION_BYTES))
    tracee.run_one(tracee.speaker, call)
    return True


def _unmap_abandoned(tracee: Tracee, starts: list[int]) -> None:
    """Unmap the regions of visits whose lzy has gone; Busy if one of them still waits."""
    for region in map(_Region, starts):
        try:
            if read_memory(tracee.pid, region.code, len(_CODE)) != _CODE:
                continue  # its lzy has cleared up since we looked
            head = read_memory(tracee.pid, region.mailbox, door_machine.STATE_BYTES)
        except OSError:
            continue
        asker = door_machine.unpack_state(head).asker
        if asker and asker == _fingerprint(asker & 0xFFFFFFFF):
            raise Busy(
                f"another lzy (pid {asker & 0xFFFFFFFF}) is asking pid {tracee.pid}",
                remedy="try again when it is done",
                pid=tracee.pid,
            )
        _unmap(tracee, region)


def _fingerprint(pid: int) -> int:
    """A number of a living process that a later one of its pid does not have; 0 if it is gone."""
    try:
        return pid | (proc.start_time(pid) & 0xFFFFFFFF) << 32
    except NotFound:
        return 0


def leftovers(pid: int, vmas: list[Vma]) -> list[int]:
    """Where regions of visits start: they are known by the code in their last page."""
    found: list[int] = []
    for vma in vmas:
        if vma.kind == "anonymous" and vma.permissions == "r-xp" and vma.length == PAGE_BYTES:
            with contextlib.suppress(OSError):
                if read_memory(pid, vma.start, len(_CODE)) == _CODE:
                    found.append(vma.start - _Region(0).code)
    return found
