"""The pages of two images side by side: equal by their chunks' identity, by their bytes only then.

A page that both images take from the same place of the same chunk is equal unread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from .buffers import page_aligned
from .linux import PAGE_BYTES

if TYPE_CHECKING:
    from .image import Image

Progress = Callable[[str, int, int], None]

GROUP_PAGES = 64  # the largest window, whatever the two images' are
GROUP_BYTES = GROUP_PAGES * PAGE_BYTES
_PROGRESS_S = 0.1


class _Window(NamedTuple):
    """A run record: which pages of its group it holds (`mask`), and where its own begin."""

    mask: int
    shift: int
    chunk: int


class Comparer:
    """Walks the windows of both images side by side."""

    def __init__(self, before: Image, after: Image, progress: Progress | None) -> None:
        self._before, self._after, self._progress = before, after, progress
        self._content = _Content(before), _Content(after)
        self._done_bytes = 0
        self._told_s = 0.0
        self.total_bytes = sum(
            image.run_count * image.window_pages * PAGE_BYTES for image in (before, after)
        )

    @property
    def read_bytes(self) -> int:
        """Content that was read, after decompression."""
        return sum(content.read_bytes for content in self._content)

    def differences(self, before: int, after: int) -> Iterator[tuple[int, int, int, int]]:
        """(address, changed, new, gone) of each group of 64 pages that differs; masks.

        The spaces are numbers, -1 where an image has none.
        """
        ours, theirs = self._groups(self._before, before), self._groups(self._after, after)
        one, two = next(ours, None), next(theirs, None)
        while one is not None or two is not None:
            if two is None or (one is not None and one[0] < two[0]):
                assert one is not None
                yield one[0], 0, 0, _mask(one[1])
                one = next(ours, None)
            elif one is None or two[0] < one[0]:
                yield two[0], 0, _mask(two[1]), 0
                two = next(theirs, None)
            else:
                held, holds = _mask(one[1]), _mask(two[1])
                changed = self._changed(one[1], two[1], held & holds)
                if changed or held != holds:
                    yield one[0], changed, holds & ~held, held & ~holds
                one, two = next(ours, None), next(theirs, None)

    def _changed(self, one: list[_Window], two: list[_Window], common: int) -> int:
        """Those of the pages `common` to both groups whose bytes differ."""
        unknown = common & ~self._known_equal(one, two)
        if not unknown:
            return 0
        ours, theirs = self._content
        ours.load(one, unknown)
        theirs.load(two, unknown)
        changed = 0
        while unknown:
            page = unknown & -unknown
            unknown ^= page
            if ours.page(page) != theirs.page(page):
                changed |= page
        return changed

    def _known_equal(self, one: list[_Window], two: list[_Window]) -> int:
        """Pages that both take from the same place of the same chunk."""
        before, after = self._before, self._after
        if len(one) == len(two) == 1 and one[0][:2] == two[0][:2]:
            if before.content_key(one[0].chunk) == after.content_key(two[0].chunk):
                return one[0].mask
            if one[0].chunk < before.chunk_count and two[0].chunk < after.chunk_count:
                return 0
        parts: dict[tuple[bytes, int], int] = {}
        for identity, taken in _parts(before, one):
            parts[identity] = parts.get(identity, 0) | taken
        equal = 0
        for identity, taken in _parts(after, two):
            equal |= taken & parts.get(identity, 0)
        return equal

    def _groups(self, image: Image, space: int) -> Iterator[tuple[int, list[_Window]]]:
        first, last = image.space_extent(space) if space >= 0 else (0, 0)
        window_bytes = image.window_pages * PAGE_BYTES
        at, windows = -1, list[_Window]()
        for index in range(first, last):
            address, mask, chunk = image.run(index)
            group = address & -GROUP_BYTES
            if group != at:
                if windows:
                    yield at, windows
                at, windows = group, []
            shift = (address - group) // PAGE_BYTES
            windows.append(_Window(mask << shift, shift, chunk))
            self._tell(window_bytes)
        if windows:
            yield at, windows

    def _tell(self, done_bytes: int) -> None:
        self._done_bytes += done_bytes
        if self._progress and (now_s := time.monotonic()) - self._told_s >= _PROGRESS_S:
            self._told_s = now_s
            self._progress("comparing", self._done_bytes, self.total_bytes)


def _mask(windows: list[_Window]) -> int:
    found = 0
    for window in windows:
        found |= window.mask
    return found


def _parts(image: Image, windows: list[_Window]) -> Iterator[tuple[tuple[bytes, int], int]]:
    """((chunk's identity, pages it holds), pages taken from it): equal parts are equal bytes."""
    for window in windows:
        for piece in image.pieces(window.chunk, window.mask >> window.shift):
            identity = image.chunk_place(piece.chunk)[0], piece.held << window.shift
            yield identity, piece.taken << window.shift


class _Content:
    """The pages of one group of one image, as far as they are wanted."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._memory: list[memoryview] = []
        self._loaded: list[tuple[int, int, memoryview]] = []
        self.read_bytes = 0

    def load(self, windows: list[_Window], wanted: int) -> None:
        """Read the chunks of a group that hold the pages `wanted`."""
        self._loaded.clear()
        for window in windows:
            for piece in self._image.pieces(window.chunk, window.mask >> window.shift):
                taken = piece.taken << window.shift
                if not taken & wanted:
                    continue
                if len(self._memory) == len(self._loaded):
                    self._memory.append(page_aligned(GROUP_BYTES)[2])
                buffer = self._memory[len(self._loaded)]
                self.read_bytes += self._image.read_chunk(piece.chunk, buffer)
                self._loaded.append((taken, piece.held << window.shift, buffer))

    def page(self, page: int) -> bytes:
        """The bytes of the page that is that single bit of the mask."""
        _, held, buffer = next(loaded for loaded in self._loaded if loaded[0] & page)
        start = (held & (page - 1)).bit_count() * PAGE_BYTES
        return bytes(buffer[start : start + PAGE_BYTES])


class PageReader:
    """Single pages of the processes of an image, from their parents where they have them so."""

    def __init__(self, processes: Iterable[Image]) -> None:
        """`processes`: what `Image.member` gives of each, and the image itself, for the first."""
        self._processes = {process.document.get("pid"): process for process in processes}
        self._memory = page_aligned(GROUP_BYTES)[2]
        self._held = -1
        self.read_bytes = 0

    def read(self, process: Image, address: int) -> bytes:
        """The page of a process at `address`; zeros where nothing is stored."""
        index = process.find_run(0, address)
        start, mask, chunk = process.run(index) if index >= 0 else (address, 0, -1)
        page = 1 << (address - start) // PAGE_BYTES
        if mask & page:
            if chunk != self._held:
                self._held = -1
                self.read_bytes += process.read_chunk(chunk, self._memory)
                self._held = chunk
            at = (mask & (page - 1)).bit_count() * PAGE_BYTES
            return bytes(self._memory[at : at + PAGE_BYTES])
        parent = self._processes.get(process.document["process"]["parent"])
        inherited = process.document.get("inherited", ())
        if parent and any(start <= address < end for start, end in inherited):
            return self.read(parent, address)
        return bytes(PAGE_BYTES)
