"""A running process into an image, step by step.

The process is stopped, asked what only it knows, and, when it is to go on, split: a clone of it,
frozen at birth, is a copy-on-write snapshot whose memory is written out at leisure while the
process runs on. Where a snapshot would not cover everything (see `_why_no_snapshot`), and when the
process is to end anyway, it stays stopped until its image is committed. An image is committed when
every byte of it has been read back from the store and authenticated; only then is anything ended.

A process that dozes is dumped as it is: what is away is taken from the image that its pager has.
Its pager would take a snapshot for a forked child; what is to be written of it is copied instead.

*Guarantee*: a dump that fails or is killed leaves the process running, untouched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import interrogate, machine, proc, resources, tracking
from .away import Away, Doze, NotAsItIs, find_doze, hold_pager, read_away
from .content import (
    CopiedPages,
    FilePages,
    Objects,
    ProcessPages,
    behind_file,
    cut_ranges,
    data_ranges,
    guard_ranges,
    intersect,
    join_ranges,
    own_page_ranges,
    windows_of,
)
from .dense import contains, still_dense
from .errors import Busy, KernelError, LzyError, NotFound, StoreUnavailable, Unsupported
from .history import ASKED, next_checkpoint, remember
from .home import run_directory
from .host import describe_host
from .huge import gather_huge_pages
from .increment import TooScattered, plan_checkpoint
from .inject import close_descriptor
from .interrupts import Deferred
from .journal import is_held, journal_path, rouse
from .lineage import forget_lineage
from .linux import PAGE_BYTES, process, ptrace
from .linux.uffd import keeps_account
from .machine import Call
from .mapped import Mappings, refuse_mappings
from .proc import Vma
from .resources.kind import all_kinds
from .stages import reach
from .tracee import Tracee, traced_by
from .unfinished import close_unfinished
from .working_set import inherit_order, order_windows, read_order, seed_order

if TYPE_CHECKING:
    from .image import Image
    from .store import Store
    from .writer import ImageWriter

Progress = Callable[[str, int, int], None]

DOCUMENT_FORMAT = 1
PAGER_NAME = "lzy-pager"  # as `pager` calls itself
_TO_DOZE = "doze"  # as `doze` calls its checkpoint: what is left out of an account cannot go
_PAGER_LEAVES_S = 2.0  # after the last page: the close it injects, and its detaching
_LITTLE = 32  # such a part of the memory is stored sooner than it is looked for in the store
SNAPSHOT_OBJECT_LIMIT_BYTES = 32 << 20  # shared memory up to here is copied while frozen
COPY_LIMIT_BYTES = 512 << 20  # and so much memory of a process that dozes


class DumpReport(NamedTuple):
    """What a dump did: sizes in bytes, times in seconds."""

    image: str
    pid: int
    raw_bytes: int
    stored_bytes: int
    freeze_s: float
    total_s: float
    threads: int
    left_running: bool
    snapshot: bool
    base: str | None
    """The image that unwritten pages were taken from; None when all were read."""
    written_bytes: int
    """Memory that was read, because it may have changed since `base`."""
    notes: list[str]


def dump(
    pid: int,
    store: Store,
    *,
    name: str | None = None,
    leave_running: bool = False,
    window_pages: int = 64,
    why: str = ASKED,
    track: bool = True,
    trim: bool = False,
    rouse: bool = True,
    progress: Progress | None = None,
) -> DumpReport:
    """Write an image of process `pid` into `store`; end the process unless `leave_running`.

    `name` is that of a session: the image is its next checkpoint (see `history`). `why` it is
    taken stands in the image.

    If the kernel has kept account of what was written since an image in `store` was taken of the
    process, only that is read and stored. One that is left running is put under account, unless
    `track` is false.

    With `trim` its interpreter is asked to give back what it does not need first; what it has then
    stands in the image. If it is busy a note says so, and the dump goes on.

    One that dozes and cannot be dumped as it is, or would stand still too long, gets all of its
    memory back first; unless `rouse` is false: then it does stand still, or Busy is raised.

    Raises NotFound, AccessDenied, Unsupported (naming what cannot be kept), Busy,
    StoreUnavailable; the process then runs on as before.
    """
    began = time.monotonic()
    notes: list[str] = []
    variables: dict[str, Any] = {}

    # 1. What can be refused without touching the process is refused now.
    refuse_unfit(pid)
    close_unfinished(pid)
    if trim:
        from .belongings import trim_if_idle

        variables = trim_if_idle(pid, notes)

    def write(doze: Doze | None) -> DumpReport:
        return _dump(
            pid, store, name, leave_running, window_pages, why, track, variables, notes, doze,
            progress, began,
        )  # fmt: skip

    doze = _find_fit_doze(pid, store, window_pages, leave_running and rouse)
    if doze:
        with contextlib.suppress(NotAsItIs):
            return write(doze)
    if not rouse and find_doze(pid):
        raise Busy(
            f"pid {pid} cannot be dumped before all of its memory is back",
            remedy=f"run: lzy rouse {pid}",
            pid=pid,
        )
    return write(None)


def _dump(
    pid: int,
    store: Store,
    name: str | None,
    leave_running: bool,
    window_pages: int,
    why: str,
    track: bool,
    variables: dict[str, Any],
    notes: list[str],
    doze: Doze | None,
    progress: Progress | None,
    began: float,
) -> DumpReport:
    """As `dump`; with `doze` what that process lacks is taken from the image its pager has.

    Raises NotAsItIs when all of its memory has to come in first; it runs on as it was.
    """
    places, vmas = look_at_mappings(pid) if doze else wait_for_pager(pid, progress)
    refuse_mappings(pid, vmas)
    all_kinds()  # their modules are loaded: what can be done before the process is stopped, is
    obstacle = "the process ends"
    hurries = leave_running and doze is not None  # all of this is done while it stands still
    policies = proc.memory_policies(pid) if hurries else {}
    if leave_running:
        obstacle = "it dozes" if doze else _why_no_snapshot(vmas)
    comm = proc.stat(pid)[1]
    taken = time.time()
    name, session = next_checkpoint(
        store, pid, name, why=why, unnamed=lambda: default_name(comm, pid, taken)
    )
    own_start = proc.start_time(pid)

    if not leave_running and not process.may_choose_pids():
        notes.append("to restore it here you will need root (CAP_CHECKPOINT_RESTORE)")

    tracee = Tracee(pid)
    snapshot = 0
    objects = Objects()
    pidfd = os.pidfd_open(pid)
    number, inode, committed = -1, 0, False
    account = tracking.find_account(pid)
    base = _open_base(account, store, window_pages)
    if not base and doze:
        account, base = None, store.load(doze.image)
    try:
        if base and not leave_running:
            store.verify(base.name, progress)  # what is taken from it is not read again below
        with store.writer(name, window_pages=window_pages) as writer:
            # 2. Stop all its threads.
            frozen_at = time.monotonic()
            with Deferred():
                tracee.seize()
                reach("dump.seized")
                interrogate.refuse_foreign_registers(tracee)
                refuse_children(pid)
                refuse_separate_threads(tracee)

                # 3. Ask what only the process itself can tell, by system calls made inside it.
                tracee.prepare(vmas=vmas)
                reach("dump.prepared")
                timers = proc.posix_timers(pid)
                threads = interrogate.describe_threads(tracee)
                own = interrogate.describe_process(tracee, timers)
                if tracking.find_account(pid) != account:  # another dump came in between
                    account = None
                number = account.number if account else -1
                if leave_running and track and not account:
                    number = _open_account(tracee, notes)
                inode = tracking.find_inode(pid, number)
                tracee.unmap_arena()
                reach("dump.asked")

                # 4. Its descriptors, with what is in flight in them.
                own_numbers = doze.numbers if doze else frozenset()
                descriptors = resources.describe_descriptors(pid, pidfd, objects, own_numbers)
                reach("dump.described")

                # 5. Its mappings; and the snapshot, if the process goes on.
                if (now := proc.read_bytes(pid, "maps")) != places:
                    vmas = proc.mappings(pid)
                    refuse_mappings(pid, vmas)
                    obstacle = obstacle or _why_no_snapshot(vmas)
                begun, written = None, None  # nobody knows
                if leave_running and track and number >= 0:
                    dense = account.dense if account and why != _TO_DOZE else ()
                    begun = _begin_account(tracee, number, vmas, dense, notes)
                    written = begun.written if begun else None
                    reach("dump.tracked")
                    if proc.read_bytes(pid, "maps") != now:  # what is new was joined to the old
                        vmas = proc.mappings(pid)
                elif account:
                    written = tracking.written_ranges(pid, vmas)
                if not account:
                    written = None
                ranges: list[tuple[int, int]] = []
                away = Away([], [])
                if doze:
                    with hold_pager(doze):
                        ranges = own_page_ranges(pid, vmas)
                        away = read_away(doze, ranges)
                    written = [*(ranges if written is None else written), *away.moved]
                mappings = Mappings(pid, vmas)
                mappings.take_objects(objects)
                own["exe_object"] = _take_deleted_executable(pid, objects)
                if not obstacle and objects.total_bytes > SNAPSHOT_OBJECT_LIMIT_BYTES:
                    obstacle = f"it shares {objects.total_bytes >> 20} MiB of memory"
                if not obstacle:
                    snapshot, obstacle = _split(tracee)
                runs_on = bool(snapshot)
                if snapshot:
                    reach("dump.split")
                    _write_objects(writer, objects, window_pages)
                    tracee.let_go()
                    freeze_s = time.monotonic() - frozen_at
                    reach("dump.resumed")
                else:
                    freeze_s = 0.0
                source_pid = snapshot or pid

            # 6. Its memory, and what the snapshot knows as well as the process did.
            own |= interrogate.describe_inherited(source_pid)
            if not (hurries and now == places):  # else they were read a moment ago
                mappings.renew_flags(proc.mappings(source_pid), of_snapshot=bool(snapshot))
                policies = proc.memory_policies(source_pid)
            vmas = mappings.vmas
            if not doze:
                ranges = own_page_ranges(source_pid, vmas)
            guards = guard_ranges(source_pid, vmas)
            host = describe_host(source_pid, vmas, interrogate.decode(threads[0]["xstate"]))
            ranges = join_ranges([*ranges, *away.missing])
            total = sum(end - start for start, end in ranges) + objects.total_bytes
            reach("dump.writing")
            source: ProcessPages | CopiedPages
            source = ProcessPages(source_pid, shares_pages=bool(snapshot))
            fresh = windows_of(ranges, window_pages)
            if base and written is not None:
                written = join_ranges(written)
                try:
                    kept, fresh = plan_checkpoint(base, ranges, written, away.missing)
                except TooScattered:
                    raise NotAsItIs from None
            written_bytes = sum(mask.bit_count() for _, mask in fresh) * PAGE_BYTES
            if leave_running and not snapshot:
                most = SNAPSHOT_OBJECT_LIMIT_BYTES
                if doze and written_bytes <= COPY_LIMIT_BYTES and objects.total_bytes <= most:
                    source = _copy(source, fresh)
                    _write_objects(writer, objects, window_pages)
                    with Deferred():
                        tracee.let_go()
                    runs_on, freeze_s = True, time.monotonic() - frozen_at
                    reach("dump.resumed")
                else:
                    notes.append(f"stopped until written, no snapshot: {obstacle}")
            doubtful: list[int] = []  # windows of which nobody knows whether they were written
            left_out = account.left_out if account else ()
            if base and written is not None:
                writer.keep(base, kept)
                doubtful = [address for address, _ in fresh if contains(left_out, address)]
                writer.expect(base, doubtful)
            parent = session["parent"]
            if not base and parent:  # all of it: as the next wake is thought to need it
                fresh = order_windows(fresh, read_order(store.path, parent))
            if base and written_bytes < total // _LITTLE:
                writer.expect_little(written_bytes)
            try:
                with _reporting(progress, "writing", writer, total):
                    writer.add_space(source, fresh, space=0)
                    if not runs_on:
                        _write_objects(writer, objects, window_pages)
            finally:
                source.close()
            reach("dump.written")
            changed = writer.find_changed(base, doubtful) if base and doubtful else []

            # 7. The manifest, once everything it names has been read back and found right.
            document = {
                "format": DOCUMENT_FORMAT,
                "taken_unix_s": taken,
                "comm": comm,
                "pid": threads[0]["tid"],
                "session": session,
                "host": host,
                "process": own,
                "threads": threads,
                "vmas": mappings.describe(),
                "guards": guards,
                "changed": cut_ranges(ranges, filter(behind_file, vmas)),
                "memory_policies": policies,
                "objects": objects.described,
                "descriptors": descriptors,
                "variables": variables,
            }
            summary = writer.commit(document, progress)
            committed = True
            if parent:
                inherit_order(store, parent, summary.name)
            if base and written is not None:
                seed_order(store, summary.name, [address for address, _ in fresh])
            reach("dump.committed")
            if leave_running and track and number >= 0:
                tracking.remember(
                    tracking.Account(
                        pid,
                        own_start,
                        proc.boot_id(),
                        number,
                        inode,
                        str(store.path),
                        summary.name,
                        still_dense(begun.dense, left_out, changed) if begun else (),
                        begun.left_out if begun else (),
                    )
                )

        # 8. Only now is the process ended, or let go.
        if leave_running:
            if not runs_on:
                tracee.let_go()
                freeze_s = time.monotonic() - frozen_at
            remember(store, pid, session, notes)
        else:
            freeze_s = time.monotonic() - frozen_at
            with Deferred():
                _end(tracee, pidfd, descriptors)
            forget_lineage(pid)
        reach("dump.ended")
    except ProcessLookupError as error:
        raise NotFound(f"process {pid} ended while it was dumped", pid=pid) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreUnavailable(
                f"no room left for the image of pid {pid}",
                remedy="free some space or name another folder with --store",
                pid=pid,
            ) from error
        raise KernelError(f"cannot dump pid {pid}: {error}", error.errno or 0, pid=pid) from error
    finally:
        with Deferred():
            objects.close()
            if base:
                base.close()
            if tracee.threads:
                tracee.let_go()
            if snapshot:
                _end_snapshot(pid, own_start, snapshot)
            if number >= 0 and not account and not committed:
                _end_account(pid, number, inode)
            os.close(pidfd)
    if begun and begun.left_out and not doze:
        gather_huge_pages(pid, begun.left_out)
    return DumpReport(
        image=summary.name,
        pid=pid,
        raw_bytes=summary.raw_bytes,
        stored_bytes=summary.stored_bytes,
        freeze_s=freeze_s,
        total_s=time.monotonic() - began,
        threads=len(threads),
        left_running=leave_running,
        snapshot=bool(snapshot),
        base=base.name if base and written is not None else None,
        written_bytes=written_bytes,
        notes=notes,
    )


def default_name(comm: str, pid: int, taken_unix_s: float) -> str:
    """An image's name when none was given: program, pid, time (UTC)."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in comm)
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(taken_unix_s))
    return f"{plain.strip('.-') or 'process'}-{pid}-{moment}.{int(taken_unix_s % 1 * 1000):03}"


