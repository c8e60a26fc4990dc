"""A process with all its descendants: found, stopped as one, and known by who is whose child.

A stopped process makes no children, so that from the root on each process is stopped before its
children are listed, until nobody new is found. A child whose parent ends meanwhile is found again
where the kernel hangs it; if that is outside of the tree, it has left the tree.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any, NamedTuple

from . import mapping_flags, proc, resources
from .errors import Busy, NotFound, Unsupported
from .fitness import Progress, refuse_unfit
from .mapped import refuse_mappings
from .sessions import Place, refuse_lost
from .subject import Subject

_START_TIME, _EXIT_SIGNAL, _EXIT_CODE = 21, 37, 51  # proc_pid_stat(5), from 0


class Ended(NamedTuple):
    """A process that has ended, whose parent has yet to wait for it; numbers as the tree's."""

    pid: int
    parent: Subject
    group: int
    session: int
    comm: str
    exit_signal: int
    status: int
    """As waitpid(2) tells it."""


def refuse_ourselves(pid: int) -> None:
    """Raise Unsupported if lzy runs below the process: it would stop itself."""
    own = os.getpid()
    while own:
        if own == pid:
            raise Unsupported(
                f"lzy was started by pid {pid} or below it, and cannot stop itself",
                remedy="run it from another terminal",
                pid=pid,
            )
        try:
            own = int(proc.stat(own)[3])
        except NotFound:
            return


def look_at_descendants(pid: int, progress: Progress | None) -> dict[int, Subject]:
    """A first look at the descendants there are now, while they run; by pid.

    Raises Unsupported for one that cannot be dumped, naming it.
    """
    found: dict[int, Subject] = {}
    for child in _living_children(pid):
        with contextlib.suppress(NotFound):
            refuse_unfit(child)
            subject = found[child] = Subject(child)
            try:
                subject.look(progress)
            except NotFound:
                found.pop(child).close()
                raise
        found |= look_at_descendants(child, progress)
    return found


def _living_children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(NotFound):
        for child in proc.children(pid):
            with contextlib.suppress(NotFound):
                if not proc.has_ended(child):
                    found.append(child)
    return found


def stop_tree(root: Subject, seen: dict[int, Subject]) -> tuple[list[Subject], list[Ended]]:
    """Stop `root` and all its descendants; parents come before their children.

    `seen` are those that were looked at; what is stopped is taken out of it. Raises Unsupported,
    Busy, AccessDenied; who was stopped until then is the caller's to let go: `root` and its
    `children`.
    """
    root.stop()
    tree = root.tree
    known = {root.pid}
    ended: dict[int, Ended] = {}
    at = 0
    while at < len(tree):
        for parent in tree[at:]:
            for child in proc.children(parent.pid):
                if child not in known and _stop_child(child, parent, seen, tree, ended):
                    known.add(child)
            at += 1
        # Whoever ended meanwhile hung its children elsewhere, perhaps on one that was done.
        if any(set(proc.children(subject.pid)) - known for subject in tree):
            at = 0
    return tree, list(ended.values())


def _stop_child(
    pid: int,
    parent: Subject,
    seen: dict[int, Subject],
    tree: list[Subject],
    ended: dict[int, Ended],
) -> bool:
    """Whether one more process is known now: stopped, or known to have ended."""
    try:
        stat = proc.stat(pid)
    except NotFound:
        return False
    if proc.has_ended(pid):
        if int(stat[_EXIT_SIGNAL]):
            ended[pid] = _describe_ended(pid, stat, parent)
        elif int(stat[_EXIT_CODE]) == signal.SIGKILL:
            parent.left_behind.append(proc.innermost(proc.status(pid)["NSpid"]))
        return True
    subject = seen.pop(pid, None)
    if subject is not None and subject.start_time != int(stat[_START_TIME]):
        subject.close()
        subject = None
    if subject is None:
        try:
            refuse_unfit(pid)
            subject = Subject(pid)
        except NotFound:  # it ends just now: a zombie in a moment
            return False
    subject.parent = parent
    tree.append(subject)
    try:
        subject.stop()
    except NotFound:
        tree.remove(subject)
        subject.close()
        return False
    if not subject.vmas:  # born since
        subject.places, subject.vmas = mapping_flags.look(pid)
        refuse_mappings(subject.witness, subject.vmas)
        if any("um" in vma.flags for vma in subject.vmas):
            raise Busy(
                f"pid {pid} was born just now, and its memory is still being brought in",
                remedy="try again",
                pid=pid,
            )
    return True


def _describe_ended(pid: int, stat: list[str], parent: Subject) -> Ended:
    status = proc.status(pid)
    return Ended(
        pid=proc.innermost(status["NSpid"]),
        parent=parent,
        group=proc.innermost(status["NSpgid"]),
        session=proc.innermost(status["NSsid"]),
        comm=stat[1],
        exit_signal=int(stat[_EXIT_SIGNAL]),
        status=int(stat[_EXIT_CODE]),
    )


def refuse_sessions(tree: list[Subject], ended: list[Ended]) -> None:
    """Raise Unsupported for a process whose session could not be made again."""
    refuse_lost(
        [
            Place(
                subject.number,
                subject.parent.number if subject.parent else 0,
                subject.own["session"],
            )
            for subject in tree
        ],
        [one.pid for one in ended],
    )


def find_names(tree: list[Subject]) -> None:
    """Have all who map a file shared know it by its name, if one of them does.

    sem_open(3) makes a semaphore under another name than the one by which others open it.
    """
    names = {
        (vma.device, vma.inode): vma.path
        for subject in tree
        for vma in subject.vmas
        if vma.kind == "file" and vma.shared
    }
    for subject in tree:
        subject.vmas = [
            vma._replace(kind="file", path=names[vma.device, vma.inode])
            if vma.kind == "memory" and (vma.device, vma.inode) in names
            else vma
            for vma in subject.vmas
        ]


def describe_ended(ended: list[Ended]) -> list[dict[str, Any]]:
    """For the document of an image."""
    return [one._asdict() | {"parent": one.parent.number} for one in ended]


def end_tree(
    tree: list[Subject],
    ended: list[Ended],
    tables: list[dict[str, Any]],
    *,
    take_down: bool = True,
) -> None:
    """Kill the processes and wait until they are gone, their inner connections without a trace.

    Unless `take_down` what is left of their memory goes when we do. Children end before their
    parents, who still wait for them. Should we die in between, the kernel kills the rest.
    """
    others = {
        subject.number: table["descriptors"]
        for subject, table in zip(tree[1:], tables[1:], strict=True)
    }
    pidfds = {subject.number: subject.pidfd for subject in tree[1:]}
    held = resources.hold_connections(tree[0].pidfd, tables[0] | {"others": others}, pidfds)
    if len(tree) > 1:
        for subject in tree:
            subject.tracee.die_with_us()
    for one in ended:
        one.parent.wait_for(one.pid)
    if not take_down:
        from .remains import hold_memory

        for subject in tree:
            hold_memory(subject.pid, subject.pidfd, [vma.start for vma in subject.vmas[:8]])
    parents = {subject.parent for subject in tree}
    for subject in tree:
        if subject not in parents:  # their memory is taken down side by side
            signal.pidfd_send_signal(subject.pidfd, signal.SIGKILL)
    for subject in reversed(tree):
        if subject in parents:
            signal.pidfd_send_signal(subject.pidfd, signal.SIGKILL)
        subject.tracee.await_end()
        if subject.parent:  # it waits: a zombie would keep the number from being free
            subject.parent.wait_for(subject.number)
    resources.release_descriptors(held)
