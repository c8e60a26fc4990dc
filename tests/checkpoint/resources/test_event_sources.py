"""Eventfds and epolls: what each counts and watches is the same after a cycle."""

from __future__ import annotations

import contextlib
import os
import select
from typing import Any

import pytest

from lzy.checkpoint.errors import Unsupported


def test_eventfd_keeps_its_count_and_its_semaphore_flag(cycle: Any) -> None:
    """A counter is read as before; a semaphore still counts down by one."""

    def hold() -> tuple[int, int, int]:
        plain = os.eventfd(0, os.EFD_NONBLOCK)
        os.eventfd_write(plain, (1 << 40) + 7)
        semaphore = os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
        full = os.eventfd(0, os.EFD_NONBLOCK)
        os.eventfd_write(full, 0xFFFFFFFFFFFFFFFE)
        return plain, semaphore, full

    def prove(state: tuple[int, int, int]) -> list[int]:
        plain, semaphore, full = state
        try:
            os.eventfd_write(full, 1)
            blocked = 0
        except BlockingIOError:
            blocked = 1
        return [
            os.eventfd_read(plain),
            os.eventfd_read(semaphore),
            os.eventfd_read(semaphore),
            blocked,
        ]

    assert cycle(hold, prove) == [(1 << 40) + 7, 1, 1, 1]


def test_describing_leaves_an_eventfd_as_it_was(cycle: Any) -> None:
    """The frozen process's counter is not read; describing twice gives the same."""

    def hold() -> int:
        return os.eventfd(5, 0)

    cycle.describe(hold, end=False)
    first = cycle.table
    process = cycle.processes[0]
    from lzy.checkpoint.resources import describe_descriptors

    again = describe_descriptors(process.pid, process.pidfd, cycle.objects)
    assert again == first


def test_epoll_reports_with_the_programs_own_data(cycle: Any) -> None:
    """What was watched is watched, for the same events, under the same number."""

    def hold() -> tuple[int, int, int]:
        reader, writer = os.pipe()
        epoll = select.epoll()
        epoll.register(reader, select.EPOLLIN)
        return os.dup(epoll.fileno()), reader, writer

    def prove(state: tuple[int, int, int]) -> list[Any]:
        number, reader, writer = state
        epoll = select.epoll.fromfd(number)
        before = epoll.poll(0)
        os.write(writer, b"x")
        after = epoll.poll(0)
        epoll.unregister(reader)
        return [before, after, epoll.poll(0)]

    answer = cycle(hold, prove)
    reader = next(
        target["number"]
        for entry in cycle.table["descriptions"]
        for target in entry.get("targets", ())
    )
    assert answer == [[], [(reader, select.EPOLLIN)], []]


@pytest.mark.shows(
    "survives",
    "epoll entries registered under a number that means something else by now",
)
def test_epoll_entries_registered_under_a_number_of_the_past(cycle: Any) -> None:
    """Registered, duplicated, closed, number reused: the kernel watches on under the old number."""

    def hold() -> tuple[int, int, int]:
        counter = os.eventfd(0, os.EFD_NONBLOCK)
        epoll = select.epoll()
        epoll.register(counter, select.EPOLLIN)
        kept = os.dup(counter)
        os.close(counter)
        reused = os.eventfd(0, os.EFD_NONBLOCK)
        assert reused == counter
        epoll.register(reused, select.EPOLLIN)
        return os.dup(epoll.fileno()), kept, reused

    def prove(state: tuple[int, int, int]) -> list[Any]:
        number, kept, reused = state
        epoll = select.epoll.fromfd(number)
        os.eventfd_write(kept, 1)
        old = epoll.poll(0)
        os.eventfd_read(kept)
        os.eventfd_write(reused, 1)
        return [old, epoll.poll(0), reused]

    old, new, reused = cycle(hold, prove)
    assert old == new == [(reused, select.EPOLLIN)]
    targets = [t for e in cycle.table["descriptions"] for t in e.get("targets", ())]
    assert sorted(t["stale"] for t in targets) == [False, True]


@pytest.mark.shows("survives", "a one-shot epoll entry that has fired")
def test_epoll_one_shot_that_has_fired_stays_quiet_until_armed(cycle: Any) -> None:
    """A fired one-shot entry reports nothing, but can be re-armed with EPOLL_CTL_MOD."""

    def hold() -> tuple[int, int]:
        counter = os.eventfd(1, os.EFD_NONBLOCK)
        epoll = select.epoll()
        epoll.register(counter, select.EPOLLIN | select.EPOLLONESHOT)
        assert epoll.poll(0)
        return os.dup(epoll.fileno()), counter

    def prove(state: tuple[int, int]) -> list[Any]:
        epoll = select.epoll.fromfd(state[0])
        quiet = epoll.poll(0)
        epoll.modify(state[1], select.EPOLLIN | select.EPOLLONESHOT)
        return [quiet, len(epoll.poll(0))]

    assert cycle(hold, prove) == [[], 1]


def test_epoll_within_epoll_and_edge_triggered(cycle: Any) -> None:
    """An epoll may watch an epoll; an edge that comes after the cycle is seen."""

    def hold() -> tuple[int, int, int]:
        counter = os.eventfd(0, os.EFD_NONBLOCK)
        inner, outer = select.epoll(), select.epoll()
        outer.register(inner.fileno(), select.EPOLLIN)
        inner.register(counter, select.EPOLLIN | select.EPOLLET)
        return os.dup(outer.fileno()), os.dup(inner.fileno()), counter

    def prove(state: tuple[int, int, int]) -> list[int]:
        outer, inner = select.epoll.fromfd(state[0]), select.epoll.fromfd(state[1])
        before = len(outer.poll(0))
        os.eventfd_write(state[2], 1)
        return [before, len(outer.poll(0)), len(inner.poll(0)), len(inner.poll(0))]

    assert cycle(hold, prove) == [0, 1, 1, 0]


@pytest.mark.shows("refused", "an epoll that watches what only another process has open")
def test_epoll_watching_what_only_somebody_else_has_is_refused(cycle: Any) -> None:
    """The process closed it, another process keeps it open: it can never be made again."""

    def hold() -> int:
        counter = os.eventfd(0)
        epoll = select.epoll()
        epoll.register(counter, select.EPOLLIN)
        alive, _ours = os.pipe()
        ready, tell = os.pipe()
        if os.fork() == 0:
            for number in map(int, os.listdir("/proc/self/fd")):
                if number not in (counter, alive, tell):
                    with contextlib.suppress(OSError):
                        os.close(number)
            os.write(tell, b"x")
            os.read(alive, 1)  # until the process is gone
            os._exit(0)
        os.read(ready, 1)
        os.close(counter)
        return os.dup(epoll.fileno())

    with pytest.raises(Unsupported, match="somebody else keeps open"):
        cycle.describe(hold)