# -- what cannot be dumped ---------------------------------------------------------------------


def refuse_unfit(pid: int) -> None:
    """Raise for a process that lzy cannot dump, from /proc alone."""
    if pid == os.getpid():
        raise Unsupported("lzy cannot dump itself", remedy="dump it from another process", pid=pid)
    status = proc.status(pid)
    if int(status["Tgid"]) != pid:
        raise NotFound(
            f"{pid} is a thread of process {status['Tgid']}",
            remedy=f"dump process {status['Tgid']}",
            pid=pid,
        )
    if status["State"].startswith("Z") and int(status["Threads"]) > 1:
        raise Unsupported(
            f"the main thread of pid {pid} has ended while others live",
            remedy="such a process cannot be dumped yet; let its other threads finish",
            pid=pid,
        )
    if status["State"].startswith(("Z", "X")):
        raise NotFound(f"process {pid} has ended (a zombie is left of it)", pid=pid)
    if not proc.read_bytes(pid, "cmdline") and "VmSize" not in status:
        raise Unsupported(f"pid {pid} is a kernel thread", remedy="choose a program", pid=pid)
    if (tracer := int(status["TracerPid"])) and not _is_pager(tracer):
        raise traced_by(pid, tracer)
    if int(status.get("Seccomp", "0")):
        raise Unsupported(
            f"pid {pid} runs under a seccomp filter, which would refuse injected system calls",
            remedy="start the program without the filter",
            pid=pid,
        )
    for namespace in ("user", "net", "ipc", "uts"):
        try:
            theirs = os.stat(f"/proc/{pid}/ns/{namespace}").st_ino
        except PermissionError:
            continue
        if theirs != os.stat(f"/proc/self/ns/{namespace}").st_ino:
            raise Unsupported(
                f"pid {pid} lives in another {namespace} namespace (a container?)",
                remedy="run lzy inside that container",
                pid=pid,
            )
    refuse_children(pid)


