"""Mappings with every flag that smaps can show; each must have it again, and its bytes."""

import contextlib
import ctypes
import mmap
import os
import struct

from clib import call
from dialogue import Proof, converse

PAGE = mmap.PAGESIZE
LENGTH = 8 * PAGE
READ, WRITE, EXECUTE = 1, 2, 4
SYS_MBIND, SYS_GET_MEMPOLICY, SYS_MSEAL = 237, 239, 462
PRIVATE, SHARED, FIXED, ANONYMOUS, GROWSDOWN, NORESERVE = 2, 1, 0x10, 0x20, 0x100, 0x4000
ADVICE = {
    "random": 1, "sequential": 2, "dontfork": 10, "mergeable": 12, "hugepage": 14,
    "nohugepage": 15, "dontdump": 16, "wipeonfork": 18,
}  # fmt: skip


def allocate(flags: int = PRIVATE | ANONYMOUS, protection: int = READ | WRITE) -> int:
    return call(
        "mmap", None, ctypes.c_size_t(LENGTH), protection, flags, -1, ctypes.c_long(0),
        restype=ctypes.c_void_p,
    )  # fmt: skip


def content(name: str) -> bytes:
    return (name.encode() + b"|").ljust(LENGTH // 8, b".")[: LENGTH // 8] * 8


def read_raw(address: int) -> bytes:
    """Through /proc/self/mem, which minds no protection."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(LENGTH)


def memory_policy(address: int) -> tuple[int, int]:
    """Mode and nodes of the NUMA policy at the address (MPOL_F_ADDR); (0, 0) without NUMA."""
    mode, nodes = ctypes.c_int(), ctypes.c_ulong()
    with contextlib.suppress(OSError):
        call("syscall", SYS_GET_MEMPOLICY, ctypes.byref(mode), ctypes.byref(nodes),
             ctypes.c_ulong(64), ctypes.c_void_p(address), 2, restype=ctypes.c_long)  # fmt: skip
    return mode.value, nodes.value


def can_seal(address: int) -> bool:
    """Seal the mapping (mseal, Linux 6.10 and later)."""
    try:
        call("syscall", SYS_MSEAL, ctypes.c_void_p(address), ctypes.c_size_t(LENGTH), 0,
             restype=ctypes.c_long)  # fmt: skip
    except OSError:
        return False
    return True


def main() -> None:
    placed: dict[str, int] = {}

    def put(name: str, address: int) -> int:
        ctypes.memmove(address, content(name), LENGTH)
        placed[name] = address
        return address

    for name, advice in ADVICE.items():
        address = put(name, allocate())
        with contextlib.suppress(OSError):  # Kernels without KSM or huge pages.
            call("madvise", ctypes.c_void_p(address), ctypes.c_size_t(LENGTH), advice)
    put("noreserve", allocate(PRIVATE | ANONYMOUS | NORESERVE))
    put("growsdown", allocate(PRIVATE | ANONYMOUS | GROWSDOWN))
    put("locked", allocate())
    call("mlock", ctypes.c_void_p(placed["locked"]), ctypes.c_size_t(LENGTH))
    put("shared", allocate(SHARED | ANONYMOUS))
    put("shared read-only", allocate(SHARED | ANONYMOUS))
    call("mprotect", ctypes.c_void_p(placed["shared read-only"]), ctypes.c_size_t(LENGTH), READ)
    put("executable", allocate(protection=READ | WRITE | EXECUTE))
    put("no access", allocate())
    call("mprotect", ctypes.c_void_p(placed["no access"]), ctypes.c_size_t(LENGTH), 0)
    put("write only", allocate())
    call("mprotect", ctypes.c_void_p(placed["write only"]), ctypes.c_size_t(LENGTH), WRITE)
    bound = put("bound to a node", allocate())
    node = ctypes.byref(ctypes.c_ulong(1))
    with contextlib.suppress(OSError):  # Kernels without NUMA. mbind(2): MPOL_BIND to node 0
        call("syscall", SYS_MBIND, ctypes.c_void_p(bound), ctypes.c_size_t(LENGTH), 2, node,
             ctypes.c_ulong(64), 0, restype=ctypes.c_long)  # fmt: skip
    policy = memory_policy(bound)
    put("sealed", allocate())
    sealed = can_seal(placed["sealed"])
    # Code written at run time, as a just-in-time compiler does: mov eax, 42; ret
    code = put("code", allocate())
    ctypes.memmove(code, b"\xb8\x2a\0\0\0\xc3", 6)
    call("mprotect", ctypes.c_void_p(code), ctypes.c_size_t(LENGTH), READ | EXECUTE)
    answer = ctypes.CFUNCTYPE(ctypes.c_int)(code)

    def prove() -> Proof:
        proof: Proof = {"policy": memory_policy(bound) == policy}
        if sealed:
            try:
                call("mprotect", ctypes.c_void_p(placed["sealed"]), ctypes.c_size_t(LENGTH), READ)
                proof["sealed still"] = False
            except PermissionError:
                proof["sealed still"] = True
        for name, address in placed.items():
            seen, right = read_raw(address), content(name)
            if name == "code":
                right = b"\xb8\x2a\0\0\0\xc3" + right[6:]
            proof[name] = seen == right
        proof["code runs"] = answer() == 42
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            wiped = ctypes.string_at(placed["wipeonfork"], LENGTH) == bytes(LENGTH)
            with open("/proc/self/maps") as maps:
                spans = [line.split()[0].split("-") for line in maps]
            address = placed["dontfork"]
            missing = not any(int(a, 16) <= address < int(b, 16) for a, b in spans)
            os.write(write, struct.pack("??", wiped, missing))
            os._exit(0)
        os.waitpid(child, 0)
        proof["wiped on fork"], proof["not forked"] = struct.unpack("??", os.read(read, 2))
        os.close(read), os.close(write)
        return proof

    converse(prove, lambda: ctypes.memset(placed["dontdump"] + 5, 0, 1))


main()
