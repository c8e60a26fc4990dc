"""One userfaultfd and what its memory still lacks: putting pages in place, whatever is there."""

from __future__ import annotations

import errno
import select
from collections.abc import Sequence

from .course import Course
from .linux import PAGE_BYTES
from .linux.uffd import Userfaultfd
from .missing import MissingPages

_ZERO_BYTES = 64 * PAGE_BYTES  # zeros are mapped so far ahead, up to a multiple of it


class LayoutChanged(Exception):
    """The kernel would not install: an event waits to be read."""


class MemoryGone(Exception):
    """The memory we serve is no more: its process ended or called execve."""


class Context:
    """The restored process's memory (`token` 0), or that of a child it forked.

    `order`: window addresses of the image in the order in which it is thought to need them.
    `moved`: where memory has been moved to; as in a map of what is missing, but without shifts.
    `stalled`: pages that were asked for and could not be read, in the order in which they were.
    """

    __slots__ = ("_messages", "course", "missing", "moved", "stalled", "token", "uffd")

    def __init__(
        self,
        token: int,
        fd: int,
        missing: MissingPages,
        order: Sequence[int] = (),
        *,
        keeps_account: bool = False,
    ) -> None:
        self.token = token
        self.uffd = Userfaultfd(fd, keeps_account=keeps_account)
        self.missing = missing
        self.moved = MissingPages()
        self.stalled: dict[int, None] = {}
        self.course = Course(missing, order)
        self._messages = select.poll()
        self._messages.register(fd, select.POLLIN)

    def has_message(self) -> bool:
        """Whether the kernel has something to say. Precondition: it was made pollable."""
        return bool(self._messages.poll(0))

    def install(self, target: int, source: int, length_bytes: int, *, forgets: bool = False) -> int:
        """Copy pages to `target`; pages that are there or have no place any more are passed over.

        Returns the bytes really installed; with `forgets` they, and only they, are missing no more.
        Raises LayoutChanged, MemoryGone, OSError (ENOMEM…).
        """
        installed = 0
        uffd = self.uffd
        while length_bytes:
            try:
                done = uffd.copy(target, source, length_bytes)
                installed += done
                if forgets:
                    self.missing.forget(target, target + done)
            except OSError as error:
                number = error.errno
                if number == errno.EEXIST:
                    done = PAGE_BYTES
                    uffd.wake(target, done)
                elif number == errno.ENOENT:
                    # The range may reach over the end of a VMA: find out page by page, in halves.
                    if length_bytes > PAGE_BYTES:
                        done = (length_bytes // PAGE_BYTES + 1) // 2 * PAGE_BYTES
                        installed += self.install(target, source, done, forgets=forgets)
                    elif self._is_changing():
                        # It waited for the VMA behind a call that has moved it since, and looked
                        # whether an event is on its way before that.
                        raise LayoutChanged from error
                    else:
                        done = PAGE_BYTES
                else:
                    raise _what_it_means(error) from error
            target += done
            source += done
            length_bytes -= done
        return installed

    def zero(self, page: int, limit: int) -> None:
        """Map zeros at `page`, and on to `limit` where that is easily done."""
        length_bytes = min(limit, (page | (_ZERO_BYTES - 1)) + 1) - page
        while True:
            try:
                self.uffd.zero(page, length_bytes)
                return
            except OSError as error:
                if error.errno == errno.ENOENT and length_bytes > PAGE_BYTES:
                    length_bytes = PAGE_BYTES
                    continue
                if error.errno in (errno.ENOENT, errno.EEXIST):
                    self.uffd.wake(page, PAGE_BYTES)
                    return
                raise _what_it_means(error) from error

    def _is_changing(self) -> bool:
        try:
            return self.uffd.layout_is_changing()
        except OSError as error:
            raise _what_it_means(error) from error

    def is_gone(self) -> bool:
        """Whether the memory is no more; a userfaultfd does not tell by itself."""
        try:
            self.uffd.layout_is_changing()
        except OSError:
            return True
        return False


def _what_it_means(error: OSError) -> Exception:
    if error.errno == errno.EAGAIN:
        return LayoutChanged()
    if error.errno == errno.ESRCH:
        return MemoryGone()
    return error
