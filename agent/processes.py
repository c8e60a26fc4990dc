"""Which process is meant, and whether it lives: by pid, start time and boot, never by pid alone."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint import proc
from ..checkpoint.errors import LzyError
from ..checkpoint.lineage import list_lineages
from ..checkpoint.linux.activity import PF_EXITING
from .state import Record

if TYPE_CHECKING:
    from ..checkpoint.lineage import Lineage
    from ..checkpoint.store import Store


class Process(NamedTuple):
    """One process from one look at all of /proc; CPU in clock ticks, memory in bytes.

    `ticks` are its own, of all its threads; `waited_ticks` of the children it has waited for.
    """

    pid: int
    parent: int
    name: str
    state: str
    exiting: bool
    ticks: int
    waited_ticks: int
    start_time: int
    resident_bytes: int
    is_clone: bool
    """It tells nobody of its end: a snapshot that a dump made."""


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def list_processes() -> dict[int, Process]:
    """Every process by its pid; proc_pid_stat(5)."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (process := look_at(int(name))):
            found[process.pid] = process
    return found


def list_below(pid: int) -> list[int]:
    """The pids of all descendants of a process, as they are just now."""
    children: dict[int, list[int]] = {}
    for process in list_processes().values():
        children.setdefault(process.parent, []).append(process.pid)
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


def look_at(pid: int) -> Process | None:
    """That process, be it a zombie; None when there is none."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, 4096)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    head, _, tail = text.rpartition(b") ")
    words = tail.split()
    if words[0] == b"Z" and int(words[17]) > 1:  # its main thread has ended, others live
        return _look_by_another(pid, head.partition(b" (")[2], words)
    return Process(
        pid=pid,
        parent=int(words[1]),
        name=head.partition(b" (")[2].decode(errors="replace"),
        state=words[0].decode(),
        exiting=bool(int(words[6]) & PF_EXITING),
        ticks=int(words[11]) + int(words[12]),
        waited_ticks=int(words[13]) + int(words[14]),
        start_time=int(words[19]),
        resident_bytes=int(words[21]) * _PAGE_BYTES,
        is_clone=words[35] == b"0",
    )


def _look_by_another(pid: int, name: bytes, words: list[bytes]) -> Process | None:
    """As `look_at`, of a process whose main thread has ended, which shows its memory no more."""
    task = proc.witness(pid)
    if task == pid or (found := look_at(task)) is None:
        return None
    return found._replace(pid=pid, name=name.decode(errors="replace"), start_time=int(words[19]))


def is_alive(pid: int, start_time: int, boot_id: str) -> bool:
    """Whether that very process runs (or stands still), and is not on its way out."""
    if pid <= 0 or boot_id != proc.boot_id():
        return False
    process = look_at(pid)
    return (
        process is not None
        and process.start_time == start_time
        and process.state not in "ZX"
        and not process.exiting
        and not _is_killed(pid)
    )


def _is_killed(pid: int) -> bool:
    """Whether a SIGKILL is on its way to the process."""
    with contextlib.suppress(LzyError, ValueError):
        return proc.is_killed(proc.witness(pid))
    return False


def is_traced(pid: int) -> bool:
    """Whether somebody traces the process: a dump or a restore that is not over."""
    with contextlib.suppress(LzyError, KeyError, ValueError):
        return int(proc.status(proc.witness(pid))["TracerPid"]) != 0
    return False


def find_living(store: Store, record: Record) -> Lineage | Record | None:
    """The living process of a session: the one in the record, or one restored since.

    Both kinds of answer have `pid`, `start_time` and `boot_id`.
    """
    if is_alive(record.pid, record.start_time, record.boot_id):
        return record
    for lineage in list_lineages(store):
        if lineage.session == record.name and is_alive(
            lineage.pid, lineage.start_time, lineage.boot_id
        ):
            return lineage
    return None


def owner_of(pid: int) -> int:
    """The real uid of a process. Raises NotFound, AccessDenied."""
    return int(proc.status(pid)["Uid"].split()[0])


def command_of(pid: int) -> str:
    """Its command line in words, at most 1000 characters. Raises NotFound, AccessDenied."""
    line = proc.read_bytes(proc.witness(pid), "cmdline")
    words = line.replace(b"\0", b" ").decode(errors="replace")
    return words.strip()[:1000] or proc.stat(pid)[1]
