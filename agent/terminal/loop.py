"""Waits for descriptors and for moments, and calls who wanted to hear of them."""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable
from typing import Any, NoReturn

Work = Callable[[], object]
Heard = Callable[[int], None]
"""What to do with the events, as `selectors` has them, of a descriptor."""


class Loop:
    """One thread's; whatever it calls must not wait for anybody."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._due: dict[Work, float] = {}

    def hear(self, file: Any, heard: Heard) -> None:
        """Call `heard` whenever there is something to read in `file`, or its end."""
        self._selector.register(file, selectors.EVENT_READ, heard)

    def hear_also(self, file: Any, *, writable: bool) -> None:
        """Whether to call also when `file` can be written to. Precondition: it is heard of."""
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if writable else 0)
        key = self._selector.get_key(file)
        if key.events != wanted:
            self._selector.modify(file, wanted, key.data)

    def forget(self, file: Any) -> None:
        """Hear no more of `file`, if it was heard of."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(file)

    def soon(self, work: Work, in_s: float) -> None:
        """Call `work` once after that time, or when it is due already."""
        self._due.setdefault(work, time.monotonic() + in_s)

    def never_mind(self, work: Work) -> None:
        """It need not be called: it is being done."""
        self._due.pop(work, None)

    def close(self) -> None:
        """In one of two processes after a fork; the other goes on by `renew`."""
        self._selector.close()

    def renew(self) -> None:
        """After a fork: what the two would share, an epoll(7), is made anew."""
        before, self._selector = self._selector, selectors.DefaultSelector()
        for key in list(before.get_map().values()):
            self._selector.register(key.fileobj, key.events, key.data)
        before.close()

    def run(self) -> NoReturn:
        """Go on until the process ends."""
        while True:
            now = time.monotonic()
            for work in [work for work, due_s in self._due.items() if due_s <= now]:
                if self._due.pop(work, None) is not None:
                    work()
            wait_s = min((due_s - now for due_s in self._due.values()), default=None)
            for key, events in self._selector.select(max(wait_s, 0) if wait_s else wait_s):
                key.data(events)
