"""The account of writes over one dump: what it began with, begun anew, tied to the new image.

Account is kept of the root of a tree only. See `tracking` for what the kernel does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import proc, tracking
from .content import join_ranges
from .dense import without
from .errors import KernelError, LzyError
from .huge import gather_huge_pages
from .inject import close_descriptor

if TYPE_CHECKING:
    from .image import Image
    from .store import Store
    from .subject import Subject

Range = tuple[int, int]


class Bookkeeping:
    """One dump's part in an account.

    Its steps in order: `open_base`, `ask`, then `begin` or `read`, `leave_out`, `tie`; at the end
    of a dump that failed, `give_up`.
    """

    def __init__(self, root: Subject, notes: list[str]) -> None:
        self._root = root
        self._notes = notes
        self._tied = False
        self._number = -1  # of the account's descriptor, in the process
        self._inode = 0
        self.account = tracking.find_account(root.pid)
        """The account that stands, as far as it can be relied on."""
        self.begun: tracking.Begun | None = None
        """The account that began anew."""
        self._left_out: Sequence[Range] = ()

    @property
    def left_out(self) -> Sequence[Range]:
        """What the account that stands does not cover, and so counts as written."""
        return self.account.left_out if self.account else ()

    def leave_out(self, still_dense: Sequence[Range]) -> None:
        """Leave out what was written densely of the account that began anew.

        `still_dense`: what of that was left out before and has changed all the same.
        """
        if self.begun:
            self._left_out = join_ranges([*without(self.begun.dense, self.left_out), *still_dense])
            tracking.leave_out(self._root.pid, self._number, self._left_out)

    def open_base(self, store: Store, window_pages: int) -> Image | None:
        """The image that the account began with, if it is there, in this store, and fits."""
        if self.account is None or self.account.store != str(store.path):
            return None
        try:
            base = store.load(self.account.image)
        except LzyError:  # removed, damaged, away: then all of the memory is read
            return None
        if base.window_pages == window_pages:
            return base
        base.close()
        return None

    def ask(self, *, opens: bool) -> None:
        """Now that the process stands still: is it the same account? `opens` one if there is none.

        A note is left if none can be kept: it costs time only.
        """
        pid = self._root.pid
        if tracking.find_account(pid) != self.account:  # another dump came in between
            self.account = None
        self._number = self.account.number if self.account else -1
        if opens and not self.account:
            try:
                self._number = tracking.open_account(self._root.tracee)
            except KernelError as error:
                self._notes.append(f"the next checkpoint reads all of the memory: {error}")
        self._inode = tracking.find_inode(pid, self._number)

    @property
    def is_open(self) -> bool:
        """Whether the process has a descriptor with which account can be kept."""
        return self._number >= 0

    def begin(self) -> list[Range] | None:
        """Begin it anew; the pages that may have been written until now, or None: any may."""
        root = self._root
        try:
            self.begun = tracking.begin_account(root.tracee, self._number, root.vmas)
        except OSError as error:
            self._notes.append(
                f"the next checkpoint reads more of the memory than was written: {error}"
            )
        return self.begun.written if self.begun and self.account else None

    def read(self) -> list[Range] | None:
        """The pages that may have been written since it began; None if there is no account."""
        return tracking.written_ranges(self._root.pid, self._root.vmas) if self.account else None

    def tie(self, store: Store, image: str) -> None:
        """Record that it began with that image, which is committed."""
        root = self._root
        tracking.remember(
            tracking.Account(
                root.pid,
                root.start_time,
                proc.boot_id(),
                self._number,
                self._inode,
                str(store.path),
                image,
                self._left_out,
            )
        )

    def keep(self) -> None:
        """What was begun stays: the image is committed."""
        self._tied = True

    def give_up(self) -> None:
        """Unless it was to be kept: take a descriptor that we opened out of the process again."""
        if not self.is_open or self.account or self._tied:
            return
        root = self._root
        root.let_go()
        tracking.withdraw(root.pid)
        with contextlib.suppress(LzyError, OSError):
            if tracking.find_inode(root.pid, self._number) == self._inode:
                close_descriptor(root.pid, self._number)

    def gather(self) -> None:
        """Have the kernel put huge pages together again where it was left out."""
        if self._left_out:
            gather_huge_pages(self._root.pid, self._left_out, self._root.mappings.vmas)
