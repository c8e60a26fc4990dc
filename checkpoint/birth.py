"""How a process with a chosen pid comes into being: forked here, turned into our stub, traced.

In the present PID namespace the process is a fork of the restorer with the pid it had. In a new
one there are also an init (pid 1) and, under the number of the process's former parent, a stand-in
for it, so that getppid(2) answers as before; both are a few bytes of machine code that wait for
their child and end as it ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from . import machine, proc
from .errors import Busy, LzyError, NotFound
from .linux import namespaces, process, ptrace
from .linux.detached import close_all_but, forget_signals

TRACE_OPTIONS = (
    ptrace.PTRACE_O_EXITKILL
    | ptrace.PTRACE_O_TRACEFORK
    | ptrace.PTRACE_O_TRACECLONE
    | ptrace.PTRACE_O_TRACEEXEC
)  # fmt: skip


class Birth(NamedTuple):
    """A new process, stopped at the first instruction of the stub, seized by us."""

    pid: int
    init: int  # pid of the new namespace's init as we see it, 0 in the present namespace


class Wanted(NamedTuple):
    """The numbers a process had: its pid, its parent's, its group's and its session's."""

    pid: int
    parent: int
    group: int
    session: int
    tids: frozenset[int]


def taken_numbers(wanted: Wanted) -> list[int]:
    """Which of the pid and tids are in use in the present PID namespace."""
    return [n for n in sorted({wanted.pid, *wanted.tids}) if os.path.exists(f"/proc/{n}")]


def await_free_numbers(wanted: Wanted, timeout_s: float = 0.5) -> list[int]:
    """As `taken_numbers`; but zombies that their parent is about to wait for get a moment to go."""
    deadline = time.monotonic() + timeout_s
    while taken := taken_numbers(wanted):
        if time.monotonic() > deadline or not all(map(_is_zombie, taken)):
            break
        time.sleep(0.01)
    return taken


def _is_zombie(pid: int) -> bool:
    try:
        return proc.stat(pid)[2] == "Z"
    except NotFound:
        return True


def number_taken(number: int) -> Busy:
    """The error for a number that a process or thread must have and is somebody else's by now.

    `taken` among its facts tells it from others.
    """
    return Busy(
        f"pid {number} is taken{by_whom(number)}",
        remedy="wait until it ends, or restore with --pid-namespace new",
        pid=number,
        taken=number,
    )


