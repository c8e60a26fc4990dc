"""Single calls made inside a running process."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from subjects import living

from lzy.checkpoint.errors import NotFound
from lzy.checkpoint.inject import call_inside, close_descriptor
from lzy.checkpoint.machine import Call

TALKING = """
r, w = os.pipe()
say("ready"); say(r, w)
while (line := hear()): say(line)
"""


def test_close_a_descriptor() -> None:
    """Exactly that descriptor is closed; one that is not there is told, not raised."""
    with living(TALKING) as subject:
        reader, writer = map(int, subject.hear().split())
        before = set(os.listdir(f"/proc/{subject.pid}/fd"))
        assert close_descriptor(subject.pid, reader) == 0
        assert set(os.listdir(f"/proc/{subject.pid}/fd")) == before - {str(reader)}
        assert close_descriptor(subject.pid, reader) == -errno.EBADF
        assert subject.ask("hello") == "hello"
        assert close_descriptor(subject.pid, writer) == 0


def test_calls_are_the_processes_own() -> None:
    """The result is the process's: its pid, its parent, its umask, changed and changed back."""
    with living(TALKING) as subject:
        assert call_inside(subject.pid, Call(39)) == subject.pid
        assert call_inside(subject.pid, Call(110)) == os.getpid()
        before = call_inside(subject.pid, Call(95, (0o123,)))
        assert call_inside(subject.pid, Call(95, (before,))) == 0o123
        maps = Path(f"/proc/{subject.pid}/maps").read_text()
        for _ in range(50):
            assert call_inside(subject.pid, Call(39)) == subject.pid
        assert Path(f"/proc/{subject.pid}/maps").read_text() == maps


def test_killed_in_a_call_and_at_once_another() -> None:
    """Who comes next waits until the thread has found its way back: the process lives on."""
    with living(TALKING) as subject:
        reader, writer = map(int, subject.hear().split())
        for descriptor in (reader, writer):
            injector = os.fork()
            if injector == 0:
                call_inside(subject.pid, Call(7, (0, 0, 400)))  # poll(2) of nothing
                os._exit(1)
            while not Path(f"/proc/{subject.pid}/syscall").read_text().startswith("7 0x0 0x0 "):
                os.sched_yield()
            os.kill(injector, signal.SIGKILL)
            os.waitpid(injector, 0)
            assert close_descriptor(subject.pid, descriptor) == 0
            assert subject.ask("hello") == "hello"


def test_nobody_there() -> None:
    """A process that has gone is NotFound."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(NotFound):
        close_descriptor(pid, 3)
