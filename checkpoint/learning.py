"""Learns, from what is asked for at one wake, in which order the process needs its memory.

How that is done, and why so, is told in docs/pager.md; what is kept of it is `working_set`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .contexts import Context
from .course import Step
from .journal import MAIN
from .supply import Supply
from .windows import Windows
from .working_set import MOST_WINDOWS, merge_order


class Lesson:
    """What one wake teaches about `order`, window addresses in the order of need known so far.

    `keep` gets the order that is known better by the end.
    """

    def __init__(
        self, order: Sequence[int], keep: Callable[[list[int]], None], supply: Supply
    ) -> None:
        self._order = order
        self._keep = keep
        self._supply = supply
        self._place = 0  # how many windows of the order are in
        self._needed: dict[int, int] = {}  # see `merge_order`
        self._unneeded: dict[int, None] = {}

    def note(
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
                is_in = context.missing.find(address - shift) is None
                if is_in or self._supply.is_installed(passed):  # else it would have asked
                    self._needed.setdefault(address, self._place)
        place = MOST_WINDOWS if is_due else self._place  # then its own is earlier
        self._needed.setdefault(windows.address(number), place)

    def pass_by(self, context: Context, windows: Windows, step: Step) -> None:
        """The stream of the order of need, or of what comes behind it, has come to a step."""
        if context.token != MAIN:
            return
        if step.place >= 0:
            self._place = step.place
        window = windows.address(step.number)
        if context.course.is_held_back(window) and window not in self._needed:
            self._unneeded[window] = None

    def hand_over(self) -> None:
        """Say in which order memory was needed, if this wake has taught anything; once."""
        if self._needed:
            self._keep(merge_order(self._order, self._needed, self._unneeded))
            self._needed = {}
