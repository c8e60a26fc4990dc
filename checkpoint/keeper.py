"""A pager's two processes, which have left who started them, and keep each other alive.

They have one descriptor table (CLONE_FILES). The *pager* proper answers faults
(`lzy.checkpoint.faults`). The *keeper* does nothing but wait for the pager's end and start another;
the pager likewise starts another keeper. Whoever is killed, the table lives on with the survivor,
and with it the userfaultfds of children that the process forked.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from .ending import CloseDescriptor
from .faults import FaultServer
from .harbour import Harbour
from .huge import restore_huge_pages
from .journal import FINISHED, Journal, log_path, read_phase
from .linux.detached import close_all_but, forget_signals, fork_sharing_descriptors, set_name
from .stages import reach
from .windows import ChunkSource
from .working_set import read_order, write_order

_LAST_RESPAWN_S = 5.0
_MOST_LOG_BYTES = 1 << 20

OpenImage = Callable[[str, str], ChunkSource]
"""(store path, image name) to an image of that store; raises LzyError."""


class Seat(NamedTuple):
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


def detach(seat: Seat, image: ChunkSource | None, ready: int) -> NoReturn:
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
        else:
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


def _move_aside(seat: Seat, ready: int) -> tuple[Seat, int]:
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
    seat: Seat,
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
    seat: Seat,
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


def _children(seat: Seat) -> set[int]:
    """The descriptors of forked children in the table that the dead pager has left."""
    journal = Journal(os.dup(seat.journal), seat.path)
    try:
        return journal.children()
    finally:
        journal.close()


def _say_why(seat: Seat, what: str, error: BaseException) -> None:
    import traceback

    lines = traceback.format_exception(type(error), error, error.__traceback__)
    seat.write_log(f"{what}: {''.join(lines)}")
