"""A process comes into being under the number it had, stopped at its stub's first instruction."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from memory import descriptors
from subjects import living

from lzy.checkpoint import machine, proc
from lzy.checkpoint.birth import Birth, Wanted, give_birth, taken_numbers
from lzy.checkpoint.errors import Busy, LzyError
from lzy.checkpoint.linux import ptrace

ADDRESS = 0x1000000000
EXIT_42 = bytes.fromhex("b8e7000000bf2a0000000f05")  # mov eax,231; mov edi,42; syscall


def free_pid() -> int:
    """A number that nobody has, far from those the kernel gives next."""
    limit = int(Path("/proc/sys/kernel/pid_max").read_text())
    start = limit - 1 - os.getpid() % 1000
    return next(n for n in range(start, 300, -1) if not os.path.exists(f"/proc/{n}"))


def wanted(pid: int, **numbers: int) -> Wanted:
    group = numbers.get("group", pid)
    session = numbers.get("session", pid)
    parent = numbers.get("parent", os.getpid())
    return Wanted(pid, parent, group, session, frozenset({pid}))


@contextmanager
def born(
    want: Wanted,
    *,
    new_namespace: bool = False,
    offsets: dict[str, int] | None = None,
    become: Callable[[], None] = lambda: None,
) -> Iterator[Birth]:
    """A birth; whatever it made is ended with the block, if it was not waited for before."""
    executable = os.memfd_create("stub", os.MFD_CLOEXEC)
    os.write(executable, machine.tiny_executable(EXIT_42, ADDRESS))
    try:
        made = give_birth(
            want, executable, new_namespace=new_namespace, offsets=offsets, become=become
        )
    finally:
        os.close(executable)
    try:
        yield made
    finally:
        for pid in filter(None, made):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.WIFSTOPPED(os.waitpid(pid, ptrace.WALL)[1]):
                    pass


def test_stands_at_its_first_instruction_under_its_number() -> None:
    """The wanted pid, stopped by us at the stub's first byte, all signals blocked, none changed."""
    pid = free_pid()
    with born(wanted(pid)) as made:
        assert made == Birth(pid, 0)
        registers = machine.unpack_registers(ptrace.read_register_set(pid, ptrace.NT_PRSTATUS))
        assert registers["rip"] == ADDRESS
        status = proc.status(pid)
        assert int(status["TracerPid"]) == os.getpid()
        assert int(status["Threads"]) == 1
        ptrace.detach(pid)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


def test_what_it_becomes() -> None:
    """What `become` does, in the child and nowhere else, is so when the stub begins."""
    pid = free_pid()
    here = os.getcwd()
    ours = {line.partition(" ")[2] for line in descriptors()}
    with born(wanted(pid), become=lambda: os.chdir("/usr")):
        assert os.readlink(f"/proc/{pid}/cwd") == "/usr"
        assert os.getcwd() == here
        held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert not [link for link in held - ours if "pipe" in link]


def test_session_and_group() -> None:
    """It leads a session or group as it did; in a foreign session it gets one of its own."""
    pid, own = free_pid(), os.getsid(0)
    for group, session, expected in (
        (pid, pid, (pid, pid)),
        (pid, own, (pid, own)),
        (os.getpgid(0), own, (os.getpgid(0), own)),
        (free_pid(), free_pid() - 1, (pid, pid)),
    ):
        with born(wanted(pid, group=group, session=session)):
            assert (os.getpgid(pid), os.getsid(pid)) == expected


def test_taken_number_is_busy_by_name() -> None:
    """A living process or a zombie that has the number is named; nothing is made."""
    with living("libc.prctl(15, b'occupant', 0, 0, 0); say('ready'); hear()") as subject:
        assert taken_numbers(wanted(subject.pid)) == [subject.pid]
        before = proc.children(os.getpid())
        with (
            pytest.raises(Busy, match=f"pid {subject.pid} is taken by occupant") as caught,
            born(wanted(subject.pid)),
        ):
            pass
        assert "new" in caught.value.remedy
        assert proc.children(os.getpid()) == before
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(Busy, match="zombie"), born(wanted(pid)):
            pass
    finally:
        os.waitpid(pid, 0)
    assert taken_numbers(wanted(pid)) == []


