"""Starts the pager of a lazily restored process, keeps it alive, and takes over where it died.

A pager is two processes with one descriptor table (CLONE_FILES). The *pager* proper answers
faults (`lzy.checkpoint.faults`). The *keeper* does nothing but wait for the pager's end and start
another; the pager likewise starts another keeper. Whoever is killed, the table lives on with the
survivor, and with it the userfaultfds of children that the process forked.

If both are killed, the process's own duplicate of its userfaultfd keeps its memory waiting (its
threads stall on missing pages, they never see zeros there), and `resume_pager` goes on from the
journal. Exactly one pager serves a process: the journal is locked by whoever holds the table.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from . import ending, proc
from .errors import Busy, Damaged, LzyError, NotFound
from .faults import FaultServer
from .harbour import Harbour
from .home import run_directory
from .huge import restore_huge_pages
from .journal import (
    FINISHED,
    WORKING,
    Journal,
    Status,
    is_held,
    journal_path,
    read_phase,
    read_status,
)
from .linux.detached import (
    close_all_but,
    forget_signals,
    fork_sharing_descriptors,
    set_name,
    take_descriptor,
)
from .linux.uffd import is_userfaultfd
from .missing import MissingPages
from .stages import reach
from .windows import ChunkSource
from .working_set import read_order, write_order

_LAST_RESPAWN_S = 5.0
_LOCK_PATIENCE_S = 2.0
_MOST_LOG_BYTES = 1 << 20


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


class PagerReport(NamedTuple):
    """One journal: which process it is for, whether a pager serves it, and how that one does."""

    pid: int
    store: str
    image: str
    alive: bool
    status: Status


OpenImage = Callable[[str, str], ChunkSource]
"""(store path, image name) to an image of that store; raises LzyError."""

CloseDescriptor = Callable[[int, int], int]
"""Close descriptor `number` of process `pid` from within; 0 or -errno."""


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
) -> PagerStart:
    """As `start_pager`, but comes back while the pager still gets ready, to save the time.

    The journal stands when this returns: from then on `resume_pager` can take over.
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
    journal = Journal.create(journal_path(run_directory(), plan.pid), facts, missing, plan.moved)
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


def list_pagers() -> list[PagerReport]:
    """Every journal there is, oldest pid first."""
    reports = []
    for path in run_directory().glob("*.pager"):
        with contextlib.suppress(NotFound, Damaged):
            facts, status = read_status(path)
            alive = is_held(path)
            reports.append(PagerReport(facts["pid"], facts["store"], facts["image"], alive, status))
    return sorted(reports)


def who_waits(store: Path, image: str) -> list[int]:
    """Processes whose memory still comes from that image, whether their pagers live or not."""
    found = []
    for path in run_directory().glob("*.pager"):
        with contextlib.suppress(NotFound, Damaged):
            facts, _ = read_status(path)
            own = facts["image"].partition("#")[0]  # NAME#PID: one process of its tree
            same = own == image and os.path.realpath(facts["store"]) == str(store.resolve())
            if same and _is_alive(facts):
                found.append(int(facts["pid"]))
    return sorted(found)


def log_path(journal: Path) -> Path:
    """The pager's log, beside its journal."""
    return journal.with_suffix(".log")


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
        if not _is_alive(facts):
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


def _is_alive(facts: dict[str, Any]) -> bool:
    """Whether the journal's process still is the one it was written for."""
    try:
        alive = proc.start_time(facts["pid"]) == facts["start_time"]
    except NotFound:
        return False
    return alive and proc.boot_id() == facts["boot_id"] and not proc.has_ended(facts["pid"])


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


class _Seat(NamedTuple):
    """What pager and keeper share: descriptor numbers of their one table, and two ways."""

    journal: int
    path: Path
    uffd: int
    pidfd: int
    log: int
    open_image: OpenImage
    close_descriptor: CloseDescriptor
    harbour: tuple[int, ...]
    children: tuple[tuple[int, int], ...]
    """Of forked children: (token, descriptor), to be put where the token says."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Those that every pager and keeper needs."""
        return (self.journal, self.uffd, self.pidfd, self.log, *self.harbour)

    def write_log(self, text: str) -> None:
        with contextlib.suppress(OSError):
            if os.fstat(self.log).st_size > _MOST_LOG_BYTES:
                return
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with contextlib.suppress(OSError):  # a full disk must not stop the pager
            os.write(self.log, f"{moment} {text}\n".encode())


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
        seat = _Seat(
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
                _detach(seat, image, writing)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
    finally:
        os.close(log)
    return PagerStart(child, reading, journal)


def _detach(seat: _Seat, image: ChunkSource | None, ready: int) -> NoReturn:
    """In the forked child: leave session, folder, descriptors and signals of who started us."""
    try:
        # Objects of the process we were may own descriptors that are closed now, and would close
        # whatever has their numbers later: none of them may ever be finalised.
        gc.disable()
        gc.freeze()
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        forget_signals()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        seat, ready = _move_aside(seat, ready)
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        keep = [0, 1, 2, ready, *seat.descriptors, *(fd for _, fd in seat.children)]
        image_descriptors = getattr(image, "descriptors", None)
        if image_descriptors is None or seat.children:  # children go by numbers it might have
            image = None
        elif image_descriptors is not None:
            keep += image_descriptors()
        close_all_but(keep)
        for token, fd in seat.children:
            os.dup2(fd, token, inheritable=False)
            os.close(fd)
        _keep(seat, image, ready=ready)
    except BaseException as error:
        _say_why(seat, "the keeper failed", error)
    finally:
        os._exit(1)


def _move_aside(seat: _Seat, ready: int) -> tuple[_Seat, int]:
    """Move descriptors out of the way of 0, 1, 2 and of the numbers that children go by."""
    lowest = max(2, *(token for token, _ in seat.children), 2) + 1

    def move(fd: int) -> int:
        return fd if fd >= lowest else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)

    seat = seat._replace(
        journal=move(seat.journal),
        uffd=move(seat.uffd),
        pidfd=move(seat.pidfd),
        log=move(seat.log),
        harbour=tuple(map(move, seat.harbour)),
        children=tuple((token, move(fd)) for token, fd in seat.children),
    )
    return seat, move(ready)


