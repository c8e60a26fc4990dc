"""Pages that a process still shares copy-on-write with its parent: the same frame at one address.

They are stored once, with the parent, and a restore shares them again: the child is forked when its
parent's memory is there. Only pages count whose mapping, too, is as the parent's, or a part of it;
so the fork brings the child's mapping as it was.

Frame numbers take CAP_SYS_ADMIN. Without them nothing is found to be shared, and equal contents are
still stored once.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from .content import holds_own_pages, intersect, join_ranges, subtract
from .linux import memory
from .proc import Vma

Range = tuple[int, int]

Places = tuple[list[Vma], list[Range]]
"""The mappings of a process, and the pages that it has in them; both ascend."""

_CLOSE_BYTES = 1 << 20
AS_MAPPED = frozenset({"hg", "nh", "nr", "gd", "dp", "mw"})
"""What a mapping has from the start, or before its memory is filled: it must agree."""


def find_inherited(
    own: Places,
    parents: Places,
    sure: list[Range],
    frames: tuple[memory.Frames, memory.Frames] | None = None,
) -> list[Range]:
    """Of the pages of a process those that are its parent's. All ascend.

    Both must stand still, or be snapshots. `sure`: where nobody has to look, for they were its
    parent's before, and neither of the two has written to them. Elsewhere `frames`, of it and of
    its parent, tell; without them nothing else is its parent's.
    """
    (vmas, ranges), (parent_vmas, parent_ranges) = own, parents
    starts = [vma.start for vma in parent_vmas]
    alike = [
        (vma.start, vma.end)
        for vma in vmas
        if (at := bisect_right(starts, vma.start)) and _is_part(vma, parent_vmas[at - 1])
    ]
    candidates = intersect(intersect(ranges, alike), parent_ranges)
    found = intersect(candidates, sure)
    if frames is None:
        return join_ranges(found)
    unknown = subtract(candidates, found)
    same: list[Range] = []
    for start, end in _together(unknown):
        same += memory.same_frames(*frames, start, end)
    return join_ranges([*found, *intersect(unknown, join_ranges(same))])


def open_frames(pid: int, *, keeps: bool = False) -> memory.Frames:
    """What lies behind the pages of that process; `keeps` what was read once."""
    return memory.Frames(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC), keeps=keeps)


def _is_part(vma: Vma, other: Vma) -> bool:
    """Whether the other mapping has all of this one, as it is but for what mprotect(2) changes."""
    if not holds_own_pages(vma) or other.shared or vma.end > other.end:
        return False
    if "ht" in vma.flags:  # its pages cannot be given back in part
        return False
    if vma == other:
        return True
    if vma.kind != other.kind or vma.flags & AS_MAPPED != other.flags & AS_MAPPED:
        return False
    return vma.kind == "anonymous" or (
        (vma.path, vma.inode, vma.offset - vma.start)
        == (other.path, other.inode, other.offset - other.start)
    )


def _together(ranges: list[Range]) -> Iterator[Range]:
    """Ranges that are close to one another in one: a system call takes as long as many pages."""
    if not ranges:
        return
    start, end = ranges[0]
    for low, high in ranges[1:]:
        if low - end > _CLOSE_BYTES:
            yield start, end
            start = low
        end = high
    yield start, end


def length_bytes(ranges: Iterable[Range]) -> int:
    """How much that is."""
    return sum(end - start for start, end in ranges)
