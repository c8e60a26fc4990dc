"""Real processes for the engine's tests to work on, and tracers that may be killed at any step."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE_S = 30.0

PRELUDE = """
import ctypes, mmap, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
def say(*words): print(*words, flush=True)
def hear(): return sys.stdin.readline().strip()
def allocate(length, protection=3, flags=0x22, fd=-1, offset=0):
    address = libc.mmap(None, length, protection, flags, fd, offset)
    assert address not in (None, 2**64 - 1), ctypes.get_errno()
    return address
"""


class Subject:
    """A child interpreter that runs `code` behind `PRELUDE`; it is talked to line by line."""

    def __init__(self, code: str, *arguments: str, **popen: Any) -> None:
        self.child = subprocess.Popen(
            popen.pop("command", None)
            or [sys.executable, "-I", "-S", "-c", PRELUDE + code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            **popen,
        )
        self.pid = self.child.pid
        self.pidfd = os.pidfd_open(self.pid)
        self._heard = b""

    def say(self, line: str) -> None:
        assert self.child.stdin
        self.child.stdin.write(line.encode() + b"\n")

    def hear(self, timeout_s: float = PATIENCE_S) -> str:
        """The next line; AssertionError when it stays silent or has died."""
        assert self.child.stdout
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._heard:
            left_s = deadline - time.monotonic()
            ready, _, _ = select.select([self.child.stdout], [], [], max(0, left_s))
            assert ready, f"pid {self.pid} is silent; {self.describe()}"
            found = os.read(self.child.stdout.fileno(), 65536)
            assert found, f"pid {self.pid} ended with {self.child.wait(PATIENCE_S)}"
            self._heard += found
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()

    def describe(self) -> str:
        lines = []
        for task in Path(f"/proc/{self.pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                lines.append(f"{task.name}: {self.state(int(task.name))} in {self.call_of(task)}")
        return "; ".join(lines)

    @staticmethod
    def call_of(task: Path) -> str:
        """The number of the system call a thread sleeps in, or `running`."""
        return (task / "syscall").read_text().split()[0]

    def state(self, tid: int | None = None) -> str:
        path = f"/proc/{self.pid}/task/{tid or self.pid}/stat"
        return Path(path).read_text(errors="replace").rpartition(")")[2].split()[0]

    def await_calls(self, wanted: dict[int, int]) -> None:
        """Wait until each thread sleeps in its system call: {tid: number}.

        Or in 219: restart_syscall(2), by which the kernel goes on with a timeout.
        """
        deadline = time.monotonic() + PATIENCE_S
        for tid, number in wanted.items():
            task = Path(f"/proc/{self.pid}/task/{tid}")
            # The kernel tells nobody when a thread falls asleep, so it has to be asked.
            while self.call_of(task) not in (str(number), "219") or self.state(tid) != "S":
                assert time.monotonic() < deadline, self.describe()
                time.sleep(0.001)

    def await_state(self, letters: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.state() not in letters:
            assert time.monotonic() < deadline, f"{self.state()}, not {letters}"
            time.sleep(0.001)

    @property
    def is_alive(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.child.communicate(timeout=PATIENCE_S)
        os.close(self.pidfd)


@contextmanager
def living(code: str, *arguments: str, **popen: Any) -> Iterator[Subject]:
    """A subject that has said `ready`; it is ended with the block."""
    subject = Subject(code, *arguments, **popen)
    try:
        line = subject.hear()
        assert line == "ready", line
        yield subject
    finally:
        subject.close()


def in_child(work: Callable[[], None], *, timeout_s: float = PATIENCE_S) -> int:
    """Run `work` in a forked child; its wait status. AssertionError if it hangs."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    pidfd = os.pidfd_open(pid)
    try:
        ended = select.select([pidfd], [], [], timeout_s)[0]
        if not ended:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert ended, "the child hangs"
        return status
    finally:
        os.close(pidfd)


class Fuse:
    """Kills this process just before the step number `fatal` of those that touch a tracee.

    `light` wraps the functions by which the engine touches it; do so only in a forked child.
    """

    def __init__(self, fatal: int) -> None:
        self.steps, self.fatal = 0, fatal
        self.names: list[str] = []

    def light(self) -> None:
        from lzy.checkpoint.linux import memory, ptrace

        for module, name in (
            (ptrace, "seize"),
            (ptrace, "interrupt"),
            (ptrace, "write_register_set"),
            (ptrace, "write_signal_mask"),
            (ptrace, "resume"),
            (ptrace, "detach"),
            (ptrace, "set_options"),
            (memory, "write_process"),
            (os, "pwrite"),
            (os, "waitpid"),
        ):
            setattr(module, name, self._wrap(name, getattr(module, name)))

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if self.steps == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self.steps += 1
            self.names.append(name)
            return function(*arguments)

        return wrapped


def kill_at_every_step(
    work: Callable[[], None], check: Callable[[str], None], *, first: int = 0, every: int = 1
) -> int:
    """Fork `work` and kill it before each of its steps in turn, each time calling `check`.

    How many times it was killed; ends when `work` came through.
    """
    kills = 0
    fatal = first
    while True:

        def run(fatal: int = fatal) -> None:
            fuse = Fuse(fatal)
            fuse.light()
            work()

        status = in_child(run)
        if os.WIFEXITED(status):
            assert status == 0, f"the tracer failed at step {fatal}"
            check(f"after all {fatal} steps")
            return kills
        assert os.WTERMSIG(status) == signal.SIGKILL
        check(f"killed before step {fatal}")
        kills += 1
        fatal += every
