"""What an incremental checkpoint takes from the image before it, and what it stores anew.

Everything here is arithmetic on ranges and masks: no memory is read, nothing is written. Of a
large session nearly all windows are as they were. They are not looked at one by one: they are rows
of the base's run table, named by their ends and copied as they lie.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .content import cut_windows, join_ranges, windows_of
from .image import CHUNK_MASK
from .linux import PAGE_BYTES
from .patchwork import MOST_PIECES, Piece, is_worth_it, renew

Range = tuple[int, int]
"""(start, end): page-aligned addresses; ranges ascend"""
Window = tuple[int, int]
"""(window-aligned address, mask of pages)"""


class Kept(NamedTuple):
    """What a base image has as it is: rows of its run table, and pieces of its chunks.

    Pages of zeros are in neither, for they are not in the base.
    """

    rows: list[tuple[int, int]]
    """[first, last) of the run records, ascending: windows of one chunk each."""
    pieces: dict[int, list[Piece]]
    """{window address: pieces of chunks}: other windows of which something is kept."""
    page_count: int
    """How many pages there are, those of zeros included."""


class Increment(NamedTuple):
    """`kept`: what is as the base image has it; `fresh`: what is to be read and stored, ascending.

    Together they are the pages that there are, each once.
    """

    kept: Kept
    fresh: list[Window]


class TooScattered(Exception):
    """What cannot be read now lies in more pieces of chunks than a window may have."""


class Rows(Protocol):
    """What is planned with: an image, or what was read ahead of one (`draft.Draft`)."""

    @property
    def window_pages(self) -> int: ...
    @property
    def runs(self) -> array[int] | memoryview[int]: ...
    @property
    def chunk_count(self) -> int: ...
    @property
    def patchwork_count(self) -> int: ...

    def space_extent(self, space: int) -> tuple[int, int]:
        """[first, last) of the rows of a space."""

    def pieces(self, chunk: int, mask: int) -> list[Piece]:
        """What makes up the pages `mask` that a row finds in `chunk`."""


def plan_checkpoint(
    base: Rows,
    present: Sequence[Range],
    written: Sequence[Range],
    away: Sequence[Range] = (),
    *,
    spare: int = 0,
) -> Increment:
    """How to make a checkpoint of the pages `present`, of which `written` may differ from `base`.

    Of one process: `base` is what `Image.in_space` makes of an image of several.

    A window of which too little is left in the chunks of `base` is stored anew, whole
    (`lzy.checkpoint.patchwork.is_worth_it`), but for those of its pages that are `away`: these
    cannot be read now, and have not been written. Raises TooScattered. In every window there is
    room for `spare` pieces more.
    """
    runs = base.runs[: 3 * base.space_extent(0)[1]]
    addresses = runs[0::3].tolist()
    chunks = [owner & CHUNK_MASK for owner in runs[2::3].tolist()]
    chunk_count = base.chunk_count
    dirty = dict(windows_of(written, base.window_pages))
    whole, singles = cut_windows(present, base.window_pages)
    rows, special = _find_rows(whole, addresses, _find_special(base, addresses, chunks, dirty))
    full = (1 << base.window_pages) - 1
    singles += [(address, full) for address in special]
    singles.sort()
    unreadable: dict[int, int] | None = None
    kept: dict[int, list[Piece]] = {}
    fresh: list[Window] = []
    for address, mask in singles:
        at = bisect_left(addresses, address)
        stored, chunk = 0, 0
        if at < len(addresses) and addresses[at] == address:
            stored, chunk = runs[3 * at + 1], chunks[at]
        fresh_mask = dirty.get(address, 0) & mask
        if not fresh_mask and stored & mask == stored and chunk < chunk_count:
            if stored:
                rows.append((at, at + 1))
            continue
        pieces = renew(base.pieces(chunk, stored), mask & ~fresh_mask) if stored else []
        if pieces and not is_worth_it(pieces, fresh_mask, spare):
            if unreadable is None:
                unreadable = dict(windows_of(away, base.window_pages))
            kept_mask = unreadable.get(address, 0) & mask & ~fresh_mask
            fresh_mask = mask & ~kept_mask
            pieces = renew(pieces, kept_mask)
            if len(pieces) + bool(fresh_mask) > MOST_PIECES:
                raise TooScattered
        if pieces:
            kept[address] = pieces
        if fresh_mask:
            fresh.append((address, fresh_mask))
    pages = sum([end - start for start, end in present]) // PAGE_BYTES
    pages -= sum([mask.bit_count() for _, mask in fresh])
    rows = join_ranges([row for row in rows if row[0] < row[1]])
    return Increment(Kept(rows, kept, pages), fresh)


def _find_special(
    base: Rows, addresses: list[int], chunks: list[int], dirty: dict[int, int]
) -> list[int]:
    """The windows that have to be looked at: what was written, and what lies in several chunks."""
    special = set(dirty)
    if base.patchwork_count:
        count = base.chunk_count
        special.update([at for at, chunk in zip(addresses, chunks, strict=True) if chunk >= count])
    return sorted(special)


def _find_rows(
    spans: list[Range], addresses: list[int], special: list[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """(rows of the windows in `spans` that are not special, those that are); rows may be empty."""
    rows: list[tuple[int, int]] = []
    met: list[int] = []
    at = number = 0
    for start, end in spans:
        at = bisect_left(addresses, start, at)
        number = bisect_left(special, start, number)
        behind = bisect_left(special, end, number)
        for address in special[number:behind]:
            found = bisect_left(addresses, address, at)
            rows.append((at, found))
            at = found + (found < len(addresses) and addresses[found] == address)
        met += special[number:behind]
        found = bisect_left(addresses, end, at)
        rows.append((at, found))
        at, number = found, behind
    return rows, met
