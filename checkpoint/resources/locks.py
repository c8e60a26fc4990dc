"""File locks: who holds which range, and how each is taken again by its rightful owner.

A description's locks stand in its fdinfo (proc_pid_fdinfo(5)): `flock` and open-file-description
locks belong to the description, so the restorer takes them on its copy; POSIX locks belong to the
process, which must take them itself (the engine makes the calls in it). A
lease (F_SETLEASE) belongs to the description and tells of itself by a number of the process, which
takes it there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import Busy, KernelError
from ..linux import descriptors as kernel

if TYPE_CHECKING:
    from .kind import Entry
    from .survey import Opened


def describe_locks(opened: Opened) -> dict[str, Any]:
    """`{"locks": [...]}` with form (POSIX, OFDLCK, FLOCK), write, start, length_bytes (0: all)."""
    found: list[dict[str, Any]] = []
    for at, number in opened.first_places():
        holder = opened.survey.holders[at]
        information = opened.survey.information[at, number]
        if "lock:" not in information:
            continue
        for lock in _locks_of(opened, information.splitlines()):
            if lock["form"] == "POSIX" or holder is opened.holder:
                found.append(lock | {"number": number})
                if holder.number:
                    found[-1]["holder"] = holder.number
    return {"locks": found} if found else {}


def _locks_of(opened: Opened, information: list[str]) -> Iterator[dict[str, Any]]:
    """The locks that a descriptor's fdinfo tells of."""
    for line in information:
        name, _, text = line.partition(":")
        if name != "lock":
            continue
        # lock:	1: POSIX  ADVISORY  WRITE 4121 08:01:131 0 EOF
        _, form, kind, access, _, _, start, end = text.split()
        if form not in ("POSIX", "OFDLCK", "FLOCK", "LEASE"):
            raise opened.refusal(
                f"it holds a {form.lower()} on the file, which cannot be taken again",
                "let the process give it back, then dump again",
            )
        if form == "LEASE" and kind != "ACTIVE":
            raise opened.refusal(
                "its lease on the file is being broken by another process",
                "let the process give it back with fcntl(F_SETLEASE, F_UNLCK), then dump again",
            )
        length_bytes = 0 if end == "EOF" else int(end) - int(start) + 1
        yield {
            "form": form,
            "write": access == "WRITE",
            "start": int(start),
            "length_bytes": length_bytes,
        }


def posix_locks(table: dict[str, Any], holder: int = 0) -> list[tuple[int, int, bytes]]:
    """The calls with which the new process itself must take its POSIX locks.

    `holder` is its number in the tree, 0 for the first.

    Each is (descriptor, fcntl command, struct flock in bytes): fcntl(descriptor, command, &flock)
    made in the process, after the descriptors are in place. EAGAIN or EACCES means that another
    process took a lock on the file meanwhile.
    """
    calls = []
    for entry in table["descriptions"]:
        for lock in entry.get("locks", ()):
            if lock["form"] == "POSIX" and lock.get("holder", 0) == holder:
                calls.append((lock["number"], fcntl.F_SETLK, _packed(lock)))
    return calls


def refuse_taken_locks(entry: Entry, fd: int) -> None:
    """Raise Busy when another process holds one of the POSIX locks by now.

    The process itself takes them, late: here it is told in words before there is a process.
    """
    for lock in entry.get("locks", ()):
        if lock["form"] == "POSIX" and (holder := kernel.find_lock_holder(fd, _packed(lock))):
            path = os.readlink(f"/proc/self/fd/{fd}")
            who = f"process {holder}" if holder > 0 else "another process"
            raise Busy(
                f"cannot take the lock of descriptor {lock['number']} on {path} again: {who} has "
                "locked it since the dump",
                remedy="end that process (`lslocks` names it), then restore again",
                path=path,
            )


def take_leases(entry: Entry, number: int) -> None:
    """In the new process, at the descriptor's last number: the leases on it. Source: fcntl(2)."""
    for lock in entry.get("locks", ()):
        if lock["form"] == "LEASE" and lock["number"] == number:
            fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_WRLCK if lock["write"] else fcntl.F_RDLCK)


def take_locks(entry: Entry, fd: int) -> None:
    """Take the locks that belong to the description, on our copy of it.

    Raises Busy when another process holds one by now.
    """
    for lock in entry.get("locks", ()):
        try:
            if lock["form"] == "FLOCK":
                way = fcntl.LOCK_EX if lock["write"] else fcntl.LOCK_SH
                fcntl.flock(fd, way | fcntl.LOCK_NB)
            elif lock["form"] == "OFDLCK":
                fcntl.fcntl(fd, kernel.F_OFD_SETLK, _packed(lock))
        except BlockingIOError as error:
            path = os.readlink(f"/proc/self/fd/{fd}")
            raise Busy(
                f"cannot take the lock of descriptor {lock['number']} on {path} again: another "
                "process has locked it since the dump",
                remedy="end that process (`lslocks` names it), then restore again",
                path=path,
            ) from error
        except OSError as error:
            raise KernelError(
                f"cannot take the lock of descriptor {lock['number']}", error.errno or 0
            ) from error


def _packed(lock: dict[str, Any]) -> bytes:
    kind = fcntl.F_WRLCK if lock["write"] else fcntl.F_RDLCK
    return kernel.pack_lock(kind, lock["start"], lock["length_bytes"])
