"""Fixtures of the tests of whole programs: start one, call lzy, leave nothing behind."""

from __future__ import annotations

import compileall
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from living import (
    PROGRAMS,
    CommandLine,
    Program,
    describe_process,
    end_process,
    list_children,
    reap,
    wait_readable,
)
from memory_group import MemoryGroup, make_group

from lzy.checkpoint.linux import namespaces

PR_SET_CHILD_SUBREAPER = 36


def pytest_sessionstart() -> None:
    """Compile what every agent and command of a test would else compile anew at its start.

    Under PYTHONDONTWRITEBYTECODE that is half of the time that such a test takes. And have Ctrl-C
    reach what tests start: who runs in the background of a shell has it ignored, and so have all
    below it.
    """
    for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action or signal.SIG_DFL)
    root = Path(__file__).parent.parent
    for package in ("checkpoint", "agent", "migrator", "cli"):
        compileall.compile_dir(root / package, quiet=2)


@pytest.fixture(scope="session")
def _adopt_orphans() -> None:
    """What a test's processes leave behind becomes our child, so that nothing can hide."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


@pytest.fixture(scope="session")
def own_shared_memory() -> bool:
    """Root's tests have a /dev/shm of their own, so that whatever is left there is theirs."""
    if os.geteuid() == 0:
        namespaces.enter_own_folder("/dev/shm", 1 << 30)
    return os.geteuid() == 0


@pytest.fixture
def nothing_left_behind(
    _adopt_orphans: None, own_shared_memory: bool, tmp_path: Path
) -> Iterator[None]:
    """After the test no process of its making is alive, and no mount or shared memory is new.

    Only mounts in the test's folder and over /proc count: other tests may run beside this one.
    """

    def is_ours(name: str) -> bool:
        return own_shared_memory or ("lzy" in name and "lzy-test-" not in name)

    def surroundings() -> tuple[list[str], list[str]]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        places = [line.split()[4] for line in lines]
        mine = [place for place in places if place == "/proc" or place.startswith(str(tmp_path))]
        return sorted(mine), sorted(filter(is_ours, os.listdir("/dev/shm")))

    before, children_before = surroundings(), set(list_children(os.getpid()))
    yield
    deadline = time.monotonic() + 10
    left: list[int] = []
    while left := [pid for pid in list_children(os.getpid()) if pid not in children_before]:
        pidfds = []
        for pid in left:
            reap(pid)
            with contextlib.suppress(ProcessLookupError):
                pidfds.append((pid, os.pidfd_open(pid)))
        with contextlib.ExitStack() as stack:
            for _, pidfd in pidfds:
                stack.callback(os.close, pidfd)
            # A zombie of another parent is readable at once: its parent will reap it or end.
            left_s = deadline - time.monotonic()
            if left_s > 0:
                wait_readable([pidfd for _, pidfd in pidfds], min(left_s, 0.05))
                continue
            named = [describe_process(pid) for pid in left]
            for pid, pidfd in pidfds:
                end_process(pid, pidfd)
            pytest.fail(f"left behind: {named}")
    assert surroundings() == before


def remove_names(pids: Iterable[int]) -> None:
    """What outlasts the programs that made it: queues and memory called after their pids."""
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in pids:
        # torch gives what it shares a name for a moment, in which it may be killed.
        for name in (f"*lzy-test-{pid}-*", f"sem.loky-{pid}-*", f"torch_{pid}_*"):
            for path in Path("/dev/shm").glob(name):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        if (segment := libc.shmget(0x6C000000 | pid, 0, 0)) >= 0:
            libc.shmctl(segment, 0, None)  # IPC_RMID
        if (semaphores := libc.semget(0x6C000000 | pid, 0, 0)) >= 0:
            libc.semctl(semaphores, 0, 0)
        for key in (0x6C000000, 0x6D000000):
            if (queue := libc.msgget(key | pid, 0)) >= 0:
                libc.msgctl(queue, 0, None)
        for name in ("one", "empty"):
            libc.mq_unlink(f"/lzy-test-{pid}-{name}".encode())


@pytest.fixture
def group(nothing_left_behind: None) -> Iterator[MemoryGroup]:
    """A control group that limits memory; whoever is in it must end before the test does."""
    made = make_group()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def start(tmp_path: Path, nothing_left_behind: None) -> Iterator[Callable[..., Program]]:
    """Starts a program by its name (`start("heap")`) or any command (`start(command=[…])`)."""
    started: list[Program] = []

    def start_program(
        name: str = "", *arguments: str, command: list[str] | None = None, **popen: Any
    ) -> Program:
        folder = tmp_path / f"program{len(started)}"
        folder.mkdir()
        words = command or [sys.executable, str(PROGRAMS / f"{name}.py")]
        filled = [argument.replace("{folder}", str(folder)) for argument in arguments]
        started.append(Program(folder, [*words, *filled], **popen))
        return started[-1]

    try:
        yield start_program
    finally:
        for program in reversed(started):  # A tracer before what it traces.
            program.close()
        remove_names({pid for p in started for pid in (p.child.pid, *p.killed)})


@pytest.fixture
def lzy(tmp_path: Path, nothing_left_behind: None) -> CommandLine:
    """lzy with a home of its own in the test's folder."""
    home = tmp_path / "home"
    home.mkdir()
    return CommandLine(home)
