"""Pipes and named pipes, with the bytes in flight.

The bytes are copied with tee(2), which consumes nothing. A pipe whose other end nobody here holds
is made with that end closed: a reader gets the bytes and then end of file, a writer EPIPE. Only
standard output and error would make that a nuisance, so they become /dev/null.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING

from ..errors import Incompatible
from ..linux import descriptors as kernel
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_READ_BYTES = 1 << 20
_LARGEFILE = 0o100000  # what open(2) adds on x86-64 and pipe2(2) does not


class Pipe(Kind):
    rank = 20

    def claims(self, opened: Opened) -> bool:
        return opened.mode == stat.S_IFIFO and not opened.is_path_only

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        identity = (opened.status.st_dev, opened.status.st_ino)
        readers = survey.once("pipe readers", lambda: _first_readers(survey))
        entry: Entry = {
            "pipe": f"{identity[0]}:{identity[1]}",
            "capacity_bytes": fcntl.fcntl(opened.fd, fcntl.F_GETPIPE_SZ),
        }
        if opened.link.startswith("/") and not opened.link.endswith(" (deleted)"):
            entry["path"] = opened.link
        if readers.get(identity) is opened:
            pieces = _copy(opened, entry["capacity_bytes"])
            entry["content"] = [base64.b64encode(piece).decode() for piece in pieces]
        return entry

    def check(self, entry: Entry, assembly: Assembly) -> None:
        if "path" in entry and not stat.S_ISFIFO(os.stat(entry["path"]).st_mode):
            raise Incompatible(
                f"{entry['path']} was a named pipe and is none now",
                remedy="make it again with mkfifo, then restore again",
                path=entry["path"],
            )

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        assembly.once(("pipe", entry["pipe"]), lambda: _make_family(entry, assembly))
        return assembly.local[index]


def _first_readers(survey: Survey) -> dict[tuple[int, int], Opened]:
    """Of each pipe the first description that can be read: the one to carry its bytes."""
    found: dict[tuple[int, int], Opened] = {}
    for opened in survey.of_kind(KIND.name):
        if opened.readable:
            found.setdefault((opened.status.st_dev, opened.status.st_ino), opened)
    return found


def _copy(opened: Opened, capacity_bytes: int) -> list[bytes]:
    """The bytes in flight, in pieces: one, or one for each packet of a pipe in packet mode."""
    unread = kernel.unread_bytes(opened.fd)
    if not unread:
        return []
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, capacity_bytes)
        copied = kernel.tee(opened.fd, writer, unread)
        pieces: list[bytes] = []
        while sum(len(piece) for piece in pieces) < copied:
            pieces.append(os.read(reader, max(_READ_BYTES, capacity_bytes)))
    finally:
        os.close(reader)
        os.close(writer)
    if copied != unread:
        raise opened.refusal(
            f"only {copied} of its {unread} bytes in flight could be copied",
            "let the process read it, then dump again",
        )
    return pieces


def _families(assembly: Assembly) -> dict[str, list[tuple[int, Entry]]]:
    found: dict[str, list[tuple[int, Entry]]] = {}
    for index, entry in assembly.of_kind(KIND.name):
        found.setdefault(entry["pipe"], []).append((index, entry))
    return found


def _make_family(entry: Entry, assembly: Assembly) -> None:
    """Make every description of one pipe."""
    family = assembly.once("pipe families", lambda: _families(assembly))[entry["pipe"]]
    if "path" in entry:
        # Open for both: no end waits for the other, and what is written meanwhile stays.
        reader = os.open(entry["path"], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        writer = os.dup(reader)
    else:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    _set_capacity(writer, entry["capacity_bytes"])
    packets = any(_writes(other) and other["flags"] & os.O_DIRECT for _, other in family)
    content = [base64.b64decode(piece) for _, other in family for piece in other.get("content", ())]
    # A named pipe that somebody still holds has kept its bytes.
    if content and not kernel.unread_bytes(reader):
        _fill(writer, content, packets or len(content) > 1)
    has_reader = any(_reads(other) for _, other in family)
    unused = {reader, writer}
    for index, other in family:
        ways = os.O_CLOEXEC | os.O_NONBLOCK
        end = reader if _reads(other) else writer
        if not has_reader and "path" not in entry and assembly.is_standard(index):
            fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        elif end in unused and "path" not in entry and not other["flags"] & _LARGEFILE:
            fd = end
            unused.remove(end)
        else:
            fd = os.open(f"/proc/self/fd/{end}", other["flags"] & os.O_ACCMODE | ways)
        assembly.adopt(index, fd)
    for fd in unused:
        os.close(fd)


def _reads(entry: Entry) -> bool:
    return entry["flags"] & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)


def _writes(entry: Entry) -> bool:
    return entry["flags"] & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)


def _set_capacity(fd: int, capacity_bytes: int) -> None:
    if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) == capacity_bytes:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, capacity_bytes)
    except PermissionError as error:
        raise Incompatible(
            f"a pipe of {capacity_bytes} bytes is more than this machine allows",
            remedy="raise fs.pipe-max-size and fs.pipe-user-pages-soft with sysctl",
        ) from error


def _fill(writer: int, pieces: list[bytes], packets: bool) -> None:
    if packets:
        fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
    for piece in pieces:
        if os.write(writer, piece) != len(piece):
            raise OSError(errno.ENOSPC, "the pipe cannot hold its bytes in flight")
    if packets:
        fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)


KIND = Pipe()
