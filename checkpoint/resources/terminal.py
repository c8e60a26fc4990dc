"""Terminals: pairs made by the process itself are made again; the one it was run in is replaced.

A pseudo-terminal whose master is open here is made again with its settings and window size, under
the same number in /dev/pts where that is free. Any other terminal belongs to somebody outside:
its place is taken by the terminal of whoever restores, else by /dev/null. That terminal's settings
are left alone: it is the shell's too.
"""

from __future__ import annotations

import base64
import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING

from ..linux import descriptors as kernel
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

# Documentation/admin-guide/devices.txt: tty 4, its aliases 5, pseudo-terminal slaves 136-143.
_MASTER = os.makedev(5, 2)
_SLAVE_MAJORS = range(136, 144)
_MAJORS = (4, 5, *_SLAVE_MAJORS)


class Terminal(Kind):
    rank = 11

    def claims(self, opened: Opened) -> bool:
        return (
            opened.mode == stat.S_IFCHR
            and not opened.is_path_only
            and os.major(opened.status.st_rdev) in _MAJORS
        )

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        masters = {
            _number(other.fd): other
            for other in survey.of_kind(self.name)
            if other.status.st_rdev == _MASTER
        }
        device = opened.status.st_rdev
        if device == _MASTER:
            number = _number(opened.fd)
            _refuse_unread(opened)
            return {
                "form": "master",
                "pair": number,
                "settings": _ask(opened.fd, kernel.TCGETS2, kernel.TERMIOS2_BYTES),
                "window": _ask(opened.fd, kernel.TIOCGWINSZ, kernel.WINSIZE_BYTES),
                "locked": _flag(opened.fd, kernel.TIOCGPTLCK),
                "packets": _flag(opened.fd, kernel.TIOCGPKT),
                "exclusive": _flag(opened.fd, kernel.TIOCGEXCL),
            }
        number = os.minor(device) + 256 * (os.major(device) - _SLAVE_MAJORS[0])
        if os.major(device) in _SLAVE_MAJORS and number in masters:
            _refuse_unread(opened)
            return {"form": "slave", "pair": number}
        return {"form": "outside", "path": opened.link}

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        flags = entry["flags"] & ~os.O_ASYNC | os.O_NOCTTY | os.O_CLOEXEC
        if entry["form"] == "outside":
            return os.open(assembly.once("terminal", lambda: _stand_in(assembly)), flags)
        if entry["form"] == "master":
            master = _open_master(entry["pair"], flags)
            fcntl.ioctl(master, kernel.TIOCSPTLCK, struct.pack("=i", 0))
            fcntl.ioctl(master, kernel.TCSETS2, base64.b64decode(entry["settings"]))
            fcntl.ioctl(master, kernel.TIOCSWINSZ, base64.b64decode(entry["window"]))
            if entry["packets"]:
                fcntl.ioctl(master, kernel.TIOCPKT, struct.pack("=i", 1))
            return master
        # The slave's master is made first, whatever their order in the table.
        master = assembly.make(_master_of(entry, assembly))
        return os.open(f"/dev/pts/{_number(master)}", flags)

    def settle(self, index: int, entry: Entry, assembly: Assembly) -> None:
        if entry["form"] == "master":
            fd = assembly.local[index]
            fcntl.ioctl(fd, kernel.TIOCSPTLCK, struct.pack("=i", entry["locked"]))
            if entry["exclusive"]:
                fcntl.ioctl(fd, kernel.TIOCEXCL)


def _master_of(entry: Entry, assembly: Assembly) -> int:
    return next(
        index
        for index, other in enumerate(assembly.entries)
        if other["kind"] == KIND.name
        and other["form"] == "master"
        and other["pair"] == entry["pair"]
    )


def _open_master(wanted: int, flags: int) -> int:
    """A new pseudo-terminal's master, number `wanted` if it is free.

    The kernel gives the lowest free number, so those below are taken for the moment.
    """
    taken = []
    try:
        while True:
            fd = os.open("/dev/ptmx", flags)
            if _number(fd) == wanted:
                return fd
            taken.append(fd)
            if _number(fd) > wanted or len(taken) > 256:
                return taken.pop()
    finally:
        for fd in taken:
            os.close(fd)


def _stand_in(assembly: Assembly) -> str:
    """The path of the terminal that takes the place of one that is gone."""
    if assembly.options.terminal:
        return assembly.options.terminal
    for number in (0, 1, 2):
        try:
            return os.ttyname(number)
        except OSError:
            continue
    return os.devnull


def _number(master: int) -> int:
    return int(struct.unpack("=I", fcntl.ioctl(master, kernel.TIOCGPTN, bytes(4)))[0])


def _flag(fd: int, request: int) -> int:
    return int(struct.unpack("=i", fcntl.ioctl(fd, request, bytes(4)))[0])


def _ask(fd: int, request: int, length_bytes: int) -> str:
    return base64.b64encode(fcntl.ioctl(fd, request, bytes(length_bytes))).decode()


def _refuse_unread(opened: Opened) -> None:
    if unread := kernel.unread_bytes(opened.fd):
        raise opened.refusal(
            f"{unread} bytes in the pseudo-terminal are unread and cannot be copied",
            "let the process read them, then dump again",
        )


KIND = Terminal()
