"""Loads what comes behind the faults: steps of a course, read ahead in a queue, then installed.

A step says nothing about what is right: it is looked up in the map of what is missing when it is
installed, and passed over if a fault or an event came first. Whatever is missed so comes with the
rest.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

from .contexts import Context, LayoutChanged, MemoryGone
from .course import Step
from .errors import LzyError
from .journal import MAIN
from .learning import Lesson
from .listening import Listener
from .loading import Loader
from .readahead import MOST_PARTS, Goal, Readahead
from .supply import Supply
from .trouble import Backoff, Trouble
from .windows import Windows

HOT_S = 0.001
"""So long after a fault others are expected."""

_NEAR_READS = 4  # a fault on what comes so soon waits for the reader
_READ_PATIENCE_S = 0.002
_TRUSTED = 3  # faults in a row that readers were about to answer
_TRUST_S = 0.001
_AT_ONCE = 6  # steps that readers end before we look after them
_MOST_QUEUED = 64  # steps that are decided on
_LOOK_AGAIN_S = 0.1


class Stream:
    """What is decided on, in order, and how far that is. `private`: what readers must not hold.

    Who answers faults says here how they come: `hot_until`, by the monotonic clock, others are
    expected; `due_in_a_row` of them were on what readers were about to install. `failed` is set
    when a step could not be read; when to go on is said by `again`.
    """

    def __init__(
        self,
        listener: Listener,
        supply: Supply,
        loader: Loader,
        lesson: Lesson,
        trouble: Trouble,
        *,
        private: Callable[[], Iterable[int]],
        log: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._supply = supply
        self._loader = loader
        self._lesson = lesson
        self._trouble = trouble
        self._private = private
        self._log = log
        self.hot_until = 0.0
        self.due_in_a_row = 0
        self.failed = False
        self.again = Backoff()
        self._queue: deque[tuple[Context, Step]] = deque()
        self._put_off: tuple[Context, Step] | None = None
        self._spare_cores = max(0, (os.cpu_count() or 1) - 2)

    def restart(self) -> None:
        """Begin from the beginning: the image was opened anew."""
        self._queue.clear()
        self._put_off = None
        for context in self._listener.contexts.values():
            context.course.restart()

    # -- for who answers faults

    def is_pressing(self) -> bool:
        """Whether what comes next should not wait for yet another fault.

        Readers who install want the core that we would wait on. Of what is read and likely to be
        asked for a moment later, the fault may be spared.
        """
        readahead = self._supply.readahead
        if not self._queue or readahead is None:
            return False
        if readahead.installs:
            return True
        step = self._queue[0][1]
        return step.likely and step.number in readahead and readahead.is_ready(step.number)

    def rests(self) -> bool:
        """Whether only what is touched is wanted, and something is missing still.

        Not of forked children: until they are whole, their memory hangs on pager and keeper alone.
        """
        if not self._loader.is_on_demand():
            return False
        contexts = self._listener.contexts
        return [token for token, context in contexts.items() if context.missing] == [MAIN]

    def is_coming(self, number: int, page: int) -> bool:
        """Whether a reader will have installed this page, of window `number`, before we could."""
        readahead = self._supply.readahead
        return (
            readahead is not None
            and readahead.is_coming(number, page)
            and self._is_next(number, readahead)
        )

    def await_reader(self, number: int) -> None:
        """Let a reader end that is reading window `number` or is about to: sooner than anew."""
        readahead = self._supply.readahead
        if readahead is None or number not in readahead or readahead.is_ready(number):
            return
        if not self._is_next(number, readahead):
            return
        deadline = time.monotonic() + _READ_PATIENCE_S
        readahead.call_when_done(number)
        while not readahead.is_ready(number) and time.monotonic() < deadline:
            readahead.clear_done()
            if not readahead.is_ready(number):
                readahead.wait_done(_READ_PATIENCE_S)

    def _is_next(self, number: int, readahead: Readahead) -> bool:
        """Whether few reads must end before that of window `number`."""
        before = 0
        for _, step in self._queue:
            if step.number == number:
                return True
            if step.number in readahead and not readahead.is_ready(step.number):
                before += 1
                if before == _NEAR_READS:
                    break
        return False

    def settle(self) -> None:
        """Take note of what readers have installed of what comes next, and of what faults had."""
        supply, queue = self._supply, self._queue
        readahead, windows = supply.readahead, supply.windows
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
            self._lesson.pass_by(context, windows, step)
            supply.release(number)

    def keep_readers_busy(self) -> None:
        """Have more read while faults come one after the other; they may have used what was."""
        windows = self._supply.windows
        if windows is None or self.rests():
            return
        for context in reversed(self._listener.contexts.values()):
            if context.missing:
                self._read_ahead(context, windows)
                break

    # -- behind the faults

    def load_next(self, context: Context, windows: Windows, now: float) -> float:
        """Load one more window of what a context lacks; how long there is nothing to do, in s."""
        readahead = self._read_ahead(context, windows)
        if not self._queue:  # the course begins anew
            return HOT_S if self._put_off is not None else 0.0
        context, step = self._queue[0]
        if step.number in readahead and not readahead.is_ready(step.number):
            return self._await_next(readahead, step, now)
        self._queue.popleft()
        try:
            self._take_step(context, step, windows)
            self.again.shorten()
        except LayoutChanged:
            self._queue.appendleft((context, step))
            self._listener.attend_now(context)
        except MemoryGone:
            self._listener.drop(context)
        except (LzyError, OSError) as error:
            self._trouble.complain(error)
            self.failed = True
            self.again.put_off(now)
            self.again.lengthen()
        return 0.0

    def _await_next(self, readahead: Readahead, step: Step, now: float) -> float:
        """The next step is not read yet: how long to wait for that, or for a fault."""
        readahead.call_when_done(self._last_of_some(readahead))
        readahead.clear_done()
        if readahead.is_ready(step.number):
            return 0.0
        if self.due_in_a_row >= _TRUSTED and step.likely and now < self.hot_until:
            # The order is followed: who installs what comes next wakes who waits for it.
            readahead.wait_done(_TRUST_S)
            return 0.0
        if not readahead.is_whole():
            self._log("a reader has died; starting others")
            self._supply.end_readers()
            return 0.0
        return _LOOK_AGAIN_S

    def _last_of_some(self, readahead: Readahead) -> int:
        """Which of the next steps to wait for, so that we are not woken for each of them."""
        last = self._queue[0][1].number
        for _, step in islice(self._queue, 1, _AT_ONCE):
            if step.number in readahead and not readahead.is_ready(step.number):
                last = step.number
        return last

    def _read_ahead(self, context: Context, windows: Windows) -> Readahead:
        """Have read what comes next of a context, as far as there is room."""
        supply, queue = self._supply, self._queue
        readahead = supply.readahead or supply.begin_readers(
            windows, self._listener.main, self._private()
        )
        self.settle()
        while readahead.room and len(queue) < _MOST_QUEUED:
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
            queue.append((context, step))
        readahead.begin()
        return readahead

    def _wants_cores(self) -> bool:
        """Whether faults come that would be answered later if more was read behind them."""
        return len(self._queue) >= self._spare_cores and time.monotonic() < self.hot_until

    def _goal(self, context: Context, windows: Windows, step: Step) -> Goal | None:
        """Where a reader may install a step that was just proposed; None if we do that."""
        if context.token != MAIN or self._loader.on_demand:
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
        current = self._listener.is_served(context) and piece is not None and piece[0] < step.end
        if current and piece is not None:
            base = windows.address(number) - piece[2]
            current = base <= max(step.address, piece[0]) < base + windows.length
        self._lesson.pass_by(context, windows, step)
        if current and piece is not None:
            self._loader.load(context, windows, number, piece)
        # A fault or an event may have come first: then what was read for it is not needed any more.
        self._supply.release(number)