def give_birth(
    wanted: Wanted,
    executable: int,
    *,
    new_namespace: bool,
    offsets: dict[str, int] | None,
    become: Callable[[], None],
) -> Birth:
    """Make the process; it runs `become` (descriptors, directory) and then the stub.

    `executable` is a descriptor of the stub's ELF file, `offsets` what its monotonic and
    boot-time clocks are ahead of this machine's, in nanoseconds (time_namespaces(7)).
    Precondition: the caller has one thread. Raises Busy when the pid is taken.
    """
    ready_out, ready_in = os.pipe2(os.O_CLOEXEC)
    go_out, go_in = os.pipe2(os.O_CLOEXEC)

    def live() -> NoReturn:
        try:
            os.close(ready_out)
            os.close(go_in)
            if offsets:
                process.unshare(process.CLONE_NEWTIME)
                _write_offsets(offsets)
            os.write(ready_in, b"R")
            if not os.read(go_out, 1):
                os._exit(1)
            become()
            signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
            os.execve(executable, ["lzy-restoring"], {})
        except BaseException as error:  # the one place that hears of it is the restorer
            os.write(ready_in, f"{type(error).__name__}: {error}".encode())
            os._exit(1)

    init = child = 0
    try:
        if new_namespace:
            init = _make_namespace(wanted, live)
        else:
            child = _clone(wanted.pid, flags=_parent_flag(wanted))
            if child == 0:
                _join_session(wanted)
                live()
        os.close(ready_in)
        ready_in = -1
        os.close(go_out)
        go_out = -1
        answer = os.read(ready_out, 4096)
        if answer != b"R":
            raise LzyError(f"the new process could not start: {answer.decode() or 'it ended'}")
        pid = _youngest(init) if init else wanted.pid
        ptrace.seize(pid, TRACE_OPTIONS)
        with contextlib.suppress(BrokenPipeError):  # it ended: `_await_exec` tells how
            os.write(go_in, b"g")
        os.close(go_in)
        go_in = -1
        _await_exec(pid, ready_out)
        return Birth(pid, init)
    except BaseException:
        for victim in filter(None, (init, child)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(victim, ptrace.WALL)
        raise
    finally:
        for descriptor in (ready_out, ready_in, go_out, go_in):
            if descriptor >= 0:
                os.close(descriptor)


def _clone(pid: int, flags: int = 0) -> int:
    try:
        # clone(2): with CLONE_PARENT the exit signal is the caller's own and must be given as 0
        exit_signal = 0 if flags & process.CLONE_PARENT else signal.SIGCHLD
        return process.clone3(flags=flags, exit_signal=exit_signal, set_tid=pid)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise number_taken(pid) from error
        raise LzyError(
            f"cannot make a process with pid {pid}: {error.strerror}",
            remedy="run lzy as root (CAP_CHECKPOINT_RESTORE)",
            pid=pid,
        ) from error


def by_whom(pid: int) -> str:
    """Who has the pid, in words that continue a sentence."""
    try:
        stat = proc.stat(pid)
    except NotFound:
        return ""
    return f" by {stat[1]}" + (", a zombie its parent has not waited for" if stat[2] == "Z" else "")


def _parent_flag(wanted: Wanted) -> int:
    """Who was a child of our own parent becomes one again: it sees no difference."""
    return process.CLONE_PARENT if os.getppid() == wanted.parent else 0


def _join_session(wanted: Wanted) -> None:
    """Lead a session or group as before, stay in one that is ours too, else start a new one."""
    if wanted.session == wanted.pid or os.getsid(0) != wanted.session:
        os.setsid()
    elif wanted.group == wanted.pid:
        os.setpgid(0, 0)
    elif os.getpgid(0) != wanted.group:
        try:
            os.setpgid(0, wanted.group)
        except OSError:
            os.setpgid(0, 0)


def _make_namespace(wanted: Wanted, live: Callable[[], NoReturn]) -> int:
    """A new PID and mount namespace with its init, perhaps a stand-in parent, and the process."""
    flags = process.CLONE_NEWPID | process.CLONE_NEWNS
    outside = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        init = process.clone3(flags=flags)
    except OSError as error:
        os.close(outside)
        raise LzyError(
            f"cannot make a PID namespace: {error.strerror}",
            remedy="run lzy as root (CAP_SYS_ADMIN); `lzy doctor` tells what is missing",
        ) from error
    if init:
        os.close(outside)
        return init
    try:
        process.mount("none", "/", "", process.MS_REC | process.MS_PRIVATE)
        process.mount(
            "proc", "/proc", "proc", process.MS_NOSUID | process.MS_NODEV | process.MS_NOEXEC
        )
        if wanted.pid == 1:
            live()
        parent = wanted.parent
        is_parent = True
        if parent > 1 and parent != wanted.pid and parent not in wanted.tids:
            is_parent = process.clone3(set_tid=parent) == 0
            if is_parent and wanted.session == parent:
                os.setsid()
        if is_parent and process.clone3(set_tid=wanted.pid) == 0:
            _join_session(wanted)
            live()
        if os.getpid() == 1:
            # Files that we opened are called by where they are mounted as long as anybody is there.
            with contextlib.suppress(OSError):  # not ours to enter, without root
                namespaces.enter(f"/proc/self/fd/{outside}", namespaces.CLONE_NEWNS)
        _become_reaper()
    except BaseException as error:
        print(f"lzy: namespace: {error}", file=sys.stderr)
        os._exit(1)


def _become_reaper() -> NoReturn:
    """Turn into the few bytes that wait for children and end as the last one did."""
    executable = os.memfd_create("lzy-init", os.MFD_CLOEXEC)
    os.write(executable, machine.tiny_executable(machine.REAPER, 0x400000))
    forget_signals()
    close_all_but([executable])
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        if number != null and number != executable:
            os.dup2(null, number)
    os.chdir("/")
    os.execve(executable, ["lzy-init"], {})
    raise AssertionError


def _youngest(pid: int) -> int:
    """The last of a line of only children."""
    while below := proc.children(pid):
        pid = below[0]
    return pid


def _write_offsets(offsets: dict[str, int]) -> None:
    with open("/proc/self/timens_offsets", "w") as file:
        for clock, ahead in offsets.items():
            file.write(f"{clock} {ahead // 10**9} {ahead % 10**9}\n")


def _await_exec(pid: int, ready: int) -> None:
    """Wait until the process stands at the stub's first instruction.

    The event comes from inside execve(2), whose result has yet to be put into rax; so the process
    is stopped once more on its way out.
    """
    executed = False
    while True:
        _, status = os.waitpid(pid, ptrace.WALL)
        if not os.WIFSTOPPED(status):
            said = os.read(ready, 4096).decode()
            raise LzyError(f"the new process could not become the old one: {said or status}")
        if executed and status >> 16 == ptrace.PTRACE_EVENT_STOP:
            return
        if status >> 16 == ptrace.PTRACE_EVENT_EXEC:
            executed = True
            ptrace.interrupt(pid)
        event = status >> 16
        ptrace.resume(pid, 0 if event else os.WSTOPSIG(status))
