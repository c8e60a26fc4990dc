"""Moves a running process from somebody's terminal to another, in place; it keeps its pid.

Whoever leads a process group cannot begin a session (setsid(2)), and what a shell starts leads one.
So the process makes a child that never runs, gives it a group of its own, joins that, and is free
to leave; reptyr(1) found that way. It opens the new terminal beforehand: nothing after that can
fail for want of anything. Its descriptors of the old terminal become ones of the new, in one list
of calls, which it makes to the end by itself should lzy die. Who leads the session of its terminal
(what a terminal emulator started, not a shell) keeps that session and changes its terminal.

Its shell notices nothing: the process stays its child and runs. Somebody is to stand for it on the
old terminal; when he leaves, `give_prompt` tells the shell that the process has stopped, and then
that it runs on: so the shell gives its prompt, and knows a job in the background.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import time
from typing import NamedTuple

from . import machine, proc
from .errors import Busy, KernelError, NotFound, Unsupported
from .kept import find_by_device
from .linux import descriptors as kernel
from .linux import process, ptrace
from .machine import Call
from .tracee import Thread, Tracee

_STOPS_WITHIN_S = 2.0


class Place(NamedTuple):
    """The terminal that a process is on: `/dev/pts/N`, and the window.

    `settings` is a struct termios2, empty where another group is in the foreground and has set it.
    """

    device: str
    rows: int
    columns: int
    settings: bytes
    numbers: list[int]
    """The process's descriptors of it."""
    shell_pid: int
    """Its parent, which waits for it on that terminal; 0 if it leads the session there."""


class _Watch(NamedTuple):
    """An epoll's registration of a descriptor of the terminal: epoll(7) watches descriptions."""

    epoll: int
    number: int
    events: int
    data: int


def look_at_terminal(pid: int) -> Place:
    """Where the process is, if it can be taken from there. Raises Unsupported with a way out."""
    status, stat = proc.status(pid), proc.stat(pid)
    device, numbers = _find_descriptors(pid)
    if not numbers:
        raise _refusal(pid, "it has no terminal open", f"lzy attach {pid}")
    if find_by_device(device):
        raise _refusal(pid, "lzy keeps it already", "see lzy ps, and lzy console")
    own, group, session = (int(status[key].split()[0]) for key in ("NSpid", "NSpgid", "NSsid"))
    leads = own == session
    if int(stat[6]) != os.stat(device).st_rdev:
        raise _refusal(pid, "it is of another session than that terminal", f"lzy attach {pid}")
    others = [
        int(name)
        for name in filter(str.isdecimal, os.listdir("/proc"))
        if int(name) != pid and _is_with(int(name), pid, group, int(stat[6]), leads=leads)
    ]
    if others:
        raise _refuse_company(pid, group, others[0])
    descriptor = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        settings = fcntl.ioctl(descriptor, kernel.TCGETS2, bytes(kernel.TERMIOS2_BYTES))
        window = fcntl.ioctl(descriptor, kernel.TIOCGWINSZ, bytes(kernel.WINSIZE_BYTES))
    finally:
        os.close(descriptor)
    rows, columns = struct.unpack_from("=HH", window)
    used = settings if int(stat[7]) == group else b""
    return Place(device, rows, columns, used, numbers, 0 if leads else int(stat[3]))


def take_over(pid: int, place: Place, device: str) -> None:
    """Give the process the terminal `device` in place of `place`'s; one that is stopped goes on.

    Raises AccessDenied, NotFound, Unsupported, KernelError; it then stays where it is.
    """
    was_stopped = proc.stat(pid)[2] == "T"
    tracee = Tracee(pid)
    tracee.seize()
    try:
        tracee.prepare(arena_bytes=65536)
        leader = tracee.speaker
        clone = _clone(tracee, leader)
        try:
            _move(tracee, leader, clone, place, device)
        finally:
            _end_clone(tracee, leader, clone)
    finally:
        tracee.let_go()
    if was_stopped:
        os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGWINCH)  # it is to paint itself


def give_prompt(pid: int) -> None:
    """Have the shell of a process that was taken give its prompt; the process runs on."""
    with contextlib.suppress(NotFound, ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + _STOPS_WITHIN_S
        while proc.stat(pid)[2] != "T" and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)  # its shell may be about to look
        os.kill(pid, signal.SIGCONT)


def _move(tracee: Tracee, leader: Thread, clone: int, place: Place, device: str) -> None:
    batch = tracee.batch()
    path = batch.put(os.fsencode(device) + b"\0")
    flags = os.O_RDWR | os.O_NOCTTY | _status_flags(tracee.pid, place.numbers[0])
    opened = batch.call(kernel.SYS_OPENAT, -100, path, flags, 0, what=f"open {device}")
    tracee.run(leader, batch)
    number = batch.results[opened]
    inner = proc.innermost(proc.status(clone)["NSpid"])
    watches = _find_watches(tracee.pid, place.numbers)
    batch = tracee.batch()
    batch.call(process.SYS_SETPGID, inner, inner, what="a group for the clone")
    if place.shell_pid:
        batch.call(process.SYS_SETPGID, 0, inner, what="leave its group")
        batch.call(process.SYS_SETSID, what="begin a session")
    else:  # the clone's group gets the SIGHUP that a leader who leaves causes, tty_ioctl(4)
        group, old = batch.put(struct.pack("=i", inner)), place.numbers[0]
        batch.call(process.SYS_IOCTL, old, kernel.TIOCSPGRP, group, what="put the clone in front")
        batch.call(process.SYS_IOCTL, old, kernel.TIOCNOTTY, what="leave its terminal")
    batch.call(process.SYS_IOCTL, number, kernel.TIOCSCTTY, 0, tolerate=True)
    for watch in watches:
        batch.call(process.SYS_EPOLL_CTL, watch.epoll, 2, watch.number, 0, tolerate=True)
    for old in place.numbers:
        closes = _closes_on_exec(tracee.pid, old)
        batch.call(process.SYS_DUP3, number, old, os.O_CLOEXEC if closes else 0, tolerate=True)
    for watch in watches:
        event = batch.put(struct.pack("=IQ", watch.events, watch.data))
        batch.call(process.SYS_EPOLL_CTL, watch.epoll, 1, watch.number, event, tolerate=True)
    batch.call(process.SYS_CLOSE, number)
    try:
        tracee.run(leader, batch)
    except KernelError:
        own = proc.innermost(tracee.status(leader)["NSpid"])
        if place.shell_pid:
            tracee.run_one(leader, Call(process.SYS_SETPGID, (0, own)))
        tracee.run_one(leader, Call(process.SYS_CLOSE, (number,)))
        raise


