"""A running process, with all its descendants, into an image, step by step.

The processes are stopped, asked what only they know, and, when they are to go on, split: a clone,
frozen at birth, is a copy-on-write snapshot whose memory is written out at leisure while its
process runs on. Where a snapshot would not cover everything (see `why_no_snapshot`), and when the
processes are to end anyway, all stay stopped until their image is committed. An image is committed
when every byte of it has been read back from the store and authenticated; only then is anything
ended.

Account of writes is kept of the first process only, the root of the tree: of the others all of the
memory is read at each dump, but for what they share copy-on-write with their parents.

A process that dozes is dumped as it is: what is away is taken from the image that its pager has.
Its pager would take a snapshot for a forked child; what is to be written of it is copied instead.

*Guarantee*: a dump that fails or is killed leaves the processes running, untouched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import interrogate, proc, resources, tracking
from .away import Away, Doze, NotAsItIs, find_doze, hold_pager, read_away
from .beside import Beside
from .carried import Cargo
from .content import (
    CopiedPages,
    FilePages,
    Objects,
    ProcessPages,
    data_ranges,
    intersect,
    join_ranges,
    own_page_ranges,
    windows_of,
)
from .dense import contains, still_dense
from .errors import Busy, KernelError, LzyError, NotFound, StoreUnavailable
from .fitness import refuse_unfit
from .history import ASKED, next_checkpoint, remember
from .host import describe_host
from .huge import gather_huge_pages
from .increment import TooScattered, plan_checkpoint
from .inheritance import length_bytes
from .inject import close_descriptor
from .interrupts import Deferred
from .lineage import forget_lineage
from .linux import PAGE_BYTES, process
from .proc import Vma
from .resources.kind import load_kinds
from .stages import reach
from .subject import Subject, why_no_snapshot
from .tracee import Tracee
from .tree import (
    Ended,
    describe_ended,
    find_names,
    look_at_descendants,
    refuse_ourselves,
    refuse_sessions,
    stop_tree,
)
from .unfinished import close_unfinished
from .working_set import inherit_order, order_windows, read_order, seed_order

if TYPE_CHECKING:
    from .image import Image
    from .store import Store
    from .writer import ImageWriter

Progress = Callable[[str, int, int], None]

DOCUMENT_FORMAT = 1
FIRST_MEMBER_SPACE = 1 << 20  # of the image, for the processes behind the first; below: objects
_TO_DOZE = "doze"  # as `doze` calls its checkpoint: what is left out of an account cannot go
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
    """Of all processes together."""
    processes: int
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
    carry_files: bool = False,
    carry: Sequence[str] = (),
    progress: Progress | None = None,
) -> DumpReport:
    """Write an image of process `pid` and its descendants into `store`.

    They are ended unless `leave_running`.

    `name` is that of a session: the image is its next checkpoint (see `history`). `why` it is
    taken stands in the image.

    If the kernel has kept account of what was written since an image in `store` was taken of the
    process, only that is read and stored. One that is left running is put under account, unless
    `track` is false.

    With `trim` its interpreter is asked to give back what it does not need first; what it has then
    stands in the image. If it is busy a note says so, and the dump goes on.

    One that dozes and cannot be dumped as it is, or would stand still too long, gets all of its
    memory back first; unless `rouse` is false: then it does stand still, or Busy is raised.

    `carry_files`: mapped files travel in the image, too, and so do the files and folders of
    `carry`, whoever has them open (see `carried`).

    Raises NotFound, AccessDenied, Unsupported (naming what cannot be kept), Busy,
    StoreUnavailable; the process then runs on as before.
    """
    began = time.monotonic()
    notes: list[str] = []
    variables: dict[str, Any] = {}

    # 1. What can be refused without touching the process is refused now.
    refuse_unfit(pid)
    refuse_ourselves(pid)
    close_unfinished(pid)
    if trim:
        from .belongings import trim_if_idle

        variables = trim_if_idle(pid, notes)

    def write(doze: Doze | None) -> DumpReport:
        return _dump(
            pid, store, name, leave_running, window_pages, why, track, variables, notes, doze,
            carry_files, carry, progress, began,
        )  # fmt: skip

    doze = _find_fit_doze(pid, store, window_pages, leave_running and rouse)
    if doze and not proc.children(pid):
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
    carry_files: bool,
    carry: Sequence[str],
    progress: Progress | None,
    began: float,
) -> DumpReport:
    """As `dump`; with `doze` what that process lacks is taken from the image its pager has.

    Raises NotAsItIs when all of its memory has to come in first; it runs on as it was.
    """
    root = Subject(pid)
    seen: dict[int, Subject] = {}
    objects = Objects()
    base: Image | None = None
    account: tracking.Account | None = None
    number, inode, committed = -1, 0, False
    Beside(lambda: load_kinds([pid]))  # while the kernel looks at the mappings
    try:
        root.look(progress, dozes=doze is not None)
        seen = look_at_descendants(pid, progress)
    except BaseException:
        _close_all(root, seen)
        raise
    load_kinds([pid, *seen])  # what can be done before the process is stopped, is
    obstacle = "the process ends"
    hurries = leave_running and doze is not None  # all of this is done while it stands still
    taken = time.time()
    try:
        if hurries:
            root.policies = proc.memory_policies(pid)
        if leave_running:
            obstacle = "it dozes" if doze else why_no_snapshot(root.vmas)
        name, session = next_checkpoint(
            store, pid, name, why=why, unnamed=lambda: default_name(root.comm, pid, taken)
        )
        if not leave_running and not process.may_choose_pids():
            notes.append(
                "without root it comes back in a user and a PID namespace of its own, all of its "
                "memory at once (lzy doctor tells whether it may)"
            )
        account = tracking.find_account(pid)
        base = _open_base(account, store, window_pages)
        if not base and doze:
            account, base = None, store.load(doze.image)
        if base and not leave_running:
            store.verify(base.name, progress)  # what is taken from it is not read again below
        with store.writer(name, window_pages=window_pages) as writer:
            cargo = Cargo(writer, everything=carry_files)
            cargo.add_asked(carry)
            for subject in (root, *seen.values()):
                cargo.add_mapped(subject.pid, subject.vmas)

            # 2. Stop all its threads, and those of its descendants.
            frozen_at = time.monotonic()
            with Deferred():
                tree, ended = stop_tree(root, seen)
                reach("dump.seized")
                if doze and len(tree) > 1:  # born just now
                    raise NotAsItIs
                if leave_running:
                    for subject in tree[1:]:
                        obstacle = obstacle or why_no_snapshot(subject.vmas)

                # 3. Ask what only a process itself can tell, by system calls made inside it.
                for subject in tree:
                    subject.ask()
                    if subject is root:
                        reach("dump.prepared")
                        if tracking.find_account(pid) != account:  # another dump came in between
                            account = None
                        number = account.number if account else -1
                        if leave_running and track and not account:
                            number = _open_account(root.tracee, notes)
                        inode = tracking.find_inode(pid, number)
                    subject.tracee.unmap_arena()
                refuse_sessions(tree, ended)
                reach("dump.asked")

                # 4. Their descriptors, with what is in flight in them.
                holders = [
                    resources.Holder(
                        subject.pid,
                        subject.pidfd,
                        doze.numbers if doze else frozenset(),
                        subject.number if subject is not root else 0,
                    )
                    for subject in tree
                ]
                tables = resources.describe_together(holders, objects)
                reach("dump.described")

                # 5. Their mappings; and the snapshots, if they go on.
                now = root.look_again()
                if now != root.places:
                    obstacle = obstacle or why_no_snapshot(root.vmas)
                for subject in tree[1:]:
                    subject.look_again()
                begun, written = None, None  # nobody knows
                if leave_running and track and number >= 0:
                    dense = account.dense if account and why != _TO_DOZE else ()
                    begun = _begin_account(root.tracee, number, root.vmas, dense, notes)
                    written = begun.written if begun else None
                    reach("dump.tracked")
                    joined = not begun or begun.registered
                    if joined and proc.read_bytes(pid, "maps") != now:
                        root.vmas = proc.mappings(pid)
                elif account:
                    written = tracking.written_ranges(pid, root.vmas)
                if not account:
                    written = None
                away = Away([], [])
                if doze:
                    with hold_pager(doze):
                        root.ranges = own_page_ranges(pid, root.vmas)
                        away = read_away(doze, root.ranges)
                    written = [*(root.ranges if written is None else written), *away.moved]
                find_names(tree)
                for subject in tree:
                    subject.map(objects)
                if not obstacle and objects.total_bytes > SNAPSHOT_OBJECT_LIMIT_BYTES:
                    obstacle = f"it shares {objects.total_bytes >> 20} MiB of memory"
                for subject in tree:
                    obstacle = obstacle or subject.split()
                runs_on = not obstacle
                freeze_s = 0.0
                if runs_on:
                    reach("dump.split")
                    _write_objects(writer, objects, window_pages)
                    for subject in tree:
                        subject.tracee.let_go()
                    freeze_s = time.monotonic() - frozen_at
                    reach("dump.resumed")
                else:  # what cannot all be looked at later, is looked at as it stands
                    for subject in tree:
                        subject.end_snapshot()

            # 6. Their memory, and what a snapshot knows as well as its process did.
            for subject in tree:
                subject.settle(
                    as_seen=subject is root and hurries and now == root.places,
                    dozes=doze is not None,
                )
            host = describe_host(
                root.source_pid, root.mappings.vmas, interrogate.decode(root.threads[0]["xstate"])
            )
            root.ranges = join_ranges([*root.ranges, *away.missing])
            for subject in tree:
                cargo.add_mapped(subject.source_pid, subject.mappings.vmas)
            for subject in tree[1:]:
                subject.find_inherited()
            total = objects.total_bytes + sum(length_bytes(subject.fresh) for subject in tree)
            reach("dump.writing")
            own_pages = root.open_pages()
            source: ProcessPages | CopiedPages = own_pages
            if base and written is not None:
                written = join_ranges(written)
                try:
                    kept, fresh = plan_checkpoint(base, root.ranges, written, away.missing)
                except TooScattered:
                    raise NotAsItIs from None
            else:
                fresh = windows_of(root.ranges, window_pages)
            written_bytes = sum(mask.bit_count() for _, mask in fresh) * PAGE_BYTES
            written_bytes += sum(length_bytes(subject.fresh) for subject in tree[1:])
            if leave_running and not runs_on:
                most = SNAPSHOT_OBJECT_LIMIT_BYTES
                if doze and written_bytes <= COPY_LIMIT_BYTES and objects.total_bytes <= most:
                    source = _copy(own_pages, fresh)
                    _write_objects(writer, objects, window_pages)
                    with Deferred():
                        root.tracee.let_go()
                    runs_on, freeze_s = True, time.monotonic() - frozen_at
                    reach("dump.resumed")
                else:
                    notes.append(f"stopped until written, no snapshot: {obstacle}")
            doubtful: list[int] = []  # windows of which nobody knows whether they were written
            left_out = account.left_out if account else ()
            if base and written is not None:
                writer.keep(base, kept)
                doubtful = [address for address, _ in fresh if contains(left_out, address)]
                if doubtful:
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
                    for space, subject in enumerate(tree[1:], FIRST_MEMBER_SPACE):
                        _write_member(writer, subject, space, window_pages)
            finally:
                source.close()
            reach("dump.written")
            changed = writer.find_changed(base, doubtful) if base and doubtful else []

            # 7. The manifest, once everything it names has been read back and found right.
            document = {
                "format": DOCUMENT_FORMAT,
                "taken_unix_s": taken,
                "session": session,
                "host": host,
                **root.describe(),
                "objects": objects.described,
                "descriptors": tables[0],
                "variables": variables,
            }
            if len(tree) > 1:
                document["members"] = [
                    subject.describe_member(table, space)
                    for space, (subject, table) in enumerate(
                        zip(tree[1:], tables[1:], strict=True), FIRST_MEMBER_SPACE
                    )
                ]
            if ended:
                document["zombies"] = describe_ended(ended)
            if carried := cargo.describe():
                document["carried"] = carried
            for subject in tree:
                subject.kill_snapshot()  # it ends while the disk is waited for
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
                        root.start_time,
                        proc.boot_id(),
                        number,
                        inode,
                        str(store.path),
                        summary.name,
                        still_dense(begun.dense, left_out, changed) if begun else (),
                        begun.left_out if begun else (),
                    )
                )

        # 8. Only now are the processes ended, or let go.
        if leave_running:
            if not runs_on:
                for subject in tree:
                    subject.tracee.let_go()
                freeze_s = time.monotonic() - frozen_at
            remember(store, pid, session, notes)
        else:
            freeze_s = time.monotonic() - frozen_at
            with Deferred():
                _end(tree, ended, tables)
            for subject in tree:
                forget_lineage(subject.pid)
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
            if number >= 0 and not account and not committed:
                root.let_go()
                _end_account(pid, number, inode)
            _close_all(root, seen)
    if begun and begun.left_out and not doze:
        gather_huge_pages(pid, begun.left_out, root.mappings.vmas)
    return DumpReport(
        image=summary.name,
        pid=pid,
        raw_bytes=summary.raw_bytes,
        stored_bytes=summary.stored_bytes,
        freeze_s=freeze_s,
        total_s=time.monotonic() - began,
        threads=sum(len(subject.threads) for subject in tree),
        processes=len(tree),
        left_running=leave_running,
        snapshot=not obstacle,
        base=base.name if base and written is not None else None,
        written_bytes=written_bytes,
        notes=notes,
    )


def default_name(comm: str, pid: int, taken_unix_s: float) -> str:
    """An image's name when none was given: program, pid, time (UTC)."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in comm)
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(taken_unix_s))
    return f"{plain.strip('.-') or 'process'}-{pid}-{moment}.{int(taken_unix_s % 1 * 1000):03}"


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


