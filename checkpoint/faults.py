"""Answers the page faults of a lazily restored process, and loads the rest behind them.

One thread does it, and this module says what comes next. Each of the others does one thing, and
knows only those that stand below it here:

    answering   a fault: with pages, with zeros, or with a moment's patience for a reader
    stream      what comes behind the faults, read ahead; in which order says `course`
    ending      when all is in
    listening   what the kernel tells, into the journal; what is missing therefore, and where
    loading     the pages of a window, into place
    learning    what this wake teaches about the order of need
    supply      the image, and the readers: processes that install what comes behind the faults
    trouble     what cannot be read now

What makes it right:

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

import select
import time
from collections.abc import Callable, Sequence

from .answering import PATIENCE_S, Answerer
from .ending import CloseDescriptor, Ending
from .errors import LzyError
from .harbour import Harbour
from .journal import MAIN, Journal
from .learning import Lesson
from .listening import Listener
from .loading import Loader
from .stream import HOT_S, Stream
from .supply import Supply
from .trouble import Trouble
from .windows import ChunkSource, Windows

_LOOK_AROUND_S = 0.1  # how often a busy pager looks for the end of process and keeper
_REST_S = 1.0  # the same of one that has nothing to do but to answer
_LINGER_S = 50e-6  # a fault is often followed by another: so long nothing else is begun


class FaultServer:
    """Serves every context of one restored process until all is in or all are gone.

    `inside`: (number in the process, our duplicate) of the descriptors to be closed at the end.
    `uffd` and `pidfd` are our descriptors of the process's; `open_image` opens the image anew
    (after it could not be read); `harbour` is where forked children's userfaultfds are kept.
    `look_around` is called now and then, its descriptor (or -1) is waited for as well; `reach`
    hears of each stage. `order` are window addresses in the order in which the process is thought
    to need them; `keep_order` gets the one that is known better by then, before anybody can see
    that all is in.
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
        close_descriptor: CloseDescriptor,
        log: Callable[[str], None],
        harbour: Harbour | None = None,
        order: Sequence[int] = (),
        keep_order: Callable[[list[int]], None] = lambda order: None,
        look_around: Callable[[], int] = lambda: -1,
        reach: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self._journal = journal
        self._pidfd = pidfd
        self._inside = inside
        self._look_around = look_around
        self._watched = -1
        self._poll = select.poll()
        self._polled: tuple[int, ...] = ()
        supply = self._supply = Supply(image, open_image, journal.fd, log)
        listener = self._listener = Listener(
            journal, uffd, supply, harbour=harbour, order=order, log=log
        )
        trouble = self._trouble = Trouble(journal, log)
        lesson = self._lesson = Lesson(order, keep_order, supply)
        loader = self._loader = Loader(supply, journal)
        self._stream = Stream(
            listener, supply, loader, lesson, trouble, private=self._descriptors, log=log
        )
        self._answerer = Answerer(listener, supply, loader, self._stream, lesson, trouble)
        self._ending = Ending(
            journal,
            listener,
            supply,
            lesson,
            pidfd=pidfd,
            inside=inside,
            close_descriptor=close_descriptor,
            log=log,
            reach=reach,
        )

    @property
    def left_something(self) -> bool:
        """Whether one of our descriptors had to stay in the process."""
        return self._ending.left_something

    def prepare(self) -> None:
        """Open the image if it was not handed to us; if that fails, `serve` goes on trying."""
        self._supply.make_fence()
        self._listener.settle_harbour()
        if self._supply.windows is None:
            self._reopen()

    def serve(self) -> None:
        """Go on until nothing is left to do."""
        listener, answerer, stream, supply = (
            self._listener,
            self._answerer,
            self._stream,
            self._supply,
        )
        contexts = listener.contexts
        listener.begin()
        stream.keep_readers_busy()  # at once: faults, one after the other, might keep us from it
        look_at = linger_until = 0.0
        clock = time.monotonic
        while contexts:
            heard = False
            for context in list(contexts.values()):
                heard |= listener.attend(context)
            if answerer.awaited:
                answerer.see_to_awaited()
            # Also what was noted elsewhere: a fault heard of while the end was being prepared.
            if heard or listener.asked:
                stream.settle()
                answerer.answer_all()
                now = clock()
                linger_until, stream.hot_until = now + _LINGER_S, now + HOT_S
                stream.keep_readers_busy()
                continue
            now = clock()
            if now < linger_until and not stream.is_pressing():
                continue
            stalled = answerer.stalled
            if now >= look_at:
                look_at = now + _LOOK_AROUND_S
                self._look()
            elif stalled and now >= answerer.again.at:
                self._reopen()
                answerer.try_again()
            elif now < stream.again.at:
                if supply.readahead is not None:
                    supply.readahead.clear_done()
                until = min(stream.again.at, answerer.again.at if stalled else 1e18)
                self._wait(min(until, look_at + 1) - now)
            elif supply.windows is None:
                self._reopen()
            elif stream.rests():
                self._wait(_REST_S)
            else:
                self._go_on(supply.windows, now)
        supply.end_readers()
        self._say_how_it_is()
        self._lesson.hand_over()
        supply.close()

    def _go_on(self, windows: Windows, now: float) -> None:
        """Load one more window, or make an end where nothing is missing."""
        if self._stream.failed:
            self._stream.failed = False
            self._reopen()
            windows = self._supply.windows or windows
        # Forked children first, the youngest before all: until they are whole, their memory
        # hangs on pager and keeper alone.
        for context in reversed(self._listener.contexts.values()):
            if context.missing:
                wait_s = self._stream.load_next(context, windows, now)
                if wait_s:
                    self._wait(min(wait_s, PATIENCE_S) if self._answerer.awaited else wait_s)
                return
            if context.token != MAIN:
                self._listener.drop(context)
                return
        for context in list(self._listener.contexts.values()):
            self._ending.let_go(context)

    def _reopen(self) -> None:
        """Serve from the image opened anew; if that fails, from the one there is, if any."""
        is_first = self._supply.windows is None
        stream = self._stream
        try:
            self._supply.reopen()
        except (LzyError, OSError) as error:
            self._trouble.complain(error)
            if is_first:
                stream.again.put_off(time.monotonic())
                stream.again.lengthen()
            return
        stream.restart()
        if is_first:
            self._answerer.again.at = 0.0

    def _look(self) -> None:
        """See who is gone, and say how it is."""
        self._watched = self._look_around()
        self._say_how_it_is()
        for context in list(self._listener.contexts.values()):
            if context.is_gone():
                self._listener.drop(context)

    def _say_how_it_is(self) -> None:
        contexts = self._listener.contexts.values()
        self._journal.set_numbers(
            faults=self._listener.faults,
            installed=self._loader.installed_bytes + self._supply.installed_bytes,
            stalled=self._answerer.stalled,
            missing=sum(context.missing.length_bytes for context in contexts),
        )

    def _wait(self, timeout_s: float) -> None:
        """Wait for messages, for a chunk that was read ahead, for the end of process or keeper."""
        readahead = self._supply.readahead
        descriptors = (
            *self._listener.descriptors,
            self._pidfd if self._listener.main is not None else -1,
            self._watched,
            *((readahead.done_fd, *readahead.reader_fds) if readahead is not None else ()),
        )
        if descriptors != self._polled:
            self._poll, self._polled = select.poll(), descriptors
            for fd in descriptors:
                if fd >= 0:
                    self._poll.register(fd, select.POLLIN)
        self._poll.poll(timeout_s * 1000)

    def _descriptors(self) -> set[int]:
        """What we hold of the process and of the keeper."""
        ours = {fd for _, fd in self._inside}
        return {self._pidfd, self._watched, *ours, *self._listener.descriptors} - {-1}
