"""One dump from the first look to the last word: steps that share what they find.

The processes are stopped, asked what only they know, and, when they are to go on, split: a clone,
frozen at birth, is a copy-on-write snapshot whose memory is written out at leisure while its
process runs on. If they have written but little since the image before, that is copied instead: to
clone the page tables of the whole takes longer, 25 to 40 ms a GiB. Where a snapshot
would not cover everything (see `why_no_snapshot`), and when the processes are to end anyway, all
stay stopped until their image is committed. An image is committed when every byte of it has been
read back from the store and authenticated; only then is anything ended.

Account of writes is kept of each process of the tree, so that what is read of it is what it wrote
since the image before. What they write together (shared memory) is read at each dump.

A process that dozes is dumped as it is: what is away is taken from the image that its pager has.
Its pager would take a snapshot for a forked child; what is to be written of it is copied instead.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import interrogate, mapping_flags, proc, resources
from .ahead import LEAST_BYTES as LEAST_AHEAD_BYTES
from .away import Away, Doze, NotAsItIs, hold_pager, read_away
from .beside import Beside
from .bookkeeping import Books
from .carried import Cargo
from .composed import ComposedPages
from .content import (
    CopiedPages,
    ProcessPages,
    intersect,
    join_ranges,
    own_page_ranges,
    subtract,
)
from .errors import KernelError, LzyError, NotFound, StoreUnavailable, Unsupported
from .fitness import Progress
from .history import TO_DOZE, next_checkpoint, remember
from .host import describe_host
from .increment import TooScattered
from .inheritance import length_bytes
from .interrupts import Deferred
from .ipc import describe_ipc
from .lineage import forget_lineage
from .linux import PAGE_BYTES, process
from .mapped import Statuses
from .named import describe_named, remove_own
from .objects import Objects
from .reporting import reporting
from .resources.kind import load_kinds
from .stages import reach
from .subject import Subject, why_no_snapshot
from .tree import (
    Ended,
    describe_ended,
    end_tree,
    find_names,
    look_at_descendants,
    refuse_sessions,
    stop_tree,
)
from .urgency import Urgent
from .working_set import inherit_order, order_windows, read_order, seed_order

if TYPE_CHECKING:
    from .image import Image
    from .store import ImageSummary, Store
    from .writer import ImageWriter

Range = tuple[int, int]

DOCUMENT_FORMAT = 1
FIRST_MEMBER_SPACE = 1 << 20  # of the image, for the processes behind the first; below: objects
COPY_LIMIT_BYTES = 512 << 20  # so much shared memory, or of a process that dozes, is copied
_CLONE_LOOKS = 20  # to clone page tables takes so many times as long as a look at them
_CLONE_S = 2.5e-3  # and that besides
_COPY_S, _COPY_RUN_S, _COPY_BYTES_PER_S = 1.2e-3, 5e-6, 2e9  # to copy: at least; each run; memory
_LITTLE = 32  # such a part of the memory is stored sooner than it is looked for in the store


class Wishes(NamedTuple):
    """What is asked of a dump; see `dump.dump`."""

    name: str | None
    leave_running: bool
    window_pages: int
    why: str
    track: bool
    carry_files: bool
    carry: Sequence[str]
    progress: Progress | None
    take_down: bool = True
    verified: str = ""


class DumpReport(NamedTuple):
    """What a dump did: sizes in bytes, times in seconds."""

    image: str
    pid: int
    raw_bytes: int
    stored_bytes: int
    freeze_s: float
    frozen_at_s: float
    """When that began (CLOCK_MONOTONIC)."""
    total_s: float
    threads: int
    """Of all processes together."""
    processes: int
    left_running: bool
    snapshot: bool
    base: str | None
    """The image that unwritten pages were taken from; None when all were read."""
    written_bytes: int
    """Memory that was stored, because it has changed since `base` or may have."""
    notes: list[str]


class Capture:
    """A process and its descendants on their way into an image of `store`.

    With `doze`, what the root lacks is taken from the image that its pager has.
    """

    def __init__(
        self,
        pid: int,
        store: Store,
        wishes: Wishes,
        *,
        doze: Doze | None = None,
        variables: dict[str, Any],
        notes: list[str],
    ) -> None:
        """`variables` go into the image; `notes` are added to. Raises NotFound."""
        self.pid = pid
        self.store = store
        self.wishes = wishes
        self.doze = doze
        self.variables = variables
        self.notes = notes
        self.root = Subject(pid)
        self.seen: dict[int, Subject] = {}
        """Its descendants at the first look, by pid."""
        self.tree: list[Subject] = []
        """Who was stopped, the root first, parents before their children."""
        self.spaces: dict[Subject, int] = {}
        """Which part of the image is the memory of each."""
        self.ended: list[Ended] = []
        self.system_v: dict[str, Any] = {}
        self.objects = Objects()
        self.tables: list[dict[str, Any]] = []
        """The descriptors of each of `tree`."""
        self.base: Image | None = None
        self.books = Books(self.root, notes)
        self.obstacle = "" if wishes.leave_running else "the process ends"
        """Why there is no snapshot, in words; empty if there is one."""
        self.away = Away([], [])
        self._known: set[Subject] = set()  # those whose `ranges` are
        self.composed: dict[Subject, ComposedPages] = {}
        """What is to be read of each, if it was copied while they stood still."""
        self.runs_on = False
        self.freeze_s = 0.0
        self.written_bytes = 0

    def run(self) -> DumpReport:
        """All of it. Raises what `dump.dump` does; the processes then run on as before.

        Raises NotAsItIs when all of the memory has to come in first.
        """
        wishes, began = self.wishes, time.monotonic()
        try:
            self._look()
            with self.store.writer(self.name, window_pages=wishes.window_pages) as writer:
                cargo = Cargo(writer, everything=wishes.carry_files)
                cargo.add_asked(wishes.carry)
                for subject in (self.root, *self.seen.values()):
                    cargo.add_mapped(proc.witness(subject.pid), subject.vmas)
                self._go_ahead(writer)
                self.frozen_at = time.monotonic()
                with Deferred(), Urgent():
                    self._stop()
                    self._ask()
                    self._describe_descriptors()
                    self._map()
                    self._split()
                self._settle()
                for subject in self.tree:
                    cargo.add_mapped(subject.source_pid, subject.mappings.vmas)
                self._write(writer)
                summary = self._commit(writer, cargo)
            self._finish(summary.name)
        except OSError as error:
            raise self._explain(error) from error
        finally:
            with Deferred():
                self._close()
        if not self.doze:
            self.books.gather()
        return DumpReport(
            image=summary.name,
            pid=self.pid,
            raw_bytes=summary.raw_bytes,
            stored_bytes=summary.stored_bytes,
            freeze_s=self.freeze_s,
            frozen_at_s=self.frozen_at,
            total_s=time.monotonic() - began,
            threads=sum(len(subject.threads) for subject in self.tree),
            processes=len(self.tree),
            left_running=wishes.leave_running,
            snapshot=not self.obstacle,
            base=self.base.name if self.base and self.books.takes_from_base else None,
            written_bytes=self.written_bytes,
            notes=self.notes,
        )

    # -- before the stop ---------------------------------------------------------------------------

    def _look(self) -> None:
        """What can be done before the processes are stopped, is."""
        wishes, root, doze = self.wishes, self.root, self.doze
        Beside(lambda: load_kinds([self.pid]))  # while the kernel looks at the mappings
        root.look(wishes.progress, dozes=doze is not None)
        self.seen = look_at_descendants(self.pid, wishes.progress)
        load_kinds([self.pid, *self.seen])
        self.taken = time.time()
        if wishes.leave_running:
            if doze:  # all is done while it stands still
                root.policies = proc.memory_policies(proc.witness(self.pid))
            self.obstacle = "it dozes" if doze else why_no_snapshot(root.vmas)
            if doze or not self.obstacle:
                subjects = (root, *self.seen.values())
                mapped = [(subject.pid, vma) for subject in subjects for vma in subject.vmas]
                self.objects.make_room(mapped, COPY_LIMIT_BYTES)
        self.name, self.session = next_checkpoint(
            self.store,
            self.pid,
            wishes.name,
            why=wishes.why,
            unnamed=lambda: default_name(root.comm, self.pid, self.taken),
        )
        if not wishes.leave_running and not process.may_choose_pids():
            self.notes.append(
                "without root it comes back in a user and a PID namespace of its own, all of its "
                "memory at once (lzy doctor tells whether it may)"
            )
        self.base = self.books.open_base(self.store, wishes.window_pages)
        if not self.base and doze:
            self.base = self.store.load(doze.image)
            self.books.take_base(self.base)
        if self.base and not wishes.leave_running:  # what is taken from it is not read again
            self.store.verify(self.base.name, wishes.progress, known=wishes.verified)

    def _go_ahead(self, writer: ImageWriter) -> None:
        """Before the stop: accounts begin, and memory of which much is to be read is, as they run.

        Of a descendant that may end, or is no fit subject, the dump tells if it matters.
        """
        if not self._is_to_keep_account or self.doze:
            return
        for subject in self.seen.values():
            with contextlib.suppress(NotFound, Unsupported, KernelError, OSError):
                self._go_ahead_of(subject, writer)
        self._go_ahead_of(self.root, writer)
        reach("dump.ahead")

    def _go_ahead_of(self, subject: Subject, writer: ImageWriter) -> None:
        resident = int(proc.read_bytes(proc.witness(subject.pid), "statm").split()[1]) * PAGE_BYTES
        is_forked = subject is not self.root and proc.shares_with_parent(subject.pid)
        is_worth_it = resident >= LEAST_AHEAD_BYTES and not is_forked and not self.obstacle
        if not self.base:
            book = self.books.open_ahead(subject)
        elif is_worth_it:
            book = self.books.take_up_ahead(subject)
        else:
            return
        if book is None:
            return
        if not is_worth_it:
            book.protect_ahead()
        elif not self.base or book.has_written_much():
            parent = self.session["parent"] if subject is self.root else None
            order = read_order(self.store.path, parent) if parent and not self.base else ()
            with reporting(self.wishes.progress, "writing", writer, resident):
                self.books.read_ahead(book, writer, order)

    # -- while they stand still --------------------------------------------------------------------

    def _stop(self) -> None:
        """Stop all threads of all processes."""
        self.tree, self.ended = stop_tree(self.root, self.seen)
        members = range(FIRST_MEMBER_SPACE, FIRST_MEMBER_SPACE + len(self.tree) - 1)
        self.spaces = dict(zip(self.tree, (0, *members), strict=True))
        reach("dump.seized")
        if self.doze and len(self.tree) > 1:  # born just now
            raise NotAsItIs
        if self.wishes.leave_running:
            for subject in self.tree[1:]:
                self.obstacle = self.obstacle or why_no_snapshot(subject.vmas)

    def _ask(self) -> None:
        """Ask what only a process itself can tell, by system calls made inside it."""
        self.books.compare()
        for subject in self.tree:
            subject.ask()
            if subject is self.root:
                reach("dump.prepared")
            self.books.ask(subject, opens=self._is_to_keep_account)
            subject.tracee.unmap_arena()
        if not self.wishes.leave_running:
            self.root.look_closely()
        refuse_sessions(self.tree, self.ended)
        self.system_v = describe_ipc(subject.pid for subject in self.tree)
        reach("dump.asked")

    @property
    def _is_to_keep_account(self) -> bool:
        return self.wishes.leave_running and self.wishes.track

    def _describe_descriptors(self) -> None:
        """Their descriptors, with what is in flight in them."""
        holders = [
            resources.Holder(
                subject.pid,
                subject.pidfd,
                self.doze.numbers if self.doze else frozenset(),
                subject.number if subject is not self.root else 0,
                subject.witness,
            )
            for subject in self.tree
        ]
        self.tables = resources.describe_together(holders, self.objects)
        reach("dump.described")

    def _map(self) -> None:
        """Their mappings, and which pages were written since the image before."""
        if self._is_to_keep_account:
            self.books.withdraw()
        places = {}
        for subject in self.tree:
            now = places[subject] = subject.look_again()
            if now != subject.places:
                self.obstacle = self.obstacle or why_no_snapshot(subject.vmas)
            self._look_into_account(subject, now)
        if self.doze:
            root, book = self.root, self.books[self.root]
            self._known.add(root)
            with hold_pager(self.doze):
                root.ranges = own_page_ranges(self.pid, root.vmas)
                self.away = read_away(self.doze, root.ranges)
            known = root.ranges if book.written is None else book.written
            book.written = [*known, *self.away.moved]
        find_names(self.tree)
        statuses: Statuses = {}
        for subject in self.tree:
            subject.map(self.objects, statuses)
        is_as_before = places[self.root] == self.root.places
        self._is_as_seen = bool(self.doze) and self.wishes.leave_running and is_as_before

    def _look_into_account(self, subject: Subject, now: bytes) -> None:
        """What it wrote; `now` is what /proc/PID/maps says."""
        book = self.books[subject]
        if self._is_to_keep_account and book.is_open:
            book.begin()
            if subject is self.root:
                reach("dump.tracked")
            joined = not book.begun or book.begun.registered
            if joined and proc.read_bytes(subject.witness, "maps") != now:
                subject.vmas = mapping_flags.mappings(subject.witness)
        elif book.account and not self.doze:
            subject.ranges = book.look()
            self._known.add(subject)
        else:
            book.read()

    def _split(self) -> None:
        """Take the snapshots and let the processes go on, if they are to and can."""
        if not self.obstacle and self.objects.written_bytes > COPY_LIMIT_BYTES:
            self.obstacle = f"it shares {self.objects.written_bytes >> 20} MiB of memory"
        if not self.obstacle and self._is_little():
            self._settle_all()
            self._compose()
            return
        for subject in self.tree:
            self.obstacle = self.obstacle or subject.split()
        if self.obstacle:  # what cannot all be looked at later, is looked at as it stands
            for subject in self.tree:
                subject.end_snapshot()
            return
        reach("dump.split")
        self.objects.copy_written(self.wishes.window_pages)
        self._let_go()

    def _is_little(self) -> bool:
        """Whether to copy what is to be read takes less time than to clone the processes."""
        if not any(mapping_flags.is_large(subject.witness) for subject in self.tree):
            return False
        clone_s = copy_s = 0.0
        copied_bytes = 0
        for subject in self.tree:
            book, is_child = self.books[subject], subject is not self.root
            if is_child and not book.before and proc.shares_with_parent(subject.pid):
                return False  # what it shares is yet to be found out
            began = time.monotonic()
            subject.look_at_pages()
            clone_s += _CLONE_S + _CLONE_LOOKS * (time.monotonic() - began)
            self._known.add(subject)
            changed = subject.ranges
            if book.knows_before:
                changed = book.to_read
                copy_s += _COPY_RUN_S * len(changed)
                changed = subtract(changed, self.books.find_inherited(subject))
            copied_bytes += length_bytes(changed)
            copy_s += _COPY_S + _COPY_RUN_S * len(changed)
        copy_s += copied_bytes / _COPY_BYTES_PER_S
        if copy_s > clone_s or copied_bytes > COPY_LIMIT_BYTES:
            return False
        if all(subject.look_quickly() for subject in self.tree):
            return True
        for subject in self.tree:
            subject.look_again_later()
        return False

    def _compose(self) -> None:
        """Copy what is to be read, and let them go on.

        What a process or its parent has written since the image before they share no more: frames
        need not be compared.
        """
        for subject in self.tree[1:]:
            subject.take_inherited(self.books.find_inherited(subject))
        for subject in self.tree:
            book = self.books[subject]
            wanted = subject.fresh
            if book.knows_before:
                wanted = intersect(wanted, book.to_read)
            pages = subject.open_pages()
            try:
                self.composed[subject] = ComposedPages(pages, wanted, book.before)
            finally:
                pages.close()
        self.objects.copy_written(self.wishes.window_pages)
        self._let_go()

    def _let_go(self) -> None:
        for subject in self.tree:
            subject.let_go()
        for subject in self.tree:
            subject.disclaim()
        self.runs_on = True
        self.freeze_s = time.monotonic() - self.frozen_at
        reach("dump.resumed")

    # -- what a snapshot knows as well as its process did ------------------------------------------

    def _settle(self) -> None:
        """What of their memory is to be in the image."""
        root = self.root
        if not self.composed:
            self._settle_all()
        self.host = describe_host(
            root.source_pid, root.mappings.vmas, interrogate.decode(root.threads[0]["xstate"])
        )
        root.ranges = join_ranges([*root.ranges, *self.away.missing])
        if not self.composed:
            for subject in self.tree[1:]:
                subject.find_inherited(self.books.find_inherited(subject))
        ours = [pid for subject in self.tree for pid in (subject.pid, subject.snapshot)]
        describe_named(self.objects, root.start_time, ours)
        reach("dump.writing")

    def _settle_all(self) -> None:
        for subject in self.tree:
            subject.settle(
                as_seen=subject is self.root and self._is_as_seen,
                knows=subject in self._known,
                goes_on=self.wishes.leave_running and not self.runs_on,
            )

    def _write(self, writer: ImageWriter) -> None:
        """Write the memory, as far as the image before has not got it."""
        wishes, root, base = self.wishes, self.root, self.base
        own = sum(length_bytes(subject.fresh) for subject in self.tree)
        total = self.objects.total_bytes + own
        if base:
            writer.expect_objects(base, FIRST_MEMBER_SPACE)
        self._plan(writer)
        self.written_bytes = sum(_pages_bytes(self.books[subject].fresh) for subject in self.tree)
        for book in (self.books[subject] for subject in self.tree):
            self.written_bytes += _pages_bytes(book.ahead_windows)
            if book.ahead and book.kept and not book.before:
                self.written_bytes += book.kept.page_count * PAGE_BYTES
        fresh = self.books[root].fresh
        self.refreshed = [address for address, _ in (*fresh, *self.books[root].ahead_windows)]
        source = self._open_pages(fresh)
        try:
            if not base and (parent := self.session["parent"]):  # as the next wake may need it
                fresh = order_windows(fresh, read_order(self.store.path, parent))
            if base and self.written_bytes < total // _LITTLE:
                writer.expect_little(self.written_bytes)
            with reporting(wishes.progress, "writing", writer, total):
                writer.add_space(source, fresh, space=0)
                for number, content, held in self.objects.contents(wishes.window_pages):
                    writer.add_space(content, held, space=number)
                for subject in self.tree[1:]:
                    self._write_member(writer, subject)
        finally:
            source.close()
        reach("dump.written")

    def _plan(self, writer: ImageWriter) -> None:
        """Have the writer keep what is as the image before has it."""
        kept = []
        leaves_out = self.wishes.why != TO_DOZE and not self.doze
        for subject, space in self.spaces.items():
            book = self.books[subject]
            book.compare(writer, self.composed.get(subject), leaves_out=leaves_out)
            away = self.away.missing if subject is self.root else ()
            try:
                book.plan(self.wishes.window_pages, away)
            except TooScattered:
                raise NotAsItIs from None
            if book.ahead and book.kept:
                writer.keep_draft(book.ahead.draft, book.kept, space)
            elif book.before and book.kept:
                kept.append((space, book.before, book.kept))
        if kept:
            writer.keep(kept)

    def _write_member(self, writer: ImageWriter, subject: Subject) -> None:
        if windows := self.books[subject].fresh:
            source = self.composed.get(subject) or subject.open_pages()
            try:
                writer.add_space(source, windows, space=self.spaces[subject])
            finally:
                source.close()

    def _open_pages(
        self, fresh: list[tuple[int, int]]
    ) -> ProcessPages | CopiedPages | ComposedPages:
        """Where the memory of the first process is read from."""
        if composed := self.composed.get(self.root):
            return composed
        pages = self.root.open_pages()
        if self.wishes.leave_running and not self.runs_on:
            return self._copy_or_stay(pages, fresh)
        return pages

    def _copy_or_stay(
        self, source: ProcessPages, fresh: list[tuple[int, int]]
    ) -> ProcessPages | CopiedPages:
        """Without a snapshot: a copy of little memory, and they go on; else they stay stopped."""
        if not self.doze or self.written_bytes + self.objects.written_bytes > COPY_LIMIT_BYTES:
            self.notes.append(f"stopped until written, no snapshot: {self.obstacle}")
            return source
        try:
            copied = CopiedPages(source, fresh)
        finally:
            source.close()
        self.objects.copy_written(self.wishes.window_pages)
        with Deferred():
            self._let_go()
        return copied

    # -- the manifest ------------------------------------------------------------------------------

    def _commit(self, writer: ImageWriter, cargo: Cargo) -> ImageSummary:
        """The manifest, once everything it names has been read back and found right."""
        document = self._describe()
        if carried := cargo.describe():
            document["carried"] = carried
        for subject in self.tree:
            subject.kill_snapshot()  # it ends while the disk is waited for
        summary = writer.commit(document, self.wishes.progress)
        self.books.keep()
        if parent := self.session["parent"]:
            inherit_order(self.store, parent, summary.name)
        if self.books[self.root].kept:
            seed_order(self.store, summary.name, self.refreshed)
        reach("dump.committed")
        if self._is_to_keep_account:
            self.books.tie(self.store, summary.name, self.spaces)
        return summary

    def _describe(self) -> dict[str, Any]:
        """The image's document."""
        document = {
            "format": DOCUMENT_FORMAT,
            "taken_unix_s": self.taken,
            "session": self.session,
            "host": self.host,
            **self.root.describe(),
            "objects": self.objects.described,
            "descriptors": self.tables[0],
            "variables": self.variables,
        }
        members = zip(self.tree[1:], self.tables[1:], strict=True)
        if len(self.tree) > 1:
            document["members"] = [
                subject.describe_member(table, self.spaces[subject]) for subject, table in members
            ]
        if self.ended:
            document["zombies"] = describe_ended(self.ended)
        if self.system_v:
            document["system_v"] = self.system_v
        return document

    # -- afterwards --------------------------------------------------------------------------------

    def _finish(self, image: str) -> None:
        """Only now are the processes ended, or let go."""
        if self.wishes.leave_running:
            if not self.runs_on:
                for subject in self.tree:
                    subject.let_go()
                self.freeze_s = time.monotonic() - self.frozen_at
            remember(self.store, self.pid, self.session, self.notes)
        else:
            self.freeze_s = time.monotonic() - self.frozen_at
            with Deferred():
                end_tree(self.tree, self.ended, self.tables, take_down=self.wishes.take_down)
            for subject in self.tree:
                forget_lineage(subject.pid)
            if next(self.objects.named(), None):
                with self.store.load(image) as whole:
                    taken_down = self.wishes.take_down
                    remove_own(self.objects, whole, self.notes, taken_down=taken_down)
        reach("dump.ended")

    def _explain(self, error: OSError) -> LzyError:
        if isinstance(error, ProcessLookupError) or self.root.has_ended:
            return NotFound(f"process {self.pid} ended while it was dumped", pid=self.pid)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreUnavailable(
                f"no room left for the image of pid {self.pid}",
                remedy="free some space or name another folder with --store",
                pid=self.pid,
            )
        return KernelError(f"cannot dump pid {self.pid}: {error}", error.errno or 0, pid=self.pid)

    def _close(self) -> None:
        """Whatever happened: they go on if they are stopped, and nothing of ours stays in them."""
        self.objects.close()
        if self.base:
            self.base.close()
        self.books.give_up()
        for subject in (*self.root.tree, *self.seen.values()):
            subject.close()


def _pages_bytes(windows: Iterable[tuple[int, int]]) -> int:
    return sum([mask.bit_count() for _, mask in windows]) * PAGE_BYTES


def default_name(comm: str, pid: int, taken_unix_s: float) -> str:
    """An image's name when none was given: program, pid, time (UTC)."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in comm)
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(taken_unix_s))
    return f"{plain.strip('.-') or 'process'}-{pid}-{moment}.{int(taken_unix_s % 1 * 1000):03}"
