"""The heap behind brk(2): it goes on growing from where it was, its old bytes still there."""

import ctypes
import gc

from clib import call
from dialogue import Proof, converse

STEP = 1 << 20


def current_break() -> int:
    return call("sbrk", ctypes.c_long(0), restype=ctypes.c_void_p)


def heap_mapping() -> tuple[int, int]:
    """From where to where; it may be more than one mapping."""
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if "[heap]" in line]
    return int(spans[0][0], 16), int(spans[-1][1], 16)


def main() -> None:
    begin = call("sbrk", ctypes.c_long(STEP), restype=ctypes.c_void_p)
    ctypes.memset(begin, 0x5A, STEP)
    known_break = current_break()
    small = [bytes([n % 256]) * 40 for n in range(100_000)]

    def prove() -> Proof:
        nonlocal known_break
        proof: Proof = {}
        low, high = heap_mapping()
        proof["named"] = low < begin < high
        proof["not moved"] = current_break() >= known_break
        proof["old bytes"] = ctypes.string_at(begin, STEP) == b"\x5a" * STEP
        proof["small objects"] = all(b == bytes([n % 256]) * 40 for n, b in enumerate(small))
        above = call("sbrk", ctypes.c_long(STEP), restype=ctypes.c_void_p)
        ctypes.memset(above, 0x33, STEP)
        proof["grows"] = above >= known_break and current_break() >= above + STEP
        proof["heap grows"] = heap_mapping()[1] >= above + STEP
        known_break = current_break()
        blocks = [call("malloc", ctypes.c_size_t(5000), restype=ctypes.c_void_p) for _ in range(99)]
        for block in blocks:
            ctypes.memset(block, 1, 5000)
            call("free", ctypes.c_void_p(block), restype=None)
        gc.collect()
        call("malloc_trim", ctypes.c_size_t(0))
        return proof

    converse(prove, lambda: ctypes.memset(begin + 4097, 0, 1))


main()
