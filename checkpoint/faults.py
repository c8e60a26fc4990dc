"""Answers the page faults of a lazily restored process, and loads the rest behind them.

One thread reads the messages, keeps the map of what is missing and installs the pages. That order
is what makes it right:

- Messages are read into the journal, and events among them applied, before any fault is answered.
- While an event is on its way the kernel refuses to install anything (EAGAIN). So what we look up
  after the last event we read still holds when the kernel takes our page. On EAGAIN we read again
  and look everything up afresh.
- A page is forgotten from the map only when it is installed, or when the kernel says that no
  registered VMA is there. A page that is in no map is zero (or there already: EEXIST).
- Bytes that do not authenticate are never installed, and neither are zeros in their place: that
  fault stays open, is tried again later, and all others go on.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import Protocol

from .errors import LzyError
from .journal import CLOSING, CONTEXT, GONE, MAIN, PIECE, SOURCE, Journal, Record
from .linux import PAGE_BYTES
from .linux import uffd as kernel
from .linux.uffd import MESSAGE_BYTES, Userfaultfd
from .missing import MissingPages

_PAGE_MASK = -PAGE_BYTES
_BATCH_BYTES = 16 * MESSAGE_BYTES
_ZERO_BYTES = 64 * PAGE_BYTES  # zeros are mapped so far ahead, up to a multiple of it
_FIRST_RETRY_S = 0.05
_LAST_RETRY_S = 5.0
_LOOK_AROUND_S = 0.1  # how often a busy pager looks for the end of process and keeper
_MANY_MASKS = 1 << 16


class ChunkSource(Protocol):
    """What the pager needs of an image; `lzy.checkpoint.image.Image` is one.

    `runs` are records of three u64, sorted: window address, mask of stored pages, chunk number in
    the low 32 bits of the third; `space_extent(0)` tells which records are the address space's.
    """

    @property
    def window_pages(self) -> int: ...
    @property
    def runs(self) -> memoryview: ...
    def space_extent(self, space: int) -> tuple[int, int]: ...
    def read_chunk(self, chunk: int, into: memoryview) -> int: ...
    def close(self) -> None: ...


class LayoutChanged(Exception):
    """The kernel would not install: an event waits to be read."""


class MemoryGone(Exception):
    """The memory we serve is no more: its process ended or called execve."""


class Context:
    """One userfaultfd: the restored process's memory, or that of a child it forked."""

    __slots__ = ("cursor", "missing", "token", "uffd")

    def __init__(self, token: int, fd: int, missing: MissingPages) -> None:
        self.token = token
        self.uffd = Userfaultfd(fd)
        self.missing = missing
        self.cursor = 0

    def install(self, target: int, source: int, length_bytes: int) -> int:
        """Copy pages to `target`; pages that are there or have no place any more are passed over.

        Returns the bytes really installed. Raises LayoutChanged, MemoryGone, OSError (ENOMEM…).
        """
        installed = 0
        uffd = self.uffd
        while length_bytes:
            try:
                done = uffd.copy(target, source, length_bytes)
                installed += done
            except OSError as error:
                number = error.errno
                if number == errno.EEXIST:
                    done = PAGE_BYTES
                    uffd.wake(target, done)
                elif number == errno.ENOENT:
                    # The range may reach over the end of a VMA: find out page by page, in halves.
                    if length_bytes > PAGE_BYTES:
                        done = (length_bytes // PAGE_BYTES + 1) // 2 * PAGE_BYTES
                        installed += self.install(target, source, done)
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


def _what_it_means(error: OSError) -> Exception:
    if error.errno == errno.EAGAIN:
        return LayoutChanged()
    if error.errno == errno.ESRCH:
        return MemoryGone()
    return error


class FaultServer:
    """Serves every context of one restored process until all is in or all are gone.

    `uffd` and `pidfd` are our descriptors of the process's; `open_image` opens the image anew
    (after it could not be read), `close_descriptor(pid, number)` closes one inside the process;
    `look_around` is called now and then, its descriptor (or -1) is waited for as well.
    """

    def __init__(
        self,
        journal: Journal,
        uffd: int,
        pidfd: int,
        image: ChunkSource | None,
        *,
        open_image: Callable[[], ChunkSource],
        close_descriptor: Callable[[int, int], int],
        log: Callable[[str], None],
        look_around: Callable[[], int] = lambda: -1,
    ) -> None:
        self._journal = journal
        self._pid: int = journal.facts["pid"]
        self._number: int = journal.facts["uffd_number"]
        self._pidfd = pidfd
        self._uffd = uffd
        self._open_image = open_image
        self._close_descriptor = close_descriptor
        self._log = log
        self.left_something = False
        self._look_around = look_around
        self._watched = -1
        self._contexts: dict[int, Context] = {}
        self._asked: deque[tuple[Context, int]] = deque()
        self._stalled: dict[tuple[int, int], None] = {}
        self._retry_at = 0.0
        self._retry_s = _FIRST_RETRY_S
        self._background_at = 0.0
        self._background_s = _FIRST_RETRY_S
        self._background_failed = False
        self._message = ""
        self._faults = 0
        self._installed_bytes = 0
        self._mask_runs: dict[int, tuple[tuple[int, int, int], ...]] = {}
        self._image: ChunkSource | None = None
        self._buffer = memoryview(mmap.mmap(-1, 64 * PAGE_BYTES))
        self._buffer_address = kernel.address_of(self._buffer)
        self._replay()
        if image is not None:
            self._use_image(image)

    def _use_image(self, image: ChunkSource) -> None:
        self._image = image
        first, last = image.space_extent(0)
        runs = image.runs
        self._addresses = runs[3 * first : 3 * last : 3]
        self._masks = runs[3 * first + 1 : 3 * last : 3]
        self._chunks = runs[3 * first + 2 : 3 * last : 3]
        self._count = last - first
        self._window_bytes = image.window_pages * PAGE_BYTES
        self._window_mask = -self._window_bytes

    # -- the journal

    def _replay(self) -> None:
        main = Context(MAIN, self._uffd, MissingPages())
        self._contexts = {MAIN: main}
        source: Context = main
        for kind, a, b, c in self._journal.replay():
            if kind == SOURCE:
                source = self._contexts[a]
            elif kind == PIECE:
                source.missing.add(a, b, c if c < 1 << 63 else c - (1 << 64))
            elif kind == GONE:
                self._contexts.pop(a, None)
            elif kind == CONTEXT:
                self._contexts[a] = Context(a, a, MissingPages())
            else:
                self._apply(source, (kind, a, b, c))

    @property
    def descriptors(self) -> list[int]:
        """The userfaultfds served."""
        return [context.uffd.fd for context in self._contexts.values()]

    def drop_children(self) -> int:
        """Forget contexts of forked children, whose descriptors we do not hold; their number."""
        children = [token for token in self._contexts if token != MAIN]
        for token in children:
            self._journal.append(GONE, token)
            del self._contexts[token]
        return len(children)

    def _compact(self) -> None:
        records: list[Record] = []
        if MAIN not in self._contexts:
            records.append((GONE, MAIN, 0, 0))
        for token, context in self._contexts.items():
            if token != MAIN:
                records.append((CONTEXT, token, 0, 0))
            records.append((SOURCE, token, 0, 0))
            records += [(PIECE, start, end, shift) for start, end, shift in context.missing]
        records.append((SOURCE, MAIN, 0, 0))
        self._journal.rewrite(records)

    def _apply(self, context: Context, event: Record) -> None:
        kind, a, b, c = event
        if kind in (kernel.EVENT_REMOVE, kernel.EVENT_UNMAP):
            context.missing.forget(a, b)
        elif kind == kernel.EVENT_REMAP:
            context.missing.move(a, b, c)
            context.cursor = min(context.cursor, b)
        elif kind == kernel.EVENT_FORK:
            fd = a & 0xFFFFFFFF
            self._contexts[fd] = Context(fd, fd, context.missing.copy())
        else:
            self._log(f"the kernel sent an event of unknown kind {kind:#x}")

    def _attend(self, context: Context) -> bool:
        """Read what the kernel has to say; events are applied, faults noted. Whether it did."""
        journal = self._journal
        if journal.room_bytes < _BATCH_BYTES + 8 * MESSAGE_BYTES:
            self._compact()
        if journal.source != context.token:
            journal.name_source(context.token)
        length = context.uffd.read(journal.address, _BATCH_BYTES)
        if not length:
            return False
        faults: list[int] = []
        events: list[Record] = []
        journal.take(length, faults, events)
        for event in events:
            self._apply(context, event)
        for address in faults:
            self._asked.append((context, address & _PAGE_MASK))
        self._faults += len(faults)
        return True

    # -- serving

    def serve(self) -> None:
        """Go on until nothing is left to do."""
        for context in self._contexts.values():
            context.uffd.wake_all()
        look_at = 0.0
        while self._contexts:
            heard = False
            for context in list(self._contexts.values()):
                heard |= self._attend(context)
            while self._asked:
                self._answer(*self._asked.popleft())
            if heard:
                continue
            now = time.monotonic()
            if now >= look_at:
                look_at = now + _LOOK_AROUND_S
                self._watched = self._look_around()
                self._say_how_it_is()
                if self._some_are_gone():
                    continue
            if self._stalled and now >= self._retry_at:
                self._try_again(now)
            elif now >= self._background_at and self._image is not None:
                self._load_next(now)
            else:
                if self._image is None:
                    self._reopen()
                self._wait(now)
        self._say_how_it_is()

    def _wait(self, now: float) -> None:
        until = self._background_at
        if self._stalled:
            until = min(until, self._retry_at)
        poll = select.poll()
        for context in self._contexts.values():
            poll.register(context.uffd.fd, select.POLLIN)
        for fd in (self._pidfd if MAIN in self._contexts else -1, self._watched):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        poll.poll(max(0.0, until - now) * 1000)

    def _some_are_gone(self) -> bool:
        """Drop contexts whose memory is no more; a userfaultfd does not tell by itself."""
        gone = []
        for context in self._contexts.values():
            try:
                context.uffd.layout_is_changing()
            except OSError:
                gone.append(context)
        for context in gone:
            self._drop(context)
        return bool(gone)

    def _answer(self, context: Context, page: int) -> None:
        if context.token not in self._contexts:
            return
        try:
            piece = context.missing.find(page)
            if piece is None:
                context.zero(page, context.missing.next_start(page))
                return
            if self._image is None:
                raise LzyError("the image is not open")
            start, end, shift = piece
            at = page + shift
            window = at & self._window_mask
            addresses = self._addresses
            index = bisect_left(addresses, window)
            if index < self._count and addresses[index] == window:
                mask = self._masks[index] >> ((at - window) // PAGE_BYTES)
                if mask & 1:
                    self._load(context, index, start, end, shift, page)
                    return
                absent = (mask & -mask).bit_length() - 1 if mask else 64
                following = min(at + absent * PAGE_BYTES, window + self._window_bytes)
            else:
                following = addresses[index] if index < self._count else end + shift
            context.zero(page, min(end, following - shift))
        except LayoutChanged:
            self._asked.append((context, page))
            if not self._attend(context):
                os.sched_yield()
        except MemoryGone:
            self._drop(context)
        except (LzyError, OSError) as error:
            self._stall(context, page, error)

    def _runs_of(self, mask: int) -> tuple[tuple[int, int, int], ...]:
        """(byte offset in the window, byte offset in the chunk, length) of each run in a mask."""
        found = self._mask_runs.get(mask)
        if found is None:
            runs = []
            rest, bit, stored = mask, 0, 0
            while rest:
                skip = (rest & -rest).bit_length() - 1
                rest >>= skip
                bit += skip
                length = (~rest & (rest + 1)).bit_length() - 1
                runs.append((bit * PAGE_BYTES, stored * PAGE_BYTES, length * PAGE_BYTES))
                rest >>= length
                bit += length
                stored += length
            if len(self._mask_runs) >= _MANY_MASKS:
                self._mask_runs.clear()
            found = self._mask_runs[mask] = tuple(runs)
        return found

    def _load(
        self, context: Context, index: int, start: int, end: int, shift: int, page: int = -1
    ) -> None:
        """Install what window `index` has for the piece `[start, end)`, the run of `page` first."""
        image = self._image
        assert image is not None
        mask = self._masks[index]
        base = self._addresses[index] - shift
        low = base if base > start else start
        high = base + self._window_bytes
        if high > end:
            high = end
        wanted: list[tuple[int, int, int]] = []
        for offset, stored, length in self._runs_of(mask):
            first = base + offset
            last = first + length
            if first < low:
                stored += low - first
                first = low
            if last > high:
                last = high
            if first < last:
                if first <= page < last:
                    wanted.insert(0, (first, stored, last - first))
                else:
                    wanted.append((first, stored, last - first))
        if wanted:
            got = image.read_chunk(self._chunks[index] & 0xFFFFFFFF, self._buffer)
            if got != mask.bit_count() * PAGE_BYTES:
                raise LzyError(f"a chunk of {got} bytes does not fit the window at {base:#x}")
            buffer = self._buffer_address
            for first, stored, length in wanted:
                self._installed_bytes += context.install(first, buffer + stored, length)
        context.missing.forget(low, high)
        if page >= 0:
            context.cursor = high

    # -- behind the faults

    def _load_next(self, now: float) -> None:
        """Load one more window, in order of address from where the process was last."""
        if self._background_failed:
            self._background_failed = False
            self._reopen()
        for context in self._contexts.values():
            if context.missing:
                break
        else:
            for context in list(self._contexts.values()):
                self._let_go(context)
            return
        missing = context.missing
        piece = missing.find_from(context.cursor)
        if piece is None:
            context.cursor = 0
            return
        start, end, shift = piece
        position = max(start, context.cursor)
        window = (position + shift) & self._window_mask
        index = bisect_left(self._addresses, window)
        next_stored = self._addresses[index] - shift if index < self._count else end
        try:
            if next_stored >= end:
                missing.forget(position, end)
                context.cursor = end
                return
            high = min(end, next_stored + self._window_bytes)
            context.cursor = high
            self._load(context, index, start, end, shift)
            missing.forget(position, high)
            self._background_s = _FIRST_RETRY_S
        except LayoutChanged:
            context.cursor = position
            if not self._attend(context):
                os.sched_yield()
        except MemoryGone:
            self._drop(context)
        except (LzyError, OSError) as error:
            self._complain(error)
            self._background_failed = True
            self._background_at = now + self._background_s
            self._background_s = min(self._background_s * 2, _LAST_RETRY_S)

    # -- what cannot be read now

    def _stall(self, context: Context, page: int, error: Exception) -> None:
        if not self._stalled:
            self._retry_at = time.monotonic() + self._retry_s
        self._stalled[context.token, page] = None
        self._complain(error)

    def _complain(self, error: Exception) -> None:
        message = str(error)
        if message != self._message:
            self._message = message
            self._log(f"cannot load memory of process {self._pid} now, trying again: {message}")
            self._journal.set_message(message)

    def _try_again(self, now: float) -> None:
        """Ask the stalled faults once more, of an image opened afresh."""
        self._reopen()
        waiting = [
            (context, page)
            for token, page in self._stalled
            if (context := self._contexts.get(token)) is not None
        ]
        before = len(self._stalled)
        self._stalled.clear()
        self._retry_at = now
        for context, page in waiting:
            self._answer(context, page)
        while self._asked:
            self._answer(*self._asked.popleft())
        if not self._stalled:
            self._log("all faults that had to wait are answered")
            self._message = ""
            self._journal.set_message("")
        if len(self._stalled) < before:
            self._retry_s = _FIRST_RETRY_S
        else:
            self._retry_s = min(self._retry_s * 2, _LAST_RETRY_S)
        self._retry_at = time.monotonic() + self._retry_s

    def _reopen(self) -> None:
        try:
            image = self._open_image()
        except (LzyError, OSError) as error:
            self._complain(error)
            if self._image is None:
                self._background_at = time.monotonic() + self._background_s
                self._background_s = min(self._background_s * 2, _LAST_RETRY_S)
            return
        old = self._image
        self._use_image(image)
        if old is not None:
            old.close()

    # -- the end

    def _drop(self, context: Context) -> None:
        """Forget a context and close our descriptor of it."""
        if self._contexts.pop(context.token, None) is None:
            return
        self._journal.append(GONE, context.token)
        for key in [key for key in self._stalled if key[0] == context.token]:
            del self._stalled[key]
        if context.token != MAIN:  # the main one is closed by our end: a new pager may need it
            os.close(context.uffd.fd)

    def _let_go(self, context: Context) -> None:
        """All pages of a context are in: take userfaultfd away from its memory."""
        if context.token != MAIN:
            # Nobody else holds this one: closing it unregisters everything.
            self._drop(context)
            return
        try:
            if not self._unregister_all(context):
                return
        except MemoryGone:
            self._drop(context)
            return
        self._journal.phase = CLOSING
        if self._process_ended():
            self._drop(context)
            return
        if kernel.same_description(self._pid, self._number, self._uffd):
            try:
                result = self._close_descriptor(self._pid, self._number)
                if result < 0:
                    raise OSError(-result, os.strerror(-result))
            except Exception as error:  # whatever it is, the process has all its memory
                if self._process_ended():
                    self._drop(context)
                    return
                self.left_something = True
                self._log(
                    f"all memory is in, but descriptor {self._number} of process {self._pid}"
                    f" could not be closed and stays (it does no harm): {error}"
                )
        self._drop(context)

    def _process_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _unregister_all(self, context: Context) -> bool:
        """Unregister every VMA; False when the layout changed meanwhile and it must be redone."""
        try:
            with open(f"/proc/{self._pid}/maps", "rb") as maps:
                lines = maps.readlines()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise MemoryGone from error
        for line in lines:
            start, _, end = line.split(b" ", 1)[0].partition(b"-")
            low, high = int(start, 16), int(end, 16)
            try:
                kernel.unregister(context.uffd.fd, low, high - low)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    raise MemoryGone from error
                # EINVAL: a VMA that cannot have been registered, or that is gone by now.
        changed = self._attend(context)
        try:
            changed |= context.uffd.layout_is_changing()
        except OSError as error:
            raise MemoryGone from error
        return not changed and not self._asked

    def _say_how_it_is(self) -> None:
        self._journal.set_numbers(
            faults=self._faults,
            installed=self._installed_bytes,
            stalled=len(self._stalled),
            missing=sum(context.missing.length_bytes for context in self._contexts.values()),
        )
