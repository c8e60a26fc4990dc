"""Huge pages that are set aside: private memory of them, shared memory, a sealed memory file."""

import ctypes
import fcntl
import mmap
import os
import signal

from clib import call
from dialogue import Proof, converse

HUGE = 2 << 20
ANONYMOUS, HUGETLB, ALLOW_SEALING = 0x20, 0x40000, 2
F_ADD_SEALS, F_GET_SEALS, SEAL_GROW, SEAL_SHRINK = 1033, 1034, 4, 2


def allocate(length: int, flags: int, file: int = -1) -> int:
    """Memory for reading and writing, mmap(2)."""
    return int(
        call(
            "mmap", None, ctypes.c_size_t(length), 3, flags, file, ctypes.c_long(0),
            restype=ctypes.c_void_p,
        )
    )  # fmt: skip


def page_bytes_at(address: int) -> int:
    """The size of the pages of the mapping there, proc_pid_smaps(5)."""
    found = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            first = line.split()[0]
            if "-" in first:
                start, end = (int(word, 16) for word in first.split("-"))
                found = start <= address < end
            elif found and first == "KernelPageSize:":
                return int(line.split()[1]) << 10
    return 0


def pattern(seed: int) -> bytes:
    return b"".join(bytes([(seed + n) % 251 + 1]) * 64 for n in range(HUGE // 64))


def main() -> None:
    private = allocate(
        2 * HUGE, mmap.MAP_PRIVATE | ANONYMOUS | HUGETLB
    )  # one page is never touched
    ctypes.memmove(private, pattern(1), HUGE)
    ctypes.memset(private + 5 * 4096, 0, 3 * 4096)
    shared = allocate(HUGE, mmap.MAP_SHARED | ANONYMOUS | HUGETLB)
    ctypes.memmove(shared, pattern(2), HUGE)
    memfd = call("memfd_create", b"huge", 4 | ALLOW_SEALING)
    os.ftruncate(memfd, HUGE)
    mapped = allocate(HUGE, mmap.MAP_SHARED, memfd)
    ctypes.memmove(mapped, pattern(3), HUGE)
    own = allocate(HUGE, mmap.MAP_PRIVATE, memfd)
    ctypes.memmove(own + 100, b"mine", 4)
    fcntl.fcntl(memfd, F_ADD_SEALS, SEAL_GROW | SEAL_SHRINK)
    child = os.fork()
    if not child:  # it shares the shared ones
        while True:
            signal.pause()
    changed = bytearray(pattern(1))
    changed[5 * 4096 : 8 * 4096] = bytes(3 * 4096)
    places = {"private": private, "shared": shared, "memory file": mapped, "own": own}
    contents = {"private": bytes(changed), "shared": pattern(2), "memory file": pattern(3)}
    contents["own"] = pattern(3)[:100] + b"mine" + pattern(3)[104:]

    def prove() -> Proof:
        proof: Proof = {}
        for name, place in places.items():
            proof[name] = ctypes.string_at(place, HUGE) == contents[name]
            proof[f"pages of {name}"] = page_bytes_at(place) == HUGE
        ctypes.memset(private + HUGE, 7, 3)
        proof["the rest is there"] = ctypes.string_at(private + HUGE, 3) == b"\7\7\7"
        ctypes.memset(mapped, 9, 1)
        proof["one memory"] = os.pread(memfd, 1, 0) == b"\x09"
        ctypes.memmove(mapped, contents["memory file"], 1)
        proof["seals"] = fcntl.fcntl(memfd, F_GET_SEALS) == SEAL_GROW | SEAL_SHRINK
        os.kill(child, 0)
        theirs = os.open(f"/proc/{child}/mem", os.O_RDWR)
        proof["of the child"] = os.pread(theirs, HUGE, private) == contents["private"]
        os.pwrite(theirs, b"!", shared + 9)
        proof["shared with the child"] = ctypes.string_at(shared + 9, 1) == b"!"
        ctypes.memmove(shared, contents["shared"], 64)
        os.close(theirs)
        return proof

    def spoil() -> None:
        ctypes.memset(shared, 0, 1)

    converse(prove, spoil)
    os.kill(child, signal.SIGKILL)
    os._exit(0)


main()
