"""What an image has stored for a range of addresses, and where in which chunk it lies."""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

from .errors import Damaged
from .linux import PAGE_BYTES

_MANY_MASKS = 1 << 14


class ChunkSource(Protocol):
    """What the pager needs of an image; `lzy.checkpoint.image.Image` is one.

    `runs` are records of three u64, sorted: window address, mask of stored pages, chunk number in
    the low 32 bits of the third; `space_extent(0)` tells which records are the address space's.
    """

    @property
    def window_pages(self) -> int: ...
    @property
    def runs(self) -> memoryview: ...
    def space_extent(self, space: int) -> tuple[int, int]: ...
    def read_chunk(self, chunk: int, into: memoryview) -> int: ...
    def close(self) -> None: ...


class Windows:
    """The windows of an image's address space, numbered in order of address. Finds in O(log n)."""

    __slots__ = ("_addresses", "_chunks", "_mask", "_masks", "_runs", "count", "image", "length")

    def __init__(self, image: ChunkSource) -> None:
        first, last = image.space_extent(0)
        runs = image.runs[3 * first : 3 * last]
        self.image = image
        self.count = last - first
        self.length = image.window_pages * PAGE_BYTES
        self._mask = -self.length
        self._addresses = runs[0::3]
        self._masks = runs[1::3]
        self._chunks = runs[2::3]
        self._runs: dict[int, tuple[tuple[int, int, int], ...]] = {}

    def find_from(self, address: int) -> int:
        """The window that holds `address` or else the next stored one; `count` if there is none."""
        return bisect_left(self._addresses, address & self._mask)

    def address(self, number: int) -> int:
        """Where window `number` begins."""
        start: int = self._addresses[number]
        return start

    def chunk(self, number: int) -> int:
        """The chunk that holds the stored pages of window `number`."""
        chunk: int = self._chunks[number] & 0xFFFFFFFF
        return chunk

    def absent_until(self, address: int, number: int) -> int:
        """0 when the page at `address` is stored, else where the next stored page may be.

        `number` is what `find_from(address)` said.
        """
        window = address & self._mask
        if number == self.count:
            return 1 << 64
        found: int = self._addresses[number]
        if found != window:
            return found
        mask: int = self._masks[number] >> ((address - window) // PAGE_BYTES)
        if mask & 1:
            return 0
        if mask:
            return address + ((mask & -mask).bit_length() - 1) * PAGE_BYTES
        return window + self.length

    def parts(
        self, number: int, low: int, high: int, shift: int, page: int
    ) -> list[tuple[int, int, int]]:
        """What of window `number` goes to addresses `[low, high)` of the process.

        `shift` leads from there to addresses of the image. Each part is (address in the process,
        offset in the chunk, length in bytes), as long as can be; the first one begins with `page`
        (unless that is -1).
        """
        base = self._addresses[number] - shift
        parts: list[tuple[int, int, int]] = []
        for offset, stored, length in self._runs_of(self._masks[number]):
            first = base + offset
            last = first + length
            if first < low:
                stored += low - first
                first = low
            if last > high:
                last = high
            if first >= last:
                continue
            if first <= page < last:
                parts.insert(0, (page, stored + page - first, last - page))
                last = page
            if first < last:
                parts.append((first, stored, last - first))
        return parts

    def stored_bytes(self, number: int) -> int:
        """How long the chunk of window `number` must be."""
        return self._masks[number].bit_count() * PAGE_BYTES

    def read(self, number: int, into: memoryview) -> None:
        """Read the chunk of window `number`; Damaged, StoreUnavailable."""
        self.check(number, self.image.read_chunk(self.chunk(number), into))

    def check(self, number: int, length_bytes: int) -> None:
        """Damaged when that is not how long the chunk of window `number` must be."""
        if length_bytes != self.stored_bytes(number):
            raise Damaged(
                f"the chunk for {self.address(number):#x} has {length_bytes} bytes"
                f" instead of {self.stored_bytes(number)}",
                address=self.address(number),
            )

    def _runs_of(self, mask: int) -> tuple[tuple[int, int, int], ...]:
        """(byte offset in the window, byte offset in the chunk, length) of each run in a mask."""
        found = self._runs.get(mask)
        if found is None:
            runs = []
            rest, bit, stored = mask, 0, 0
            while rest:
                skip = (rest & -rest).bit_length() - 1
                rest >>= skip
                bit += skip
                length = (~rest & (rest + 1)).bit_length() - 1
                runs.append((bit * PAGE_BYTES, stored * PAGE_BYTES, length * PAGE_BYTES))
                rest >>= length
                bit += length
                stored += length
            if len(self._runs) >= _MANY_MASKS:
                self._runs.clear()
            found = self._runs[mask] = tuple(runs)
        return found
