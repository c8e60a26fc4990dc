"""What a restored process and its forked children lack, as the journal and the kernel tell it.

Everything that changes where memory belongs comes through here, and first of all. *Guarantees*:
messages are read into the journal, and the events among them applied, before any fault among them
is handed on; no reader installs anything between the two, and what readers have installed is
forgotten from the map before an event changes it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence

from .contexts import Context
from .harbour import Harbour
from .journal import CONTEXT, GONE, MAIN, MOVED, PIECE, SOURCE, Journal, Record
from .linux import PAGE_BYTES
from .linux import uffd as kernel
from .linux.uffd import MESSAGE_BYTES
from .missing import MissingPages, follow
from .supply import Supply

_PAGE_MASK = -PAGE_BYTES
_BATCH_BYTES = 16 * MESSAGE_BYTES
_SPARE_RECORDS = 128  # kept free in the journal for records of our own


class Listener:
    """The contexts of one restored process by their tokens, oldest first.

    `uffd` is our descriptor of the process's; `harbour` is where forked children's are kept.
    `asked` are the faults heard of, oldest first: (context, address of the page), for whoever
    answers them.
    """

    def __init__(
        self,
        journal: Journal,
        uffd: int,
        supply: Supply,
        *,
        harbour: Harbour | None,
        order: Sequence[int],
        log: Callable[[str], None],
    ) -> None:
        self._journal = journal
        self._supply = supply
        self._harbour = harbour
        self._log = log
        self.asked: deque[tuple[Context, int]] = deque()
        self.faults = 0
        self.contexts = self._replay(uffd, order)

    @property
    def descriptors(self) -> list[int]:
        """The userfaultfds served."""
        return [context.uffd.fd for context in self.contexts.values()]

    @property
    def main(self) -> Context | None:
        """The process itself, until its memory is all in or gone."""
        return self.contexts.get(MAIN)

    def begin(self) -> None:
        """Hear of all from now on; also what for they wait whom a killed pager has not answered."""
        for context in self.contexts.values():
            context.uffd.make_pollable()
            context.uffd.wake_all()

    def attend(self, context: Context) -> bool:
        """Read what the kernel has to say; events are applied, faults noted. Whether it did."""
        journal, supply = self._journal, self._supply
        if journal.room_bytes < _BATCH_BYTES + _SPARE_RECORDS * MESSAGE_BYTES:
            self._compact()
        if journal.source != context.token:
            journal.name_source(context.token)
        faults: list[int] = []
        events: list[Record] = []
        fence = None
        if supply.readahead is not None and supply.readahead.installs:
            if not context.has_message():
                return False
            fence = supply.close_fence()
        try:
            length = context.uffd.read(journal.address, _BATCH_BYTES)
            journal.take(length, faults, events)
            if events:
                supply.note_installed()
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
                self.contexts[child.token] = child
                child.uffd.make_pollable()
        for address in faults:
            self.asked.append((context, address & _PAGE_MASK))
        self.faults += len(faults)
        return True

    def attend_now(self, context: Context) -> None:
        """The kernel says that an event waits, or that one is about to."""
        if not self.attend(context):
            os.sched_yield()

    def is_served(self, context: Context) -> bool:
        """Whether it was not dropped; its token may be that of another, later child by now."""
        return self.contexts.get(context.token) is context

    def drop(self, context: Context) -> None:
        """Forget a context and close our descriptor of it."""
        if not self.is_served(context):
            return
        del self.contexts[context.token]
        self._journal.append(GONE, context.token)
        if context.token != MAIN:  # the main one is closed by our end: a new pager may need it
            if self._harbour is not None:
                self._harbour.release(context.token)
            os.close(context.uffd.fd)

    def settle_harbour(self) -> None:
        """Bring the harbour into line with the journal, between which our forerunner was killed."""
        if self._harbour is None:
            return
        there = self._harbour.look()
        for fd in there.values():
            os.close(fd)
        for token in there.keys() - self.contexts.keys():
            self._harbour.release(token)
        for token in self.contexts.keys() - there.keys() - {MAIN}:
            self._stow(token)

    def _replay(self, uffd: int, order: Sequence[int]) -> dict[int, Context]:
        """The contexts of which the journal tells."""
        keeps_account: bool = self._journal.facts.get("keeps_account", False)
        source = Context(MAIN, uffd, MissingPages(), order, keeps_account=keeps_account)
        contexts = {MAIN: source}
        for kind, a, b, c in self._journal.replay():
            if kind == SOURCE:
                source = contexts[a]
            elif kind == PIECE:
                source.missing.add(a, b, c if c < 1 << 63 else c - (1 << 64))
            elif kind == MOVED:
                source.moved.add(a, b)
            elif kind == GONE:
                contexts.pop(a, None)
            elif kind == CONTEXT:
                contexts[a] = Context(a, a, MissingPages())
            elif (child := self._apply(source, (kind, a, b, c))) is not None:
                contexts[child.token] = child
        return contexts

    def _compact(self) -> None:
        """Write the journal anew, as it would be had everything been so from the beginning."""
        records: list[Record] = []
        if MAIN not in self.contexts:
            records.append((GONE, MAIN, 0, 0))
        for token, context in self.contexts.items():
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
            return Context(fd, fd, context.missing.copy())
        self._log(f"the kernel sent an event of unknown kind {kind:#x}")
        return None

    def _stow(self, fd: int) -> None:
        """Have the process itself hold a forked child's userfaultfd, beside us."""
        if self._harbour is not None:
            try:
                self._harbour.stow(fd, fd)
            except OSError as error:
                self._log(f"a forked child's memory hangs on pager and keeper alone: {error}")
