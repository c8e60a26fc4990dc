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
from pathlib import Path
from typing import Any, Final

from . import door_machine, pools, proc
from .door_functions import find_functions
from .door_region import (
    ANSWER_BYTES,
    Region,
    leftovers,
    read_state,
    unmap,
    write_given_up,
)
from .door_visit import POLL_S, Patience, await_idle, enter, refuse_closed, visited
from .errors import Busy, KernelError, LzyError, NotFound
from .linux import PAGE_BYTES, memory
from .stages import reach
from .symbols import read_memory

__all__ = ["Patience", "ask", "find_functions", "leftovers"]

_POOLS_LIMIT: Final = ANSWER_BYTES // 8 - 1  # of one visit: 2 GiB
_ENDS_WITHIN_S: Final = 2.0  # a thread that has nothing left to do
_PATIENCE: Final = Patience()


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
    refuse_closed(pid)
    text = _text_for(question)
    vmas = proc.mappings(pid, with_flags=False)
    functions, interpreter = find_functions(pid, vmas)
    variables: list[int] = []
    if trim:
        variables = pools.find_variables(pid, vmas, interpreter)
    else:
        functions.pop("malloc_trim", None)
    await_idle(pid, patience.idle_s)
    token = int.from_bytes(os.urandom(8), "little")
    region = enter(pid, token, text, functions, patience, pauses=trim)
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


# -- the answer, and going out -------------------------------------------------------------------


def _await_answer(
    pid: int, region: Region, token: int, patience: Patience, variables: list[int]
) -> tuple[int, bytes]:
    """(outcome, answer); Busy if it did not begin in time and never will, or does not end."""
    began = time.monotonic()
    content = b""
    while True:
        state = read_state(pid, region, token)
        if state.state in (door_machine.DONE, door_machine.PAUSED) and not content:
            if state.outcome == door_machine.ANSWERED and state.answer_bytes <= ANSWER_BYTES:
                content = read_memory(pid, region.answer, state.answer_bytes)
            read_state(pid, region, token)  # it was that of our mailbox
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
        time.sleep(POLL_S if waited_s < 0.05 else 10 * POLL_S)


def _hand_pools(pid: int, region: Region, token: int, content: bytes, variables: list[int]) -> None:
    """Tell the visitor, which keeps the GIL and waits, which pools of pymalloc are free."""
    found: list[int] = []
    with contextlib.suppress(LzyError, OSError, ValueError):  # it is waiting: hand it none then
        version = str(_read_answer(pid, content).get("python")).split(".")
        if version[0] == "3" and int(version[1]) in pools.VERSIONS:
            found = pools.list_free_pools(pid, proc.mappings(pid, with_flags=False), variables)
    table = bytearray(struct.pack(f"<{len(found[:_POOLS_LIMIT]) + 1}Q", *found[:_POOLS_LIMIT], 0))
    with visited(pid):
        if read_state(pid, region, token).state != door_machine.PAUSED:
            return  # we were too slow: others have the GIL again
        memory.write_process(pid, [(region.answer, len(table))], memoryview(table))
        head = bytearray(read_memory(pid, region.mailbox, door_machine.STATE_BYTES))
        door_machine.hand_pools(head)
        memory.write_process(pid, [(region.mailbox, len(head))], memoryview(head))
    reach("door.handed")


def _give_up(pid: int, region: Region, token: int, while_in: int) -> bool:
    """Give up on the visitor, which will not begin if it has not; False if its state is another.

    All threads stand still, so that either it or we come first.
    """
    with visited(pid):
        if read_state(pid, region, token).state != while_in:
            return False
        write_given_up(pid, region)
        reach("door.cancelled")
    return True


def _clear(pid: int, region: Region, token: int) -> None:
    """Unmap the region once the visitor's thread is gone, which it is a moment after it is done."""
    deadline = time.monotonic() + _ENDS_WITHIN_S
    while True:
        vmas = proc.mappings(pid, with_flags=False)
        with visited(pid) as tracee:
            tracee.prepare(arena_bytes=PAGE_BYTES, vmas=vmas)
            read_state(pid, region, token)
            if unmap(tracee, region):
                return
            if time.monotonic() > deadline:  # whoever comes next may
                write_given_up(pid, region)
                return
        time.sleep(POLL_S)
