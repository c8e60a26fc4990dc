"""Keeps the daemons of one home running: starts them, and starts them again when they die.

`python -m lzy.agent.supervisor COMMANDS`, a JSON list of argument lists. It holds `supervisor.lock`
of its home, in which its pid stands, as long as it lives. At SIGTERM it ends them, the last one
first, and then itself. Orphans of an agent that was killed become its children, not init's, and
are waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ..checkpoint import proc
from ..checkpoint.errors import NotFound
from ..checkpoint.home import home
from ..checkpoint.linux.detached import set_name
from ..checkpoint.linux.process import PR_SET_CHILD_SUBREAPER, prctl
from .cgroups import Cgroup
from .voice import speak_safely

LONGEST_PAUSE_S = 5.0
_ENDS_WITHIN_S = 15.0
_STEADY_S = 10.0
_MOST_LOG_BYTES = 8 << 20
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Daemon:
    """One of them: its command, and the process that runs it at present."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.child: subprocess.Popen[bytes] | None = None
        self.pause_s = 0.0
        self.began_s = self.due_s = 0.0

    def start(self) -> None:
        """Start it, and remember when."""
        self.began_s = time.monotonic()
        self.child = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, preexec_fn=_unblock_signals
        )

    def note_end(self, status: int) -> None:
        """It has ended: when will it be started again?"""
        self.child = None
        steady = time.monotonic() - self.began_s > _STEADY_S
        self.pause_s = 0.0 if steady else min(max(2 * self.pause_s, 0.1), LONGEST_PAUSE_S)
        self.due_s = time.monotonic() + self.pause_s
        words = f"{' '.join(self.command[2:])} ended ({_describe(status)})"
        print(f"lzy: {words}; it starts again in {self.pause_s:.1f} s", file=sys.stderr, flush=True)


def supervise(commands: list[list[str]]) -> None:
    """Keep the commands running until SIGTERM or SIGINT."""
    folder = home()
    lock = take_lock(folder)
    if lock is None:
        sys.exit(f"lzy is up for {folder} already")
    set_name("lzy-supervisor")
    speak_safely()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    daemons = [Daemon(command) for command in commands]
    try:
        while True:
            for daemon in daemons:
                if daemon.child is None and time.monotonic() >= daemon.due_s:
                    daemon.start()
            waits = [d.due_s - time.monotonic() for d in daemons if d.child is None]
            told = signal.sigtimedwait(_SIGNALS, max(0.0, min(waits, default=3600.0)))
            if told and told.si_signo in (signal.SIGTERM, signal.SIGINT):
                return
            _reap(daemons)
    finally:
        for daemon in reversed(daemons):
            _end(daemon)
        Cgroup.left_by(folder).remove()
        os.close(lock)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _reap(daemons: list[Daemon]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        for daemon in daemons:
            if daemon.child and daemon.child.pid == pid:
                daemon.child.returncode = os.waitstatus_to_exitcode(status)
                daemon.note_end(status)


def _end(daemon: Daemon) -> None:
    if daemon.child is None:
        return
    daemon.child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.child.wait(_ENDS_WITHIN_S)
        return
    words = f"{' '.join(daemon.command[2:])} did not end within {_ENDS_WITHIN_S:g} s"
    print(f"lzy: {words}; it is killed", file=sys.stderr, flush=True)
    daemon.child.kill()
    daemon.child.wait()


def _describe(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit status {os.waitstatus_to_exitcode(status)}"


# -- its lock ------------------------------------------------------------------------------------


class Running(NamedTuple):
    """A supervisor that lives."""

    pid: int
    pidfd: int


def take_lock(folder: Path) -> int | None:
    """Become the supervisor of a home: the descriptor that holds it; None if there is one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(folder / "supervisor.lock", flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    own = {"pid": os.getpid(), "start_time": proc.start_time(os.getpid())}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(own).encode(), 0)
    return descriptor


def find_supervisor(folder: Path) -> Running | None:
    """The living supervisor of a home; its `pidfd` is the caller's to close."""
    try:
        with open(folder / "supervisor.lock", "rb") as file:
            if not _is_held(file.fileno()):
                return None
            told = json.loads(file.read())
        pidfd = os.pidfd_open(told["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(NotFound):
        if proc.start_time(told["pid"]) == told["start_time"]:
            return Running(told["pid"], pidfd)
    os.close(pidfd)
    return None


def is_supervised(folder: Path) -> bool:
    """Whether a supervisor lives for that home."""
    try:
        with open(folder / "supervisor.lock", "rb") as file:
            return _is_held(file.fileno())
    except OSError:
        return False


def _is_held(descriptor: int) -> bool:
    """Whether a living process has the lock; a zombie that nobody waits for has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def shorten_log(path: Path) -> None:
    """Begin a new log when it has grown long; the one before is kept beside it."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > _MOST_LOG_BYTES:
            path.rename(path.with_suffix(".log.1"))


if __name__ == "__main__":
    supervise(json.loads(sys.argv[1]))
