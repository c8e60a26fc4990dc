"""seccomp(2) filters: suspended while lzy works in a process, read, and put on again at a restore.

A filter would refuse injected calls, or end the thread that makes them; its tracer may suspend it
(PTRACE_O_SUSPEND_SECCOMP, Linux 4.3) if it has CAP_SYS_ADMIN and no filter of its own. Where lzy
runs under the very filters of the process, as inside one container, they are left in force: what
they refuse lzy is refused anyway, and whoever restores it there has them too. That they are the
same is judged by their number, for who is filtered may not read filters.

Should lzy die while it works in a process, the filters are in force again at once; one that does
not let it unmap, or set its signal mask, then leaves the traces that `machine` would have removed.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import proc
from .errors import Incompatible, KernelError, Unsupported
from .linux import process, ptrace

if TYPE_CHECKING:
    from .tracee import Thread, Tracee

_STRICT, _FILTER = 1, 2  # as /proc/PID/status has them


def mode_of(status: dict[str, str]) -> int:
    """How a thread is filtered: 0 not, 1 strictly, 2 by programs; proc_pid_status(5)."""
    return int(status.get("Seccomp", "0"))


def are_ours(status: dict[str, str]) -> bool:
    """Whether a thread's filters are just those that lzy itself runs under."""
    own = proc.status(os.getpid())
    names = ("Seccomp", "Seccomp_filters")
    return mode_of(own) == _FILTER and all(own.get(n) == status.get(n) for n in names)


def refuse_unsuspendable(pid: int, status: dict[str, str]) -> None:
    """Raise Unsupported for a process under filters that lzy cannot suspend."""
    if not mode_of(status) or are_ours(status):
        return
    own = proc.status(os.getpid())
    if mode_of(own):
        raise Unsupported(
            f"pid {pid} runs under other seccomp filters than lzy itself",
            remedy="run lzy outside, as root and without a filter",
            pid=pid,
        )
    if not process.is_administrator():
        raise Unsupported(
            f"pid {pid} runs under a seccomp filter, which would refuse injected system calls",
            remedy="run lzy as root (CAP_SYS_ADMIN), which may suspend it; or start the program "
            "without the filter",
            pid=pid,
        )


def suspend_filters(tracee: Tracee) -> None:
    """Suspend the filters of all stopped threads for as long as they are traced."""
    for thread in tracee.threads.values():
        status = tracee.status(thread)
        if mode_of(status) and not are_ours(status):
            refuse_unsuspendable(tracee.pid, status)
            try:
                ptrace.suspend_filters(thread.tid)
            except OSError as error:
                raise Unsupported(
                    f"the seccomp filter of thread {thread.tid} of pid {tracee.pid} cannot be "
                    f"suspended: {error.strerror}",
                    remedy="start the program without the filter, or use a kernel with "
                    "CONFIG_CHECKPOINT_RESTORE",
                    pid=tracee.pid,
                ) from error


def describe_filters(tracee: Tracee, thread: Thread) -> dict[str, Any] | None:
    """How a stopped thread is filtered: the mode, and programs, the first installed first."""
    status = tracee.status(thread)
    if not (mode := mode_of(status)):
        return None
    if are_ours(status):
        return {"mode": mode, "ours": int(status.get("Seccomp_filters", "1")), "programs": []}
    programs = []
    if mode == _FILTER:
        try:
            found = ptrace.filter_programs(thread.tid)
        except OSError as error:
            raise KernelError(
                f"cannot read the seccomp filters of thread {thread.tid}", error.errno or 0
            ) from error
        for program, flags in found:
            if ptrace.asks_a_supervisor(program):
                raise Unsupported(
                    f"a seccomp filter of pid {tracee.pid} asks a supervising process "
                    "(SECCOMP_RET_USER_NOTIF), which would have to be there again",
                    remedy="start the program without that sandbox",
                    pid=tracee.pid,
                )
            programs.append({"program": base64.b64encode(program).decode(), "flags": flags})
    return {"mode": mode, "ours": 0, "programs": programs}


def install_filters(
    tracee: Tracee, described: Sequence[dict[str, Any]], threads: Sequence[Thread]
) -> None:
    """Put the threads' filters on again, suspended until they are let go.

    While they still may: as root, and before their rights are those of old. What is common to all
    is installed once for all (TSYNC), so that it is one and the same filter as before, and a
    program can still add another for all its threads. Raises Incompatible, KernelError.
    """
    wanted = [
        thread.get("filters") or {"mode": 0, "ours": 0, "programs": []} for thread in described
    ]
    own = proc.status(os.getpid())
    ours = int(own.get("Seccomp_filters", "0")) if mode_of(own) else 0
    if any(want["mode"] and want["ours"] != ours for want in wanted):
        raise Incompatible(
            "the process ran under other seccomp filters than lzy does here",
            remedy="restore it as it was dumped: inside its container, or outside of any",
        )
    if not any(want["mode"] and not want["ours"] for want in wanted):
        return
    from .birth import TRACE_OPTIONS

    for thread in threads:
        try:
            ptrace.suspend_filters(thread.tid, TRACE_OPTIONS)
        except OSError as error:
            raise KernelError("cannot suspend seccomp filters", error.errno or 0) from error
    lists = [want["programs"] for want in wanted]
    common = 0
    while all(len(programs) > common for programs in lists) and all(
        programs[common] == lists[0][common] for programs in lists
    ):
        common += 1
    _install(tracee, threads[0], lists[0][:common], for_all=True)
    for thread, programs, want in zip(threads, lists, wanted, strict=True):
        _install(tracee, thread, programs[common:], for_all=False)
        if want["mode"] == _STRICT:
            batch = tracee.batch()
            batch.call(process.SYS_SECCOMP, process.SECCOMP_SET_MODE_STRICT, 0, 0, what="seccomp")
            tracee.run(thread, batch)


def _install(
    tracee: Tracee, thread: Thread, programs: Sequence[dict[str, Any]], *, for_all: bool
) -> None:
    for described in programs:
        batch = tracee.batch()
        program = base64.b64decode(described["program"])
        flags = described["flags"] | (process.SECCOMP_FILTER_FLAG_TSYNC if for_all else 0)
        place = batch.put(program)
        header = batch.put(process.pack_filter_program(len(program), place))
        batch.call(
            process.SYS_SECCOMP, process.SECCOMP_SET_MODE_FILTER, flags, header,
            what="seccomp filter",
        )  # fmt: skip
        tracee.run(thread, batch)