def refuse_children(pid: int) -> None:
    """Raise Unsupported if the process has children, or children whose end it has yet to hear of.

    A clone that a killed lzy left behind does not count: it has no exit signal, field 38 of
    proc_pid_stat(5), and nobody waits for it.
    """
    living, ended = [], []
    for child in proc.children(pid):
        try:
            stat = proc.stat(child)
        except NotFound:
            continue
        if stat[2] not in "ZX":
            living.append(f"{child} ({stat[1]})")
        elif int(stat[37]):
            ended.append(f"{child} ({stat[1]})")
    if living:
        raise Unsupported(
            f"pid {pid} has living child processes: {', '.join(living)}",
            remedy="process trees are not supported yet; end the children and try again",
            pid=pid,
            children=living,
        )
    if ended:
        raise Unsupported(
            f"pid {pid} has ended children it has not waited for: {', '.join(ended)}",
            remedy="have it wait for them (Popen.wait), so that their exit status is not lost",
            pid=pid,
            children=ended,
        )


def refuse_separate_threads(tracee: Tracee) -> None:
    """Raise Unsupported if threads have descriptors or a directory of their own, unshare(2)."""
    for tid in tracee.threads:
        for what, name in (
            (process.KCMP_FILES, "descriptors"),
            (process.KCMP_FS, "a working directory"),
        ):
            if tid != tracee.pid and not process.is_shared(tracee.pid, tid, what):
                raise Unsupported(
                    f"thread {tid} of pid {tracee.pid} has {name} of its own (unshare)",
                    remedy="such a thread cannot be made again yet; end it and try again",
                    pid=tracee.pid,
                )


