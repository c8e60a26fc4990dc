"""Memory that is locked, at once or when touched, now or from now on; guards; memory barriers."""

import contextlib
import ctypes
import os
import signal

from clib import call
from dialogue import Proof, converse

PAGE, PAGES = 4096, 16
LENGTH = PAGES * PAGE
MLOCK2, MEMBARRIER = 325, 324
ON_FAULT, LOCK_FUTURE, LOCK_ON_FAULT, GUARD_INSTALL = 1, 2, 4, 102
REGISTER_PRIVATE, PRIVATE, REGISTER_CORE, REGISTRATIONS = 1 << 4, 1 << 3, 1 << 6, 1 << 9


def allocate() -> int:
    """Fresh private memory."""
    return int(
        call(
            "mmap",
            None,
            ctypes.c_size_t(LENGTH),
            3,
            0x22,
            -1,
            ctypes.c_long(0),
            restype=ctypes.c_void_p,
        )
    )


def flags_of(address: int) -> "set[str]":
    """VmFlags of the mapping that holds the address, proc_pid_smaps(5)."""
    found = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            first = line.split()[0]
            if "-" in first:
                start, end = (int(word, 16) for word in first.split("-"))
                found = start <= address < end
            elif found and first == "VmFlags:":
                return set(line.split()[1:])
    return set()


def present(address: int) -> "list[bool]":
    """Which pages are in RAM, mincore(2)."""
    vector = ctypes.create_string_buffer(PAGES)
    call("mincore", ctypes.c_void_p(address), ctypes.c_size_t(LENGTH), vector)
    return [bool(byte & 1) for byte in vector.raw]


def barrier(command: int) -> int:
    return int(call("syscall", MEMBARRIER, command, 0, 0, restype=ctypes.c_long))


def faults_at(address: int) -> bool:
    """Whether a child that reads there is killed for it."""
    child = os.fork()
    if child == 0:
        ctypes.string_at(address, 1)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


def main() -> None:
    at_once, on_fault, guarded = allocate(), allocate(), allocate()
    call("mlock", ctypes.c_void_p(at_once), ctypes.c_size_t(LENGTH))
    call(
        "syscall",
        MLOCK2,
        ctypes.c_void_p(on_fault),
        ctypes.c_size_t(LENGTH),
        ON_FAULT,
        restype=ctypes.c_long,
    )
    ctypes.memset(on_fault + PAGE, 7, PAGE)
    ctypes.memset(guarded, 9, LENGTH)
    has_guards = False
    with contextlib.suppress(OSError):  # Linux 6.13
        call("madvise", ctypes.c_void_p(guarded + 2 * PAGE), ctypes.c_size_t(PAGE), GUARD_INSTALL)
        has_guards = True
    barrier(REGISTER_PRIVATE)
    barrier(REGISTER_CORE)
    registered = barrier(REGISTRATIONS)
    call("mlockall", LOCK_FUTURE | LOCK_ON_FAULT)

    def prove() -> Proof:
        later = allocate()
        proof: Proof = {
            "locked": "lo" in flags_of(at_once) and all(present(at_once)),
            "locked when touched": {"lo", "lf"} <= flags_of(on_fault),
            "not touched": present(on_fault) == [page == 1 for page in range(PAGES)],
            "locked from now on": {"lo", "lf"} <= flags_of(later),
            "bytes": ctypes.string_at(on_fault + PAGE, PAGE) == b"\7" * PAGE,
            "registered": barrier(REGISTRATIONS) == registered,
            "barrier": barrier(PRIVATE) == 0,
        }
        call("munmap", ctypes.c_void_p(later), ctypes.c_size_t(LENGTH))
        if has_guards:
            proof["guarded"] = faults_at(guarded + 2 * PAGE)
            proof["beside it"] = ctypes.string_at(guarded + 3 * PAGE, 1) == b"\11"
        return proof

    converse(prove, lambda: call("munlockall"))


main()
