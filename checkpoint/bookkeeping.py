"""The accounts of writes over one dump: what each began with, begun anew, tied to the new image.

Account is kept of each process of a tree by itself; one record tells with which image all of them
began. See `tracking` for what the kernel does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import proc, tracking
from .ahead import Ahead, is_much, read_ahead
from .content import intersect, join_ranges, own_page_ranges, subtract, windows_of
from .dense import without
from .errors import KernelError, LzyError
from .huge import gather_huge_pages
from .increment import Kept, plan_checkpoint
from .inject import close_descriptor
from .interrupts import Deferred
from .recheck import recheck
from .urgency import Urgent

if TYPE_CHECKING:
    from .composed import ComposedPages
    from .image import Image
    from .store import Store
    from .subject import Subject
    from .tracee import Tracee
    from .writer import ImageWriter

Range = tuple[int, int]


class Book:
    """The account of one process in one dump.

    Its steps in order: perhaps `open_ahead` or `take_up_ahead`, and then `read_ahead` or
    `protect_ahead`; `ask`, then `begin`, `look` or `read`, `compare`, `plan`; at the end of a dump
    that failed, `give_up`.
    """

    def __init__(
        self, subject: Subject, account: tracking.Account | None, notes: list[str]
    ) -> None:
        self.subject = subject
        self.account = account
        """The account that stands, as far as it can be relied on."""
        self.begun: tracking.Begun | None = None
        """The account that began anew."""
        self.before: Image | None = None
        """What the image before has of this process by itself."""
        self.ahead: Ahead | None = None
        """What was read ahead of this very image, `before` or not (see `ahead`)."""
        self.written: list[Range] | None = None
        """What may have been written since the one or the other; None: any of it."""
        self.kept: Kept | None = None
        """What is taken from `before`, or from what was read ahead; None if nothing is."""
        self.fresh: list[tuple[int, int]] = []
        """The windows that are to be read."""
        self.left_out: Sequence[Range] = account.left_out if account else ()
        """What the account that stands does not cover, and so counts as written."""
        self._left_out: Sequence[Range] = ()
        self._notes = notes
        self._number = -1  # of the account's descriptor, in the process
        self._inode = 0
        self._is_ahead = False  # the account began before the process was stopped
        self._is_lost = False  # since when it was begun anew is unknown

    @property
    def is_open(self) -> bool:
        """Whether the process has a descriptor with which account can be kept."""
        return self._number >= 0

    def open_ahead(self) -> bool:
        """Stop it for a moment, to open an account before its dump; whether there is one."""
        subject = self.subject
        with Deferred(), Urgent():
            try:
                subject.stop()
                subject.tracee.prepare(vmas=subject.vmas)
                self._open(subject.tracee)
            finally:
                subject.let_go()
        return self.is_open

    def take_up_ahead(self, before: Image | None) -> bool:
        """Go on with the account that stands, from that image; whether reading ahead is of use.

        What was left out of it has to be read during the stop anyway.
        """
        account, self.before = self.account, before
        if not (account and before) or is_much(self.left_out) or self.inherited_before:
            return False
        self._number, self._inode = account.number, account.inode
        return True

    def has_written_much(self) -> bool:
        """Whether so much was written since the image before that it is better read ahead."""
        pid, vmas = self.subject.pid, self.subject.vmas
        written = subtract(tracking.written_ranges(pid, vmas), self.left_out)
        # New mappings count whole, whatever there is in them.
        return is_much(written) and is_much(intersect(written, own_page_ranges(pid, vmas)))

    def read_ahead(self, writer: ImageWriter, order: Sequence[int]) -> None:
        """Read its memory while it runs; what was not written since need not be read again.

        Of one with an account, what was written; precondition: its record is withdrawn.
        """
        self.account = None
        self._is_lost = self.before is not None  # what was written since, if this fails
        self.ahead = read_ahead(
            self.subject.pid,
            self._number,
            writer,
            order,
            base=self.before,
            left_out=self.left_out,
        )
        self._is_lost = False

    def protect_ahead(self) -> None:
        """Have its account begin while it runs: there is less to do during the stop."""
        tracking.protect_running(self.subject.pid, self._number, self.subject.vmas)

    def ask(self, *, opens: bool) -> None:
        """Now that the process stands still: `opens` an account if there is none.

        A note is left if none can be kept: it costs time only.
        """
        if self.is_open:
            self._is_ahead = tracking.find_inode(self.subject.pid, self._number) == self._inode
        if not self._is_ahead:
            self._number = self.account.number if self.account else -1
            if opens and not self.account:
                self._open(self.subject.tracee)
            else:
                self._inode = tracking.find_inode(self.subject.pid, self._number)

    def _open(self, tracee: Tracee) -> None:
        try:
            self._number = tracking.open_account(tracee)
        except KernelError as error:
            self._note(f"the next checkpoint reads all of the memory: {error}")
        self._inode = tracking.find_inode(self.subject.pid, self._number)

    def begin(self) -> None:
        """Begin it anew, and see what was `written` until now.

        Precondition: the record of the tree is withdrawn.
        """
        subject = self.subject
        try:
            self.begun = tracking.begin_account(subject.tracee, self._number, subject.vmas)
        except OSError as error:
            self._note(f"the next checkpoint reads more of the memory than was written: {error}")
        knows = (self.account or self._is_ahead) and not self._is_lost
        self.written = self.begun.written if self.begun and knows else None

    def look(self) -> list[Range]:
        """See what was `written`, and the pages that there are. Precondition: an account stands."""
        pages, self.written = tracking.look_at_all(self.subject.pid, self.subject.vmas)
        return pages

    def read(self) -> None:
        """See what was `written`, if there is an account."""
        if self.account:
            self.written = tracking.written_ranges(self.subject.pid, self.subject.vmas)

    @property
    def knows_before(self) -> bool:
        """Whether there is something to hold the process against, and what was written since."""
        return bool(self.before or self.ahead) and self.written is not None

    @property
    def changed(self) -> list[Range]:
        """What was written since the image before. Precondition: `knows_before`."""
        return join_ranges([*(self.written or ()), *(self.ahead.written if self.ahead else ())])

    @property
    def ahead_windows(self) -> list[tuple[int, int]]:
        """Those that were read ahead because they had been written, if there is an image before."""
        return self.ahead.windows if self.ahead and self.before and self.kept else []

    @property
    def to_read(self) -> list[Range]:
        """What may differ from what it is held against, ascending."""
        return join_ranges([*(self.written or ()), *self.inherited_before])

    @property
    def inherited_before(self) -> list[Range]:
        """What it had from its parent in the image before."""
        found = self.before.document.get("inherited", ()) if self.before else ()
        return [(start, end) for start, end in found]

    def compare(
        self, writer: ImageWriter, copied: ComposedPages | None, *, leaves_out: bool
    ) -> None:
        """See what of the memory that was left out of the account has really been written.

        `copied`: what was copied of it while it stood still; else it still does, or there is a
        snapshot. `leaves_out`: what was written densely is left out from now on.
        """
        base, subject = self.before, self.subject
        if base is None or self.written is None:
            return
        written = join_ranges(self.written)
        left_out = intersect(subject.fresh, intersect(written, list(self.left_out)))
        still_dense: Sequence[Range] = ()
        if left_out:
            pages = copied or subject.open_pages()
            try:
                checked = recheck(base, pages, windows_of(left_out, base.window_pages))
            finally:
                if pages is not copied:
                    pages.close()
            written = subtract(written, checked.same)
            still_dense = checked.dense
            writer.expect(base, (at for at, _ in windows_of(still_dense, base.window_pages)))
        if leaves_out and self.begun:
            dense = self.begun.dense
            if self.ahead:
                dense = join_ranges([*dense, *self.ahead.dense])
            self._left_out = join_ranges([*without(dense, self.left_out), *still_dense])
            tracking.leave_out(subject.pid, self._number, self._left_out)
        self.written = written

    def plan(self, window_pages: int, away: Sequence[Range] = ()) -> None:
        """What is `kept` and what is `fresh`, of what is stored with this process.

        What it shared with its parent the image before has there, and not with this process: what
        it has for itself by now is read. Raises TooScattered.
        """
        own = self.subject.fresh
        if self.ahead and self.written is not None:
            draft = self.ahead.draft
            unwritten = subtract(own, self.written)  # of which nothing has to be read again
            self.kept, self.fresh = plan_checkpoint(draft, own, self.written, unwritten)
            return
        if self.before is None or self.written is None:
            self.fresh = windows_of(own, window_pages)
            return
        self.kept, self.fresh = plan_checkpoint(self.before, own, self.to_read, away)

    def describe(self, store: Store, image: str, space: int) -> tracking.Account:
        """The account that began with that image, of which that space is the process."""
        return tracking.Account(
            pid=self.subject.pid,
            start_time=self.subject.start_time,
            boot_id=proc.boot_id(),
            number=self._number,
            inode=self._inode,
            store=str(store.path),
            image=image,
            space=space,
            left_out=self._left_out,
        )

    def give_up(self) -> None:
        """Take a descriptor that was opened out of the process again."""
        if not self.is_open or self.account:
            return
        subject = self.subject
        subject.let_go()
        with contextlib.suppress(LzyError, OSError):
            if tracking.find_inode(subject.pid, self._number) == self._inode:
                close_descriptor(subject.pid, self._number)

    def gather(self) -> None:
        """Have the kernel put huge pages together again where it was left out."""
        if self._left_out:
            subject = self.subject
            gather_huge_pages(subject.pid, self._left_out, subject.mappings.vmas)

    def _note(self, note: str) -> None:
        if note not in self._notes:  # the same of each process
            self._notes.append(note)


class Books:
    """The accounts of all processes of a dump."""

    def __init__(self, root: Subject, notes: list[str]) -> None:
        self._root = root
        self._notes = notes
        self._accounts = tracking.find_accounts(root.pid)
        self._base: Image | None = None
        self._books: dict[Subject, Book] = {}
        self._tied = False
        self._is_withdrawn = False

    def __getitem__(self, subject: Subject) -> Book:
        return self._books[subject]

    def open_base(self, store: Store, window_pages: int) -> Image | None:
        """The image that the accounts began with, if it is there, in this store, and fits."""
        known = next(iter(self._accounts.values()), None)
        if known is None or known.store != str(store.path):
            return None
        try:
            base = store.load(known.image)
        except LzyError:  # removed, damaged, away: then all of the memory is read
            return None
        if base.window_pages == window_pages:
            self._base = base
            return base
        base.close()
        return None

    def take_base(self, base: Image) -> None:
        """Rely on no account, but hold the first process against that image."""
        self._accounts.clear()
        self._base = base

    def open_ahead(self, subject: Subject) -> Book | None:
        """Put a process under account that runs, before it is stopped to be dumped."""
        book = self._books[subject] = Book(subject, None, self._notes)
        return book if book.open_ahead() else None

    def take_up_ahead(self, subject: Subject) -> Book | None:
        """Go on with the account of a process that runs; None where that is of no use."""
        account = self._accounts.get(subject.pid)
        before = self._base.in_space(account.space) if self._base and account else None
        book = Book(subject, account, self._notes)
        return book if book.take_up_ahead(before) else None

    def read_ahead(self, book: Book, writer: ImageWriter, order: Sequence[int]) -> None:
        """Have one that was taken up read ahead, after which the record holds no more."""
        self.withdraw()
        self._books[book.subject] = book
        book.read_ahead(writer, order)

    def compare(self) -> None:
        """Now that all stand still: are they the same accounts? Another dump may have come between.

        To be called before `ask`.
        """
        if self._is_withdrawn:
            now = {pid: known for pid, known in self._accounts.items() if tracking.stands(known)}
        else:
            now = tracking.find_accounts(self._root.pid)
        self._accounts = {
            pid: known for pid, known in self._accounts.items() if now.get(pid) == known
        }

    def ask(self, subject: Subject, *, opens: bool) -> None:
        """Take up the account of a process that stands still; see `Book.ask`."""
        account = self._accounts.get(subject.pid)
        book = self._books.get(subject) or Book(subject, account, self._notes)
        self._books[subject] = book
        if not book.ahead and self._base and (account or subject is self._root):
            book.before = self._base.in_space(account.space if account else 0)
        book.ask(opens=opens)

    def find_inherited(self, subject: Subject) -> list[Range]:
        """What a process had from its parent in the image before, and neither has written since."""
        book = self._books[subject]
        parent = self._books[subject.parent] if subject.parent else None
        if not (book.before and parent and parent.before):
            return []
        if book.written is None or parent.written is None:
            return []
        if book.before.document["process"]["parent"] != parent.before.document["pid"]:
            return []  # another one, who had ended
        changed = join_ranges([*book.changed, *parent.changed])
        return subtract(book.inherited_before, changed)

    def withdraw(self) -> None:
        """Rely no more on what is recorded: to be called before the first account begins anew."""
        tracking.withdraw(self._root.pid)
        self._is_withdrawn = True

    @property
    def takes_from_base(self) -> bool:
        """Whether anything is taken from the image before."""
        return any(book.before and book.written is not None for book in self._books.values())

    def tie(self, store: Store, image: str, spaces: dict[Subject, int]) -> None:
        """Record that they began with that image, which is committed."""
        for subject in self._books.keys() - spaces.keys():  # it has left the tree
            self._books.pop(subject).give_up()
        of_root = self._books[self._root]
        if not of_root.is_open:
            return
        others = (
            book.describe(store, image, spaces[subject])
            for subject, book in self._books.items()
            if book.is_open and book is not of_root
        )
        tracking.remember(of_root.describe(store, image, spaces[self._root]), others)

    def keep(self) -> None:
        """What was begun stays: the image is committed."""
        self._tied = True

    def give_up(self) -> None:
        """Unless they were to be kept: take what we opened out of the processes again."""
        if not self._tied:
            for book in self._books.values():
                book.give_up()

    def gather(self) -> None:
        """Have the kernel put huge pages together again, see `Book.gather`."""
        for book in self._books.values():
            book.gather()
