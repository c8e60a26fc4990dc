"""Answers the page faults of a lazily restored process, and loads the rest behind them.

One thread reads the messages, keeps the map of what is missing and installs the pages. That order
is what makes it right:

- Messages are read into the journal, and events among them applied, before any fault is answered.
- While an event is on its way the kernel refuses to install anything (EAGAIN). So what we look up
  after the last event we read still holds when the kernel takes our page. On EAGAIN we read again
  and look everything up afresh.
- A page is forgotten from the map only when it is installed, or when the kernel says that no
  registered VMA is there. A page that is in no map is zero (or there already: EEXIST). Of a process
  that goes to doze the map says more than is missing: what is there, or not heard of, may go yet.
  So what is asked for one by one is forgotten only if it was really installed.
- Bytes that do not authenticate are never installed, and neither are zeros in their place: that
  fault stays open, is tried again later, and all others go on.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import time
from collections import deque
from collections.abc import Callable, Sequence

from .contexts import Context, LayoutChanged, MemoryGone
from .course import Step
from .errors import LzyError
from .harbour import Harbour
from .journal import CLOSING, CONTEXT, GONE, MAIN, MOVED, PIECE, SOURCE, Journal, Record
from .linux import PAGE_BYTES, address_of
from .linux import uffd as kernel
from .linux.uffd import MESSAGE_BYTES
from .missing import MissingPages, follow
from .readahead import Readahead
from .windows import ChunkSource, Windows
from .working_set import merge_order

_PAGE_MASK = -PAGE_BYTES
_BATCH_BYTES = 16 * MESSAGE_BYTES
_SPARE_RECORDS = 128  # kept free in the journal for records of our own
_NEAR_READS = 4
_READ_PATIENCE_S = 0.002
_MOST_QUEUED = 64  # steps behind the faults that are decided on
_FIRST_RETRY_S = 0.05
_LAST_RETRY_S = 5.0
_LOOK_AROUND_S = 0.1  # how often a busy pager looks for the end of process and keeper
_REST_S = 1.0  # the same of one that has nothing to do but to answer
_DOZE_BYTES = 16 * PAGE_BYTES  # what a fault brings in where only what is touched is wanted
_LINGER_S = 50e-6  # a fault is often followed by another: so long nothing else is begun
_AHEAD_BYTES = 4 << 20  # read, authenticated and not yet installed, at most
_MOST_READERS = 2  # the pager itself wants a core, and two read as fast as it installs


class FaultServer:
    """Serves every context of one restored process until all is in or all are gone.

    `inside`: (number in the process, our duplicate) of the descriptors to be closed at the end.
    `uffd` and `pidfd` are our descriptors of the process's; `open_image` opens the image anew
    (after it could not be read), `close_descriptor(pid, number)` closes one inside the process;
    `harbour` is where forked children's userfaultfds are kept. `look_around` is called now and
    then, its descriptor (or -1) is waited for as well; `reach` hears of each stage. `order` are
    window addresses in the order in which the process is thought to need them; `keep_order` gets
    the one that is known better by then, before anybody can see that all is in.
    """

    def __init__(
        self,
        journal: Journal,
        uffd: int,
        pidfd: int,
        image: ChunkSource | None,
        *,
        inside: Sequence[tuple[int, int]],
        open_image: Callable[[], ChunkSource],
        close_descriptor: Callable[[int, int], int],
        log: Callable[[str], None],
        harbour: Harbour | None = None,
        order: Sequence[int] = (),
        keep_order: Callable[[list[int]], None] = lambda order: None,
        look_around: Callable[[], int] = lambda: -1,
        reach: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self._journal = journal
        self._pid: int = journal.facts["pid"]
        self._inside = inside
        self._pidfd = pidfd
        self._uffd = uffd
        self._open_image = open_image
        self._close_descriptor = close_descriptor
        self._log = log
        self._reach = reach
        self._harbour = harbour
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
        self._poll: select.poll | None = None
        self._windows: Windows | None = None
        self._readahead: Readahead | None = None
        self._queue: deque[tuple[Context, Step]] = deque()
        self._order = order
        self._keep_order = keep_order
        self._on_demand: bool = journal.facts.get("on_demand", False)
        self._place = 0  # how many windows of the order are in
        self._needed: dict[int, int] = {}  # see `merge_order`
        self._unneeded: dict[int, None] = {}
        self._buffer = memoryview(mmap.mmap(-1, 64 * PAGE_BYTES))
        self._buffer_address = address_of(self._buffer)
        self._replay()
        if image is not None:
            self._use_image(image)

    def _use_image(self, image: ChunkSource) -> None:
        """Serve from `image` from now on; the one before is closed."""
        self._end_readahead()
        self._queue.clear()
        if self._windows is not None:
            self._windows.image.close()
        self._windows = Windows(image)
        for context in self._contexts.values():
            context.course.restart()

    def _begin_readahead(self, windows: Windows) -> Readahead:
        inside = {ours for _, ours in self._inside}
        private = {self._journal.fd, self._pidfd, self._watched, *inside, *self.descriptors}
        private.discard(-1)
        depth = max(4, _AHEAD_BYTES // windows.length)
        readers = min(os.cpu_count() or 1, _MOST_READERS)
        self._poll = None
        self._readahead = Readahead(windows.image, depth, windows.length, private, readers=readers)
        return self._readahead

    def _end_readahead(self) -> None:
        if self._readahead is not None:
            self._poll = None
            self._readahead.close()
            self._readahead = None

    # -- the journal

    def _replay(self) -> None:
        main = Context(
            MAIN,
            self._uffd,
            MissingPages(),
            self._order,
            keeps_account=self._journal.facts.get("keeps_account", False),
        )
        self._contexts = {MAIN: main}
        source: Context = main
        for kind, a, b, c in self._journal.replay():
            if kind == SOURCE:
                source = self._contexts[a]
            elif kind == PIECE:
                source.missing.add(a, b, c if c < 1 << 63 else c - (1 << 64))
            elif kind == MOVED:
                source.moved.add(a, b)
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

    def _compact(self) -> None:
        records: list[Record] = []
        if MAIN not in self._contexts:
            records.append((GONE, MAIN, 0, 0))
        for token, context in self._contexts.items():
            if token != MAIN:
                records.append((CONTEXT, token, 0, 0))
            records.append((SOURCE, token, 0, 0))
            records += [(PIECE, start, end, shift) for start, end, shift in context.missing]
            records += [(MOVED, start, end, 0) for start, end, _ in context.moved]
        records.append((SOURCE, MAIN, 0, 0))
        self._journal.rewrite(records)

    def _apply(self, context: Context, event: Record) -> Context | None:
        """Follow what the process did; the context of its child if it forked."""
        kind, a, _, _ = event
        if follow(event, context.missing, context.moved):
            return None
        if kind == kernel.EVENT_FORK:
            fd = a & 0xFFFFFFFF
            self._poll = None
            self._contexts[fd] = child = Context(fd, fd, context.missing.copy())
            return child
        self._log(f"the kernel sent an event of unknown kind {kind:#x}")
        return None

    def _attend(self, context: Context) -> bool:
        """Read what the kernel has to say; events are applied, faults noted. Whether it did."""
        journal = self._journal
        if journal.room_bytes < _BATCH_BYTES + _SPARE_RECORDS * MESSAGE_BYTES:
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
            if event[0] == kernel.EVENT_FORK:
                self._stow(event[1] & 0xFFFFFFFF)
        for event in events:
            child = self._apply(context, event)
            if child is not None:
                child.uffd.make_pollable()
        for address in faults:
            self._asked.append((context, address & _PAGE_MASK))
        self._faults += len(faults)
        return True

    def _settle_harbour(self) -> None:
        """Bring the harbour into line with the journal, between which our forerunner was killed."""
        if self._harbour is None:
            return
        there = self._harbour.look()
        for fd in there.values():
            os.close(fd)
        for token in there.keys() - self._contexts.keys():
            self._harbour.release(token)
        for token in self._contexts.keys() - there.keys() - {MAIN}:
            self._stow(token)

    def _stow(self, fd: int) -> None:
        """Have the process itself hold a forked child's userfaultfd, beside us."""
        if self._harbour is not None:
            try:
                self._harbour.stow(fd, fd)
            except OSError as error:
                self._log(f"a forked child's memory hangs on pager and keeper alone: {error}")

    # -- serving

    def prepare(self) -> None:
        """Open the image if it was not handed to us; if that fails, `serve` goes on trying."""
        self._settle_harbour()
        if self._windows is None:
            self._reopen()

    def serve(self) -> None:
        """Go on until nothing is left to do."""
        for context in self._contexts.values():
            context.uffd.make_pollable()
            context.uffd.wake_all()
        look_at = linger_until = 0.0
        clock = time.monotonic
        while self._contexts:
            heard = False
            for context in list(self._contexts.values()):
                heard |= self._attend(context)
            # Also what was noted elsewhere: a fault heard of while the end was being prepared.
            if heard or self._asked:
                while self._asked:
                    self._answer(*self._asked.popleft())
                    self._keep_readers_busy()
                linger_until = clock() + _LINGER_S
                continue
            now = clock()
            if now < linger_until and not self._is_hurried():
                continue
            if now >= look_at:
                look_at = now + _LOOK_AROUND_S
                self._look()
            elif self._stalled and now >= self._retry_at:
                self._try_again(now)
            elif now < self._background_at:
                if self._readahead is not None:
                    self._readahead.clear_done()
                until = min(self._background_at, self._retry_at if self._stalled else 1e18)
                self._wait(min(until, look_at + 1) - now)
            elif self._windows is None:
                self._reopen()
            elif self._rests():
                self._wait(_REST_S)
            else:
                self._load_next(now)
        self._end_readahead()
        self._say_how_it_is()
        self._hand_over_order()
        if self._windows is not None:
            self._windows.image.close()
            self._windows = None

    def _is_hurried(self) -> bool:
        """Whether what comes next behind the faults will probably be asked for in a moment."""
        if not self._queue or self._readahead is None:
            return False
        step = self._queue[0][1]
        return (
            step.likely and step.number in self._readahead and self._readahead.is_ready(step.number)
        )

    def _rests(self) -> bool:
        """Whether only what is touched is wanted, and something is missing still.

        Not of forked children: until they are whole, their memory hangs on pager and keeper alone.
        """
        if not self._on_demand or self._journal.is_roused:
            self._on_demand = False
            return False
        wanting = [token for token, context in self._contexts.items() if context.missing]
        return wanting == [MAIN]

    def _look(self) -> None:
        """See who is gone, and say how it is."""
        watched = self._look_around()
        if watched != self._watched:
            self._watched = watched
            self._poll = None
        self._say_how_it_is()
        for context in [context for context in self._contexts.values() if context.is_gone()]:
            self._drop(context)

    def _wait(self, timeout_s: float) -> None:
        """Wait for messages, for a chunk that was read ahead, for the end of process or keeper."""
        poll = self._poll
        if poll is None:
            poll = self._poll = select.poll()
            for context in self._contexts.values():
                poll.register(context.uffd.fd, select.POLLIN)
            if MAIN in self._contexts:
                poll.register(self._pidfd, select.POLLIN)
            if self._watched >= 0:
                poll.register(self._watched, select.POLLIN)
            if self._readahead is not None:
                for fd in (self._readahead.done_fd, *self._readahead.reader_fds):
                    poll.register(fd, select.POLLIN)
        poll.poll(timeout_s * 1000)

    def _answer(self, context: Context, page: int) -> None:
        if not self._is_served(context):
            return
        try:
            piece = context.missing.find(page)
            if piece is None:
                context.zero(page, context.missing.next_start(page))
                return
            windows = self._windows
            if windows is None:
                raise LzyError("the image is not open")
            _, end, shift = piece
            number = windows.find_from(page + shift)
            absent_until = windows.absent_until(page + shift, number)
            if absent_until:
                context.zero(page, min(end, absent_until - shift))
                return
            high = self._load(context, windows, number, piece, page)
            low = windows.address(number) - shift
            walked = (high, high)
            if not self._on_demand and not context.course.is_known(windows.address(number)):
                walked = context.course.follow(page, low, high, windows.length)
            if context.token == MAIN:
                self._note_need(context, windows, number, walked, shift)
        except LayoutChanged:
            self._asked.append((context, page))
            self._attend_now(context)
        except MemoryGone:
            self._drop(context)
        except (LzyError, OSError) as error:
            self._stall(context, page, error)

    def _load(
        self,
        context: Context,
        windows: Windows,
        number: int,
        piece: tuple[int, int, int],
        page: int = -1,
    ) -> int:
        """Install what window `number` has for a piece, from `page` on first; where that ends."""
        start, end, shift = piece
        base = windows.address(number) - shift
        low = base if base > start else start
        high = base + windows.length
        if high > end:
            high = end
        if self._on_demand and page >= 0:
            low = max(low, page & -_DOZE_BYTES)
            high = min(high, (page & -_DOZE_BYTES) + _DOZE_BYTES)
        parts = windows.parts(number, low, high, shift, page)
        may_go_yet = self._on_demand and context.token == MAIN
        if parts:
            readahead = self._readahead
            if page >= 0:
                self._await_reader(number)
            slot = readahead.take(number) if readahead is not None else None
            if slot is None or readahead is None:
                windows.read(number, self._buffer)
                self._install(context, parts, self._buffer_address, forgets=may_go_yet)
            else:
                try:
                    windows.check(number, slot.length_bytes)
                    self._install(context, parts, slot.address, forgets=may_go_yet)
                finally:
                    readahead.give_back(slot)
        if not may_go_yet:
            context.missing.forget(low, high)
        return high

    def _await_reader(self, number: int) -> None:
        """Let a reader end that is reading window `number` or is about to: sooner than anew."""
        readahead = self._readahead
        if readahead is None or number not in readahead or readahead.is_ready(number):
            return
        before = 0  # reads that must end first
        for _, step in self._queue:
            if step.number == number:
                break
            if step.number in readahead and not readahead.is_ready(step.number):
                before += 1
                if before == _NEAR_READS:
                    return
        deadline = time.monotonic() + _READ_PATIENCE_S
        while not readahead.is_ready(number) and time.monotonic() < deadline:
            readahead.clear_done()
            if not readahead.is_ready(number):
                readahead.wait_done(_READ_PATIENCE_S)

    def _install(
        self, context: Context, parts: list[tuple[int, int, int]], source: int, *, forgets: bool
    ) -> None:
        for address, offset, length in parts:
            installed = context.install(address, source + offset, length, forgets=forgets)
            self._installed_bytes += installed

    # -- the order of need

    def _note_need(
        self,
        context: Context,
        windows: Windows,
        number: int,
        walked: tuple[int, int],
        shift: int,
    ) -> None:
        """Remember that window `number` was asked for, and first what a walk came through."""
        low, high = walked
        if low < high:
            for passed in range(windows.find_from(low + shift), number):
                address = windows.address(passed)
                if address - shift >= high:
                    break
                if context.missing.find(address - shift) is None:  # else it would have asked
                    self._needed.setdefault(address, self._place)
        self._needed.setdefault(windows.address(number), self._place)

    def _hand_over_order(self) -> None:
        """Say in which order memory was needed, if this wake has taught anything; once."""
        if self._needed:
            self._keep_order(merge_order(self._order, self._needed, self._unneeded))
            self._needed = {}

    # -- behind the faults

    def _load_next(self, now: float) -> None:
        """Load one more window."""
        if self._background_failed:
            self._background_failed = False
            self._reopen()
        windows = self._windows
        assert windows is not None
        # Forked children first, the youngest before all: until they are whole, their memory
        # hangs on pager and keeper alone.
        for context in reversed(self._contexts.values()):
            if context.missing:
                break
            if context.token != MAIN:
                self._drop(context)
                return
        else:
            for context in list(self._contexts.values()):
                self._let_go(context)
            return
        readahead = self._readahead or self._begin_readahead(windows)
        self._read_ahead(context, windows, readahead)
        if not self._queue:
            return  # the course begins anew
        context, step = self._queue[0]
        number = step.number
        if number in readahead and not readahead.is_ready(number):
            readahead.clear_done()
            if not readahead.is_ready(number):
                self._wait(_LOOK_AROUND_S)
                if not readahead.is_whole():
                    self._log("a reader has died; starting others")
                    self._end_readahead()
            return
        self._queue.popleft()
        try:
            self._take_step(context, windows, step)
            self._background_s = _FIRST_RETRY_S
        except LayoutChanged:
            self._queue.appendleft((context, step))
            self._attend_now(context)
        except MemoryGone:
            self._drop(context)
        except (LzyError, OSError) as error:
            self._complain(error)
            self._background_failed = True
            self._background_at = now + self._background_s
            self._background_s = min(self._background_s * 2, _LAST_RETRY_S)

    def _keep_readers_busy(self) -> None:
        """Have more read while faults come one after the other; they may have used what was."""
        readahead, windows = self._readahead, self._windows
        if readahead is None or windows is None:
            return
        while self._queue:
            context, step = self._queue[0]
            if step.number in readahead:
                break
            piece = context.missing.find_from(step.address)
            if piece is not None and piece[0] < step.end:
                break
            self._queue.popleft()  # a fault has had it
            if step.place >= 0 and context.token == MAIN:
                self._place = step.place
        for context in reversed(self._contexts.values()):
            if context.missing:
                self._read_ahead(context, windows, readahead)
                break

    def _read_ahead(self, context: Context, windows: Windows, readahead: Readahead) -> None:
        """Have read what comes next, as far as there is room."""
        while readahead.room and len(self._queue) < _MOST_QUEUED:
            step = context.course.next(windows)
            if step is None:
                return
            if step.number not in readahead:
                readahead.ask(step.number, windows.chunk(step.number))
            self._queue.append((context, step))

    def _take_step(self, context: Context, windows: Windows, step: Step) -> None:
        """Install what a course has proposed, if it still is what is missing there."""
        number = step.number
        if step.place >= 0 and context.token == MAIN:
            self._place = step.place
        piece = context.missing.find_from(step.address)
        current = self._is_served(context) and piece is not None and piece[0] < step.end
        if current and piece is not None:
            base = windows.address(number) - piece[2]
            current = base <= max(step.address, piece[0]) < base + windows.length
        if current and piece is not None:
            self._load(context, windows, number, piece)
            window = windows.address(number)
            held_back = context.token == MAIN and context.course.is_held_back(window)
            if held_back and window not in self._needed:
                self._unneeded[window] = None
        # A fault or an event may have come first: then what was read for it is not needed any more.
        slot = self._readahead.take(number) if self._readahead is not None else None
        if slot is not None and self._readahead is not None:
            self._readahead.give_back(slot)

    def _attend_now(self, context: Context) -> None:
        """The kernel says that an event waits, or that one is about to."""
        if not self._attend(context):
            os.sched_yield()

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
            if self._windows is None:
                self._background_at = time.monotonic() + self._background_s
                self._background_s = min(self._background_s * 2, _LAST_RETRY_S)
            return
        if self._windows is None:
            self._retry_at = 0.0
        self._use_image(image)

    # -- the end

    def _is_served(self, context: Context) -> bool:
        """Whether it was not dropped; its token may be that of another, later child by now."""
        return self._contexts.get(context.token) is context

    def _drop(self, context: Context) -> None:
        """Forget a context and close our descriptor of it."""
        if not self._is_served(context):
            return
        del self._contexts[context.token]
        self._poll = None
        self._journal.append(GONE, context.token)
        for key in [key for key in self._stalled if key[0] == context.token]:
            del self._stalled[key]
        if context.token != MAIN:  # the main one is closed by our end: a new pager may need it
            if self._harbour is not None:
                self._harbour.release(context.token)
            os.close(context.uffd.fd)

    def _let_go(self, context: Context) -> None:
        """All pages of a context are in: take userfaultfd away from its memory."""
        if context.token != MAIN:
            # Nobody else holds this one: closing it unregisters everything.
            self._drop(context)
            return
        self._reach("pager.loaded")
        try:
            if not self._unregister_all(context):
                return
        except MemoryGone:
            self._drop(context)
            return
        self._hand_over_order()
        self._reach("pager.unregistered")
        self._journal.phase = CLOSING
        if self._process_ended():
            self._drop(context)
            return
        # The userfaultfd goes last: who dumps the process waits until it sees none.
        for number, ours in reversed(self._inside):
            if not kernel.same_description(self._pid, number, ours):
                continue
            try:
                result = self._close_descriptor(self._pid, number)
                if result < 0 and result != -errno.EBADF:  # else it called execve meanwhile
                    raise OSError(-result, os.strerror(-result))
            except Exception as error:  # whatever it is, the process has all its memory
                if self._process_ended():
                    break
                self.left_something = True
                self._log(
                    f"all memory is in, but descriptor {number} of process {self._pid}"
                    f" could not be closed and stays (it does no harm): {error}"
                )
        self._reach("pager.closed")
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
