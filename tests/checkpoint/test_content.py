"""Which pages go into an image: against naive models, and against what the kernel says of pages."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from subjects import living

from lzy.checkpoint import proc
from lzy.checkpoint.content import (
    FilePages,
    ProcessPages,
    cut_ranges,
    data_ranges,
    guard_ranges,
    own_page_ranges,
    windows_of,
)
from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.objects import Objects

# -- models --------------------------------------------------------------------------------------

page_sets = st.sets(st.integers(0, 300), max_size=60)


def ranges_of(pages: set[int], unit: int = PAGE_BYTES) -> list[tuple[int, int]]:
    """Ascending ranges of whole pages."""
    found: list[tuple[int, int]] = []
    for page in sorted(pages):
        if found and found[-1][1] == page * unit:
            found[-1] = (found[-1][0], (page + 1) * unit)
        else:
            found.append((page * unit, (page + 1) * unit))
    return found


@settings(max_examples=150, deadline=None)
@given(page_sets, st.sampled_from([1, 2, 16, 64]))
def test_windows_hold_every_page_once(pages: set[int], window_pages: int) -> None:
    """Windows come in order, each once, aligned; their masks name exactly the pages given."""
    windows = windows_of(ranges_of(pages), window_pages)
    addresses = [address for address, _ in windows]
    assert addresses == sorted(set(addresses))
    assert all(address % (window_pages * PAGE_BYTES) == 0 for address in addresses)
    assert all(0 < mask < 1 << window_pages for _, mask in windows)
    found = [
        address // PAGE_BYTES + bit
        for address, mask in windows
        for bit in range(window_pages)
        if mask >> bit & 1
    ]
    assert found == sorted(pages)


@settings(max_examples=50, deadline=None)
@given(page_sets, st.sampled_from([1, 64]))
def test_windows_of_pieces_are_those_of_the_whole(pages: set[int], window_pages: int) -> None:
    """Ranges that adjoin yet come apart, as of neighbouring mappings, make no window twice."""
    apart = [(p * PAGE_BYTES, (p + 1) * PAGE_BYTES) for p in sorted(pages)]
    assert windows_of(apart, window_pages) == windows_of(ranges_of(pages), window_pages)


def vma(start: int, end: int, kind: str = "file") -> proc.Vma:
    return proc.Vma(start, end, "rw-p", 0, 0, 1, "/x", kind, frozenset())


@settings(max_examples=150, deadline=None)
@given(page_sets, page_sets)
def test_cutting_ranges_is_intersection(pages: set[int], mapped: set[int]) -> None:
    """What is cut out lies in both: page by page the intersection, in order."""
    vmas = [vma(a, b) for a, b in ranges_of(mapped)]
    cut = cut_ranges(ranges_of(pages), vmas)
    assert [p for a, b in cut for p in range(a // PAGE_BYTES, b // PAGE_BYTES)] == sorted(
        pages & mapped
    )


# -- pages of a process --------------------------------------------------------------------------


def anonymous_pages(pid: int, start: int, end: int) -> set[int]:
    """From /proc/PID/pagemap: present or swapped, neither a file's nor shared (bit 61)."""
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        file.seek(start // PAGE_BYTES * 8)
        entries = file.read((end - start) // PAGE_BYTES * 8)
    return {
        start // PAGE_BYTES + n
        for n, (entry,) in enumerate(struct.iter_unpack("<Q", entries))
        if entry >> 62 and not entry >> 61 & 1
    }


def own_pages(pid: int, vmas: list[proc.Vma]) -> set[int]:
    return {
        page
        for a, b in own_page_ranges(pid, vmas)
        for page in range(a // PAGE_BYTES, b // PAGE_BYTES)
    }


KINDS = """
name = sys.argv[1]
def touch(place, pages, write=True):
    for page in pages:
        if write: ctypes.memset(place + 4096 * page, 65 + page, 4096)
        else: ctypes.string_at(place + 4096 * page, 1)
def fresh(length=16, flags=0x22, fd=-1):
    place = allocate(4096 * length, 3, flags, fd)
    if fd < 0: libc.madvise(place, 4096 * length, 15)
    return place
places = {}
places["written"] = fresh(); touch(places["written"], [1, 2, 7])
places["read"] = fresh(); touch(places["read"], [0, 3, 4], False)
fd = os.open(name, os.O_RDWR)
places["file"] = fresh(16, 0x2, fd)
touch(places["file"], range(16), False)
touch(places["file"], [5, 15])
places["shared_file"] = fresh(16, 0x1, fd); touch(places["shared_file"], [6])
places["shared"] = fresh(16, 0x21); touch(places["shared"], range(4))
places["forbidden"] = fresh(); touch(places["forbidden"], [2, 3, 9])
libc.mprotect(places["forbidden"], 16 * 4096, 0)
places["dropped"] = fresh(); touch(places["dropped"], range(16))
libc.madvise(places["dropped"] + 4096, 8 * 4096, 4)
places["guarded"] = fresh(); touch(places["guarded"], [8])
guarded = libc.madvise(places["guarded"] + 2 * 4096, 3 * 4096, 102)
libc.mprotect(places["written"] + 4096 * 4, 4096 * 2, 1)  # splits the mapping
say("ready"); say(repr(places)); say(guarded); hear()
"""
EXPECTED = {
    "written": {1, 2, 7},
    "read": set(),
    "file": {5, 15},
    "shared_file": set(),
    "shared": set(),
    "forbidden": {2, 3, 9},
    "dropped": {0, 9, 10, 11, 12, 13, 14, 15},
    "guarded": {8},
}


def test_own_pages_of_every_kind_of_mapping(tmp_path: Path) -> None:
    """Only pages that nobody else has: written anonymous ones, changed ones of private files.

    Not pages that were only read (the kernel's zero page), shared ones, nor what was given up.
    What is chosen is readable, forbidden pages too, and holds what the process wrote.
    """
    path = tmp_path / "file"
    path.write_bytes(b"f" * 16 * PAGE_BYTES)
    with living(KINDS, str(path)) as subject:
        places = eval(subject.hear())
        guards_work = subject.hear() == "0"
        vmas = proc.mappings(subject.pid)
        everything = own_pages(subject.pid, vmas)
        source = ProcessPages(subject.pid)
        try:
            for kind, place in places.items():
                first = place // PAGE_BYTES
                found = {p - first for p in everything if first <= p < first + 16}
                assert found == EXPECTED[kind], kind
                if not found:
                    continue
                runs = [(place + page * PAGE_BYTES, PAGE_BYTES) for page in sorted(found)]
                content = bytearray(len(runs) * PAGE_BYTES)
                source.read_runs(runs, memoryview(content))
                expected = b"".join(bytes([65 + page]) * PAGE_BYTES for page in sorted(found))
                assert content == expected, kind
        finally:
            source.close()
        if guards_work:
            start = places["guarded"] + 2 * PAGE_BYTES
            assert (start, start + 3 * PAGE_BYTES) in guard_ranges(subject.pid, vmas)
        else:
            assert guard_ranges(subject.pid, vmas) == []


def test_own_pages_against_the_pagemap() -> None:
    """Over all mappings of a living interpreter no anonymous page is left out but zero pages."""
    with living("x = [bytes(n) for n in range(20000)]\nsay('ready'); hear()") as subject:
        subject.await_calls({subject.pid: 0})
        vmas = proc.mappings(subject.pid)
        found = own_pages(subject.pid, vmas)
        expected: set[int] = set()
        for v in vmas:
            if v.kind in ("anonymous", "file") and not v.shared:
                expected |= anonymous_pages(subject.pid, v.start, v.end)
        assert found <= expected
        # The slow way cannot tell the zero page; whatever else differs would be lost.
        source = ProcessPages(subject.pid)
        try:
            for page in sorted(expected - found):
                content = bytearray(PAGE_BYTES)
                source.read_runs([(page * PAGE_BYTES, PAGE_BYTES)], memoryview(content))
                assert not any(content)
        finally:
            source.close()
        assert len(found) > 1000


def test_unreadable_page_among_readable_ones() -> None:
    """One forbidden page among many runs does not spoil those around it."""
    code = """
place = allocate(4096 * 8)
for n in range(8): ctypes.memset(place + 4096 * n, 65 + n, 4096)
libc.mprotect(place + 4096 * 3, 4096, 0)
say("ready"); say(place); hear()
"""
    with living(code) as subject:
        place = int(subject.hear())
        source = ProcessPages(subject.pid)
        try:
            runs = [(place, 2 * PAGE_BYTES), (place + 2 * PAGE_BYTES, 3 * PAGE_BYTES)]
            content = bytearray(5 * PAGE_BYTES)
            source.read_runs(runs, memoryview(content))
            assert content == b"".join(bytes([65 + n]) * PAGE_BYTES for n in range(5))
            with pytest.raises(OSError):  # noqa: PT011  not mapped at all: EFAULT or EIO
                source.read_runs([(place + (1 << 40), 16)], memoryview(bytearray(16)))
        finally:
            source.close()


# -- contents of files ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 40), max_size=12), st.integers(0, 41 * PAGE_BYTES))
def test_data_ranges_leave_holes_out(pages: set[int], length: int) -> None:
    """Ranges are page-aligned, ascending, apart, and hold all bytes that are not zero."""
    descriptor = os.memfd_create("test")
    try:
        os.ftruncate(descriptor, length)
        for page in pages:
            if page * PAGE_BYTES < length:
                size = min(PAGE_BYTES, length - page * PAGE_BYTES)
                os.pwrite(descriptor, b"x" * size, page * PAGE_BYTES)
        os.lseek(descriptor, 17, os.SEEK_SET)
        found = data_ranges(descriptor, length)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 17
    finally:
        os.close(descriptor)
    assert found == ranges_of({p for p in pages if p * PAGE_BYTES < length})


def test_file_pages_behind_the_end_are_zeros(tmp_path: Path) -> None:
    """A file's last page is padded with zeros, and so is what lies wholly behind its end."""
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 2000)
    with open(path, "rb") as file:
        content = bytearray(b"?" * 3 * PAGE_BYTES)
        runs = [(PAGE_BYTES, PAGE_BYTES), (0, PAGE_BYTES), (8 * PAGE_BYTES, PAGE_BYTES)]
        FilePages(file.fileno()).read_runs(runs, memoryview(content))
    whole = (b"abc" * 2000).ljust(2 * PAGE_BYTES, b"\0")
    assert content == whole[PAGE_BYTES:] + whole[:PAGE_BYTES] + bytes(PAGE_BYTES)


def test_one_file_is_one_object() -> None:
    """The same file by two descriptors is taken once; its name, length and mode are told."""
    first = os.memfd_create("first")
    second = os.memfd_create("second")
    objects = Objects()
    try:
        os.write(first, b"x" * 5000)
        assert objects.add_file(first, key=(1, 1)) == 1
        assert objects.add_file(second, key=(1, 2)) == 2
        assert objects.add_file(os.dup(first), key=(1, 1)) == 1
        assert objects.total_bytes == 5000
        assert [o["length_bytes"] for o in objects.described] == [5000, 0]
        assert "first" in str(objects.described[0]["name"])
        assert len(objects.descriptors) == 2
    finally:
        objects.close()
        os.close(first)
        os.close(second)
