"""Answers the page faults of a lazily restored process, and loads the rest behind them.

One thread reads the messages, keeps the map of what is missing and installs what is asked for; what
comes behind the faults is installed by those who read it ahead, as that thread has told them. What
makes it right:

- Messages are read into the journal, and events among them applied, before any fault is answered.
- While an event is on its way the kernel refuses to install anything (EAGAIN). So what we look up
  after the last event we read still holds when the kernel takes our page. On EAGAIN we read again
  and look everything up afresh.
- A page is forgotten from the map only when it is installed, or when the kernel says that no
  registered VMA is there (ENOENT) and that no event is on its way: it may have looked for the VMA
  only after the process had moved it.
- A page that is in no map is zero (or there already: EEXIST). Of a process that goes to doze the
  map says more than is missing: what is there, or not heard of, may go yet. So what is asked for
  one by one is forgotten only if it was really installed.
- A reader installs only as long as no event has been read since it was told where
  (`lzy.checkpoint.fence`); and what it has installed is forgotten before such an event is applied.
- Bytes that do not authenticate are never installed, and neither are zeros in their place: that
  fault stays open, is tried again later, and all others go on.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from . import proc
from .contexts import Context, LayoutChanged, MemoryGone
from .course import Step
from .errors import LzyError
from .fence import Fence
from .harbour import Harbour
from .journal import CLOSING, CONTEXT, GONE, MAIN, MOVED, PIECE, SOURCE, Journal, Record
from .linux import PAGE_BYTES, address_of
from .linux import uffd as kernel
from .linux.uffd import MESSAGE_BYTES
from .missing import MissingPages, follow
from .readahead import MOST_PARTS, Goal, Readahead, Slot
from .windows import ChunkSource, Windows
from .working_set import MOST_WINDOWS, merge_order

_PAGE_MASK = -PAGE_BYTES
_BATCH_BYTES = 16 * MESSAGE_BYTES
_SPARE_RECORDS = 128  # kept free in the journal for records of our own
_NEAR_READS = 4  # a fault on what comes so soon waits for the reader
_READ_PATIENCE_S = 0.002
_FENCE_PATIENCE_S = 0.5
_PATIENCE_S = 0.005  # so long a fault is left to a reader
_HOT_S = 0.001  # so long after a fault others are expected
_TRUSTED = 3  # faults in a row that readers were about to answer
_TRUST_S = 0.001
_AT_ONCE = 6  # steps that readers end before we look after them
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
        self._fence: Fence | None = None
        self._queue: deque[tuple[Context, Step]] = deque()
        self._order = order
        self._keep_order = keep_order
        self._on_demand: bool = journal.facts.get("on_demand", False)
        self._awaited: list[tuple[Context, int, int, float]] = []
        self._put_off: tuple[Context, Step] | None = None
        self._hot_until = 0.0
        self._due_in_a_row = 0  # faults that readers were about to answer
        self._spare_cores = max(0, (os.cpu_count() or 1) - 2)
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
        self._put_off = None
        if self._windows is not None:
            self._windows.image.close()
        self._windows = Windows(image)
        for context in self._contexts.values():
            context.course.restart()

    def _begin_readahead(self, windows: Windows) -> Readahead:
        main = self._contexts.get(MAIN)
        inside = {ours for _, ours in self._inside}
        private = {self._pidfd, self._watched, *inside, *self.descriptors}
        private -= {-1, self._uffd}
        if main is None or self._fence is None:  # else the readers install
            private |= {self._journal.fd, self._uffd}
        self._poll = None
        self._readahead = Readahead(
            windows.image,
            max(4, _AHEAD_BYTES // windows.length),
            windows.length,
            private,
            readers=min(os.cpu_count() or 1, _MOST_READERS),
            fence=self._fence,
            uffd=main.uffd if main is not None else None,
        )
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
        faults: list[int] = []
        events: list[Record] = []
        fence = None
        if self._readahead is not None and self._readahead.installs:
            if not context.has_message():
                return False
            fence = self._close_fence()
        try:
            length = context.uffd.read(journal.address, _BATCH_BYTES)
            journal.take(length, faults, events)
            if events:
                self._note_installed()
        finally:
            # Whoever is killed before this leaves readers that install nothing any more.
            if fence is not None:
                fence.open(calls_off=bool(events))
        if not length:
            return False
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

    def _close_fence(self) -> Fence | None:
        """Keep readers from installing anything: what is read next may change what goes where."""
        fence = self._fence
        try:
            if fence is None or fence.close(_FENCE_PATIENCE_S):
                return fence
            self._log("a reader does not go on; starting others")
        except OSError as error:
            self._log(f"readers install nothing any more: {error}")
            self._fence = None
        self._end_readahead()
        return None

    def _note_installed(self) -> None:
        """Take note of all that readers have installed. Precondition: the fence is closed."""
        if self._readahead is not None:
            for goal in self._readahead.installed():
                self._reached(goal)

    def _reached(self, goal: Goal) -> None:
        """A reader has installed this, and no event was read since it was told to."""
        self._installed_bytes += sum(length for _, _, length in goal.parts)
        if (main := self._contexts.get(MAIN)) is not None:
            main.missing.forget(goal.low, goal.high)

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
        with contextlib.suppress(OSError):  # then readers only read
            self._fence = Fence(self._journal.fd)
        self._settle_harbour()
        if self._windows is None:
            self._reopen()

    def serve(self) -> None:
        """Go on until nothing is left to do."""
        for context in self._contexts.values():
            context.uffd.make_pollable()
            context.uffd.wake_all()
        self._keep_readers_busy()  # at once: faults, one after the other, might keep us from it
        look_at = linger_until = 0.0
        clock = time.monotonic
        while self._contexts:
            heard = False
            for context in list(self._contexts.values()):
                heard |= self._attend(context)
            if self._awaited:
                self._see_to_awaited()
            # Also what was noted elsewhere: a fault heard of while the end was being prepared.
            if heard or self._asked:
                self._settle()
                while self._asked:
                    self._answer(*self._asked.popleft())
                now = clock()
                linger_until, self._hot_until = now + _LINGER_S, now + _HOT_S
                self._keep_readers_busy()
                continue
            now = clock()
            if now < linger_until and not self._has_helpers() and not self._is_hurried():
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

    def _has_helpers(self) -> bool:
        """Whether readers are at work that install: they want the core that we would wait on."""
        return bool(self._queue) and self._readahead is not None and self._readahead.installs

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

    def _answer(self, context: Context, page: int, *, patient: bool = True) -> None:
        """Install what is wanted; or leave it, if `patient`, to a reader that is just about to."""
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
            is_known = context.course.is_known(windows.address(number))
            is_due = is_known and self._is_due(number)
            low = windows.address(number) - shift
            if patient and self._is_near(context, page, number):
                self._due_in_a_row += is_due
                high = min(low + windows.length, end)
                self._awaited.append((context, page, number, time.monotonic() + _PATIENCE_S))
            else:
                self._due_in_a_row = 0
                high = self._load(context, windows, number, piece, page)
            walked = (high, high)
            if not self._on_demand and not is_known:
                walked = context.course.follow(page, low, high, windows.length)
            if context.token == MAIN:
                self._note_need(context, windows, number, walked, shift, is_due=is_due)
        except LayoutChanged:
            self._asked.append((context, page))
            self._attend_now(context)
        except MemoryGone:
            self._drop(context)
        except (LzyError, OSError) as error:
            self._stall(context, page, error)

    def _is_near(self, context: Context, page: int, number: int) -> bool:
        """Whether a reader will have installed this page, of window `number`, before we could."""
        readahead = self._readahead
        if readahead is None or context.token != MAIN or not readahead.is_coming(number, page):
            return False
        before = 0  # reads that must end first
        for _, step in self._queue:
            if step.number == number:
                return True
            if step.number in readahead and not readahead.is_ready(step.number):
                before += 1
                if before == _NEAR_READS:
                    break
        return False

    def _see_to_awaited(self) -> None:
        """Answer the faults that were left to readers which have not installed what they asked."""
        awaited, self._awaited = self._awaited, []
        now = time.monotonic()
        for context, page, number, until in awaited:
            readahead = self._readahead
            if readahead is not None and now < until and readahead.is_coming(number, page):
                self._awaited.append((context, page, number, until))
            elif readahead is None or not readahead.is_installed(number, page):
                self._answer(context, page, patient=False)
            # else it is there, and who waits for it was woken

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
            slot = self._take(number)
            if slot is None and self._is_all_in(context, low, high):
                return high
            if slot is None or readahead is None:
                if readahead is not None and number in readahead:
                    readahead.spare(number)
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

    def _take(self, number: int) -> Slot | None:
        """What was read ahead for window `number`, to be given back; None if it is not there.

        A reader that has installed it leaves none: then less is missing now.
        """
        slot = self._readahead.take(number) if self._readahead is not None else None
        if slot is not None and self._readahead is not None and slot.installed is not None:
            self._reached(slot.installed)
            self._readahead.give_back(slot)
            return None
        return slot

    def _is_all_in(self, context: Context, low: int, high: int) -> bool:
        """Whether nothing of [low, high) is missing any more."""
        piece = context.missing.find_from(low)
        return piece is None or piece[0] >= high

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
        readahead.call_when_done(number)
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
        *,
        is_due: bool,
    ) -> None:
        """Remember that window `number` was asked for, and first what a walk came through.

        `is_due`: it is known and was about to come, so it may keep its place in the order.
        """
        low, high = walked
        if low < high:
            for passed in range(windows.find_from(low + shift), number):
                address = windows.address(passed)
                if address - shift >= high:
                    break
                if context.missing.find(address - shift) is None or self._is_in(passed):
                    # else it would have asked
                    self._needed.setdefault(address, self._place)
        place = MOST_WINDOWS if is_due else self._place  # then its own is earlier
        self._needed.setdefault(windows.address(number), place)

    def _is_in(self, number: int) -> bool:
        """Whether a reader has installed window `number`, though we have not taken note yet."""
        return self._readahead is not None and self._readahead.is_installed(number)

    def _is_due(self, number: int) -> bool:
        return self._readahead is not None and number in self._readahead

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
        self._settle()
        self._read_ahead(context, windows, readahead)
        if not self._queue:
            if self._put_off is not None:
                self._wait(_HOT_S)
            return  # the course begins anew
        context, step = self._queue[0]
        number = step.number
        if number in readahead and not readahead.is_ready(number):
            readahead.call_when_done(self._last_of_some(readahead))
            readahead.clear_done()
            if not readahead.is_ready(number):
                if self._due_in_a_row >= _TRUSTED and step.likely and now < self._hot_until:
                    # The order is followed: who installs what comes next wakes who waits for it.
                    readahead.wait_done(_TRUST_S)
                    return
                self._wait(_PATIENCE_S if self._awaited else _LOOK_AROUND_S)
                if not readahead.is_whole():
                    self._log("a reader has died; starting others")
                    self._end_readahead()
            return
        self._queue.popleft()
        try:
            self._take_step(context, step, windows)
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

    def _settle(self) -> None:
        """Take note of what readers have installed of what comes next, and of what faults had."""
        readahead, windows, queue = self._readahead, self._windows, self._queue
        if readahead is None or windows is None:
            return
        while queue:
            context, step = queue[0]
            number = step.number
            if not readahead.is_installed(number):
                if number in readahead and not readahead.is_ready(number):
                    break
                piece = context.missing.find_from(step.address)
                if piece is not None and piece[0] < step.end:
                    break
            queue.popleft()
            self._pass_by(context, windows, step)
            slot = self._take(number)
            if slot is not None:
                readahead.give_back(slot)

    def _last_of_some(self, readahead: Readahead) -> int:
        """Which of the next steps to wait for, so that we are not woken for each of them."""
        last = self._queue[0][1].number
        for _, step in islice(self._queue, 1, _AT_ONCE):
            if step.number in readahead and not readahead.is_ready(step.number):
                last = step.number
        return last

    def _keep_readers_busy(self) -> None:
        """Have more read while faults come one after the other; they may have used what was."""
        windows = self._windows
        if windows is None or self._rests():
            return
        for context in reversed(self._contexts.values()):
            if context.missing:
                readahead = self._readahead or self._begin_readahead(windows)
                self._settle()
                self._read_ahead(context, windows, readahead)
                break

    def _read_ahead(self, context: Context, windows: Windows, readahead: Readahead) -> None:
        """Have read what comes next, as far as there is room."""
        while readahead.room and len(self._queue) < _MOST_QUEUED:
            put_off, self._put_off = self._put_off, None
            if put_off is not None and put_off[0] is context:
                step: Step | None = put_off[1]
            else:
                step = context.course.next(windows)
            if step is None:
                break
            if not step.likely and self._wants_cores():
                self._put_off = context, step
                break
            if step.number not in readahead:
                goal = self._goal(context, windows, step) if readahead.installs else None
                readahead.ask(step.number, windows.chunk(step.number), goal)
            self._queue.append((context, step))
        readahead.begin()

    def _wants_cores(self) -> bool:
        """Whether faults come that would be answered later if more was read behind them."""
        return len(self._queue) >= self._spare_cores and time.monotonic() < self._hot_until

    def _goal(self, context: Context, windows: Windows, step: Step) -> Goal | None:
        """Where a reader may install a step that was just proposed; None if we do that."""
        if context.token != MAIN or self._on_demand:
            return None
        piece = context.missing.find(step.address)
        if piece is None or piece[1] < step.end or piece[2] != step.shift:
            return None
        parts = windows.parts(step.number, step.address, step.end, step.shift, -1)
        if not 0 < len(parts) <= MOST_PARTS:
            return None
        return Goal(step.address, step.end, parts, windows.stored_bytes(step.number))

    def _take_step(self, context: Context, step: Step, windows: Windows) -> None:
        """Install what a course has proposed, if it still is what is missing there."""
        number = step.number
        piece = context.missing.find_from(step.address)
        current = self._is_served(context) and piece is not None and piece[0] < step.end
        if current and piece is not None:
            base = windows.address(number) - piece[2]
            current = base <= max(step.address, piece[0]) < base + windows.length
        self._pass_by(context, windows, step)
        if current and piece is not None:
            self._load(context, windows, number, piece)
        # A fault or an event may have come first: then what was read for it is not needed any more.
        slot = self._take(number)
        if slot is not None and self._readahead is not None:
            self._readahead.give_back(slot)

    def _pass_by(self, context: Context, windows: Windows, step: Step) -> None:
        """The stream of the order of need, or of what comes behind it, has come to a step."""
        if context.token != MAIN:
            return
        if step.place >= 0:
            self._place = step.place
        window = windows.address(step.number)
        if context.course.is_held_back(window) and window not in self._needed:
            self._unneeded[window] = None

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
        self._end_readahead()  # and with it whoever could install anything
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
            if not kernel.same_description(proc.witness(self._pid), number, ours):
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
                    f" could not be closed and stays until it is dumped: {error}"
                )
                self._note_left(number)
        self._reach("pager.closed")
        self._drop(context)

    def _note_left(self, number: int) -> None:
        from .unfinished import note_descriptor

        try:
            note_descriptor(self._pid, number)
        except (LzyError, OSError) as error:
            self._log(f"it could not be noted: {error}")

    def _process_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _unregister_all(self, context: Context) -> bool:
        """Unregister every VMA; False when the layout changed meanwhile and it must be redone."""
        try:
            with open(f"/proc/{proc.witness(self._pid)}/maps", "rb") as maps:
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
