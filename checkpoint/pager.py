"""Starts the pager of a lazily restored process, and takes over where it died.

A pager is two processes, either of which starts the other anew (`lzy.checkpoint.keeper`). If both
are killed, the process's own duplicate of its userfaultfd keeps its memory waiting (its threads
stall on missing pages, they never see zeros there), and `resume_pager` goes on from the journal.
Exactly one pager serves a process: the journal is locked by whoever holds the table of its
descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import ending, proc
from .ending import CloseDescriptor
from .errors import Busy, Damaged, LzyError, NotFound
from .harbour import Harbour
from .home import run_directory
from .journal import WORKING, Journal, journal_path, log_path, read_status
from .keeper import OpenImage, Seat, detach
from .linux.detached import take_descriptor
from .linux.uffd import is_userfaultfd
from .missing import MissingPages
from .waiting import is_alive
from .windows import ChunkSource

_LOCK_PATIENCE_S = 2.0


class Plan(NamedTuple):
    """What a pager is to do. Addresses are the process's, which are the image's (space 0).

    `ranges`: the registered ranges [start, end); `loaded`: parts of them that are in already.
    Only private anonymous memory may be registered, and none that is MADV_WIPEONFORK: the kernel
    tells of no change to shared memory that comes by its file, nor of what a fork wipes.
    """

    pid: int
    start_time: int  # clock ticks after boot, `proc.start_time(pid)`
    uffd_number: int  # the userfaultfd's descriptor number in the process
    store: str
    image: str
    ranges: Sequence[tuple[int, int]]
    loaded: Sequence[tuple[int, int]] = ()
    harbour_numbers: tuple[int, int] | None = None
    """Descriptor numbers, in the process, of the two ends of a unix SOCK_SEQPACKET pair, CLOEXEC:
    where userfaultfds of forked children are kept (`lzy.checkpoint.harbour`); closed at the end."""
    on_demand: bool = False
    """Bring in only what is touched, until `lzy.checkpoint.journal.rouse` asks for the rest."""
    keeps_account: bool = False
    """The userfaultfd has DOZE_FEATURES: what is brought in counts as not written."""
    moved: Sequence[tuple[int, int]] = ()
    """Ranges whose content has been moved there since the image was taken, or may have been."""


class PagerStart:
    """A pager on its way up: `wait` for it once; meanwhile faults just wait in the kernel."""

    def __init__(self, child: int, reading: int, journal: Journal) -> None:
        self._child = child
        self._reading = reading
        self._pid: int = journal.facts["pid"]
        self._log = log_path(journal.path)

    def wait(self) -> int:
        """The pager's pid, once it serves; LzyError when it does not come up."""
        try:
            answer = os.read(self._reading, 64)
        finally:
            os.close(self._reading)
        with contextlib.suppress(ChildProcessError):  # the caller may ignore SIGCHLD
            os.waitpid(self._child, 0)
        if not answer:
            raise LzyError(
                f"the pager of process {self._pid} did not start", remedy=f"see {self._log}"
            )
        return int(answer)


def start_pager(
    plan: Plan,
    uffd: int,
    pidfd: int,
    image: ChunkSource,
    *,
    open_image: OpenImage | None = None,
    close_descriptor: CloseDescriptor | None = None,
) -> int:
    """Start a pager and its keeper; returns the pager's pid once it serves.

    `uffd`, `pidfd`: our duplicate of the process's userfaultfd, and the process. They, `image` and
    all else stay open here; the pager has its own copies. Raises Busy when a pager serves that
    pid, LzyError when the pager does not come up.
    """
    return begin_pager(
        plan, uffd, pidfd, image, open_image=open_image, close_descriptor=close_descriptor
    ).wait()