def look_at_mappings(pid: int) -> tuple[bytes, list[Vma]]:
    """Both /proc/PID/maps as it is and the mappings with their flags.

    Should the first read the same later, the second still hold. The first is empty where they
    disagree, so that it never does: a leaving pager, say, maps a page for its last call inside the
    process just between the two.
    """
    places = proc.read_bytes(pid, "maps")
    vmas = proc.mappings(pid)
    agree = [vma[:4] for vma in proc.parse_mappings(places)] == [vma[:4] for vma in vmas]
    return places if agree else b"", vmas


def _find_fit_doze(pid: int, store: Store, window_pages: int, quick: bool) -> Doze | None:
    """How the process dozes, if it can be dumped as it is; `quick`: standing still but shortly."""
    doze = find_doze(pid)
    if doze is None or os.path.realpath(doze.store) != os.path.realpath(store.path):
        return None
    try:
        with store.load(doze.image) as image:
            if image.window_pages != window_pages:
                return None
    except LzyError:
        return None
    if quick:
        vmas = proc.mappings(pid)
        there = join_ranges(own_page_ranges(pid, vmas))
        written = intersect(there, join_ranges(tracking.written_ranges(pid, vmas)))
        if sum(end - start for start, end in written) > COPY_LIMIT_BYTES:
            return None
    return doze


