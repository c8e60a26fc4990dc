"""Memory that is written so densely that an account of its writes costs more than reading it.

The first write to a protected page is a fault, and the first to a huge page splits it. A program
that rewrites all of an array between two checkpoints pays 512 faults for each huge page, and all
that the account then says is that everything was written. Such memory, in units of a huge page, is
left out from then on: it counts as written at the next checkpoint, which compares it with the image
before (`recheck`). A unit of which less than half has changed by then is under account again.

Everything here is arithmetic, and none of it can make an account miss a write: what is left out is
not protected, and what is not protected counts as written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .content import join_ranges
from .linux import PAGE_BYTES
from .linux.hugepages import HUGE_PAGE_BYTES

Range = tuple[int, int]

_LEAST_RUN_BYTES = 16 * PAGE_BYTES
_LEAST_BYTES = HUGE_PAGE_BYTES // 2


def find_dense(written: Iterable[Range]) -> list[Range]:
    """The units of which at least half was written, joined, ascending.

    Runs of less than 16 pages are passed over: it takes longer to count them than to protect them.
    """
    sizes: dict[int, int] = {}
    for start, end in [run for run in written if run[1] - run[0] >= _LEAST_RUN_BYTES]:
        at = start
        while at < end:
            unit = at // HUGE_PAGE_BYTES
            stop = min(end, (unit + 1) * HUGE_PAGE_BYTES)
            sizes[unit] = sizes.get(unit, 0) + stop - at
            at = stop
    return _place(unit for unit, size in sizes.items() if size >= _LEAST_BYTES)


def without(dense: Iterable[Range], left_out: Iterable[Range]) -> list[Range]:
    """The units of `dense` that were not left out."""
    was_out = set(_units(left_out))
    return _place(unit for unit in _units(dense) if unit not in was_out)


def _units(ranges: Iterable[Range]) -> Iterator[int]:
    for start, end in ranges:
        yield from range(start // HUGE_PAGE_BYTES, end // HUGE_PAGE_BYTES)


def _place(units: Iterable[int]) -> list[Range]:
    return join_ranges((unit * HUGE_PAGE_BYTES, (unit + 1) * HUGE_PAGE_BYTES) for unit in units)
