"""Descriptors of processes: of the process itself, of one that has ended, of one still there."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from .. import proc
from ..errors import NotFound
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey


class ProcessDescriptor(Kind):
    def claims(self, opened: Opened) -> bool:
        return opened.anonymous == "pidfd"

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        target = int(opened.fields["Pid"])
        if opened.flags & os.O_EXCL:  # PIDFD_THREAD, linux/pidfd.h
            raise opened.refusal(
                f"it refers to the thread {target}", "let the process close it, then dump again"
            )
        if target == opened.pid:
            return {"form": "own"}
        for holder in survey.holders:
            if target == holder.pid:
                return {"form": "member", "target": survey.number_of(holder)}
        if target <= 0:
            return {"form": "ended"}
        with contextlib.suppress(NotFound):
            if proc.has_ended(target) and int(proc.stat(target)[3]) in (
                holder.pid for holder in survey.holders
            ):  # it has ended, and one of them has yet to wait for it
                return {"form": "member", "target": proc.innermost(proc.status(target)["NSpid"])}
        return {"form": "other", "target": target, "started": _start(target)}

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        if entry["form"] in ("own", "member"):
            return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)  # until there is the process
        if entry["form"] == "other" and _start(entry["target"]) == entry["started"]:
            with contextlib.suppress(ProcessLookupError):
                return os.pidfd_open(entry["target"])
        return _of_the_dead()

    def make_inside(self, entry: Entry, process_id: int) -> int | None:
        return os.pidfd_open(process_id) if entry["form"] == "own" else None


def _start(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none. proc_pid_stat(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _of_the_dead() -> int:
    """A descriptor of a process that has ended and was waited for."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        return os.pidfd_open(pid)
    finally:
        os.waitpid(pid, 0)


KIND = ProcessDescriptor()
