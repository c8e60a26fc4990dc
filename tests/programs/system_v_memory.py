"""System V shared memory: a segment with a key, attached twice; one that is to go with its user."""

import ctypes
import os
import struct

from clib import call
from dialogue import Proof, converse

CREATE, READ_ONLY, REMOVE, STATUS = 0o1000, 0o10000, 0, 2
SIZE = 3 * 4096 - 100


def attach(segment: int, flags: int = 0) -> int:
    return int(call("shmat", segment, None, flags, restype=ctypes.c_void_p))


def look_at(segment: int) -> "tuple[int, int, int, int]":
    """Key, rights with marks, size, how often it is attached."""
    buffer = ctypes.create_string_buffer(256)
    call("shmctl", segment, STATUS, buffer)
    key, mode, size, attached = struct.unpack_from("<i16xI24xQ32xQ", buffer)
    return key, mode, size, attached


def main() -> None:
    key = 0x6C000000 | os.getpid()
    named = call("shmget", key, ctypes.c_size_t(SIZE), CREATE | 0o640)
    private = call("shmget", 0, ctypes.c_size_t(5 * 4096), CREATE | 0o600)
    writable, readable, own = attach(named), attach(named, READ_ONLY), attach(private)
    call("shmctl", private, REMOVE, None)
    ctypes.memset(writable, 0x51, SIZE)
    ctypes.memset(own, 0x52, 5 * 4096)
    call("mprotect", ctypes.c_void_p(own + 4096), ctypes.c_size_t(4096), 1)
    rounds = 0

    def prove() -> Proof:
        nonlocal rounds
        rounds += 1
        content = bytes([rounds - 1]) * 4 if rounds > 1 else b"\x51" * 4
        proof: Proof = {
            "content": ctypes.string_at(readable, SIZE) == content + b"\x51" * (SIZE - 4),
            "own content": ctypes.string_at(own, 5 * 4096) == b"\x52" * 5 * 4096,
            "status": look_at(named) == (key, 0o640, SIZE, 2),
            "status of its own": look_at(private)[1:3] == (0o1600, 5 * 4096),
        }
        ctypes.memset(writable, rounds, 4)
        proof["shared"] = ctypes.string_at(readable, 4) == bytes([rounds]) * 4
        with open("/proc/self/maps") as maps:
            lines = [line.split()[:2] for line in maps if "/SYSV" in line]
        rights = {int(span.split("-")[0], 16): rights for span, rights in lines}
        proof["read only"] = rights[readable] == "r--s" and rights[writable] == "rw-s"
        proof["protected"] = rights[own + 4096] == "r--s" and rights[own] == "rw-s"
        again = attach(named)
        proof["attached again"] = look_at(named)[3] == 3
        call("shmdt", ctypes.c_void_p(again))
        proof["detached"] = look_at(named)[3] == 2
        return proof

    converse(prove, lambda: ctypes.memset(own, 0, 1))


main()
