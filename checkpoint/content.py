"""Which bytes of a process go into its image: pages of its memory, contents of unnamed files.

Pages are named by windows (see `lzy.checkpoint`): (window-aligned address, mask of its pages).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from . import proc
from .linux import PAGE_BYTES, memory
from .proc import Vma

_RUNS_AT_ONCE = 512
CLOSE_BYTES = 1 << 20


def windows_of(ranges: Iterable[tuple[int, int]], window_pages: int) -> list[tuple[int, int]]:
    """The windows that cover page-aligned, ascending address ranges: (address, page mask)."""
    size = window_pages * PAGE_BYTES
    full = (1 << window_pages) - 1
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        address = start & -size
        while address < end:
            if start <= address <= end - size:
                found += [(whole, full) for whole in range(address, end & -size, size)]
                address = end & -size
                continue
            first = max(start - address, 0) // PAGE_BYTES
            last = min(end - address, size) // PAGE_BYTES
            mask = full if last - first == window_pages else ((1 << (last - first)) - 1) << first
            if found and found[-1][0] == address:
                found[-1] = (address, found[-1][1] | mask)
            else:
                found.append((address, mask))
            address += size
    return found


def cut_windows(
    ranges: Iterable[tuple[int, int]], window_pages: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Page-aligned, ascending ranges as (ranges of whole windows, other windows with their masks).

    As `windows_of`, but what is large is not listed window by window.
    """
    size = window_pages * PAGE_BYTES
    whole: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    for start, end in ranges:
        first, last = -(-start // size) * size, end // size * size
        if first < last:
            whole.append((first, last))
            rest += [(start, first), (last, end)]
        else:
            rest.append((start, end))
    return whole, windows_of(rest, window_pages)


def holds_own_pages(vma: Vma) -> bool:
    """Whether pages of this VMA can exist nowhere but in this process."""
    kinds = ("anonymous", "file", "memory", "huge")
    return vma.kind in kinds and not vma.shared and "dp" not in vma.flags


def neighbourhoods(vmas: Iterable[Vma]) -> list[tuple[int, int]]:
    """The places of ascending mappings; those that are close to one another in one.

    To ask of each of some hundred mappings by itself takes longer than the answer; but what lies
    between them may be large.
    """
    found: list[tuple[int, int]] = []
    for vma in vmas:
        if found and vma.start - found[-1][1] <= CLOSE_BYTES:
            found[-1] = (found[-1][0], vma.end)
        else:
            found.append((vma.start, vma.end))
    return found


def places(vmas: Sequence[Vma]) -> list[tuple[int, int, bool]]:
    """Where to look, ascending, and whether pages of files can be there: that takes longest to see.

    (For each page the kernel then looks at what describes its frame, which no cache has.) Large
    anonymous mappings by themselves, others together with those that are near.
    """
    large = [v for v in vmas if v.kind == "anonymous" and v.length > CLOSE_BYTES]
    alone = {vma.start for vma in large}
    near = neighbourhoods(v for v in vmas if v.start not in alone)
    found = [(start, end, True) for start, end in near]
    return sorted(found + [(vma.start, vma.end, False) for vma in large])


def own_page_ranges(pid: int, vmas: Iterable[Vma]) -> list[tuple[int, int]]:
    """Address ranges of the pages that only this process has: anonymous or changed, never zero-pfn.

    `vmas` ascend. Asks PAGEMAP_SCAN (Linux 6.7), else /proc/PID/pagemap.
    """
    pagemap = os.open(f"/proc/{proc.witness(pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    own = list(filter(holds_own_pages, vmas))
    found: list[tuple[int, int]] = []
    try:
        for start, end, may_be_files in places(own):
            found += _scan_own_pages(pagemap, start, end, may_be_files)
    finally:
        os.close(pagemap)
    return cut_ranges(found, own)


def look_at_pages(
    pid: int, vmas: Sequence[Vma]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Both `own_page_ranges` and `guard_ranges` of what stands still, in one look.

    Where most pages are there, the kernel takes a third of the time to list the others.
    """
    own = list(filter(holds_own_pages, vmas))
    absent: list[tuple[int, int]] = []
    guards: list[tuple[int, int]] = []
    there = memory.PAGE_IS_PRESENT | memory.PAGE_IS_SWAPPED
    pagemap = os.open(f"/proc/{proc.witness(pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end, may_be_files in places(own):
            nobodys = memory.PAGE_IS_PFNZERO | memory.PAGE_IS_GUARD
            nobodys |= memory.PAGE_IS_FILE if may_be_files else 0
            for begin, behind, flags in memory.describe_pages(
                pagemap,
                start,
                end,
                some=memory.PAGE_IS_PRESENT | nobodys,
                lacks=memory.PAGE_IS_PRESENT,
                flags=there | nobodys,
            ):
                if flags & nobodys or not flags & there:
                    absent.append((begin, behind))
                if flags & memory.PAGE_IS_GUARD:
                    guards.append((begin, behind))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        return own_page_ranges(pid, vmas), guard_ranges(pid, vmas)
    finally:
        os.close(pagemap)
    pages = subtract(join_ranges((vma.start, vma.end) for vma in own), join_ranges(absent))
    return cut_ranges(pages, own), cut_ranges(guards, filter(_may_have_guards, vmas))


def _may_have_guards(vma: Vma) -> bool:
    return vma.kind == "anonymous" and not vma.shared


def _scan_own_pages(
    pagemap: int, start: int, end: int, may_be_files: bool
) -> list[tuple[int, int]]:
    """As `own_page_ranges`, for all that is mapped between two addresses.

    A guard page (MADV_GUARD_INSTALL) looks like one in swap, yet cannot be read by anybody; kernels
    tell it apart since 6.15, earlier ones refuse the question with EINVAL.
    """
    without = memory.PAGE_IS_PFNZERO | (memory.PAGE_IS_FILE if may_be_files else 0)
    for none in (without | memory.PAGE_IS_GUARD, without):
        try:
            return memory.scan_pages(
                pagemap,
                start,
                end,
                none=none,
                some=memory.PAGE_IS_PRESENT | memory.PAGE_IS_SWAPPED,
            )
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
    return memory.read_pagemap(pagemap, start, end)


def behind_file(vma: Vma) -> bool:
    """Whether a page that the process never changed shows a file's bytes, not zeros."""
    return vma.kind in ("file", "memory") and not vma.shared


def cut_ranges(ranges: list[tuple[int, int]], vmas: Iterable[Vma]) -> list[tuple[int, int]]:
    """The parts of ascending `ranges` that lie in `vmas` (ascending too)."""
    found: list[tuple[int, int]] = []
    position = 0
    for vma in vmas:
        while position < len(ranges) and ranges[position][1] <= vma.start:
            position += 1
        index = position
        while index < len(ranges) and ranges[index][0] < vma.end:
            start, end = ranges[index]
            found.append((max(start, vma.start), min(end, vma.end)))
            index += 1
    return found


def guard_ranges(pid: int, vmas: Iterable[Vma]) -> list[tuple[int, int]]:
    """Address ranges under MADV_GUARD_INSTALL (Linux 6.13); empty on kernels that cannot tell."""
    pagemap = os.open(f"/proc/{proc.witness(pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [
            pair
            for vma in filter(_may_have_guards, vmas)
            for pair in memory.scan_pages(pagemap, vma.start, vma.end, every=memory.PAGE_IS_GUARD)
        ]
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return []
        raise
    finally:
        os.close(pagemap)


class ProcessPages:
    """A `PageSource` over a stopped process; over one that `shares_pages`, as a snapshot does.

    process_vm_readv(2) pins what it reads, and to pin a page that is shared copy-on-write the
    kernel copies it first (gup_must_unshare, Linux 5.19): a snapshot read that way grows to its
    full size, huge pages are split, and it takes three times as long. /proc/PID/mem only looks.
    """

    def __init__(self, pid: int, *, shares_pages: bool = False) -> None:
        self.pid = proc.witness(pid)
        self._shares_pages = shares_pages
        self._memory = memory.open_memory(self.pid)

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        """Fill `into` with the runs; pages that the process itself may not read are read too."""
        if not self._shares_pages:
            try:
                memory.read_process(self.pid, runs, into)
                return
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                # PROT_NONE somewhere: /proc/PID/mem reads it all the same (FOLL_FORCE)
        position = 0
        for address, length in runs:
            done = 0
            while done < length:
                part = into[position + done : position + length]
                count = os.preadv(self._memory, [part], address + done)
                if count == 0:
                    raise OSError(errno.EFAULT, f"no memory at {address + done:#x} of {self.pid}")
                done += count
            position += length

    def close(self) -> None:
        os.close(self._memory)


class CopiedPages:
    """A `PageSource` over a copy of those pages, so that the process can run on meanwhile."""

    def __init__(
        self,
        source: ProcessPages | FilePages,
        windows: Iterable[tuple[int, int]],
        room: memoryview | None = None,
    ) -> None:
        """`room`: memory for it, if that is large enough (see `make_room`)."""
        runs = [run for address, mask in windows for run in _runs(address, mask)]
        self._starts = [address for address, _ in runs]
        self._offsets = [0, *itertools.accumulate(length for _, length in runs)]
        self.length_bytes = self._offsets[-1]
        if room is None or len(room) < self.length_bytes:
            room = make_room(self.length_bytes)
        self._content = room[: self.length_bytes]
        for first in range(0, len(runs), _RUNS_AT_ONCE):
            part = runs[first : first + _RUNS_AT_ONCE]
            begin, end = self._offsets[first], self._offsets[first + len(part)]
            source.read_runs(part, self._content[begin:end])

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        position = 0
        for address, length in runs:
            index = bisect_right(self._starts, address) - 1
            begin = self._offsets[index] + address - self._starts[index]
            into[position : position + length] = self._content[begin : begin + length]
            position += length

    def close(self) -> None:
        self._content.release()


def make_room(length_bytes: int, *, at_once: bool = False) -> memoryview:
    """Memory for a copy; `at_once`: it is there when this returns, which takes longest of all."""
    room = mmap.mmap(-1, length_bytes or PAGE_BYTES)
    for advice in (mmap.MADV_HUGEPAGE, *([memory.MADV_POPULATE_WRITE] if at_once else [])):
        with contextlib.suppress(OSError):  # a kernel without it
            room.madvise(advice)
    return memoryview(room)


def _runs(address: int, mask: int) -> Iterator[tuple[int, int]]:
    """The pages of a window as (address, length in bytes)."""
    while mask:
        skipped = (mask & -mask).bit_length() - 1
        mask >>= skipped
        pages = (mask + 1 & ~mask).bit_length() - 1
        address += skipped * PAGE_BYTES
        yield address, pages * PAGE_BYTES
        mask >>= pages
        address += pages * PAGE_BYTES


class FilePages:
    """A `PageSource` over an open file; what lies behind its end reads as zeros."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        position = 0
        for address, length in runs:
            done = 0
            while done < length:
                part = into[position + done : position + length]
                count = os.preadv(self.descriptor, [part], address + done)
                if count == 0:
                    part[:] = bytes(len(part))
                    break
                done += count
            position += length


def data_ranges(descriptor: int, length_bytes: int) -> list[tuple[int, int]]:
    """Page-aligned ranges of a file that are not holes, lseek(2) SEEK_DATA.

    The position of the description is left as it was.
    """
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return find_data(own, length_bytes)
    finally:
        os.close(own)


def find_data(descriptor: int, length_bytes: int) -> list[tuple[int, int]]:
    """As `data_ranges`; the position of the description is lost."""
    found: list[tuple[int, int]] = []
    position = 0
    while position < length_bytes:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            end = min(os.lseek(descriptor, start, os.SEEK_HOLE), length_bytes)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        found.append((start & -PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES))
        position = end
    return join_ranges(found)


def intersect(ranges: list[tuple[int, int]], part: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of ascending `ranges` lies in ascending `part`; each without overlaps."""
    found: list[tuple[int, int]] = []
    at = 0
    for start, end in ranges:
        while at < len(part) and part[at][1] <= start:
            at += 1
        index = at
        while index < len(part) and part[index][0] < end:
            found.append((max(start, part[index][0]), min(end, part[index][1])))
            index += 1
    return found


def subtract(
    ranges: Iterable[tuple[int, int]], part: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """What of ascending `ranges` does not lie in ascending `part`; each without overlaps."""
    found: list[tuple[int, int]] = []
    at = 0
    for start, end in ranges:
        while at < len(part) and part[at][1] <= start:
            at += 1
        index = at
        while start < end:
            if index == len(part) or part[index][0] >= end:
                found.append((start, end))
                break
            if part[index][0] > start:
                found.append((start, part[index][0]))
            start = max(start, part[index][1])
            index += 1
    return found


def join_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges [start, end) in ascending order, each address in one of them."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
