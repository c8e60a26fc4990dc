"""What an incremental checkpoint takes from the image before it, and what it stores anew.

Everything here is arithmetic on masks of windows: no memory is read, nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .image import Image
from .patchwork import MOST_PIECES, is_worth_it, renew

Window = tuple[int, int]
"""(window-aligned address, mask of pages)"""


class Increment(NamedTuple):
    """`kept`: pages that are as the base image has them; `fresh`: pages to be read and stored.

    Both ascend by address; together they are the pages that there are, each once.
    """

    kept: list[Window]
    fresh: list[Window]


def runs_by_address(base: Image) -> dict[int, tuple[int, int]]:
    """{window address: (mask of stored pages, chunk)} of space 0."""
    first, last = base.space_extent(0)
    runs = base.runs[3 * first : 3 * last]
    pairs = zip(runs[1::3].tolist(), runs[2::3].tolist(), strict=True)
    return dict(zip(runs[0::3].tolist(), pairs, strict=True))


class TooScattered(Exception):
    """What cannot be read now lies in more pieces of chunks than a window may have."""


def plan_increment(
    base: Image,
    present: Iterable[Window],
    written: Iterable[Window],
    away: Iterable[Window] = (),
) -> Increment:
    """How to make a checkpoint of the pages `present`, of which `written` may differ from `base`.

    A window of which too little is left in the chunks of `base` is stored anew, whole
    (`lzy.checkpoint.patchwork.is_worth_it`), but for those of its pages that are `away`: these
    cannot be read now, and have not been written. Raises TooScattered.
    """
    dirty = dict(written)
    unreadable = dict(away)
    runs = runs_by_address(base)
    chunks = base.chunk_count
    nothing = (0, 0)
    kept: list[Window] = []
    fresh: list[Window] = []
    for window in present:
        address, mask = window
        stored, chunk = runs.get(address, nothing)
        if address not in dirty:  # as a rule
            if stored & mask == stored and chunk < chunks:
                kept.append(window)
                continue
            fresh_mask = 0
        else:
            fresh_mask = dirty[address] & mask
        kept_mask = mask & ~fresh_mask
        if kept_mask and stored:
            pieces = renew(base.pieces(chunk, stored), kept_mask)
            if pieces and not is_worth_it(pieces, fresh_mask):
                kept_mask = unreadable.get(address, 0) & kept_mask
                fresh_mask = mask & ~kept_mask
                if len(renew(pieces, kept_mask)) + bool(fresh_mask) > MOST_PIECES:
                    raise TooScattered
        if kept_mask:
            kept.append((address, kept_mask))
        if fresh_mask:
            fresh.append((address, fresh_mask))
    return Increment(kept, fresh)
