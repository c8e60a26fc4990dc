"""Another process's memory: bulk reads and writes, and which of its pages exist.

Sources: process_vm_readv(2), proc_pid_mem(5), ioctl PAGEMAP_SCAN (Linux 6.7,
Documentation/admin-guide/mm/pagemap.rst), mmap(2), madvise(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from typing import Final

from . import PAGE_BYTES, address_of, libc, syscall

PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4

MADV_POPULATE_WRITE: Final = 23
MAP_SHARED: Final = 0x1
MAP_PRIVATE: Final = 0x2
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x100
MAP_NORESERVE: Final = 0x4000
MAP_FIXED_NOREPLACE: Final = 0x100000
MAP_DROPPABLE: Final = 0x08

MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2

MADV_RANDOM: Final = 1
MADV_SEQUENTIAL: Final = 2
MADV_DONTNEED: Final = 4
MADV_DONTFORK: Final = 10
MADV_MERGEABLE: Final = 12
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_DONTDUMP: Final = 16
MADV_WIPEONFORK: Final = 18
MADV_PAGEOUT: Final = 21
MADV_GUARD_INSTALL: Final = 102

MLOCK_ONFAULT: Final = 1
MCL_FUTURE: Final = 2  # mlockall(2)
MCL_ONFAULT: Final = 4

IOV_MAX: Final = 1024

_PROCESS_MADVISE: Final = 440
_PAGEMAP_SCAN: Final = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_SCAN_WP_MATCHING: Final = 1
_SCAN_CHECK_WPASYNC: Final = 2
PAGE_IS_WPALLOWED: Final = 1 << 0  # of a mapping that is registered for write-protection (async)
PAGE_IS_WRITTEN: Final = 1 << 1
PAGE_IS_FILE: Final = 1 << 2
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4
PAGE_IS_PFNZERO: Final = 1 << 5
PAGE_IS_HUGE: Final = 1 << 6
PAGE_IS_GUARD: Final = 1 << 8


_FILE_OR_GUARD: Final = 1 << 61 | 1 << 58  # bits of an entry of /proc/PID/pagemap
_FRAME: Final = (1 << 48) - 1 | 1 << 62 | 1 << 63
_NOT_TOLD: Final = frozenset({0, 1 << 62, 1 << 63})  # nothing there, or nothing that we are to know


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_ARGUMENTS = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_readv = libc.process_vm_readv
_readv.restype = ctypes.c_ssize_t
_readv.argtypes = _ARGUMENTS
_writev = libc.process_vm_writev
_writev.restype = ctypes.c_ssize_t
_writev.argtypes = _ARGUMENTS


def read_process(pid: int, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
    """Fill `into` with the (address, length in bytes) `runs` of `pid`, one after the other.

    Raises OSError; EFAULT where a run is not readable.
    """
    _transfer(_readv, pid, runs, address_of(into))


def write_process(pid: int, runs: Sequence[tuple[int, int]], content: memoryview) -> None:
    """Write the writable buffer `content` over the (address, length) `runs` of `pid`."""
    _transfer(_writev, pid, runs, address_of(content))


def _transfer(
    call: ctypes._NamedFuncPointer, pid: int, runs: Sequence[tuple[int, int]], local: int
) -> None:
    for start in range(0, len(runs), IOV_MAX):
        part = runs[start : start + IOV_MAX]
        vector = (_Iovec * len(part))(*[_Iovec(address, length) for address, length in part])
        remaining = sum(length for _, length in part)
        position = 0
        while remaining:
            here = _Iovec(local, remaining)
            moved = call(
                pid,
                ctypes.addressof(here),
                1,
                ctypes.addressof(vector) + 16 * position,
                len(part) - position,
                0,
            )
            if moved <= 0:
                number = ctypes.get_errno() if moved < 0 else errno.EFAULT
                raise OSError(
                    number, f"{os.strerror(number)} at {vector[position].base:#x} of pid {pid}"
                )
            remaining -= moved
            local += moved
            while moved and moved >= vector[position].length:  # a partial transfer: go on behind it
                moved -= vector[position].length
                position += 1
            if moved:
                vector[position].base += moved
                vector[position].length -= moved


def page_out(pidfd: int, start: int, length_bytes: int) -> None:
    """Reclaim pages of another process (MADV_PAGEOUT, Linux 5.10). Source: process_madvise(2)."""
    vector = _Iovec(start, length_bytes)
    syscall(_PROCESS_MADVISE, pidfd, ctypes.addressof(vector), 1, MADV_PAGEOUT, 0)


def clear_access_bits(pid: int) -> None:
    """Have the kernel forget which pages were touched: `1` to /proc/PID/clear_refs, proc(5)."""
    descriptor = os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, b"1")
    finally:
        os.close(descriptor)


def open_memory(pid: int) -> int:
    """/proc/PID/mem: a tracer may write through it into read-only pages (FOLL_FORCE)."""
    return os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)


def scan_pages(
    pagemap: int,
    start: int,
    end: int,
    *,
    every: int = 0,
    none: int = 0,
    some: int = 0,
    only_protectable: bool = False,
    protect: bool = False,
) -> list[tuple[int, int]]:
    """Ranges of pages in [start, end) with all flags of `every`, none of `none`, one of `some`.

    `pagemap` is an open /proc/PID/pagemap; flags are PAGE_IS_…. Raises OSError(ENOTTY) on a
    kernel before 6.7; with `only_protectable` OSError(EPERM) where memory is not registered for
    write-protection in async mode. With `protect` each page found is write-protected, so that it is
    PAGE_IS_WRITTEN no more until it is; mappings where that is impossible are passed over. Not to
    be called by two threads at once.
    """
    flags = _SCAN_CHECK_WPASYNC if only_protectable else 0
    flags |= _SCAN_WP_MATCHING if protect else 0  # never without a vector: then it asks no flags
    wanted = every | none | some or PAGE_IS_PRESENT
    masks = (none, every | none, some, wanted)
    return _join([(a, b) for a, b, _ in _scan(pagemap, start, end, flags, masks)])


def describe_pages(
    pagemap: int, start: int, end: int, *, some: int, flags: int, lacks: int = 0
) -> list[tuple[int, int, int]]:
    """Ranges of pages in [start, end) that have one of `some`, each with what it has of `flags`.

    Of those of `some` that are in `lacks`, too: that have it not. As several calls of
    `scan_pages`, in one look at the page tables. OSError(EINVAL) where a flag is not known.
    """
    return _scan(pagemap, start, end, 0, (lacks, 0, some, flags))


def _scan(
    pagemap: int, start: int, end: int, how: int, masks: tuple[int, int, int, int]
) -> list[tuple[int, int, int]]:
    """PAGEMAP_SCAN; `masks`: inverted, all of, any of, and which flags are told."""
    found: list[tuple[int, int, int]] = []
    while start < end:
        argument = ctypes.create_string_buffer(
            struct.pack("<12Q", 96, how, start, end, 0, _REGIONS_ADDRESS, _REGIONS, 0, *masks),
            96,
        )
        count = libc.ioctl(pagemap, ctypes.c_ulong(_PAGEMAP_SCAN), ctypes.byref(argument))
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"PAGEMAP_SCAN of {start:#x}-{end:#x}: {os.strerror(number)}")
        view = memoryview(_regions)[: 24 * count]
        found += struct.iter_unpack("<QQQ", view)
        # When the vector is full, walk_end may lie before the last range it holds (seen on 6.18).
        start = found[-1][1] if count == _REGIONS else end
    return found


_REGIONS: Final = 4096
_regions = ctypes.create_string_buffer(24 * _REGIONS)  # struct page_region {start, end, categories}
_REGIONS_ADDRESS: Final = ctypes.addressof(_regions)


def read_pagemap(pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
    """As `scan_pages` for anonymous pages that exist, on kernels without PAGEMAP_SCAN.

    Bit 63 present, 62 swapped, 61 file page or shared anonymous, 58 guard page (Linux 6.15;
    proc_pid_pagemap(5)); the zero page cannot be told from others, which costs time but loses
    nothing.
    """
    found: list[tuple[int, int]] = []
    while start < end:
        step = min(end - start, PAGE_BYTES << 16)
        entries = os.pread(pagemap, step // PAGE_BYTES * 8, start // PAGE_BYTES * 8)
        for index, (entry,) in enumerate(struct.iter_unpack("<Q", entries)):
            if entry >> 62 and not entry & _FILE_OR_GUARD:
                page = start + index * PAGE_BYTES
                found.append((page, page + PAGE_BYTES))
        start += step
    return _join(found)


class Frames:
    """What lies behind the pages of a process that stands still, by /proc/PID/pagemap.

    Of one that `keeps`, what was read is kept: a parent is compared with each of its children.
    """

    BLOCK_PAGES: Final = 512

    def __init__(self, pagemap: int, *, keeps: bool = False) -> None:
        """`pagemap`: a descriptor of it, closed by `close`."""
        self._pagemap = pagemap
        self._keeps = keeps
        self._blocks: dict[int, tuple[bytes, bool]] = {}

    def read(self, block: int) -> tuple[bytes, bool]:
        """The entries of so many pages at a time, from page `block * BLOCK_PAGES` on; all told?

        Of each eight bytes: the low 48 bits, and whether it is a frame (63) or a place in swap
        (62). No frame or place has more; without the two bits one could be taken for the other.
        """
        known = self._blocks.get(block)
        if known is None:
            raw = os.pread(self._pagemap, self.BLOCK_PAGES * 8, block * self.BLOCK_PAGES * 8)
            frames = int.from_bytes(raw, "little") & _FRAMES_OF_BLOCK
            entries = frames.to_bytes(self.BLOCK_PAGES * 8, "little")
            told = _NOT_TOLD.isdisjoint(memoryview(entries).cast("Q"))
            known = entries, told
            if self._keeps:
                if len(self._blocks) >= _MOST_BLOCKS:
                    self._blocks.clear()
                self._blocks[block] = known
        return known

    def close(self) -> None:
        """Forget it all."""
        os.close(self._pagemap)
        self._blocks.clear()


_MOST_BLOCKS: Final = 1 << 14  # 64 MiB, for 32 GiB
_FRAMES_OF_BLOCK: Final = int.from_bytes(
    _FRAME.to_bytes(8, "little") * Frames.BLOCK_PAGES, "little"
)


def same_frames(one: Frames, other: Frames, start: int, end: int) -> list[tuple[int, int]]:
    """Address ranges at which two page maps name the same frame, or the same place in swap.

    Nothing where frames are not told (no CAP_SYS_ADMIN). proc_pid_pagemap(5), bits 0-54.
    """
    found: list[tuple[int, int]] = []
    first, last = start // PAGE_BYTES, end // PAGE_BYTES
    while first < last:
        block, skipped = divmod(first, Frames.BLOCK_PAGES)
        stop = min(last, (block + 1) * Frames.BLOCK_PAGES)
        (ours, told), (theirs, _) = one.read(block), other.read(block)
        if told and ours == theirs:  # as a rule
            found.append((first * PAGE_BYTES, stop * PAGE_BYTES))
            first = stop
            continue
        pages = slice(skipped, skipped + stop - first)
        pairs = zip(
            memoryview(ours).cast("Q")[pages], memoryview(theirs).cast("Q")[pages], strict=True
        )
        for page, (frame, another) in enumerate(pairs, first):
            if frame == another and frame not in _NOT_TOLD:
                found.append((page * PAGE_BYTES, (page + 1) * PAGE_BYTES))
        first = stop
    return _join(found)


def _join(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
