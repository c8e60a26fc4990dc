"""What is loaded next behind the faults: ahead of walks, then as was needed before, then the rest.

A course only proposes. What it says is looked up again when it is installed, so it need not follow
what the process does to its memory meanwhile; whatever it misses it comes back to.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .missing import END_OF_ADDRESSES, MissingPages
from .windows import Windows

_NEAR_WINDOWS = 4  # a fault so little after where a walk has come to belongs to it
_MOST_WALKS = 8  # that are followed at a time: an expression walks through several arrays at once
_MOST_AHEAD_BYTES = 16 << 20
_HELD_BACK_ONE_IN = 32


class Step(NamedTuple):
    """Load what window `number` has for [address, end), which the image has at + `shift`.

    `place`: how many windows of the order are in by then; -1 for a step that is not part of it.
    `likely`: that it will be asked for soon.
    """

    address: int
    end: int
    number: int
    place: int
    likely: bool
    shift: int = 0


class Walk:
    """A way through memory in order of address; we are ahead of it up to `ahead_to`.

    `seen` is where the last window that it asked for ends, `position` what is proposed next.
    """

    __slots__ = ("ahead_bytes", "ahead_to", "position", "seen")

    def __init__(self, seen: int) -> None:
        self.seen = self.position = self.ahead_to = seen
        self.ahead_bytes = 0


class Course:
    """The way through the memory of one context; `order` are window addresses of the image.

    Some windows of the order, others each time, are held back to the very end: should nobody ask
    for them until then, they are not needed any more (`is_held_back`).
    """

    def __init__(self, missing: MissingPages, order: Sequence[int] = ()) -> None:
        self._missing = missing
        self._order = order
        self._known = frozenset(order)
        self._held_back = set(order[random.randrange(_HELD_BACK_ONE_IN) :: _HELD_BACK_ONE_IN])
        self._walks: list[Walk] = []  # the one that was followed last is last
        self._steps: Iterator[Step] | None = None

    def is_held_back(self, window: int) -> bool:
        """Whether the window at this address of the image waits for somebody to ask for it."""
        return window in self._held_back

    def restart(self) -> None:
        """Begin from the beginning: the image was opened anew."""
        self._steps = None

    def next(self, windows: Windows) -> Step | None:
        """What to load now; None at the end, and then from the beginning again."""
        for walk in self._walks:
            if walk.position < walk.ahead_to:
                step = self._find(windows, walk.position, walk.ahead_to)
                walk.position = walk.ahead_to if step is None else step.end
                if step is not None:
                    return step
        if self._steps is None:
            self._steps = self._all(windows)
        step = next(self._steps, None)
        if step is None:
            self._steps = None
        return step

    def is_known(self, window: int) -> bool:
        """Whether the window at this address of the image is still to come in the order of need.

        To ask for it is no sign of a walk: where that would lead is in the order, too.
        """
        return window in self._known

    def follow(self, page: int, low: int, high: int, window_bytes: int) -> tuple[int, int]:
        """A fault at `page` had the window [low, high) loaded: go ahead of it if this is a walk.

        How far ahead doubles each time that the walk arrives there. Answers the range of addresses
        that it has come through without a fault, because we were ahead of it.
        """
        for walk in self._walks:
            if walk.seen <= page < walk.ahead_to + _NEAR_WINDOWS * window_bytes:
                break
        else:
            del self._walks[: max(0, len(self._walks) + 1 - _MOST_WALKS)]
            self._walks.append(Walk(high))
            return high, high
        self._walks.remove(walk)
        self._walks.append(walk)
        came_from, walk.seen = walk.seen, high
        come_through = came_from, max(came_from, min(low, walk.ahead_to))
        if page >= walk.ahead_to - walk.ahead_bytes // 2:
            walk.ahead_bytes = min(2 * walk.ahead_bytes or 2 * window_bytes, _MOST_AHEAD_BYTES)
            walk.position = max(walk.position, high)
            walk.ahead_to = high + walk.ahead_bytes
        return come_through

    def _all(self, windows: Windows) -> Iterator[Step]:
        known = len(self._order)
        held_back = self._held_back if known else set()
        for place, window in enumerate(self._order):
            if window not in held_back:
                yield from self._find_window(windows, window, place + 1)
        self._known = frozenset()
        address = 0
        while step := self._find(windows, address, END_OF_ADDRESSES, known, likely=False):
            address = step.end
            if not held_back or windows.address(step.number) not in held_back:
                yield step
        for window in self._order:
            if window in held_back:
                yield from self._find_window(windows, window, known)
        self._order = ()  # what is left then, for whatever reason, comes in order of address

    def _find_window(self, windows: Windows, window: int, place: int) -> Iterator[Step]:
        """What is missing of a window of the image and lies where it did, whoever names it."""
        number = windows.find_from(window)
        if number == windows.count:
            return
        address = windows.address(number)
        end = address + windows.length
        if not address <= window < end:
            return
        while address < end:
            piece = self._missing.find_from(address)
            if piece is None or piece[0] >= end:
                return
            low, address, shift = max(address, piece[0]), min(piece[1], end), piece[2]
            if shift == 0:
                yield Step(low, address, number, place, True)

    def _find(
        self, windows: Windows, low: int, high: int, place: int = -1, *, likely: bool = True
    ) -> Step | None:
        """The first that is missing and stored in [low, high).

        What is missing before it and was never stored is zeros, so it is not missing any more.
        """
        missing = self._missing
        while (piece := missing.find_from(low)) is not None and piece[0] < high:
            start, end, shift = piece
            position = max(start, low)
            number = windows.find_from(position + shift)
            stored_at = windows.address(number) - shift if number < windows.count else end
            if position < stored_at:
                missing.forget(position, min(stored_at, end))
                low = stored_at = min(stored_at, end)
            if stored_at < end and number < windows.count:
                if stored_at >= high:
                    return None
                base = windows.address(number) - shift
                low, high = max(position, base), min(end, base + windows.length)
                return Step(low, high, number, place, likely, shift)
        return None
