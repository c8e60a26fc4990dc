"""What /proc and the kernel's list of sockets tell of sessions at one moment, read sparingly.

All processes are looked at once for all sessions, all sockets once; of a session itself only what
those do not tell. Nothing here stops or changes a process.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..checkpoint import proc
from ..checkpoint.linux.activity import TcpSocket, list_tcp_sockets
from .processes import Process, list_processes

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_TERMINAL_MAJORS = frozenset({4, 5, *range(136, 144)})  # Documentation/admin-guide/devices.txt
GPU_DEVICES = "/dev/nvidia"
_LIST_SOCKETS_EVERY = 4  # readings: else only when the number of descriptors has changed


class Terminal(NamedTuple):
    """The terminal that is a session's standard input; `read_unix_s`: when it was last read from.

    The kernel moves that time at most every 8 seconds (tty_update_time).
    """

    path: str
    read_unix_s: float


class Reading(NamedTuple):
    """One session at one moment: totals since its process began; sizes in bytes.

    `calls` is the system call in which its main thread waits, None while it computes. What could
    not be read stands in `errors`, by the name of the probe that needs it.
    """

    at_s: float
    unix_s: float
    cpu_s: float
    resident_bytes: int
    children: int
    """All descendants; `busy_children` are those that do not sleep."""
    busy_children: tuple[str, ...]
    io_bytes: int
    moved_bytes: int
    queued_bytes: int
    waiting_connections: int
    call: int | None
    terminal: Terminal | None
    has_gpu: bool
    is_kernel: bool
    errors: Mapping[str, str]


class Node(NamedTuple):
    """All processes and TCP sockets of the node at one moment."""

    at_s: float
    processes: dict[int, Process]
    children: dict[int, list[int]]
    sockets: dict[int, TcpSocket]
    error: str
    """Why there is no list of sockets, empty if there is one."""


def look_around() -> Node:
    """Look at all processes and sockets."""
    processes = list_processes()
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    try:
        sockets, error = list_tcp_sockets(), ""
    except OSError as problem:
        sockets, error = {}, str(problem)
    return Node(time.monotonic(), processes, children, sockets, error)


class Watch:
    """Takes the readings of one process; knows from the last ones what it need not read again."""

    def __init__(self, pid: int, command: str) -> None:
        self._folder = f"/proc/{pid}"
        self._pid = pid
        self._is_kernel = "ipykernel" in command
        self._inodes: frozenset[int] = frozenset()
        self._descriptors = -1
        self._listed = 0
        self._had_terminal: Terminal | None = None
        self._has_gpu = False

    def forget(self) -> None:
        """Take nothing from the readings before."""
        self._descriptors = -1

    def read(self, node: Node) -> Reading | None:
        """What the process shows now; None when it has ended."""
        process = node.processes.get(self._pid)
        if process is None:
            return None
        errors: dict[str, str] = {}
        below = list(_descend(node, self._pid))
        ticks = process.ticks + process.waited_ticks + sum(p.ticks + p.waited_ticks for p in below)
        io_bytes = moved = queued = waiting = 0
        call: int | None = None
        try:
            io_bytes = self._count_io()
        except (OSError, ValueError, KeyError) as error:
            errors["io"] = str(error)
        try:
            self._list_sockets()
            if node.error:
                raise OSError(node.error)
            for inode in self._inodes & node.sockets.keys():
                socket = node.sockets[inode]
                moved += socket.moved_bytes
                if socket.listens:
                    waiting += socket.queued
                else:
                    queued += socket.queued
        except OSError as error:
            errors["sockets"] = errors["messages"] = str(error)
        if self._is_kernel or self._had_terminal:
            try:
                call = self._find_call()
            except (OSError, ValueError) as error:
                errors["kernel"] = errors["terminal"] = str(error)
        return Reading(
            at_s=node.at_s,
            unix_s=time.time(),
            cpu_s=ticks / _TICKS_PER_S,
            resident_bytes=process.resident_bytes,
            children=len(below),
            busy_children=tuple(f"{p.pid} ({p.name})" for p in below if p.state in "RD")[:8],
            io_bytes=io_bytes,
            moved_bytes=moved,
            queued_bytes=queued,
            waiting_connections=waiting,
            call=call,
            terminal=self._had_terminal,
            has_gpu=self._has_gpu,
            is_kernel=self._is_kernel,
            errors=errors,
        )

    def _count_io(self) -> int:
        """Bytes it has read and written by whatever call, files and pipes; proc_pid_io(5)."""
        lines = _read(f"{self._folder}/io").split(b"\n", 2)
        return int(lines[0].partition(b":")[2]) + int(lines[1].partition(b":")[2])

    def _list_sockets(self) -> None:
        """Renew what is known of its descriptors, if it may have changed."""
        folder = f"{self._find_folder()}/fd"
        number = os.stat(folder).st_size  # how many it has open, Linux 6.2
        self._listed -= 1
        if number and number == self._descriptors and self._listed > 0:
            if self._had_terminal:
                self._had_terminal = self._find_terminal()
            return
        self._descriptors, self._listed = number, _LIST_SOCKETS_EVERY
        inodes = set()
        self._has_gpu = False
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                link = os.readlink(f"{folder}/{name}")
                if link.startswith("socket:["):
                    inodes.add(int(link[8:-1]))
                elif link.startswith(GPU_DEVICES):
                    self._has_gpu = True
        self._inodes = frozenset(inodes)
        self._had_terminal = self._find_terminal()

    def _find_folder(self) -> str:
        """Where its descriptors are shown."""
        task = proc.witness(self._pid)
        return self._folder if task == self._pid else f"/proc/{task}"

    def _find_terminal(self) -> Terminal | None:
        path = f"{self._find_folder()}/fd/0"
        try:
            found = os.stat(path)
            if stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) in _TERMINAL_MAJORS:
                return Terminal(os.readlink(path), found.st_atime)
        except FileNotFoundError:
            pass
        return None

    def _find_call(self) -> int | None:
        first = _read(f"{self._folder}/syscall").split(None, 1)[0]
        return int(first) if first.lstrip(b"-").isdigit() and first != b"-1" else None


def has_terminal(pid: int) -> bool:
    """Whether the standard input of process `pid` is a terminal."""
    return Watch(pid, "")._find_terminal() is not None


def _descend(node: Node, pid: int) -> Iterable[Process]:
    """All below `pid`, the ended that nobody has waited for included."""
    for child in node.children.get(pid, ()):
        if not node.processes[child].is_clone:
            yield node.processes[child]
            yield from _descend(node, child)


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