@pytest.mark.parametrize("new_namespace", [False, True])
def test_failure_in_the_child_is_told(new_namespace: bool) -> None:
    """What goes wrong in the child before the stub is in the error; the child is gone."""
    pid = free_pid()
    before = sorted(os.listdir("/proc/self/fd"))

    def fail() -> None:
        raise ValueError("it did not want to")

    with (
        pytest.raises(LzyError, match="ValueError: it did not want to"),
        born(wanted(pid), become=fail, new_namespace=new_namespace),
    ):
        pass
    for child in proc.children(os.getpid()):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, ptrace.WALL)
    assert not os.path.exists(f"/proc/{pid}")
    assert sorted(os.listdir("/proc/self/fd")) == before


def await_program(pid: int, name: str) -> None:
    """Wait until the process, which nobody waits for otherwise, has become that program."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").read_bytes() != name.encode() + b"\0":
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_new_namespace_has_all_the_numbers() -> None:
    """In a PID namespace of its own it has its number, and its parent that of the old one.

    Its end is the end of the stand-in, and of the init, with its status.
    """
    number, parent = 1234, 777
    with born(wanted(number, parent=parent), new_namespace=True) as made:
        assert made.init
        status = proc.status(made.pid)
        assert proc.innermost(status["NSpid"]) == number
        assert proc.innermost(status["NSsid"]) == number
        stand_in = int(status["PPid"])
        assert proc.innermost(proc.status(stand_in)["NSpid"]) == parent
        assert proc.innermost(proc.status(made.init)["NSpid"]) == 1
        assert int(proc.status(stand_in)["PPid"]) == made.init
        assert os.readlink(f"/proc/{made.pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
        await_program(made.init, "lzy-init")
        held = {os.readlink(f"/proc/{made.init}/fd/{fd}")
                for fd in os.listdir(f"/proc/{made.init}/fd")}  # fmt: skip
        assert held == {"/dev/null"}
        ptrace.detach(made.pid)
        # We traced it, but its parent is the stand-in, which waits for it and ends as it did.
        assert os.waitstatus_to_exitcode(os.waitpid(made.init, 0)[1]) == 42


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_end_by_a_signal_is_passed_on(number: int) -> None:
    """A process killed in its namespace: the init ends with 128 + signal."""
    with born(wanted(1234, parent=777), new_namespace=True) as made:
        ptrace.write_signal_mask(made.pid, 0)
        os.kill(made.pid, number)
        ptrace.detach(made.pid) if number != signal.SIGKILL else None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(made.pid, ptrace.WALL)
        assert os.waitstatus_to_exitcode(os.waitpid(made.init, 0)[1]) == 128 + number


def test_process_that_was_an_init() -> None:
    """Pid 1 of a container is pid 1 of its new namespace."""
    with born(wanted(1, parent=0), new_namespace=True) as made:
        assert proc.innermost(proc.status(made.pid)["NSpid"]) == 1
        assert made.pid == made.init


def test_clocks_run_on() -> None:
    """The clocks' offsets are those of its time namespace."""
    offsets = {"monotonic": 5_000_000_123, "boottime": 7_000_000_456}
    pid = free_pid()
    with born(wanted(pid), offsets=offsets):
        lines = Path(f"/proc/{pid}/timens_offsets").read_text().split("\n")
        found = {name: (int(s), int(ns)) for name, s, ns in map(str.split, filter(None, lines))}
        assert found == {"monotonic": (5, 123), "boottime": (7, 456)}
        assert os.stat(f"/proc/{pid}/ns/time").st_ino != os.stat("/proc/self/ns/time").st_ino


def test_death_of_the_restorer_is_the_death_of_the_unfinished() -> None:
    """`kill -9` of whoever gives birth leaves nothing of the newborn."""
    pid = free_pid()
    reader, writer = os.pipe()
    restorer = os.fork()
    if restorer == 0:
        try:
            with born(wanted(pid)):
                os.write(writer, b"!")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    pidfd = None
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
    os.waitpid(restorer, 0)
    try:
        if pidfd is not None:
            import select

            assert select.select([pidfd], [], [], 10)[0]
            os.close(pidfd)
    finally:
        os.close(reader)


def test_namespace_outlives_nobody() -> None:
    """A wanted parent with a number of the process's own threads is no obstacle."""
    want = Wanted(1234, 1235, 1234, 1234, frozenset({1234, 1235}))
    with born(want, new_namespace=True) as made:
        assert int(proc.status(made.pid)["PPid"]) == made.init
