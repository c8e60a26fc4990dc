"""Memory as it was at one moment: what was written since an image is copied, that has the rest.

Of a process that has written little since the image before, only that is copied while it stands
still. Where a window is stored anew all the same, being in too many pieces, its other pages are as
the image has them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .buffers import page_aligned
from .content import CopiedPages, windows_of
from .linux import PAGE_BYTES
from .pages import MOST_WINDOW_PAGES, present_pages

if TYPE_CHECKING:
    from .content import ProcessPages
    from .image import Image

Range = tuple[int, int]


class ComposedPages:
    """A `PageSource` over the pages of one process."""

    def __init__(self, source: ProcessPages, written: Sequence[Range], base: Image | None) -> None:
        """Copies `written`, ascending, from `source`; `base`, if any, has what is not in it."""
        self._base = base
        self._written = written
        self._starts = [start for start, _ in written]
        self._copied = CopiedPages(source, windows_of(written, MOST_WINDOW_PAGES))

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        """Fill `into` with the runs. Raises what the image does of which a page cannot be read."""
        position = 0
        for address, length in runs:
            for start, end, is_copied in self._cut(address, address + length):
                part = into[position : position + end - start]
                if is_copied:
                    self._copied.read_runs([(start, end - start)], part)
                else:
                    self._read_base(start, end, part)
                position += end - start

    def _cut(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """[start, end) in parts of which all is written, or nothing."""
        at = max(bisect_right(self._starts, start) - 1, 0)
        while start < end:
            while at < len(self._written) and self._written[at][1] <= start:
                at += 1
            first, behind = self._written[at] if at < len(self._written) else (end, end)
            stop = min(end, behind if first <= start else first)
            yield start, stop, first <= start
            start = stop

    def _read_base(self, start: int, end: int, into: memoryview) -> None:
        base = self._base
        if base is None:
            raise ValueError(f"{start:#x} was not written, and is to be read")
        window_bytes = base.window_pages * PAGE_BYTES
        content = page_aligned(window_bytes)[2]
        into[:] = bytes(len(into))  # what was zeros, the image has nothing of
        for window in range(start & -window_bytes, end, window_bytes):
            row = base.find_run(0, window)
            if row < 0:
                continue
            _, stored, chunk = base.run(row)
            base.read_chunk(chunk, content)
            for number, page in enumerate(present_pages(stored)):
                address = window + page * PAGE_BYTES
                if start <= address < end:
                    found = content[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
                    into[address - start : address - start + PAGE_BYTES] = found

    def close(self) -> None:
        """Let go of the copy."""
        self._copied.close()
