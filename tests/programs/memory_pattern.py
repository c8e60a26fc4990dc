"""64 MiB (or as many as the argument says) in a known pattern, every byte of which is compared.

Beside it a thread writes pairs of pages without end; each pair is equal but in the instant between
its two writes. The proof also forks, moves, drops and unmaps parts of the memory, as programs do.
"""

import ctypes
import mmap
import os
import random
import struct
import sys
import threading

from clib import call
from dialogue import Proof, converse

PAGE = mmap.PAGESIZE
PAGES = int(sys.argv[1] if sys.argv[1:] else 64) * 2**20 // PAGE
ODD = 0x9E3779B97F4A7C15
MADV_DONTNEED, MREMAP_MAYMOVE = 4, 1
READ_WRITE, PRIVATE_ANONYMOUS = 3, 0x22


def allocate(pages: int, protection: int = READ_WRITE) -> int:
    return call(
        "mmap", None, ctypes.c_size_t(pages * PAGE), protection, PRIVATE_ANONYMOUS, -1,
        ctypes.c_long(0), restype=ctypes.c_void_p,
    )  # fmt: skip


def protect(address: int, pages: int, protection: int) -> None:
    call("mprotect", ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE), protection)


def page_content(index: int) -> bytes:
    """What page `index` holds: every 4th nothing, every 16th noise, the others a word repeated."""
    if index % 4 == 3:
        return bytes(PAGE)
    if index % 16 == 5:
        return random.Random(index).randbytes(PAGE)
    return struct.pack("<Q", (index * ODD) & (2**64 - 1)) * (PAGE // 8)


def wrong_pages(address: int, indices: range) -> int:
    return sum(
        ctypes.string_at(address + i * PAGE, PAGE) != page_content(indices[i])
        for i in range(len(indices))
    )


def main() -> None:
    big = allocate(PAGES)
    for index in range(PAGES):
        if index % 4 != 3:  # The zero pages are never touched…
            ctypes.memmove(big + index * PAGE, page_content(index), PAGE)
        elif index % 8 == 3:  # …or written with zeros.
            ctypes.memset(big + index * PAGE, 0, PAGE)
    fenced = allocate(64)  # read-write | fence | read-only | fence | written, then closed off
    for index in range(64):
        ctypes.memmove(fenced + index * PAGE, page_content(index), PAGE)
    for fence, length, protection in ((16, 1, 0), (17, 14, 1), (31, 1, 0), (48, 16, 0)):
        protect(fenced + fence * PAGE, length, protection)
    sparse = allocate(2**30 // PAGE)  # A gigabyte reserved, three pages of it used.
    for index in (0, 100_001, 2**18 - 1):
        ctypes.memmove(sparse + index * PAGE, page_content(index), PAGE)

    pairs = allocate(128)
    resting, rested, go = threading.Event(), threading.Event(), threading.Event()
    busy = threading.Event()

    def write_pairs() -> None:
        generation = 0
        while True:
            generation += 1
            word = struct.pack("<Q", generation) * (PAGE // 8)
            for index in range(64):
                ctypes.memmove(pairs + index * PAGE, word, PAGE)
                ctypes.memmove(pairs + (64 + index) * PAGE, word, PAGE)
            busy.set()
            if resting.is_set():
                rested.set()
                go.wait()
                go.clear()

    def count_unequal_pairs() -> int:
        resting.set()
        rested.wait()
        rested.clear()
        left, right = (ctypes.string_at(pairs + half * 64 * PAGE, 64 * PAGE) for half in (0, 1))
        resting.clear()
        go.set()
        return sum(
            left[n * PAGE : (n + 1) * PAGE] != right[n * PAGE : (n + 1) * PAGE] for n in range(64)
        ) + (left[:8] == bytes(8))

    threading.Thread(target=write_pairs, daemon=True).start()
    busy.wait()

    def survives_changes() -> tuple[bool, int]:
        """Fork, move, drop and unmap pieces of the big memory, then put them back.

        Whether all was right, and how the child, which compares what it inherited, ended.
        """
        at = PAGES // 4
        middle = big + at * PAGE
        child = os.fork()
        if child == 0:
            os._exit(1 if wrong_pages(middle, range(at, at + 2048)) else 0)
        moved = call(
            "mremap", ctypes.c_void_p(middle), ctypes.c_size_t(512 * PAGE),
            ctypes.c_size_t(1024 * PAGE), MREMAP_MAYMOVE, restype=ctypes.c_void_p,
        )  # fmt: skip
        good = wrong_pages(moved, range(at, at + 512)) == 0
        good &= ctypes.string_at(moved + 512 * PAGE, 512 * PAGE) == bytes(512 * PAGE)
        fixed = call(  # The hole in the middle of the big memory is mapped anew: zeros.
            "mmap", ctypes.c_void_p(middle), ctypes.c_size_t(512 * PAGE), READ_WRITE,
            PRIVATE_ANONYMOUS | 0x10, -1, ctypes.c_long(0), restype=ctypes.c_void_p,
        )  # fmt: skip
        good &= fixed == middle and ctypes.string_at(middle, 512 * PAGE) == bytes(512 * PAGE)
        dropped = middle + 600 * PAGE
        call("madvise", ctypes.c_void_p(dropped), ctypes.c_size_t(100 * PAGE), MADV_DONTNEED)
        good &= ctypes.string_at(dropped, 100 * PAGE) == bytes(100 * PAGE)
        ctypes.memmove(middle, moved, 512 * PAGE)
        for index in range(at + 600, at + 700):
            ctypes.memmove(big + index * PAGE, page_content(index), PAGE)
        call("munmap", ctypes.c_void_p(moved), ctypes.c_size_t(1024 * PAGE))
        return good, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def prove() -> Proof:
        good, child = survives_changes()
        proof: Proof = {"after mremap, DONTNEED, munmap": good, "child": child or True}
        proof["wrong pages"] = wrong_pages(big, range(PAGES)) or True
        proof["unequal pairs"] = count_unequal_pairs() == 0
        proof["open"] = wrong_pages(fenced, range(16)) == 0
        proof["read-only"] = wrong_pages(fenced + 17 * PAGE, range(17, 31)) == 0
        protect(fenced, 64, READ_WRITE)
        proof["behind the fence"] = wrong_pages(fenced, range(64)) == 0
        for fence, length, protection in ((16, 1, 0), (17, 14, 1), (31, 1, 0), (48, 16, 0)):
            protect(fenced + fence * PAGE, length, protection)
        proof["sparse"] = all(
            ctypes.string_at(sparse + i * PAGE, PAGE) == page_content(i)
            for i in (0, 100_001, 2**18 - 1)
        ) and ctypes.string_at(sparse + 5 * PAGE, 99 * PAGE) == bytes(99 * PAGE)
        return proof

    def spoil() -> None:
        ctypes.memset(big + (PAGES - 7) * PAGE + 77, 0xA5, 1)

    converse(prove, spoil)


main()