def _write_objects(writer: ImageWriter, objects: Objects, window_pages: int) -> None:
    for number, descriptor in enumerate(objects.descriptors, 1):
        length = os.fstat(descriptor).st_size
        writer.add_space(
            FilePages(descriptor),
            windows_of(data_ranges(descriptor, length), window_pages),
            space=number,
        )


def _write_member(writer: ImageWriter, subject: Subject, space: int, window_pages: int) -> None:
    source = subject.open_pages()
    try:
        writer.add_space(source, windows_of(subject.fresh, window_pages), space=space)
    finally:
        source.close()


def _end(tree: list[Subject], ended: list[Ended], tables: list[dict[str, Any]]) -> None:
    """Kill the processes and wait until they are gone, their inner connections without a trace.

    Children end before their parents, who still wait for them. Should we die in between, the
    kernel kills the rest.
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
    for subject in reversed(tree):
        signal.pidfd_send_signal(subject.pidfd, signal.SIGKILL)
        subject.tracee.await_end()
        if subject.parent:  # it waits: a zombie would keep the number from being free
            subject.parent.wait_for(subject.number)
    resources.release_descriptors(held)


def _close_all(root: Subject, seen: dict[int, Subject]) -> None:
    for subject in (*root.tree, *seen.values()):
        subject.close()


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
