"""Which addresses of a process still wait for which pages of its image.

A page is *missing* until it has been installed. What is not missing here and has no page in the
process is zero: never stored, or dropped by the process itself. So removing (madvise) and
unmapping both just forget a range, installing forgets it too, and when nothing is left the image
is all in.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from .linux import uffd

END_OF_ADDRESSES = 1 << 64


class MissingPages:
    """Disjoint pieces `[start, end)` of addresses, each with its `shift`.

    The page at address `a` is the image's page at `a + shift`; shift is 0 until the process moves
    memory by mremap(2). Finding is O(log n); changing costs one short memmove more.
    """

    __slots__ = ("_pieces", "_starts", "length_bytes")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pieces: dict[int, tuple[int, int]] = {}
        self.length_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Pieces `(start, end, shift)` in order of address."""
        for start in self._starts:
            end, shift = self._pieces[start]
            yield start, end, shift

    def find(self, address: int) -> tuple[int, int, int] | None:
        """The piece `(start, end, shift)` that holds `address`."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            start = self._starts[index]
            end, shift = self._pieces[start]
            if address < end:
                return start, end, shift
        return None

    def find_from(self, address: int) -> tuple[int, int, int] | None:
        """The first piece that ends after `address`."""
        starts = self._starts
        index = bisect_right(starts, address) - 1
        if index < 0 or self._pieces[starts[index]][0] <= address:
            index += 1
        if index == len(starts):
            return None
        start = starts[index]
        end, shift = self._pieces[start]
        return start, end, shift

    def next_start(self, address: int) -> int:
        """Where the first piece after `address` begins, or END_OF_ADDRESSES."""
        index = bisect_right(self._starts, address)
        return self._starts[index] if index < len(self._starts) else END_OF_ADDRESSES

    def add(self, start: int, end: int, shift: int = 0) -> None:
        """Call `[start, end)` missing, in place of what was known of it."""
        if start >= end:
            return
        self.forget(start, end)
        starts, pieces = self._starts, self._pieces
        self.length_bytes += end - start
        index = bisect_left(starts, start)
        if index < len(starts) and starts[index] == end and pieces[end][1] == shift:
            end = pieces.pop(end)[0]
            del starts[index]
        if index > 0:
            before = starts[index - 1]
            if pieces[before] == (start, shift):
                pieces[before] = (end, shift)
                return
        starts.insert(index, start)
        pieces[start] = (end, shift)

    def forget(self, start: int, end: int) -> None:
        """Call nothing in `[start, end)` missing: installed, removed or unmapped."""
        starts, pieces = self._starts, self._pieces
        first = bisect_right(starts, start) - 1
        if first < 0 or pieces[starts[first]][0] <= start:
            first += 1
        last = first
        kept: list[int] = []
        while last < len(starts) and starts[last] < end:
            piece_start = starts[last]
            piece_end, shift = pieces.pop(piece_start)
            if piece_start < start:
                pieces[piece_start] = (start, shift)
                kept.append(piece_start)
            if piece_end > end:
                pieces[end] = (piece_end, shift)
                kept.append(end)
            self.length_bytes -= min(piece_end, end) - max(piece_start, start)
            last += 1
        if last > first:
            starts[first:last] = kept

    def move(self, source: int, target: int, length_bytes: int) -> None:
        """What was missing at `source` is missing at `target` (mremap(2))."""
        end = source + length_bytes
        moved = []
        piece = self.find_from(source)
        while piece is not None and piece[0] < end:
            moved.append((max(piece[0], source), min(piece[1], end), piece[2]))
            piece = self.find_from(piece[1])
        self.forget(source, end)
        self.forget(target, target + length_bytes)
        by = target - source
        for start, piece_end, shift in moved:
            self.add(start + by, piece_end + by, shift - by)

    def copy(self) -> MissingPages:
        """The same, for a process that was forked."""
        other = MissingPages()
        other._starts = self._starts.copy()
        other._pieces = self._pieces.copy()
        other.length_bytes = self.length_bytes
        return other


def follow(event: tuple[int, int, int, int], missing: MissingPages, moved: MissingPages) -> bool:
    """Follow what a process did to its own memory, as the kernel tells it; whether it is that.

    In `moved`, without shifts, stands where memory was moved to: missing or not, it is not what the
    image has at that address.
    """
    kind, a, b, c = event
    if kind in (uffd.EVENT_REMOVE, uffd.EVENT_UNMAP):
        missing.forget(a, b)
        if kind == uffd.EVENT_UNMAP:
            moved.forget(a, b)
    elif kind == uffd.EVENT_REMAP:
        missing.move(a, b, c)
        moved.add(b, b + c)
    else:
        return False
    return True
