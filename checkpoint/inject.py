"""Single deeds inside a running process: stop it, make one system call, let it go on."""

from __future__ import annotations

from .linux import process
from .machine import Call
from .tracee import stopped


def close_descriptor(pid: int, number: int) -> int:
    """Close descriptor `number` of a running process; 0 or -errno of the injected close(2)."""
    return call_inside(pid, Call(process.SYS_CLOSE, (number,)))


def call_inside(pid: int, call: Call) -> int:
    """Make one system call in the main thread of a running process; its result or -errno."""
    with stopped(pid) as tracee:
        tracee.prepare(arena_bytes=4096)
        return tracee.run_one(tracee.speaker, call)