def _clone(tracee: Tracee, leader: Thread) -> int:
    """A child of the process that never runs; its pid."""
    born: list[int] = []
    tracee.on_clone = born.append
    ptrace.set_options(leader.tid, ptrace.PTRACE_O_TRACECLONE)
    try:
        call = Call(process.SYS_CLONE, (process.CLONE_FILES,))
        result = tracee.run_one(leader, call, entry=machine.SPLIT)
    finally:
        ptrace.set_options(leader.tid, 0)
    if result < 0 or not born:
        raise KernelError(f"cannot clone process {tracee.pid}", -result, pid=tracee.pid)
    _, status = os.waitpid(born[0], ptrace.WALL)
    if not os.WIFSTOPPED(status):
        raise Busy("the clone was killed", remedy="try again")
    ptrace.set_options(born[0], ptrace.PTRACE_O_EXITKILL)
    return born[0]


def _end_clone(tracee: Tracee, leader: Thread, clone: int) -> None:
    """Kill the clone, and have the process wait for it, so that no zombie stays."""
    with contextlib.suppress(NotFound, ProcessLookupError, ChildProcessError):
        inner = proc.innermost(proc.status(clone)["NSpid"])
        os.kill(clone, signal.SIGKILL)
        os.waitpid(clone, ptrace.WALL)
        tracee.run_one(leader, Call(process.SYS_WAIT4, (inner, 0, os.WNOHANG | ptrace.WALL, 0)))


def _find_descriptors(pid: int) -> tuple[str, list[int]]:
    """The terminal of a process's standard descriptors, and all its numbers that lead there."""
    links: dict[int, str] = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    device = next((links[n] for n in (0, 1, 2) if links.get(n, "").startswith("/dev/pts/")), "")
    return device, sorted(n for n, link in links.items() if device and link in (device, "/dev/tty"))


def _is_with(other: int, pid: int, group: int, terminal: int, *, leads: bool) -> bool:
    """Whether another process would be parted: of the same group, or a child on the terminal.

    Of who leads the session there (`leads`), everybody on the terminal.
    """
    try:
        stat = proc.stat(other)
    except NotFound:
        return False
    if stat[2] in "ZX":
        return False
    on_terminal = int(stat[6]) == terminal
    return int(stat[4]) == group or (on_terminal and (leads or int(stat[3]) == pid))


def _information(pid: int, number: int) -> str:
    return proc.read_bytes(pid, f"fdinfo/{number}").decode()


def _flags_of(pid: int, number: int) -> int:
    return int(_information(pid, number).partition("flags:")[2].split(None, 1)[0], 8)


def _status_flags(pid: int, number: int) -> int:
    return _flags_of(pid, number) & (os.O_NONBLOCK | os.O_APPEND)


def _closes_on_exec(pid: int, number: int) -> bool:
    return bool(_flags_of(pid, number) & os.O_CLOEXEC)


def _find_watches(pid: int, numbers: list[int]) -> list[_Watch]:
    """What the process's epolls watch of the terminal; proc_pid_fdinfo(5)."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError, NotFound):
            if os.readlink(f"/proc/{pid}/fd/{name}") != "anon_inode:[eventpoll]":
                continue
            for line in _information(pid, int(name)).splitlines():
                words = line.split()
                if words and words[0] == "tfd:" and int(words[1]) in numbers:
                    events, data = int(words[3], 16), int(words[5], 16)
                    found.append(_Watch(int(name), int(words[1]), events, data))
    return found


def _refuse_company(pid: int, group: int, other: int) -> Unsupported:
    """One of a pipeline would be parted from what its shell stops and continues with it."""
    name = f"process {other}"
    with contextlib.suppress(NotFound):
        stat = proc.stat(other)
        name = f"{stat[1]} ({other})"
        if int(stat[4]) == group:
            return _refusal(
                pid,
                f"{name} is in one job with it",
                "start what belongs together as one session: lzy run -- sh -c 'A | B'",
                companion=name,
            )
    return _refusal(
        pid,
        f"{name} runs in it, on the same terminal",
        "all of it hibernates and wakes as one session, then on a terminal of lzy's; or take what "
        "stands alone",
    )


def _refusal(pid: int, reason: str, remedy: str, **facts: str) -> Unsupported:
    return Unsupported(
        f"process {pid} cannot be taken from its terminal: {reason}",
        remedy=remedy,
        pid=pid,
        reason=reason,
        **facts,
    )
