"""Whose processor time a POSIX timer counts, where the kernel tells only: its maker's.

A timer on CLOCK_THREAD_CPUTIME_ID counts that of the thread that made it, and /proc/PID/timers does
not name the thread. But while all are stopped none uses any; so each is made to use a little, and
the time that the timer has left tells. Then it is known by the clock that names the thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import Unsupported
from .linux import layouts, process
from .proc import PosixTimer
from .tracee import Thread, Tracee

_CALLS = 8  # enough to use some microseconds


def name_thread_clocks(tracee: Tracee, timers: Sequence[PosixTimer]) -> list[PosixTimer]:
    """The timers of a stopped process, on clocks that say whose they are.

    Raises Unsupported for one that is not set, of one thread among several.
    """
    return [
        timer._replace(clock=layouts.thread_clock(_find_maker(tracee, timer)))
        if timer.clock == layouts.CLOCK_OF_CALLER
        else timer
        for timer in timers
    ]


def _find_maker(tracee: Tracee, timer: PosixTimer) -> int:
    """The thread that the timer counts, by the number it has for itself."""
    leader = tracee.speaker
    order = sorted(tracee.threads.values(), key=lambda thread: thread is not leader)
    before = _time_left(tracee, leader, timer)
    for thread in order:
        if len(order) == 1:
            return tracee.own_numbers(thread)[1]
        if thread is not leader:
            batch = tracee.batch()
            for _ in range(_CALLS):
                batch.call(process.SYS_GETPPID)
            tracee.run(thread, batch)
        now = _time_left(tracee, leader, timer)
        if now != before:
            return tracee.own_numbers(thread)[1]
    raise Unsupported(
        f"POSIX timer {timer.number} of pid {tracee.pid} counts the processor time of one thread, "
        "and nothing tells of which while it is not set",
        remedy="let the process delete it, or set it",
        pid=tracee.pid,
    )


def _time_left(tracee: Tracee, leader: Thread, timer: PosixTimer) -> bytes:
    batch = tracee.batch()
    place = batch.room(layouts.ITIMERVAL_BYTES)
    batch.call(process.SYS_TIMER_GETTIME, timer.number, place)
    return tracee.run(leader, batch).read(place, layouts.ITIMERVAL_BYTES)
