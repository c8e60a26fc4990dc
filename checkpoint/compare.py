"""What changed between two images: of each process which mappings, and how many bytes.

Two checkpoints of one process share almost all, so a comparison reads little more than what
changed (see `differences`). Everything is counted in whole pages and belongs to the mapping that
has the page in the later image, else to the one that had it. What a process has from its parent,
copy-on-write, is the parent's; once it is its own, it is held against what it had from there.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .differences import GROUP_BYTES, GROUP_PAGES, Comparer, PageReader
from .linux import PAGE_BYTES

if TYPE_CHECKING:
    from .image import Image

Progress = Callable[[str, int, int], None]


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


class ProcessChanges(NamedTuple):
    """What changed in a process: all of its mappings, by address; `presence` as a mapping's."""

    pid: int
    comm: str
    presence: str
    mappings: list[MappingChanges]

    def sum(self, what: str) -> int:
        """A figure of `Changes`, over all mappings."""
        return sum(getattr(mapping, what) for mapping in self.mappings)


class Comparison(NamedTuple):
    """All processes, the first one first; all objects; and how much had to be read to know."""

    processes: list[ProcessChanges]
    objects: list[ObjectChanges]
    read_bytes: int
    duration_s: float

    @property
    def mappings(self) -> list[MappingChanges]:
        """Those of all processes."""
        return [mapping for process in self.processes for mapping in process.mappings]

    def sum(self, what: str) -> int:
        """A figure of `Changes`, over everything."""
        return sum(getattr(part, what) for part in (*self.mappings, *self.objects))


def compare_images(before: Image, after: Image, progress: Progress | None = None) -> Comparison:
    """What changed from one image to another. Raises Damaged, StoreUnavailable.

    The first processes of the two are held against each other, and others that have one pid.
    """
    began = time.monotonic()
    comparer = Comparer(before, after, progress)
    ours, theirs = _processes(before), _processes(after)
    readers = PageReader(ours.values()), PageReader(theirs.values())
    processes = []
    for key in dict.fromkeys((*theirs, *ours)):
        pair = _Pair(ours.get(key), theirs.get(key), *readers)
        processes.append(pair.compare(comparer))

    objects = []
    held, holds = _objects(before), _objects(after)
    for name in dict.fromkeys((*holds, *held)):
        counted = ObjectChanges(name[0], _presence(held.get(name), holds.get(name)))
        spaces = held.get(name, -1), holds.get(name, -1)
        for _, changed, new, gone in comparer.differences(*spaces):
            counted.add(changed, new, gone)
        objects.append(counted)
    if progress:
        progress("comparing", comparer.total_bytes, comparer.total_bytes)
    read_bytes = comparer.read_bytes + sum(reader.read_bytes for reader in readers)
    return Comparison(processes, objects, read_bytes, time.monotonic() - began)


def _processes(image: Image) -> dict[int, Image]:
    """Each process by itself, by its pid; the first one, which need not have the same, is 0."""
    found = {0: image}
    for member in image.document.get("members", ()):
        found[member["pid"]] = image.member(member["pid"])
    return found


def _presence(before: object, after: object) -> str:
    return "new" if before is None else "gone" if after is None else "both"


class _Pair:
    """A process as two images have it; at least one of them does."""

    def __init__(
        self, before: Image | None, after: Image | None, ours: PageReader, theirs: PageReader
    ) -> None:
        self._before, self._after = before, after
        self._ours, self._theirs = ours, theirs

    def compare(self, comparer: Comparer) -> ProcessChanges:
        before, after = self._before, self._after
        one, two = (image.document if image else {} for image in (before, after))
        mappings = _lay_out(one.get("vmas", []), two.get("vmas", []))
        places = _Places(mappings)
        spaces = (image.document.get("space", 0) if image else -1 for image in (before, after))
        had, has = (_ranges(document.get("inherited", ())) for document in (one, two))
        for group, changed, new, gone in comparer.differences(*spaces):
            for address, page in _pages_in(group, new, had):
                new ^= page
                changed |= 0 if self._is_same(address) else page
            for address, page in _pages_in(group, gone, has):
                gone ^= page
                changed |= 0 if self._is_same(address) else page
            places.add(group, changed, new, gone)
        if before and after:
            for page in _blanked_file_pages(before, after):
                places.add(page, 1, 0, 0)
        known = two or one
        pid, comm = int(known.get("pid", 0)), str(known.get("comm", ""))
        return ProcessChanges(pid, comm, _presence(before, after), mappings)

    def _is_same(self, address: int) -> bool:
        assert self._before
        assert self._after
        ours = self._ours.read(self._before, address)
        return ours == self._theirs.read(self._after, address)


def _ranges(listed: Any) -> list[tuple[int, int]]:
    return [(start, end) for start, end in listed]


def _pages_in(group: int, mask: int, ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(address, single bit) of the pages of a mask that begins at `group` that lie in `ranges`."""
    while mask and ranges:
        page = mask & -mask
        mask ^= page
        address = group + (page.bit_length() - 1) * PAGE_BYTES
        at = bisect_right(ranges, (address, 1 << 64)) - 1
        if at >= 0 and address < ranges[at][1]:
            yield address, page


# -- pages of zeros over a file -----------------------------------------------------------------


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
        while at < len(self._mappings) and self._starts[at] < address + GROUP_BYTES:
            mapping = self._mappings[at]
            low = max(mapping.start - address, 0) // PAGE_BYTES
            high = min(max(mapping.end - address, 0) // PAGE_BYTES, GROUP_PAGES)
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
