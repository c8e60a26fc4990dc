"""The memory of a process that has ended, held, is nobody's, and goes when it is let go."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from subjects import PATIENCE_S, Subject

from lzy.checkpoint import proc
from lzy.checkpoint.linux.detached import take_descriptor
from lzy.checkpoint.remains import Remains, hold_memory
from lzy.checkpoint.tracee import stopped

CODE = """
address = allocate(1 << 20)
ctypes.memset(address, 7, 1 << 20)
say(address)
number = int(hear())
"""


@pytest.fixture
def subject() -> Iterator[Subject]:
    made = Subject(CODE)
    try:
        yield made
    finally:
        made.child.kill()
        made.child.communicate()
        os.close(made.pidfd)


def hold(subject: Subject) -> Remains:
    """Hold its memory, and end it: it is gone then."""
    with stopped(subject.pid):
        held = hold_memory(
            subject.pid, subject.pidfd, [v.start for v in proc.mappings(subject.pid)]
        )
        assert held is not None
        signal.pidfd_send_signal(subject.pidfd, signal.SIGKILL)
    subject.child.wait(PATIENCE_S)
    assert not os.path.exists(f"/proc/{subject.pid}")
    return held


def test_memory_is_there_until_it_is_let_go(subject: Subject) -> None:
    """The process is gone, and its memory is not; then that is gone as well."""
    address = int(subject.hear())
    memory = os.open(f"/proc/{subject.pid}/mem", os.O_RDONLY)
    try:
        held = hold(subject)
        assert os.pread(memory, 4096, address) == b"\7" * 4096
        held.let_go()
        assert os.pread(memory, 4096, address) == b""
        held.let_go()
    finally:
        os.close(memory)


def test_memory_goes_with_whoever_holds_it(subject: Subject) -> None:
    """Nothing stays behind when the holder is killed."""
    address = int(subject.hear())
    memory = os.open(f"/proc/{subject.pid}/mem", os.O_RDONLY)
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            vmas = proc.mappings(subject.pid)
            held = hold_memory(subject.pid, subject.pidfd, [v.start for v in vmas])
            os.write(writing, b"1" if held else b"0")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 1) == b"1"
        subject.child.kill()
        subject.child.wait(PATIENCE_S)
        assert os.pread(memory, 1, address) == b"\7"
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert os.pread(memory, 1, address) == b""
    finally:
        for number in (memory, reading, writing):
            os.close(number)


def test_userfaultfds_outlive_the_process(subject: Subject) -> None:
    """Closing the last descriptor of one looks at all that it heard of; that waits, too."""
    subject.hear()
    from lzy.checkpoint import tracking

    with stopped(subject.pid) as tracee:
        vmas = proc.mappings(subject.pid)
        tracee.prepare(vmas=vmas)
        number = tracking.open_account(tracee)
        tracee.unmap_arena()
    own = take_descriptor(subject.pidfd, number)
    inode = os.fstat(own).st_ino
    os.close(own)
    held = hold(subject)
    mine = [n for n in os.listdir("/proc/self/fd") if _inode(n) == inode]
    assert len(mine) == 1
    held.let_go()
    assert not os.path.exists(f"/proc/self/fd/{mine[0]}")


def test_process_that_cannot_be_held_is_not(subject: Subject) -> None:
    """Where there is nothing to read there is nothing to hold it by; it ends as ever."""
    subject.hear()
    before = set(os.listdir("/proc/self/fd"))
    assert hold_memory(subject.pid, subject.pidfd, [1 << 46]) is None
    assert set(os.listdir("/proc/self/fd")) == before


def _inode(number: str) -> int:
    try:
        return os.stat(f"/proc/self/fd/{number}").st_ino
    except OSError:
        return 0
