"""A thread stopped inside a restartable sequence leaves it by its abort handler, as rseq(2) has it.

The kernel sees to that itself when the thread goes on. But it forgets the sequence as soon as the
thread executes anything outside of it, our code for instance: so it has to be left before.
"""

from __future__ import annotations

from .linux import layouts, memory, ptrace


def leave_sequence(pid: int, tid: int, registers: dict[str, int]) -> dict[str, int]:
    """The registers with which a stopped thread goes on: those of the abort handler if need be."""
    configuration = ptrace.rseq_configuration(tid)
    if configuration is None:
        return registers
    area = configuration[0]
    found = bytearray(8)
    memory.read_process(pid, [(area + layouts.RSEQ_SECTION_OFFSET, 8)], memoryview(found))
    section = layouts.unpack_u64(bytes(found))
    if not section:
        return registers
    content = bytearray(layouts.RSEQ_SECTION_BYTES)
    memory.read_process(pid, [(section, len(content))], memoryview(content))
    start, length, abort = layouts.unpack_rseq_section(bytes(content))
    if start <= registers["rip"] < start + length:
        return {**registers, "rip": abort}
    return registers
