"""What a tree of new processes needs that none of them has alone.

Process groups, whose leaders may be elsewhere in the tree or have ended; descriptors of processes;
those that have ended and were not waited for; and the moment in which all begin to run, or none.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Sequence
from typing import Any

from .linux import layouts, process, ptrace
from .linux.descriptors import EPOLL_CTL_ADD, pack_epoll_event
from .linux.detached import forget_signals
from .member import Member, fork_stub
from .tracee import Tracee


def settle_family(members: Sequence[Member], ended: Iterable[dict[str, Any]]) -> None:
    """Once all are born: who has ended ends again; groups, and descriptors of processes."""
    zombies = list(ended)
    helpers: list[Tracee] = []
    try:
        _settle_groups(members, zombies, helpers)
    except BaseException:
        for tracee in helpers:
            with contextlib.suppress(OSError):
                os.kill(tracee.pid, signal.SIGKILL)
                os.waitpid(tracee.pid, ptrace.WALL)
        raise
    made: dict[int, tuple[Member, int]] = {}
    for member in members:
        _add_process_descriptors(member, made)
        _take_terminals(member)
    for member in members:
        _watch_processes(member)


def _settle_groups(
    members: Sequence[Member], zombies: list[dict[str, Any]], helpers: list[Tracee]
) -> None:
    """Who has ended, and who leads a group whose leader is gone, goes to `helpers`, and ends."""
    root = members[0]
    by_number = {member.number: member for member in members}
    bodies: list[tuple[dict[str, Any], Member, Tracee]] = []
    for one in zombies:
        parent = by_number[one["parent"]]
        _, tracee = fork_stub(parent.tracee, one["pid"], one)
        helpers.append(tracee)
        bodies.append((one, parent, tracee))
        _lead(tracee, one)
    leaders = {root.own["group"], *by_number, *(one["pid"] for one in zombies)}
    stand_ins: dict[int, tuple[Member, Tracee]] = {
        session: (member, tracee)
        for member in members
        for session, tracee in member.stand_ins.items()
    }
    helpers += [tracee for _, tracee in stand_ins.values()]
    for member in members[1:]:
        group = member.own["group"]
        if member.parent and group not in leaders and group not in stand_ins:
            stand_ins[group] = member.parent, _stand_in(member.parent, group)
            helpers.append(stand_ins[group][1])
    for member in members[1:]:
        if member.parent and member.own["group"] not in (
            member.number,
            member.parent.own["group"],
        ):
            _join_group(member.tracee, member.own["group"], root)
    for one, parent, tracee in bodies:
        if one["group"] not in (one["pid"], parent.own["group"]):
            _join_group(tracee, one["group"], root)
    for group, (parent, tracee) in stand_ins.items():
        _end(tracee, 0)
        batch = parent.tracee.batch()
        batch.call(process.SYS_WAIT4, group, 0, 0, 0)
        parent.tracee.run(parent.tracee.speaker, batch)
    for one, _, tracee in bodies:
        _end(tracee, one["status"])
    bereaved = [parent for _, parent, _ in bodies] + [parent for parent, _ in stand_ins.values()]
    for parent in {parent.number: parent for parent in bereaved}.values():
        _forget_child_signal(parent.tracee)


def _lead(tracee: Tracee, described: dict[str, Any]) -> None:
    """Lead a session or a group, and bear the name."""
    batch = tracee.batch()
    if described["session"] == described["pid"]:
        batch.call(process.SYS_SETSID)
    elif described["group"] == described["pid"]:
        batch.call(process.SYS_SETPGID, 0, 0)
    name = os.fsencode(described["comm"])[:15].ljust(16, b"\0")
    batch.call(process.SYS_PRCTL, process.PR_SET_NAME, batch.put(name))
    tracee.run(tracee.speaker, batch)


def _stand_in(parent: Member, group: int) -> Tracee:
    """A process that leads the group of one that has ended, until the others have joined it."""
    _, tracee = fork_stub(parent.tracee, group, {"exit_signal": signal.SIGCHLD})
    _lead(tracee, {"session": 0, "group": group, "pid": group, "comm": "lzy-group"})
    return tracee


def _join_group(tracee: Tracee, group: int, root: Member) -> None:
    if group == root.own["group"] != root.number:
        # It may lead one of its own here, where its former one is not.
        batch = root.tracee.batch()
        asked = batch.call(process.SYS_GETPGID, 0)
        root.tracee.run(root.tracee.speaker, batch)
        group = batch.results[asked]
    batch = tracee.batch()
    batch.call(process.SYS_SETPGID, 0, group, what=f"join process group {group}")
    tracee.run(tracee.speaker, batch)


def _end(tracee: Tracee, status: int) -> None:
    """Have a stub end with that status, waitpid(2); its parent has yet to wait for it."""
    leader = tracee.speaker
    number = status & 0x7F
    if number:
        ptrace.write_signal_mask(leader.tid, 0)
        ptrace.set_options(leader.tid, 0)
        ptrace.resume(leader.tid, number)
    else:
        tracee.exit(status >> 8)
    while True:
        _, told = os.waitpid(leader.tid, ptrace.WALL)
        if not os.WIFSTOPPED(told):
            break
        if told >> 16 == 0 and os.WSTOPSIG(told) == number:
            ptrace.resume(leader.tid, number)
        else:
            ptrace.resume(leader.tid)
    tracee.threads.clear()
    tracee.close()


def _forget_child_signal(tracee: Tracee) -> None:
    """Take back the SIGCHLD that an end brought: it was heard, or stands among what is pending."""
    batch = tracee.batch()
    wanted = batch.put((1 << signal.SIGCHLD - 1).to_bytes(8, "little"))
    batch.call(process.SYS_RT_SIGTIMEDWAIT, wanted, 0, batch.room(16), 8, tolerate=True)
    tracee.run(tracee.speaker, batch)


def _add_process_descriptors(member: Member, made: dict[int, tuple[Member, int]]) -> None:
    """Descriptors of processes of the tree (pidfd), which exist only now; epolls watch them.

    `made`: description to the member that has it, and its number there.
    """
    leader = member.tracee.speaker
    for text, place in member.table["descriptors"].items():
        index, number = place["description"], int(text)
        entry = member.table_of_all["descriptions"][index]
        if not _is_of_the_tree(entry):
            continue
        temporary = -1
        if index in made:
            temporary = _borrow(member, *made[index])
        if temporary < 0:
            target = entry["target"] if entry["form"] == "member" else entry["holder"]
            flags = entry["flags"] & os.O_NONBLOCK
            batch = member.tracee.batch()
            asked = batch.call(process.SYS_PIDFD_OPEN, target, flags, what=f"a pidfd of {target}")
            member.tracee.run(leader, batch)
            temporary = batch.results[asked]
        batch = member.tracee.batch()
        batch.call(process.SYS_DUP3, temporary, number, 0)
        batch.call(process.SYS_CLOSE, temporary)
        member.tracee.run(leader, batch)
        made.setdefault(index, (member, number))


def _is_of_the_tree(entry: dict[str, Any]) -> bool:
    """Whether it is a descriptor of a process; the first one makes that of itself by itself."""
    return entry["kind"] == "pidfd" and (
        bool(entry["form"] == "member") or (entry["form"] == "own" and "holder" in entry)
    )


def _borrow(member: Member, other: Member, number: int) -> int:
    """Have a member open what another has as `number`, the same description; -1 if it may not."""
    leader = member.tracee.speaker
    batch = member.tracee.batch()
    asked = batch.call(process.SYS_PIDFD_OPEN, other.number, 0, what=f"a pidfd of {other.number}")
    member.tracee.run(leader, batch)
    pidfd, batch = batch.results[asked], member.tracee.batch()
    asked = batch.call(process.SYS_PIDFD_GETFD, pidfd, number, 0, tolerate=True)
    batch.call(process.SYS_CLOSE, pidfd)
    member.tracee.run(leader, batch)
    return batch.results[asked]


def _watch_processes(member: Member) -> None:
    """Have epolls watch descriptors of processes, in whose place there was nothing to watch yet."""
    descriptions = member.table_of_all["descriptions"]
    leader = member.tracee.speaker
    numbers = {place["description"]: int(n) for n, place in member.table["descriptors"].items()}
    for index, entry in enumerate(descriptions):
        for target in entry.get("targets", ()):
            if (
                index in numbers
                and not target["stale"]
                and target.get("holder", 0) == member.holder
                and _is_of_the_tree(descriptions[target["description"]])
            ):
                batch = member.tracee.batch()
                event = batch.put(pack_epoll_event(target["events"], target["data"]))
                batch.call(
                    process.SYS_EPOLL_CTL, numbers[index], EPOLL_CTL_ADD, target["number"], event,
                    what="watch a process",
                )  # fmt: skip
                member.tracee.run(leader, batch)


def _take_terminals(member: Member) -> None:
    """Have a leader of a session take its terminal, and say which group is in the foreground."""
    import termios

    taken = set()
    for text, place in member.table["descriptors"].items():
        entry = member.table_of_all["descriptions"][place["description"]]
        controls = entry.get("controls")
        if not controls or controls["session"] in taken:
            continue
        if member.number != controls["session"] and (
            member.parent or member.own["session"] != controls["session"]
        ):
            continue
        taken.add(controls["session"])
        batch = member.tracee.batch()
        if member.parent:  # the first has done so when it was born
            batch.call(process.SYS_IOCTL, int(text), termios.TIOCSCTTY, 0, tolerate=True)
        if controls["foreground"]:
            group = batch.put(layouts.pack_s32(controls["foreground"]))
            batch.call(process.SYS_IOCTL, int(text), termios.TIOCSPGRP, group, tolerate=True)
        member.tracee.run(member.tracee.speaker, batch)


class Guard:
    """A child of ours that kills the processes if we die before they are to live."""

    def __init__(self, pid: int, line: int) -> None:
        self._pid, self._line = pid, line

    def dismiss(self) -> None:
        """From here on they live, whatever becomes of us."""
        if self._line >= 0:
            os.write(self._line, b"L")
            os.close(self._line)
            self._line = -1

    def wait(self) -> None:
        """Until the guard is gone."""
        if self._pid:
            os.waitpid(self._pid, 0)
            self._pid = 0

    def close(self) -> None:
        """Give up: they are killed."""
        if self._line >= 0:
            os.close(self._line)
            self._line = -1
        self.wait()


def begin_guard(pids: Sequence[int]) -> Guard:
    """For a tree: the kernel kills one process with its tracer, and none with another."""
    if len(pids) == 1:
        return Guard(0, -1)
    pidfds = [os.pidfd_open(pid) for pid in pids]
    ear, line = os.pipe2(os.O_CLOEXEC)
    child = process.clone3()
    if child == 0:
        try:
            forget_signals()
            os.close(line)
            if os.read(ear, 1) != b"L":
                for pidfd in pidfds:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os._exit(0)
    os.close(ear)
    for pidfd in pidfds:
        os.close(pidfd)
    return Guard(child, line)