def begin_pager(
    plan: Plan,
    uffd: int,
    pidfd: int,
    image: ChunkSource,
    *,
    open_image: OpenImage | None = None,
    close_descriptor: CloseDescriptor | None = None,
    lock: int = -1,
) -> PagerStart:
    """As `start_pager`, but comes back while the pager still gets ready, to save the time.

    The journal stands when this returns: from then on `resume_pager` can take over. `lock`: of the
    journal that it replaces (`journal.lock_journal`), if the caller holds that.
    """
    missing = MissingPages()
    for start, end in plan.ranges:
        missing.add(start, end)
    for start, end in plan.loaded:
        missing.forget(start, end)
    facts = {
        "pid": plan.pid,
        "start_time": plan.start_time,
        "boot_id": proc.boot_id(),
        "uffd_number": plan.uffd_number,
        "harbour_numbers": plan.harbour_numbers,
        "on_demand": plan.on_demand,
        "keeps_account": plan.keeps_account,
        "inodes": _inodes(plan.pid, (plan.uffd_number, *(plan.harbour_numbers or ()))),
        "store": os.path.abspath(plan.store),
        "image": plan.image,
        "began_unix_s": round(time.time(), 3),
    }
    path = journal_path(run_directory(), plan.pid)
    journal = Journal.create(path, facts, missing, plan.moved, lock=lock)
    harbour: list[int] = []
    try:
        harbour += _take_harbour(journal)
        return _launch(journal, uffd, pidfd, image, open_image, close_descriptor, harbour)
    finally:
        for fd in harbour:
            os.close(fd)
        journal.close()


def resume_pager(
    pid: int | None = None,
    *,
    open_image: OpenImage | None = None,
    close_descriptor: CloseDescriptor | None = None,
) -> dict[int, int]:
    """Take over from pagers that died; {pid of the process: pid of its new pager}.

    With `pid` for that process: NotFound when it has no journal, Busy when its pager lives.
    Without, for all that need it. Journals of processes that are gone are removed.
    """
    directory = run_directory()
    if pid is not None:
        path = journal_path(directory, pid)
        resumed = _resume(path, open_image, close_descriptor)
        return {} if resumed is None else {pid: resumed}
    started: dict[int, int] = {}
    failures: list[LzyError] = []
    for path in sorted(directory.glob("*.pager")):
        try:
            resumed = _resume(path, open_image, close_descriptor)
        except (Busy, NotFound):
            continue
        except LzyError as error:
            failures.append(error)
            continue
        if resumed is not None:
            started[int(path.stem)] = resumed
    if failures and not started:
        raise failures[0]
    return started


def _resume(
    path: Path, open_image: OpenImage | None, close_descriptor: CloseDescriptor | None
) -> int | None:
    journal = _open_journal(path)
    facts = journal.facts
    pid: int = facts["pid"]
    pidfd = sharing = uffd = -1
    harbour: list[int] = []
    taken: list[int] = []
    image: ChunkSource | None = None
    try:
        if not is_alive(facts):
            _clean(path)
            return None
        pidfd, sharing = os.pidfd_open(pid), proc.open_shared(pid)
        try:
            uffd = take_descriptor(sharing, facts["uffd_number"])
        except OSError as error:
            uffd = _no_descriptor(journal, pid, str(error))
        if uffd >= 0 and not (is_userfaultfd(uffd) and _is_the_one(uffd, facts, 0)):
            os.close(uffd)
            uffd = _no_descriptor(journal, pid, "it is something else now")
        if uffd < 0:
            _clean(path)
            return None
        harbour += _take_harbour(journal)
        children: dict[int, int] = {}
        if harbour:
            with contextlib.closing(Harbour(*harbour)) as place:
                children = place.look()
        taken += children.values()
        known = journal.children()
        lost = known - children.keys()
        journal.forget(lost)
        # The image may be away for now: the pager itself then goes on trying to open it.
        with contextlib.suppress(LzyError, OSError):
            image = (open_image or _open_image)(facts["store"], facts["image"])
        return _launch(
            journal,
            uffd,
            pidfd,
            image,
            open_image,
            close_descriptor,
            harbour,
            children={token: fd for token, fd in children.items() if token in known},
            lost_children=len(lost),
        ).wait()
    finally:
        for fd in (pidfd, sharing, uffd, *harbour, *taken):
            if fd >= 0:
                os.close(fd)
        if image is not None:
            image.close()
        journal.close()


