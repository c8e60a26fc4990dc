"""What changed between two images: pages by their chunks' identity first, by their bytes only then.

A page that both images take from the same place of the same chunk is equal unread. Two checkpoints
of one process share almost all, so a comparison reads little more than what changed. Everything is
counted in whole pages and belongs to the mapping that has the page in the later image, else to
the one that had it.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .buffers import page_aligned
from .linux import PAGE_BYTES

if TYPE_CHECKING:
    from .image import Image

Progress = Callable[[str, int, int], None]

_GROUP_PAGES = 64  # the largest window, whatever the two images' are
_GROUP_BYTES = _GROUP_PAGES * PAGE_BYTES
_PROGRESS_S = 0.1


class Changes:
    """Bytes, in whole pages: held by both images and different, only by the later, the earlier."""

    def __init__(self) -> None:
        self.changed_bytes = 0
        self.new_bytes = 0
        self.gone_bytes = 0

    @property
    def total_bytes(self) -> int:
        return self.changed_bytes + self.new_bytes + self.gone_bytes

    def add(self, changed: int, new: int, gone: int) -> None:
        """Count the pages of three masks."""
        self.changed_bytes += changed.bit_count() * PAGE_BYTES
        self.new_bytes += new.bit_count() * PAGE_BYTES
        self.gone_bytes += gone.bit_count() * PAGE_BYTES


class MappingChanges(Changes):
    """What changed in a mapping; `presence` is both, new (only later) or gone (only earlier)."""

    def __init__(self, vma: dict[str, Any], start: int, end: int, presence: str) -> None:
        super().__init__()
        self.start, self.end, self.presence = start, end, presence
        self.permissions = str(vma.get("permissions", ""))
        self.kind = str(vma.get("kind", ""))
        self.path = str(vma.get("path") or "")


class ObjectChanges(Changes):
    """What changed in a memory object (memfd, shared memory, deleted file)."""

    def __init__(self, name: str, presence: str) -> None:
        super().__init__()
        self.name, self.presence = name, presence


class Comparison(NamedTuple):
    """All mappings by address, all objects, and how much had to be read to know."""

    mappings: list[MappingChanges]
    objects: list[ObjectChanges]
    read_bytes: int
    duration_s: float

    def sum(self, what: str) -> int:
        """A figure of `Changes`, over everything."""
        return sum(getattr(part, what) for part in (*self.mappings, *self.objects))


def compare_images(before: Image, after: Image, progress: Progress | None = None) -> Comparison:
    """What changed from one image to another. Raises Damaged, StoreUnavailable."""
    began = time.monotonic()
    comparer = _Comparer(before, after, progress)
    mappings = _lay_out(before.document.get("vmas", []), after.document.get("vmas", []))
    places = _Places(mappings)
    for group, changed, new, gone in comparer.differences(0, 0):
        places.add(group, changed, new, gone)
    for page in _blanked_file_pages(before, after):
        places.add(page, 1, 0, 0)

    objects = []
    ours, theirs = _objects(before), _objects(after)
    for key in dict.fromkeys((*theirs, *ours)):
        presence = "new" if key not in ours else "gone" if key not in theirs else "both"
        counted = ObjectChanges(key[0], presence)
        for _, changed, new, gone in comparer.differences(ours.get(key, -1), theirs.get(key, -1)):
            counted.add(changed, new, gone)
        objects.append(counted)
    if progress:
        progress("comparing", comparer.total_bytes, comparer.total_bytes)
    return Comparison(mappings, objects, comparer.read_bytes, time.monotonic() - began)


# -- pages -------------------------------------------------------------------------------------


class _Window(NamedTuple):
    """A run record: which pages of its group it holds (`mask`), and where its own begin."""

    mask: int
    shift: int
    chunk: int


class _Comparer:
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
            group = address & -_GROUP_BYTES
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
                    self._memory.append(page_aligned(_GROUP_BYTES)[2])
                buffer = self._memory[len(self._loaded)]
                self.read_bytes += self._image.read_chunk(piece.chunk, buffer)
                self._loaded.append((taken, piece.held << window.shift, buffer))

    def page(self, page: int) -> bytes:
        """The bytes of the page that is that single bit of the mask."""
        _, held, buffer = next(loaded for loaded in self._loaded if loaded[0] & page)
        start = (held & (page - 1)).bit_count() * PAGE_BYTES
        return bytes(buffer[start : start + PAGE_BYTES])


def _blanked_file_pages(before: Image, after: Image) -> Iterator[int]:
    """Addresses of file pages that are the process's own zeros in one image and clean in the other.

    Zeros are not stored, nor are clean pages: only the ranges of changed pages tell them apart.
    """
    ours, theirs = _blank(before), _blank(after)
    for blank, other in ((theirs - ours, before), (ours - theirs, after)):
        for address in sorted(blank):
            index = other.find_run(0, address)
            if index >= 0:
                start, mask, _ = other.run(index)
                if mask >> ((address - start) // PAGE_BYTES) & 1:
                    continue  # stored there: counted as new or gone
            yield address


def _blank(image: Image) -> set[int]:
    """Pages behind files that are the process's own and hold zeros."""
    found = set()
    for start, end in image.document.get("changed", []):
        for address in range(start, end, PAGE_BYTES):
            index = image.find_run(0, address)
            if index >= 0:
                begins, mask, _ = image.run(index)
                if mask >> ((address - begins) // PAGE_BYTES) & 1:
                    continue
            found.add(address)
    return found


# -- places ------------------------------------------------------------------------------------


def _lay_out(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[MappingChanges]:
    """The later mappings, and between them what is left of the earlier ones; by address."""
    earlier = sorted((vma["start"], vma["end"]) for vma in before)
    later = sorted((vma["start"], vma["end"]) for vma in after)
    found = []
    for vma in after:
        covered = next(_overlaps(earlier, vma["start"], vma["end"]), None)
        presence = "new" if covered is None else "both"
        found.append(MappingChanges(vma, vma["start"], vma["end"], presence))
    for vma in before:
        at = vma["start"]
        for start, end in _overlaps(later, vma["start"], vma["end"]):
            if at < start:
                found.append(MappingChanges(vma, at, start, "gone"))
            at = max(at, end)
        if at < vma["end"]:
            found.append(MappingChanges(vma, at, vma["end"], "gone"))
    found.sort(key=lambda mapping: mapping.start)
    return found


def _overlaps(ranges: list[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Those of the sorted, disjoint ranges that touch [start, end)."""
    at = max(bisect_right(ranges, (start, 1 << 64)) - 1, 0)
    while at < len(ranges) and ranges[at][0] < end:
        if ranges[at][1] > start:
            yield ranges[at]
        at += 1


class _Places:
    """Finds the mapping of an address; the mappings are sorted and disjoint."""

    def __init__(self, mappings: list[MappingChanges]) -> None:
        self._mappings = mappings
        self._starts = [mapping.start for mapping in mappings]

    def add(self, address: int, changed: int, new: int, gone: int) -> None:
        """Count the pages of three masks that begin at `address`."""
        at = max(bisect_right(self._starts, address) - 1, 0)
        while at < len(self._mappings) and self._starts[at] < address + _GROUP_BYTES:
            mapping = self._mappings[at]
            low = max(mapping.start - address, 0) // PAGE_BYTES
            high = min(max(mapping.end - address, 0) // PAGE_BYTES, _GROUP_PAGES)
            within = (1 << high) - (1 << low) if high > low else 0
            mapping.add(changed & within, new & within, gone & within)
            at += 1


def _objects(image: Image) -> dict[tuple[str, int], int]:
    """The space of each memory object, by its name and how many of that name came before."""
    found: dict[tuple[str, int], int] = {}
    for described in image.document.get("objects", []):
        name = str(described.get("name", ""))
        nth = sum(1 for known, _ in found if known == name)
        found[name, nth] = described["space"]
    return found
