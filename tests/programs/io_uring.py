"""io_urings that lie idle: one with an unread answer and an unsubmitted request, one with a thread.

Made by bare system calls; the first has wrapped around some times, is known under two descriptor
numbers, watched by an epoll, and has no mapping of requests but the one it needs.
"""

import ctypes
import mmap
import os
import select
import struct

from clib import call
from dialogue import Proof, converse

SETUP, ENTER = 425, 426
NOP, READ = 0, 22
POLLED_BY_THREAD, NEED_WAKEUP = 2, 1
GET_EVENTS, WAKE = 1, 2
SHARED_POPULATED = mmap.MAP_SHARED | 0x8000


class Ring:
    """A ring of `entries` requests; `flags` as io_uring_setup(2) has them."""

    def __init__(self, entries: int, flags: int = 0) -> None:
        parameters = ctypes.create_string_buffer(struct.pack("<5I", 0, 0, flags, 0, 10), 120)
        self.fd = call("syscall", SETUP, entries, parameters, restype=ctypes.c_long)
        words = struct.unpack_from("<30I", parameters)
        self.entries, self.flags, self.mask = entries, flags, entries - 1
        self.sq, self.cq = words[10:20], words[20:30]
        self.rings = mmap.mmap(self.fd, self.sq[6] + 4 * entries, flags=SHARED_POPULATED)
        self.requests = mmap.mmap(self.fd, 64 * entries, flags=SHARED_POPULATED, offset=0x10000000)
        self.tail = 0  # as liburing, which never reads it again
        self.seen = 0

    def word(self, place: int) -> int:
        return int(struct.unpack_from("<I", self.rings, place)[0])

    def prepare(self, operation: int, fd: int, address: int, length: int, data: int) -> None:
        place = self.tail & self.mask
        self.requests[64 * place : 64 * place + 64] = struct.pack(
            "<BBHiQQIIQ24x", operation, 0, 0, fd, 0, address, length, 0, data
        )
        struct.pack_into("<I", self.rings, self.sq[6] + 4 * place, place)
        self.tail = (self.tail + 1) & 0xFFFFFFFF
        struct.pack_into("<I", self.rings, self.sq[1], self.tail)

    def enter(self, submit: int, wait: int) -> int:
        flags = GET_EVENTS if wait else 0
        if self.flags & POLLED_BY_THREAD and self.word(self.sq[4]) & NEED_WAKEUP:
            flags |= WAKE
        return int(
            call(
                "syscall",
                ENTER,
                self.fd,
                submit,
                wait,
                flags,
                None,
                ctypes.c_size_t(0),
                restype=ctypes.c_long,
            )
        )

    def take(self) -> "list[tuple[int, int]]":
        """Unread answers as (data, result)."""
        found = []
        while self.seen != self.word(self.cq[1]):
            at = self.cq[5] + 16 * (self.seen & (self.word(self.cq[2])))
            found.append(struct.unpack_from("<Qi", self.rings, at))
            self.seen = (self.seen + 1) & 0xFFFFFFFF
            struct.pack_into("<I", self.rings, self.cq[0], self.seen)
        return found


def main() -> None:
    plain, polled = Ring(8), Ring(64, POLLED_BY_THREAD)
    again = os.dup(plain.fd)
    watch = select.epoll()
    watch.register(plain.fd, select.EPOLLIN)
    for number in range(21):
        plain.prepare(NOP, -1, 0, 0, number)
        plain.enter(1, 1)
        assert plain.take() == [(number, 0)]
        polled.prepare(NOP, -1, 0, 0, number)
        polled.enter(1, 1)
        while not (answers := polled.take()):
            polled.enter(0, 1)
        assert answers == [(number, 0)]
    plain.prepare(NOP, -1, 0, 0, 99)
    plain.enter(1, 1)
    read, write = os.pipe()
    room = ctypes.create_string_buffer(16)
    plain.prepare(READ, read, ctypes.addressof(room), 16, 77)
    state = {"unread": True}

    def prove() -> Proof:
        if not state["unread"]:  # a second proof: put it where the first found it
            plain.prepare(NOP, -1, 0, 0, 99)
            plain.enter(1, 1)
            plain.prepare(READ, read, ctypes.addressof(room), 16, 77)
            room.raw = bytes(16)
        state["unread"] = False
        proof: Proof = {"watched": watch.poll(0) == [(plain.fd, select.EPOLLIN)]}
        proof["unread answer"] = plain.take() == [(99, 0)]
        proof["no more to hear"] = watch.poll(0) == []
        os.write(write, b"through a ring")
        plain.fd, here = again, plain.fd
        proof["submitted"] = plain.enter(1, 1) == 1
        plain.fd = here
        proof["answered"] = plain.take() == [(77, 14)]
        proof["read"] = room.value == b"through a ring"
        for number in range(100, 150):
            for ring in (plain, polled):
                ring.prepare(NOP, -1, 0, 0, number)
                ring.enter(1, 1)
                while not (answers := ring.take()):
                    ring.enter(0, 1)
                proof[f"request {number}"] = answers == [(number, 0)]
        return proof

    converse(prove, lambda: os.write(write, b"something"))


main()