def _inodes(pid: int, numbers: Sequence[int]) -> list[int]:
    """What tells descriptors of process `pid` from others that come to have their numbers."""
    witness = proc.witness(pid)
    return [os.stat(f"/proc/{witness}/fd/{number}").st_ino for number in numbers]


def _is_the_one(fd: int, facts: dict[str, Any], place: int) -> bool:
    """Whether our duplicate is of what the process had there when the journal was written."""
    return bool(os.fstat(fd).st_ino == facts["inodes"][place])


def _take_harbour(journal: Journal) -> list[int]:
    """Duplicates of the two ends of the process's socket pair; none if it has none."""
    taken: list[int] = []
    if not journal.facts["harbour_numbers"]:
        return taken
    sharing = proc.open_shared(journal.facts["pid"])
    try:
        for place, number in enumerate(journal.facts["harbour_numbers"], 1):
            taken.append(take_descriptor(sharing, number))
            if not _is_the_one(taken[-1], journal.facts, place):
                raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    except OSError:  # the process has closed it: then children hang on pager and keeper alone
        for fd in taken:
            os.close(fd)
        return []
    finally:
        os.close(sharing)
    return taken


def _open_journal(path: Path) -> Journal:
    """The journal, locked; Busy when its pager or keeper lives."""
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            return Journal.open(path)
        except Busy:
            # A reader that was just forked has the lock too, until it is killed after its pager.
            status = read_status(path)[1]
            if any(map(_runs, status[:2])) or time.monotonic() > deadline:
                raise
            time.sleep(0.002)


def _runs(pid: int) -> bool:
    try:
        return not proc.has_ended(pid)
    except NotFound:
        return False


def _no_descriptor(journal: Journal, pid: int, why: str) -> int:
    """-1 when the work was done; else Damaged."""
    if journal.phase == WORKING:
        raise Damaged(
            f"cannot take the userfaultfd of process {pid}: {why}; while no pager lived it either"
            " called execve (then all is well) or closed the descriptor (then it reads zeros)",
            remedy=f"end process {pid} and restore its image again, or remove {journal.path}",
            pid=pid,
        )
    return -1


def _clean(path: Path) -> None:
    for file in (path, log_path(path)):
        file.unlink(missing_ok=True)


def _open_image(store: str, image: str) -> ChunkSource:
    from .store import Store  # only a pager that reopens, or a fresh command, gets here

    with Store.open(Path(store)) as opened:
        return opened.load_unchecked(image)


def _launch(
    journal: Journal,
    uffd: int,
    pidfd: int,
    image: ChunkSource | None,
    open_image: OpenImage | None,
    close_descriptor: CloseDescriptor | None,
    harbour: Sequence[int],
    *,
    children: Mapping[int, int] | None = None,
    lost_children: int | None = None,
) -> PagerStart:
    """Fork the keeper, which forks the pager."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    if lost_children is None:  # not resumed
        flags |= os.O_TRUNC
    log = os.open(log_path(journal.path), flags, 0o600)
    try:
        seat = Seat(
            journal.fd,
            journal.path,
            uffd,
            pidfd,
            log,
            open_image or _open_image,
            close_descriptor or ending.close_descriptor,
            tuple(harbour),
            tuple((children or {}).items()),
        )
        if lost_children:
            seat.write_log(
                f"{lost_children} forked children are lost: pager and keeper were both killed; what"
                " the children lacked reads as zeros"
            )
        reading, writing = os.pipe()
        try:
            child = os.fork()
            if child == 0:
                detach(seat, image, writing)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
    finally:
        os.close(log)
    return PagerStart(child, reading, journal)
