"""The fence between who reads messages and who installs, each of them a process that may die."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lzy.checkpoint.fence import Fence

Act = Callable[[], None]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "journal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@contextlib.contextmanager
def another(act: Act) -> Iterator[Callable[[], None]]:
    """A forked process that has done `act` and stays; what is handed out ends it with kill -9."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os.write(writing, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    gone = False

    def end() -> None:
        nonlocal gone
        if not gone:
            gone = True
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    try:
        assert os.read(reading, 1) == b"."
        yield end
    finally:
        os.close(reading)
        end()


def entering(fence: Fence, *, stands: bool = True, leaves: bool = False) -> Act:
    """What a reader does that is about to install what was ordered just now."""
    epoch = fence.epoch

    def act() -> None:
        fence.join()
        assert fence.enter(epoch) == stands
        if leaves:
            fence.leave()

    return act


def test_who_reads_waits_for_who_installs(journal: int) -> None:
    """While a reader installs nobody reads; when it is killed in the midst of it, it is over."""
    fence = Fence(journal)
    with another(entering(fence)) as end:
        assert not fence.close(0.02)
        end()
        assert fence.close(1)
    fence.open()
    with another(entering(fence, leaves=True)):
        assert fence.close(1)


def test_readers_install_side_by_side(journal: int) -> None:
    """One that is inside keeps no other out."""
    fence = Fence(journal)
    with another(entering(fence)), another(entering(fence)):
        assert not fence.close(0.02)


@pytest.mark.parametrize("calls_off", [False, True])
def test_orders_stand_until_an_event_was_read(journal: int, calls_off: bool) -> None:
    """What was ordered before an event was read is installed no more; what comes later is."""
    fence = Fence(journal)
    before = entering(fence, stands=not calls_off)
    assert fence.close(1)
    fence.open(calls_off=calls_off)
    with another(before), another(entering(fence)):
        pass


def test_nothing_is_installed_once_who_read_was_killed(journal: int) -> None:
    """Killed between the message and what follows from it: the lock goes, no order stands."""
    fence = Fence(journal)
    order = entering(fence, stands=False)

    def read_and_stay() -> None:
        fence.join()
        assert fence.close(1)

    with another(read_and_stay) as end:
        end()
    with another(order):
        pass


def test_who_follows_waits_for_the_readers_of_who_was_killed(journal: int) -> None:
    """Another pager's fence on the same journal is not there before a reader has left."""
    fence = Fence(journal)
    reading, writing = os.pipe()

    def follow() -> None:
        Fence(journal)
        os.write(writing, b".")

    with another(entering(fence)) as end:
        follower = os.fork()
        if follower == 0:
            try:
                follow()
            finally:
                os._exit(0)
        try:
            assert not select.select([reading], [], [], 0.05)[0]
            end()
            assert select.select([reading], [], [], 10)[0]
        finally:
            os.waitpid(follower, 0)
            os.close(reading)
            os.close(writing)
