"""Bulk reads and writes of another process's memory, and the kernel's list of its pages."""

from __future__ import annotations

import errno
import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from subjects import living

from lzy.checkpoint.linux import PAGE_BYTES, memory

MAPPED = """
length = int(sys.argv[1])
place = allocate(length + 4096)
libc.munmap(place + length, 4096)
for page in range(0, length, 4096): ctypes.memset(place + page, 1 + page // 4096 % 251, 4096)
say("ready"); say(place)
while hear(): say(ctypes.string_at(place, length).hex())
"""


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 3000])
def test_reads_and_writes_many_runs(count: int) -> None:
    """More runs than one call takes (1024), of odd lengths and places, come in their order."""
    length = 64 * PAGE_BYTES
    with living(MAPPED, str(length)) as subject:
        place = int(subject.hear())
        content = bytearray(b"".join(bytes([1 + p % 251]) * PAGE_BYTES for p in range(64)))
        rng = random.Random(count)
        runs = []
        for _ in range(count):
            size = rng.randrange(1, 200)
            runs.append((place + rng.randrange(length - size), size))
        found = bytearray(sum(size for _, size in runs))
        memory.read_process(subject.pid, runs, memoryview(found))
        assert found == b"".join(content[a - place : a - place + n] for a, n in runs)

        runs = sorted({a - a % 256: (a - a % 256, n) for a, n in runs}.values())
        new = bytearray(rng.randbytes(sum(n for _, n in runs)))
        memory.write_process(subject.pid, runs, memoryview(new))
        position = 0
        for address, size in runs:
            content[address - place : address - place + size] = new[position : position + size]
            position += size
        assert subject.ask("show") == content.hex()


@pytest.mark.parametrize("before", [0, 1, 5, 1024, 1500])
def test_unmapped_runs_fail(before: int) -> None:
    """A run that is not there, or not wholly, is EFAULT, however many good ones precede it."""
    length = 4 * PAGE_BYTES
    with living(MAPPED, str(length)) as subject:
        place = int(subject.hear())
        good = [(place, 16)] * before
        for bad in ((place + length, 16), (place + length - 8, 16)):
            buffer = memoryview(bytearray(16 * before + 16))
            for transfer in (memory.read_process, memory.write_process):
                with pytest.raises(OSError, match=f"of pid {subject.pid}") as caught:
                    transfer(subject.pid, [*good, bad], buffer)
                assert caught.value.errno == errno.EFAULT


def test_nobody_there() -> None:
    """A process that has gone is ESRCH."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(ProcessLookupError):
        memory.read_process(pid, [(4096, 8)], memoryview(bytearray(8)))


SCATTERED = """
pages = list(map(int, sys.argv[2].split(","))) if sys.argv[2] else []
if len(pages) == 1: pages = list(range(0, 2 * pages[0], 2))
place = allocate(4096 * int(sys.argv[1]))
libc.madvise(place, 4096 * int(sys.argv[1]), 15)  # no huge pages
for page in pages: ctypes.memset(place + 4096 * page, 1, 1)
say("ready"); say(place)
hear()
"""


@pytest.mark.parametrize("count", [4095, 4096, 4097, 8192, 9000])
def test_scan_of_many_scattered_pages(count: int) -> None:
    """Every second page: more ranges than the kernel returns at once (4096), none lost or twice.

    The kernel's walk_end may lie before the last range of a full vector.
    """
    total = 2 * count + 3
    with living(SCATTERED, str(total), str(count)) as subject:
        place = int(subject.hear())
        expected = [(place + 8192 * n, place + 8192 * n + PAGE_BYTES) for n in range(count)]
        end = place + total * PAGE_BYTES
        pagemap = os.open(f"/proc/{subject.pid}/pagemap", os.O_RDONLY)
        try:
            wanted = {
                "none": memory.PAGE_IS_FILE | memory.PAGE_IS_PFNZERO,
                "some": memory.PAGE_IS_PRESENT | memory.PAGE_IS_SWAPPED,
            }
            assert memory.scan_pages(pagemap, place, end, **wanted) == expected
            assert memory.read_pagemap(pagemap, place, end) == expected
        finally:
            os.close(pagemap)


def test_adjoining_pages_are_one_range() -> None:
    """Runs of pages come joined, also over the seam of two calls of the slow way (65536 pages)."""
    pages = [0, 1, 2, 5, 65534, 65535, 65536, 65537, 65540]
    with living(SCATTERED, "65541", ",".join(map(str, pages))) as subject:
        place = int(subject.hear())
        expected = [
            (place + a * PAGE_BYTES, place + b * PAGE_BYTES)
            for a, b in ((0, 3), (5, 6), (65534, 65538), (65540, 65541))
        ]
        end = place + 65541 * PAGE_BYTES
        pagemap = os.open(f"/proc/{subject.pid}/pagemap", os.O_RDONLY)
        try:
            assert memory.read_pagemap(pagemap, place, end) == expected
            found = memory.scan_pages(pagemap, place, end, every=memory.PAGE_IS_PRESENT)
            assert found == expected
        finally:
            os.close(pagemap)