def _copy(source: ProcessPages, windows: list[tuple[int, int]]) -> CopiedPages:
    try:
        return CopiedPages(source, windows)
    finally:
        source.close()


def wait_for_pager(pid: int, progress: Progress | None) -> tuple[bytes, list[Vma]]:
    """Wait until memory that a lazy restore still brings in is all there; the mappings then.

    As `look_at_mappings` has them. Raises Busy if nothing arrives: the pager died.
    """
    last, moved_at = -1, time.monotonic()
    leaves_until = moved_at + _PAGER_LEAVES_S
    journal = journal_path(run_directory(), pid)
    with contextlib.suppress(NotFound, OSError):  # none, or another user's
        rouse(journal)  # should it doze, what is missing is wanted now
    while True:
        places, vmas = look_at_mappings(pid)
        missing = sum(vma.length for vma in vmas if "um" in vma.flags)
        if not missing and time.monotonic() < leaves_until and _pager_is_leaving(pid):
            time.sleep(0.005)
            continue
        if not missing:
            return places, vmas
        if journal.exists() and not is_held(journal):
            raise Busy(
                f"memory of pid {pid} is not all there, and its pager has died",
                remedy=f"run: lzy pager --resume {pid}",
                pid=pid,
            )
        present = int(proc.status(pid).get("RssAnon", "0").split()[0])
        now = time.monotonic()
        leaves_until = now + _PAGER_LEAVES_S
        if present != last:
            last, moved_at = present, now
        elif now - moved_at > 10:
            raise Busy(
                f"memory of pid {pid} is still being brought in by a pager, which does not move",
                remedy=f"run: lzy pager --resume {pid}",
                pid=pid,
            )
        if progress:
            progress("waiting for the pager", present << 10, missing)
        time.sleep(0.02)


