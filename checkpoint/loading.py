"""Puts what the image has stored for missing addresses in place: read ahead, or else read now."""

from __future__ import annotations

import mmap

from .contexts import Context
from .journal import MAIN, Journal
from .linux import PAGE_BYTES, address_of
from .supply import Supply
from .windows import Windows

_MOST_WINDOW_BYTES = 64 * PAGE_BYTES
_DOZE_BYTES = 16 * PAGE_BYTES  # what a fault brings in where only what is touched is wanted


class Loader:
    """Installs windows of the image. `installed_bytes`: how much; readers count for themselves."""

    def __init__(self, supply: Supply, journal: Journal) -> None:
        self._supply = supply
        self._journal = journal
        self.on_demand: bool = journal.facts.get("on_demand", False)
        """Whether only what is touched is wanted, as far as we have heard (`is_on_demand`)."""
        self.installed_bytes = 0
        self._buffer = memoryview(mmap.mmap(-1, _MOST_WINDOW_BYTES))
        self._buffer_address = address_of(self._buffer)

    def is_on_demand(self) -> bool:
        """Look whether only what is touched is wanted still."""
        self.on_demand = self.on_demand and not self._journal.is_roused
        return self.on_demand

    def load(
        self,
        context: Context,
        windows: Windows,
        number: int,
        piece: tuple[int, int, int],
        page: int = -1,
    ) -> int:
        """Install what window `number` has for a piece, from `page` on first; where that ends.

        Raises LayoutChanged, MemoryGone, LzyError, OSError. What does not authenticate is never
        installed, nor are zeros in its place.
        """
        start, end, shift = piece
        base = windows.address(number) - shift
        low = base if base > start else start
        high = base + windows.length
        if high > end:
            high = end
        if self.on_demand and page >= 0:
            low = max(low, page & -_DOZE_BYTES)
            high = min(high, (page & -_DOZE_BYTES) + _DOZE_BYTES)
        parts = windows.parts(number, low, high, shift, page)
        # Of a process that goes to doze the map says more than is missing: what is there may go.
        may_go_yet = self.on_demand and context.token == MAIN
        if parts:
            slot = self._supply.take(number)
            readahead = self._supply.readahead
            if slot is None and _is_all_in(context, low, high):
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

    def _install(
        self, context: Context, parts: list[tuple[int, int, int]], source: int, *, forgets: bool
    ) -> None:
        for address, offset, length in parts:
            installed = context.install(address, source + offset, length, forgets=forgets)
            self.installed_bytes += installed


def _is_all_in(context: Context, low: int, high: int) -> bool:
    """Whether nothing of [low, high) is missing any more."""
    piece = context.missing.find_from(low)
    return piece is None or piece[0] >= high
