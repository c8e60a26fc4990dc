"""Terminals: pairs made by the process itself are made again; the one it was run in is replaced.

A pseudo-terminal whose master is open here is made again with its settings and window size, under
the same number in /dev/pts where that is free. Any other terminal belongs to somebody outside: its
place is taken by the one that lzy keeps for the session (`checkpoint.kept`), by that of whoever
restores, or by /dev/null. One that lzy keeps gets the settings of the image; anybody else's are
left alone: they are the shell's too.

Which session a terminal controls, and which process group is in its foreground, is the same in all
descriptions of it (`controls`, numbers as the process sees them). The session's leader takes it
again before it runs.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING, Any

from .. import proc
from ..errors import LzyError
from ..kept import find_by_device, read_screen
from ..linux import descriptors as kernel
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

# Documentation/admin-guide/devices.txt: tty 4, its aliases 5, pseudo-terminal slaves 136-143.
_OWN_TERMINAL = os.makedev(5, 0)
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
        known = survey.once("controlling terminals", lambda: _find_controls(survey))
        controls = known.get((opened.pid if device == _OWN_TERMINAL else 0, device), {})
        number = os.minor(device) + 256 * (os.major(device) - _SLAVE_MAJORS[0])
        if os.major(device) in _SLAVE_MAJORS and number in masters:
            _refuse_unread(opened)
            return {"form": "slave", "pair": number, **controls}
        entry = {"form": "outside", "path": opened.link, **controls}
        if os.major(device) in _SLAVE_MAJORS:
            entry |= survey.once(("terminal", device), lambda: _describe_outside(opened))
        return entry

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        flags = entry["flags"] & ~os.O_ASYNC | os.O_NOCTTY | os.O_CLOEXEC
        if entry["form"] == "outside":
            path = assembly.once("terminal", lambda: _stand_in(assembly))
            made = os.open(path, flags)
            if "settings" in entry and assembly.once("is kept", lambda: find_by_device(path)):
                _give_settings(made, base64.b64decode(entry["settings"]))
            return made
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

    def place(self, entry: Entry, fd: int, local: dict[int, int], holder: int) -> None:
        """Be the session that the terminal controls, with the same group in its foreground.

        If it controls another session already, it is a shell's, say, and stays that one's.
        """
        controls = entry.get("controls")
        if not controls or os.getpid() not in (controls["session"], controls["process"]):
            return
        if os.getsid(0) != os.getpid():
            return
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, kernel.TIOCSCTTY, 0)
            if controls["foreground"] not in (0, controls["group"]):
                os.tcsetpgrp(fd, controls["foreground"])


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


def _describe_outside(opened: Opened) -> dict[str, Any]:
    """Settings and window of somebody else's terminal; of one that lzy keeps what it shows, too."""
    try:
        found: dict[str, Any] = {
            "settings": _ask(opened.fd, kernel.TCGETS2, kernel.TERMIOS2_BYTES),
            "window": _ask(opened.fd, kernel.TIOCGWINSZ, kernel.WINSIZE_BYTES),
        }
    except OSError:  # it was hung up: nobody is at its other end
        return {}
    if kept := find_by_device(opened.link):
        import zlib

        shown = zlib.compress(read_screen(kept.session))
        found |= {"kept": kept.session, "screen": base64.b64encode(shown).decode()}
    return found


def _find_control(pid: int) -> dict[str, int] | None:
    """The controlling terminal of a process: `device`, and the numbers of `controls`; or None."""
    fields = proc.stat(pid)
    terminal, foreground = int(fields[6]), int(fields[7])
    if terminal == 0:
        return None
    status = proc.status(pid)
    in_front = 0
    if foreground > 0:
        with contextlib.suppress(LzyError):
            in_front = proc.innermost(proc.status(foreground)["NSpid"])
    group = proc.innermost(status["NSpgid"])
    if int(fields[4]) == foreground:
        in_front = group
    return {
        # new_encode_dev() of the kernel: the low byte of the minor, the major, the rest
        "device": os.makedev(terminal >> 8 & 0xFFF, terminal & 0xFF | terminal >> 12 & 0xFFF00),
        "session": proc.innermost(status["NSsid"]),
        "process": proc.innermost(status["NSpid"]),
        "group": group,
        "foreground": in_front,
    }


def _find_controls(survey: Survey) -> dict[tuple[int, int], dict[str, Any]]:
    """What `controls` says of (0, device), and of (pid, /dev/tty) for each process."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for holder in survey.holders:
        if holder.pid == os.getpid():  # what is under way is held by us meanwhile
            continue
        if control := _find_control(holder.pid):
            device = control.pop("device")
            controls = {"controls": control}
            found[holder.pid, _OWN_TERMINAL] = controls
            found.setdefault((0, device), controls)
    return found


def _give_settings(fd: int, settings: bytes) -> None:
    """Give a terminal those settings; what lies in its queues stays (TCSETS, not TCSETSF)."""
    if fcntl.ioctl(fd, kernel.TCGETS2, bytes(len(settings))) != settings:
        fcntl.ioctl(fd, kernel.TCSETS2, settings)


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