def _keep(
    seat: _Seat,
    image: ChunkSource | None,
    *,
    pager: int = -1,
    ready: int = -1,
) -> NoReturn:
    """The keeper: start a pager (or wait for `pager`, a pidfd), and another whenever it dies."""
    set_name("lzy-keeper")
    own = os.pidfd_open(os.getpid())
    if pager >= 0:
        select.select([pager], [], [])
    pause_s = 0.0
    fresh = pager < 0
    while fresh or read_phase(seat.journal) != FINISHED:
        began = time.monotonic()
        pid = fork_sharing_descriptors()
        if pid == 0:
            _page(seat, image, own, ready, fresh=fresh)
        status = os.waitpid(pid, 0)[1]
        if read_phase(seat.journal) == FINISHED:
            break
        seat.write_log(f"pager {pid} ended with wait status {status:#x}; starting another")
        fresh = False
        pause_s = 0.0 if time.monotonic() - began > 1 else min(2 * pause_s + 0.01, _LAST_RESPAWN_S)
        time.sleep(pause_s)
    os._exit(0)


def _page(
    seat: _Seat,
    image: ChunkSource | None,
    keeper: int,
    ready: int,
    *,
    fresh: bool,
) -> NoReturn:
    """The pager; `keeper` is the keeper's pidfd. `fresh`: the first one in this table."""
    try:
        set_name("lzy-pager")
        own = os.pidfd_open(os.getpid())
        if not fresh:
            # What the dead pager had opened (packs) is of no use to us; its userfaultfds are. This
            # comes before anything that owns a descriptor: a mapping of the journal has one, too.
            close_all_but((0, 1, 2, keeper, own, *seat.descriptors, *_children(seat)))
        journal = Journal(seat.journal, seat.path)
        open_image = seat.open_image

        def reopen() -> ChunkSource:
            return open_image(journal.facts["store"], journal.facts["image"])

        def look_around() -> int:
            nonlocal keeper
            if select.select([keeper], [], [], 0)[0]:
                seat.write_log("the keeper is gone; starting another")
                os.close(keeper)
                pid = fork_sharing_descriptors()
                if pid == 0:
                    _keep(seat, None, pager=own)
                keeper = os.pidfd_open(pid)
                journal.set_pids(keeper_pid=pid)
            return keeper

        store, name = Path(journal.facts["store"]), journal.facts["image"]

        def keep_order(order: list[int]) -> None:
            try:
                write_order(store, name, order)
            except OSError as error:  # it was read only, or is away: the next wake learns it anew
                seat.write_log(f"the order in which memory was needed is not kept: {error}")

        numbers = (journal.facts["uffd_number"], *(journal.facts["harbour_numbers"] or ()))
        server = FaultServer(
            journal,
            seat.uffd,
            seat.pidfd,
            image if fresh else None,
            inside=list(zip(numbers, (seat.uffd, *seat.harbour), strict=False)),
            harbour=Harbour(*seat.harbour) if seat.harbour else None,
            open_image=reopen,
            close_descriptor=seat.close_descriptor,
            order=read_order(store, name),
            keep_order=keep_order,
            log=seat.write_log,
            look_around=look_around,
            reach=reach if fresh else lambda stage: None,  # else none would ever get past a stage
        )
        # Before who started us lets go of it: an open image cannot be removed.
        server.prepare()
        journal.set_pids(pager_pid=os.getpid(), keeper_pid=os.getppid())
        if fresh and ready >= 0:
            with contextlib.suppress(BrokenPipeError):  # who started us was killed meanwhile
                os.write(ready, b"%d" % os.getpid())
            os.close(ready)
        if fresh:
            reach("pager.serving")
        server.serve()
        journal.delete()
        if not server.left_something:
            log_path(seat.path).unlink(missing_ok=True)
        journal.phase = FINISHED  # last: a pager killed before it is followed by one that cleans
        os.nice(10)
        restore_huge_pages(journal.facts["pid"], seat.pidfd)
        os._exit(0)
    except BaseException as error:
        _say_why(seat, "the pager failed", error)
    finally:
        os._exit(1)


def _children(seat: _Seat) -> set[int]:
    """The descriptors of forked children in the table that the dead pager has left."""
    journal = Journal(os.dup(seat.journal), seat.path)
    try:
        return journal.children()
    finally:
        journal.close()


def _say_why(seat: _Seat, what: str, error: BaseException) -> None:
    import traceback

    lines = traceback.format_exception(type(error), error, error.__traceback__)
    seat.write_log(f"{what}: {''.join(lines)}")
