"""What is mapped into a process for one visit: stacks, a mailbox, code; read, told, unmapped.

A region outlives a lzy that was killed. Whoever comes next knows it by its code, and its mailbox
tells whether somebody still needs it; whoever reads a mailbox knows by its token that it is his.
"""

from __future__ import annotations

import contextlib
from typing import Final, NamedTuple

from . import door_machine, machine, proc
from .errors import Busy, NotFound
from .linux import PAGE_BYTES, memory, process
from .machine import Call
from .proc import Vma
from .symbols import read_memory
from .tracee import Tracee

STACK_BYTES: Final = 8 << 20  # what a main thread has; untouched pages cost nothing
BORROWED_STACK_BYTES: Final = 256 << 10
ANSWER_BYTES: Final = 1 << 20


class Region(NamedTuple):
    """Addresses within what is mapped into the process for one visit."""

    start: int

    @property
    def stack(self) -> int:
        return self.start + PAGE_BYTES  # below it a guard, that whoever runs over it faults

    @property
    def borrowed_stack(self) -> int:
        return self.stack + STACK_BYTES + PAGE_BYTES

    @property
    def mailbox(self) -> int:
        return self.borrowed_stack + BORROWED_STACK_BYTES

    @property
    def answer(self) -> int:
        return self.mailbox + -(-door_machine.MAILBOX_BYTES // PAGE_BYTES) * PAGE_BYTES

    @property
    def code(self) -> int:
        return self.answer + ANSWER_BYTES

    @property
    def guards(self) -> tuple[int, int]:
        return self.start, self.stack + STACK_BYTES

    @property
    def end(self) -> int:
        return self.code + PAGE_BYTES


REGION_BYTES: Final = Region(0).end
OUR_CODE: Final = 512  # behind `machine.CODE`, in the region's page of code
CODE: Final = machine.CODE.ljust(OUR_CODE, b"\0") + door_machine.CODE


def read_state(pid: int, region: Region, token: int) -> door_machine.State:
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


def write_given_up(pid: int, region: Region) -> None:
    content = bytearray(read_memory(pid, region.mailbox, door_machine.STATE_BYTES))
    door_machine.give_up(content)
    memory.write_process(pid, [(region.mailbox, len(content))], memoryview(content))


def unmap(tracee: Tracee, region: Region) -> bool:
    """Unmap a region unless a thread is in it; whether it was unmapped."""
    for thread in tracee.threads.values():
        if any(region.start <= thread.registers[name] < region.end for name in ("rsp", "rip")):
            return False
    call = Call(process.SYS_MUNMAP, (region.start, REGION_BYTES))
    tracee.run_one(tracee.speaker, call)
    return True


def unmap_abandoned(tracee: Tracee, starts: list[int]) -> None:
    """Unmap the regions of visits whose lzy has gone; Busy if one of them still waits."""
    for region in map(Region, starts):
        try:
            if read_memory(tracee.pid, region.code, len(CODE)) != CODE:
                continue  # its lzy has cleared up since we looked
            head = read_memory(tracee.pid, region.mailbox, door_machine.STATE_BYTES)
        except OSError:
            continue
        asker = door_machine.unpack_state(head).asker
        if asker and asker == fingerprint(asker & 0xFFFFFFFF):
            raise Busy(
                f"another lzy (pid {asker & 0xFFFFFFFF}) is asking pid {tracee.pid}",
                remedy="try again when it is done",
                pid=tracee.pid,
            )
        unmap(tracee, region)


def fingerprint(pid: int) -> int:
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
                if read_memory(pid, vma.start, len(CODE)) == CODE:
                    found.append(vma.start - Region(0).code)
    return found
