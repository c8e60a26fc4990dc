"""Answers faults: with the image's pages, with zeros, or by leaving them to a reader for a moment.

A fault on what cannot be read stays open, and is asked again later; all others go on.
"""

from __future__ import annotations

import time

from .contexts import Context, LayoutChanged, MemoryGone
from .errors import LzyError
from .journal import MAIN
from .learning import Lesson
from .listening import Listener
from .loading import Loader
from .stream import Stream
from .supply import Supply
from .trouble import Backoff, Trouble

PATIENCE_S = 0.005
"""So long a fault is left to a reader."""


class Answerer:
    """Answers what the listener has heard of.

    `awaited` are the faults that were left to readers: (context, page, number of the window, until
    when). `again`: when the stalled ones are to be asked again (`Context.stalled`).
    """

    def __init__(
        self,
        listener: Listener,
        supply: Supply,
        loader: Loader,
        stream: Stream,
        lesson: Lesson,
        trouble: Trouble,
    ) -> None:
        self._listener = listener
        self._supply = supply
        self._loader = loader
        self._stream = stream
        self._lesson = lesson
        self._trouble = trouble
        self.awaited: list[tuple[Context, int, int, float]] = []
        self.again = Backoff()

    def answer_all(self) -> None:
        """Answer all that was asked, and what is asked meanwhile."""
        asked, answer = self._listener.asked, self._answer
        while asked:
            answer(*asked.popleft())

    def _answer(self, context: Context, page: int, *, patient: bool = True) -> None:
        """Install what is wanted; or leave it, if `patient`, to a reader that is just about to."""
        if not self._listener.is_served(context):
            return
        try:
            piece = context.missing.find(page)
            if piece is None:
                context.zero(page, context.missing.next_start(page))
                return
            windows = self._supply.windows
            if windows is None:
                raise LzyError("the image is not open")
            _, end, shift = piece
            number = windows.find_from(page + shift)
            absent_until = windows.absent_until(page + shift, number)
            if absent_until:
                context.zero(page, min(end, absent_until - shift))
                return
            stream, readahead = self._stream, self._supply.readahead
            is_known = context.course.is_known(windows.address(number))
            is_due = is_known and readahead is not None and number in readahead
            low = windows.address(number) - shift
            if patient and context.token == MAIN and stream.is_coming(number, page):
                stream.due_in_a_row += is_due
                high = min(low + windows.length, end)
                self.awaited.append((context, page, number, time.monotonic() + PATIENCE_S))
            else:
                stream.due_in_a_row = 0
                stream.await_reader(number)
                high = self._loader.load(context, windows, number, piece, page)
            walked = (high, high)
            if not self._loader.on_demand and not is_known:
                walked = context.course.follow(page, low, high, windows.length)
            if context.token == MAIN:
                self._lesson.note(context, windows, number, walked, shift, is_due=is_due)
        except LayoutChanged:
            self._listener.asked.append((context, page))
            self._listener.attend_now(context)
        except MemoryGone:
            self._listener.drop(context)
        except (LzyError, OSError) as error:
            self._stall(context, page, error)

    def see_to_awaited(self) -> None:
        """Answer the faults that were left to readers which have not installed what they asked."""
        awaited, self.awaited = self.awaited, []
        now = time.monotonic()
        for context, page, number, until in awaited:
            readahead = self._supply.readahead
            if readahead is not None and now < until and readahead.is_coming(number, page):
                self.awaited.append((context, page, number, until))
            elif readahead is None or not readahead.is_installed(number, page):
                self._answer(context, page, patient=False)
            # else it is there, and who waits for it was woken

    # -- what cannot be read now

    @property
    def stalled(self) -> int:
        """How many faults wait for what could not be read."""
        return sum(len(context.stalled) for context in self._listener.contexts.values())

    def _stall(self, context: Context, page: int, error: Exception) -> None:
        if not self.stalled:
            self.again.put_off(time.monotonic())
        context.stalled[page] = None
        self._trouble.complain(error)

    def try_again(self) -> None:
        """Ask the stalled faults once more: the image may have been opened afresh."""
        contexts = self._listener.contexts.values()
        waiting = [(context, page) for context in contexts for page in context.stalled]
        for context, _ in waiting:
            context.stalled.clear()
        for context, page in waiting:
            self._answer(context, page)
        self.answer_all()
        if not self.stalled:
            self._trouble.is_over()
        if self.stalled < len(waiting):
            self.again.shorten()
        else:
            self.again.lengthen()
        self.again.put_off(time.monotonic())
