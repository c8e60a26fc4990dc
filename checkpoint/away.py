"""What of a dozing process's memory is away, read off its pager, which is held still meanwhile.

A process that dozes can be dumped as it is: its pager's journal tells what is missing, and the
image that the pager reads from has that. To be sure of the journal, pager and keeper are stopped by
ptrace(2) once the process itself is: then every event has been read and written down, and should we
die they go on by themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import proc
from .errors import Busy, LzyError
from .home import run_directory
from .journal import (
    CONTEXT,
    GONE,
    MAIN,
    MOVED,
    PIECE,
    SOURCE,
    Journal,
    is_held,
    journal_path,
    lock_journal,
    read_status,
)
from .linux.uffd import EVENT_FORK
from .missing import MissingPages, follow
from .tracee import Tracee

Range = tuple[int, int]

_ATTEMPTS = 20
_NAMES = ("lzy-pager", "lzy-keeper")  # as they call themselves: a pid may be another's by now
_READERS_END_S = 2.0


class Doze(NamedTuple):
    """How a process dozes: where its missing pages are, and what in it is lzy's."""

    pid: int
    journal: Path
    store: str
    image: str
    uffd_number: int
    harbour_numbers: tuple[int, int]

    @property
    def numbers(self) -> frozenset[int]:
        """Descriptor numbers in the process that no program knows of."""
        return frozenset((self.uffd_number, *self.harbour_numbers))


class Away(NamedTuple):
    """What is away of a stopped process; ascending ranges of addresses."""

    missing: list[Range]
    """Pages that are not there, and that the pager's image has at the same addresses."""
    moved: list[Range]
    """What the kernel's account of writes may call unwritten, but has come from elsewhere."""


class NotAsItIs(Exception):
    """What is missing has been moved, or hangs on children too: all of it must come in first."""


def find_doze(pid: int) -> Doze | None:
    """How process `pid` dozes; None if it does not, or is being roused, or nobody serves it."""
    path = journal_path(run_directory(), pid)
    try:
        facts, status = read_status(path)
        if facts["start_time"] != proc.start_time(pid) or facts["boot_id"] != proc.boot_id():
            return None
        if not (facts["on_demand"] and facts["keeps_account"]) or status.roused:
            return None
        numbers = (facts["uffd_number"], *facts["harbour_numbers"])
        inodes = [os.stat(f"/proc/{proc.witness(pid)}/fd/{number}").st_ino for number in numbers]
    except (LzyError, OSError, KeyError, TypeError):
        return None
    if len(numbers) != 3 or inodes != facts["inodes"]:
        return None
    if not _is_served(path):
        return None
    return Doze(pid, path, facts["store"], facts["image"], numbers[0], numbers[1:])


@contextlib.contextmanager
def hold_pager(doze: Doze) -> Iterator[tuple[Tracee, Tracee]]:
    """Pager and keeper stopped, as long as the block runs; then they go on, unless they are killed.

    Precondition: the process itself is stopped, so that it waits for neither. Raises Busy.
    """
    held = _seize(doze)
    try:
        yield held
    finally:
        for tracee in held:
            if tracee.threads:
                tracee.let_go()


def _seize(doze: Doze) -> tuple[Tracee, Tracee]:
    for _ in range(_ATTEMPTS):
        status = read_status(doze.journal)[1]
        held = Tracee(status.pager_pid), Tracee(status.keeper_pid)
        try:
            for tracee in held[::-1]:
                tracee.seize()
            names = tuple(proc.stat(tracee.pid)[1] for tracee in held)
            if names == _NAMES and read_status(doze.journal)[1][:2] == status[:2]:
                return held
        except LzyError:  # one has just been killed: the other starts it anew
            time.sleep(0.01)
        for tracee in held:
            if tracee.threads:
                tracee.let_go()
    raise Busy(
        f"the pager of process {doze.pid} does not keep still",
        remedy=f"run: lzy pager --resume {doze.pid}",
        pid=doze.pid,
    )


def read_away(doze: Doze, present: list[Range]) -> Away:
    """What is away, given what is there. Preconditions: its pager is held, the process stopped.

    Raises NotAsItIs.
    """
    missing, moved, children = _replay(doze)
    for start, end in present:
        missing.forget(start, end)
    if children or any(shift for _, _, shift in missing):
        raise NotAsItIs
    return Away(_ranges(missing), _ranges(moved))


def is_unroused(doze: Doze) -> bool:
    """Whether it still dozes. Precondition: its pager is held; until it goes on that holds."""
    return not read_status(doze.journal)[1].roused


def read_moved(doze: Doze) -> list[Range]:
    """What has been moved, as in `Away`; the same preconditions."""
    return _ranges(_replay(doze)[1])


def _ranges(pieces: MissingPages) -> list[Range]:
    return [(start, end) for start, end, _ in pieces]


def _replay(doze: Doze) -> tuple[MissingPages, MissingPages, set[int]]:
    """What is missing if it has not come in, what was moved, forked children by their tokens."""
    missing, moved = MissingPages(), MissingPages()
    ignored = MissingPages(), MissingPages()
    children: set[int] = set()
    source = MAIN
    journal = Journal(os.open(doze.journal, os.O_RDWR | os.O_CLOEXEC), doze.journal)
    try:
        for event in journal.replay():
            kind, a, b, c = event
            if kind == SOURCE:
                source = a
            elif kind == CONTEXT:
                children.add(a)
            elif kind == GONE:
                children.discard(a)
            elif kind == EVENT_FORK:
                children.add(a & 0xFFFFFFFF)
            elif kind == PIECE:
                (missing if source == MAIN else ignored[0]).add(
                    a, b, c if c < 1 << 63 else c - (1 << 64)
                )
            elif kind == MOVED:
                (moved if source == MAIN else ignored[1]).add(a, b)
            elif source == MAIN:
                follow(event, missing, moved)
    finally:
        journal.close()
    return missing, moved, children


def end_pager(doze: Doze, held: tuple[Tracee, Tracee]) -> int:
    """Kill a pager and its keeper, which are held; its journal's lock, to be closed.

    Until the journal of the next one is in place, that keeps others from taking over from this one:
    two would serve then, of which each knows but its own half. Raises Busy: a reader does not end
    (they are killed with it, and hold the lock, too), or somebody has taken over.
    """
    for tracee in held:
        os.kill(tracee.pid, signal.SIGKILL)
    for tracee in held:
        tracee.await_end()
    return lock_journal(doze.journal, within_s=_READERS_END_S)


def _is_served(journal: Path) -> bool:
    """Whether pager and keeper live; waits a little if one has been killed: it is started anew."""
    for _ in range(_ATTEMPTS):
        try:
            if all(map(_runs, read_status(journal)[1][:2])):
                return True
            if not is_held(journal):
                return False
        except LzyError:
            return False
        time.sleep(0.01)
    return False


def _runs(pid: int) -> bool:
    try:
        return pid > 0 and proc.stat(pid)[2] not in "ZXT"
    except LzyError:
        return False
