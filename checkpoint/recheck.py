"""What memory that no account is kept of has in common with the image before, page by page.

What is written densely is left out of an account (see `dense`) and so counts as written. Most of
it was: then a look at the first window of a unit is enough. Where it was not, pages that are as
the image has them are found here, and count as unwritten again. What is said to be the same was
compared byte by byte with content that had been authenticated, so it is so whatever came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from .beside import Beside
from .buffers import page_aligned
from .content import join_ranges
from .errors import LzyError
from .linux import PAGE_BYTES
from .linux.hugepages import HUGE_PAGE_BYTES
from .pages import page_runs

if TYPE_CHECKING:
    from .image import Image
    from .worker import PageSource

Range = tuple[int, int]
Window = tuple[int, int]
"""(window-aligned address, mask of pages)"""

_AT_ONCE = 2
_ZERO_PAGE = memoryview(bytes(PAGE_BYTES))


class Rechecked(NamedTuple):
    """`same`: pages that are as the image has them; `dense`: units of which half is not."""

    same: list[Range]
    dense: list[Range]


def recheck(base: Image, source: PageSource, windows: Sequence[Window]) -> Rechecked:
    """Compare windows of space 0, in order of address, with what `base` has of them.

    Raises what `source` raises. What of `base` cannot be read is not the same.
    """
    if not windows:
        return Rechecked([], [])
    units = iter([list(unit) for _, unit in groupby(windows, lambda w: w[0] // HUGE_PAGE_BYTES)])
    helpers = [Beside(lambda: _recheck_units(base, source, units)) for _ in range(_AT_ONCE)]
    found = [helper.result() for helper in helpers]
    return Rechecked(
        join_ranges(page for part in found for page in part.same),
        join_ranges(unit for part in found for unit in part.dense),
    )


def _recheck_units(base: Image, source: PageSource, units: Iterator[list[Window]]) -> Rechecked:
    """Of the units that this thread gets hold of; `next` of a list's iterator is one step."""
    comparison = _Comparison(base, source)
    same: list[Range] = []
    dense: list[Range] = []
    for windows in units:
        place = windows[0][0] // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        equal: list[Window] = []
        different = total = 0
        for number, (address, mask) in enumerate(windows):
            alike, changed = comparison.compare(address, mask)
            equal.append((address, alike))
            different += changed
            total += mask.bit_count()
            if number == 0 and 2 * different >= total:
                break
        if 2 * different >= total:
            dense.append((place, place + HUGE_PAGE_BYTES))
        same += [(start, start + length) for start, length in page_runs(equal)]
    return Rechecked(same, dense)


class _Comparison:
    """One thread's buffers: a window as it is, and as the image has it."""

    def __init__(self, base: Image, source: PageSource) -> None:
        self._base = base
        self._source = source
        window_bytes = base.window_pages * PAGE_BYTES
        self._now, self._now_at, self._now_view = page_aligned(window_bytes)
        self._before_view = page_aligned(window_bytes)[2]

    def compare(self, address: int, mask: int) -> tuple[int, int]:
        """Which of the pages `mask` of a window are as the image has them; how many are not.

        What the image has nothing of is never the same, for that need not mean zeros (a file may
        show there); but if it is zeros it has not changed either.
        """
        row = self._base.find_run(0, address)
        _, stored, chunk = self._base.run(row) if row >= 0 else (0, 0, 0)
        length_bytes = mask.bit_count() * PAGE_BYTES
        self._source.read_runs(page_runs([(address, mask)]), self._now_view[:length_bytes])
        if mask & stored:
            try:
                self._base.read_chunk(chunk, self._before_view)
            except LzyError:
                return 0, mask.bit_count()
        now, now_at, before = self._now, self._now_at, self._before_view
        if mask == stored and now.startswith(before[:length_bytes], now_at):
            return mask, 0
        same, changed, before_at = 0, 0, 0
        for bit in _bits(mask | stored):
            if mask & bit:
                page = before[before_at : before_at + PAGE_BYTES] if stored & bit else _ZERO_PAGE
                if not now.startswith(page, now_at):
                    changed += 1
                elif stored & bit:
                    same |= bit
                now_at += PAGE_BYTES
            before_at += PAGE_BYTES if stored & bit else 0
        return same, changed


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest
        mask ^= lowest
