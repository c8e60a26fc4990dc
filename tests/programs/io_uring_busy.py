"""A process with an io_uring that has a read in flight, made by bare system calls."""

import ctypes
import mmap
import os
import struct

from clib import call
from dialogue import Proof, converse

SETUP, ENTER, IORING_OP_READ = 425, 426, 22


def main() -> None:
    parameters = ctypes.create_string_buffer(120)
    ring = call("syscall", SETUP, 4, parameters, restype=ctypes.c_long)
    numbers = struct.unpack_from("30I", parameters)
    submission, array = numbers[10:20], numbers[16]
    tail_offset = submission[1]
    rings = mmap.mmap(ring, 4096, flags=mmap.MAP_SHARED | 0x8000)
    entries = mmap.mmap(ring, 4096, flags=mmap.MAP_SHARED | 0x8000, offset=0x10000000)
    read, write = os.pipe()
    room = ctypes.create_string_buffer(16)
    entries[:64] = struct.pack("BBHiQQIIQ24x", IORING_OP_READ, 0, 0, read, 0,
                               ctypes.addressof(room), 16, 0, 77)  # fmt: skip
    struct.pack_into("I", rings, array, 0)
    struct.pack_into("I", rings, tail_offset, 1)
    call("syscall", ENTER, ring, 1, 0, 0, None, ctypes.c_size_t(0), restype=ctypes.c_long)

    def prove() -> Proof:
        os.write(write, b"in flight")
        call("syscall", ENTER, ring, 0, 1, 1, None, ctypes.c_size_t(0), restype=ctypes.c_long)
        return {"completed": room.value == b"in flight"}

    converse(prove, lambda: os.read(read, 1))


main()