def _pager_is_leaving(pid: int) -> bool:
    """Whether the pager has yet to close its descriptor in the process, or to let go of it.

    A userfaultfd of the program's own looks the same: it is refused by name a little later.
    """
    if _is_pager(int(proc.status(pid)["TracerPid"])):
        return True
    with contextlib.suppress(OSError):  # not ours to look at: the dump tells
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # it has closed that one
                if os.readlink(
                    f"/proc/{pid}/fd/{number}"
                ) == "anon_inode:[userfaultfd]" and not keeps_account(
                    proc.read_bytes(pid, f"fdinfo/{number}").decode()
                ):
                    return True
    return False


def _is_pager(tracer: int) -> bool:
    """Whether the process `tracer` (0: none) is an lzy pager, in the midst of its last call."""
    try:
        return bool(tracer) and proc.stat(tracer)[1] == PAGER_NAME
    except NotFound:  # it has let go since
        return True


def _why_no_snapshot(vmas: list[Vma]) -> str:
    """What a clone of the process would lack, in words; empty if it lacks nothing."""
    for vma in vmas:
        if vma.kind in ("vdso", "vvar", "vsyscall"):
            continue
        if "dc" in vma.flags:
            return f"the mapping at {vma.start:#x} is not inherited (MADV_DONTFORK)"
        if "wf" in vma.flags:
            return f"the mapping at {vma.start:#x} is wiped on fork"
    return ""


# -- steps -------------------------------------------------------------------------------------


def _open_base(account: tracking.Account | None, store: Store, window_pages: int) -> Image | None:
    """The image that the account began with, if it is there, in this store, and as it should be."""
    if account is None or account.store != str(store.path):
        return None
    try:
        base = store.load(account.image)
    except LzyError:  # removed, damaged, away: then all of the memory is read
        return None
    if base.window_pages == window_pages:
        return base
    base.close()
    return None


def _open_account(tracee: Tracee, notes: list[str]) -> int:
    """A descriptor in the process for an account of writes; -1 if none is kept: it costs time."""
    try:
        return tracking.open_account(tracee)
    except KernelError as error:
        notes.append(f"the next checkpoint reads all of the memory: {error}")
        return -1


