"""What a process may do to its memory between two checkpoints; as a script, it does as it is told.

A line on standard input is the number of a deed and a seed; a dot on standard output answers it.
Numbers of children in front of it say who is to do it: `2 0 5 77` has the first child of the third
do deed 5.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from collections.abc import Callable

PAGE_BYTES = 4096
libc = ctypes.CDLL(None, use_errno=True)
PAGES = 1536
BASE = 0x6000_0000_0000
ASIDE = 0x6100_0000_0000
FILE_BASE, FILE_PAGES = 0x6200_0000_0000, 96
HUGE_PAGES = 512

_POINTER, _LENGTH, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
FIXED, MAYMOVE = 0x10, 1


def _mmap(address: int, length: int, file: int = -1) -> None:
    flags = mmap.MAP_PRIVATE | FIXED | (mmap.MAP_ANONYMOUS if file < 0 else 0)
    libc.mmap.restype = _POINTER
    libc.mmap.argtypes = [_POINTER, _LENGTH, _INT, _INT, _INT, ctypes.c_long]
    assert libc.mmap(address, length, 3, flags, file, 0) == address


def mapped_file() -> str:
    """The file whose head is mapped: the C library, which is large enough."""
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if "libc.so" in line or "libc-" in line)


def _drop(address: int, length: int) -> None:
    libc.madvise.argtypes = [_POINTER, _LENGTH, _INT]
    assert libc.madvise(address, length, mmap.MADV_DONTNEED) == 0


def write(seed: int) -> None:
    """Write to a few scattered pages, a run, and one page twice."""
    pick = random.Random(seed)
    for _ in range(pick.randrange(1, 40)):
        at = BASE + pick.randrange(PAGES) * PAGE_BYTES + pick.randrange(PAGE_BYTES - 8)
        ctypes.memmove(at, pick.randbytes(8), 8)
    start = pick.randrange(PAGES - 64)
    ctypes.memset(BASE + start * PAGE_BYTES, pick.randrange(256), 40 * PAGE_BYTES)


def drop(seed: int) -> None:
    """MADV_DONTNEED a run, and write to half of it again."""
    start = random.Random(seed).randrange(PAGES - 200)
    _drop(BASE + start * PAGE_BYTES, 200 * PAGE_BYTES)
    ctypes.memset(BASE + start * PAGE_BYTES, 7, 50 * PAGE_BYTES)
    for page in range(60, 120):  # a read brings in the page of zeros
        ctypes.string_at(BASE + (start + page) * PAGE_BYTES, 1)


def remap(seed: int) -> None:
    """Move runs away and back over other places: what lies there now was written elsewhere.

    A run that was mapped in parts, before and after an account began, be it in this moment, cannot
    be moved in one, or only in part (Linux 6.17): it is mapped anew.
    """
    pick = random.Random(seed)
    start, target = pick.sample(range(0, PAGES - 128, 128), 2)
    length = 25 * PAGE_BYTES
    libc.mremap.restype = _POINTER
    libc.mremap.argtypes = [_POINTER, _LENGTH, _LENGTH, _INT, _POINTER]
    for part in range(4):
        source = BASE + start * PAGE_BYTES + part * length
        if libc.mremap(source, length, length, MAYMOVE | 2, ASIDE) == ASIDE:
            back = BASE + target * PAGE_BYTES + part * length
            if libc.mremap(ASIDE, length, length, MAYMOVE | 2, back) != back:
                _mmap(back, length)
        _mmap(source, length)


def unmap(seed: int) -> None:
    """Unmap a run, map it anew and write to some of it."""
    start = random.Random(seed).randrange(PAGES - 100)
    libc.munmap.argtypes = [_POINTER, _LENGTH]
    assert libc.munmap(BASE + start * PAGE_BYTES, 100 * PAGE_BYTES) == 0
    _mmap(BASE + start * PAGE_BYTES, 100 * PAGE_BYTES)
    ctypes.memset(BASE + start * PAGE_BYTES, 9, 30 * PAGE_BYTES)


def grow(seed: int) -> None:
    """Map more behind the end, or over what was mapped there before."""
    length = 64 * PAGE_BYTES
    _mmap(BASE + (PAGES + 64 * (seed % 3)) * PAGE_BYTES, length)
    ctypes.memset(BASE + (PAGES + 64 * (seed % 3)) * PAGE_BYTES, seed & 0xFF, length // 2)


def protect(seed: int) -> None:
    """Make a run read-only and writable again, in two parts: mappings split and merge."""
    start = BASE + random.Random(seed).randrange(PAGES - 100) * PAGE_BYTES
    libc.mprotect.argtypes = [_POINTER, _LENGTH, _INT]
    assert libc.mprotect(start, 50 * PAGE_BYTES, 1) == 0
    ctypes.memset(start + 50 * PAGE_BYTES, 3, 10 * PAGE_BYTES)
    assert libc.mprotect(start, 50 * PAGE_BYTES, 3) == 0
    ctypes.memset(start, seed & 0xFF, 5 * PAGE_BYTES)


def fork(seed: int) -> None:
    """Fork: the child writes and ends; then the parent writes to pages that were shared."""
    pick = random.Random(seed)
    pages = [BASE + pick.randrange(PAGES) * PAGE_BYTES for _ in range(20)]
    pid = os.fork()
    if pid == 0:
        for page in pages:
            ctypes.memset(page, 0xEE, 64)
        os._exit(0)
    for page in pages[::2]:
        ctypes.memset(page, seed & 0xFF, 64)
    assert os.waitpid(pid, 0)[1] == 0


def huge(seed: int) -> None:
    """Ask for huge pages and write a byte into each of a few."""
    libc.madvise.argtypes = [_POINTER, _LENGTH, _INT]
    libc.madvise(BASE, PAGES * PAGE_BYTES, 14)
    for at in range(0, PAGES, 300):
        ctypes.memset(BASE + at * PAGE_BYTES, seed & 0xFF, 1)


def read_into(seed: int) -> None:
    """Have the kernel write: read(2) from a pipe into the memory."""
    reading, writing = os.pipe()
    os.write(writing, random.Random(seed).randbytes(20000))
    start = random.Random(seed).randrange(PAGES - 10)
    view = (ctypes.c_char * 20000).from_address(BASE + start * PAGE_BYTES + 100)
    os.readv(reading, [view])
    os.close(reading)
    os.close(writing)


def rewrite(seed: int) -> None:
    """Write to every page of some huge pages; to all, or to all but a few words."""
    pick = random.Random(seed)
    for unit in pick.sample(range(PAGES // HUGE_PAGES), pick.randrange(1, 4)):
        start = BASE + unit * HUGE_PAGES * PAGE_BYTES
        if seed % 2:
            ctypes.memset(start, seed & 0xFF, HUGE_PAGES * PAGE_BYTES)
        else:
            for page in range(HUGE_PAGES):
                ctypes.memset(start + page * PAGE_BYTES + seed % 4096, seed & 0xFF, 1)


def rewrite_all(seed: int) -> None:
    """Write to every page."""
    ctypes.memset(BASE, seed & 0xFF, PAGES * PAGE_BYTES)


def clear(seed: int) -> None:
    """Write zeros over some windows."""
    start = random.Random(seed).randrange(PAGES - 200)
    ctypes.memset(BASE + start * PAGE_BYTES, 0, 200 * PAGE_BYTES)


def change_file(seed: int) -> None:
    """Write to pages of a file that is mapped privately, and drop some: the file shows again."""
    pick = random.Random(seed)
    for _ in range(pick.randrange(1, 20)):
        ctypes.memset(FILE_BASE + pick.randrange(FILE_PAGES) * PAGE_BYTES, seed & 0xFF, 100)
    _drop(FILE_BASE + pick.randrange(FILE_PAGES - 24) * PAGE_BYTES, 24 * PAGE_BYTES)


def nothing(seed: int) -> None:
    """Be idle."""


children: dict[int, tuple[int, int, int]] = {}
"""By number: pid, and the descriptors by which it is told and heard."""


def bear(seed: int) -> None:
    """Fork a child that stays, and does as it is told; number `seed`."""
    told, telling = os.pipe2(os.O_CLOEXEC)
    hearing, heard = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.dup2(told, 0)
        os.dup2(heard, 1)
        for one in (told, telling, hearing, heard):
            os.close(one)
        for _, *lines in children.values():
            for one in lines:
                os.close(one)
        children.clear()
        serve()
        os._exit(0)
    os.close(told)
    os.close(heard)
    children[seed] = pid, telling, hearing


def lose(seed: int) -> None:
    """Have child number `seed` end, and all below it."""
    pid, telling, hearing = children.pop(seed)
    os.close(telling)
    os.close(hearing)
    assert os.waitpid(pid, 0)[1] == 0


def begin_anew(seed: int) -> None:
    """Become a new program: execve(2). The dot comes from that one."""
    for number in list(children):
        lose(number)
    os.execv(sys.executable, [sys.executable, "-ESs", __file__])


def serve() -> None:
    """Do as told, until nobody tells any more."""
    while line := os.read(0, 100):
        *path, deed, seed = map(int, line.split())
        if path:
            _, telling, hearing = children[path[0]]
            os.write(telling, b" ".join(line.split()[1:]))
            assert os.read(hearing, 1) == b"."
        else:
            FAMILY_DEEDS[deed](seed)
        os.write(1, b".")
    for number in list(children):
        lose(number)


DEEDS: list[Callable[[int], None]] = [
    write, drop, remap, unmap, grow, protect, fork, huge, read_into, rewrite, rewrite_all,
    change_file, clear, nothing,
]  # fmt: skip
FAMILY_DEEDS = [*DEEDS, bear, lose, begin_anew]


def lay_out() -> None:
    """Map and fill what the deeds are done to."""
    # Else the kernel tells the C library, in its memory, which processor it is on: rseq(2).
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    _mmap(BASE, PAGES * PAGE_BYTES)
    with open(mapped_file(), "rb") as file:
        _mmap(FILE_BASE, FILE_PAGES * PAGE_BYTES, file.fileno())
    for page in range(0, PAGES, 2):
        ctypes.memset(BASE + page * PAGE_BYTES, page % 255 + 1, PAGE_BYTES)


def main() -> None:
    lay_out()
    os.write(1, b".")
    serve()


if __name__ == "__main__":
    main()