def _begin_account(
    tracee: Tracee,
    number: int,
    vmas: list[Vma],
    dense: Sequence[tuple[int, int]],
    notes: list[str],
) -> tracking.Begun | None:
    """Have the kernel keep account of writes from now on; what was written until now, or None."""
    try:
        return tracking.begin_account(tracee, number, vmas, dense=dense)
    except OSError as error:
        notes.append(f"the next checkpoint reads more of the memory than was written: {error}")
        return None


def _end_account(pid: int, number: int, inode: int) -> None:
    """Take the descriptor of an account that is good for nothing out of the running process."""
    tracking.withdraw(pid)
    with contextlib.suppress(LzyError, OSError):
        if tracking.find_inode(pid, number) == inode:
            close_descriptor(pid, number)


def _split(tracee: Tracee) -> tuple[int, str]:
    """Clone the stopped process; the clone never runs. (its pid, "") or (0, why not)."""
    born: list[int] = []
    tracee.on_clone = born.append
    leader = tracee.threads[tracee.pid]
    ptrace.set_options(leader.tid, ptrace.PTRACE_O_TRACECLONE)
    try:
        result = tracee.run_one(
            leader, Call(process.SYS_CLONE, (process.CLONE_FILES,)), entry=machine.SPLIT
        )
    finally:
        ptrace.set_options(leader.tid, 0)
    if result < 0 or not born:
        return 0, f"the process cannot be cloned ({os.strerror(-result)})"
    _, status = os.waitpid(born[0], ptrace.WALL)
    if not os.WIFSTOPPED(status):
        return 0, "its clone was killed"
    ptrace.set_options(born[0], ptrace.PTRACE_O_EXITKILL)
    return born[0], ""


def _end_snapshot(pid: int, start_time: int, snapshot: int) -> None:
    """Kill the snapshot and have the process reap it, so that no zombie stays."""
    try:
        os.kill(snapshot, signal.SIGKILL)
        os.waitpid(snapshot, ptrace.WALL)
    except (ProcessLookupError, ChildProcessError):
        pass
    try:
        if proc.start_time(pid) != start_time:
            return
        tracee = Tracee(pid)
        tracee.seize()
        try:
            tracee.prepare(arena_bytes=4096)
            number = int(proc.status(snapshot)["NSpid"].split()[-1])
            tracee.run_one(
                tracee.threads[pid],
                Call(process.SYS_WAIT4, (number, 0, os.WNOHANG | ptrace.WALL, 0)),
            )
        finally:
            tracee.let_go()
    except (LzyError, OSError):
        return  # the process has ended meanwhile, and the zombie with it


def _take_deleted_executable(pid: int, objects: Objects) -> int:
    """The object number of an executable that has no path any more (upgraded meanwhile), or 0."""
    if not os.readlink(f"/proc/{pid}/exe").endswith(" (deleted)"):
        return 0
    executable = os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(executable)
        return objects.add_file(executable, key=(status.st_dev, status.st_ino))
    finally:
        os.close(executable)


def _write_objects(writer: ImageWriter, objects: Objects, window_pages: int) -> None:
    for number, descriptor in enumerate(objects.descriptors, 1):
        length = os.fstat(descriptor).st_size
        writer.add_space(
            FilePages(descriptor),
            windows_of(data_ranges(descriptor, length), window_pages),
            space=number,
        )


def _end(tracee: Tracee, pidfd: int, descriptors: dict[str, Any]) -> None:
    """Kill the process and wait until it is gone, its inner connections without a trace."""
    held = resources.hold_connections(pidfd, descriptors)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    tracee.await_end()
    resources.release_descriptors(held)


class _reporting:
    """Report a writer's progress ten times a second while the block runs."""

    def __init__(
        self, progress: Progress | None, stage: str, writer: ImageWriter, total_bytes: int
    ) -> None:
        self._progress, self._stage, self._writer = progress, stage, writer
        self._total_bytes = total_bytes

    def __enter__(self) -> None:
        if self._progress:
            import threading

            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._report, daemon=True)
            self._thread.start()

    def _report(self) -> None:
        assert self._progress
        while not self._ended.wait(0.1):
            self._progress(self._stage, self._writer.raw_bytes_done, self._total_bytes)

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._ended.set()
            self._thread.join()
