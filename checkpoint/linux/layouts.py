"""Kernel structs that injected system calls take and give, packed and unpacked.

Sources: PR_SET_MM_MAP(2const), sigaltstack(2), timer_create(2) and sigevent(3type), capset(2),
sigaction(2), rseq(2), mbind(2), membarrier(2), rt_sigqueueinfo(2); include/uapi/linux.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

SIGACTION_BYTES: Final = 32  # struct sigaction as the kernel has it: handler, flags, restorer, mask
ITIMERVAL_BYTES: Final = 32  # struct itimerval, itimerspec: interval, then time left
STACK_BYTES: Final = 24  # stack_t
NODEMASK_BITS: Final = 1024  # as many NUMA nodes as any kernel is built for

SS_ONSTACK: Final = 1
SIGEV_SIGNAL: Final = 0
SIGEV_NONE: Final = 1
SIGEV_THREAD: Final = 2
SIGEV_THREAD_ID: Final = 4

CLOCK_OF_CALLER: Final = (
    -2
)  # CLOCK_THREAD_CPUTIME_ID as /proc shows it, kernel/time/posix-cpu-timers.c

MEMBARRIER_GET_REGISTRATIONS: Final = 1 << 9
MEMBARRIER_REGISTRATIONS: Final = (1 << 2, 1 << 4, 1 << 6, 1 << 8)
"""GLOBAL_EXPEDITED, PRIVATE_EXPEDITED, …_SYNC_CORE, …_RSEQ: the commands that register."""

MPOL_NAMES: Final = {"prefer": 1, "bind": 2, "interleave": 3, "local": 4, "prefer (many)": 5}
MPOL_FLAGS: Final = {"static": 1 << 15, "relative": 1 << 14}
_MPOL_ALL_FLAGS: Final = 7 << 13

SECBIT_NO_SETUID_FIXUP: Final = 1 << 2
_CAPABILITY_VERSION_3: Final = 0x20080522

XFEATURE_XTILE_DATA: Final = 18


NO_EXECUTABLE: Final = 0xFFFFFFFF
"""In struct prctl_mm_map: that stays as it is."""


def pack_mm_map(addresses: Sequence[int], auxv: int, auxv_bytes: int, executable: int) -> bytes:
    """struct prctl_mm_map.

    `addresses`: start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start,
    arg_end, env_start, env_end; `auxv` the address of the vector; `executable` a descriptor.
    """
    return struct.pack("<12QII", *addresses, auxv, auxv_bytes, executable)


def pack_stack(pointer: int, flags: int, size_bytes: int) -> bytes:
    """stack_t of sigaltstack(2), without SS_ONSTACK."""
    return struct.pack("<QiiQ", pointer, flags & ~SS_ONSTACK, 0, size_bytes)


def unpack_stack(content: bytes) -> list[int]:
    """[pointer, flags without SS_ONSTACK, size] of a stack_t."""
    pointer, flags, size_bytes = struct.unpack("<QixxxxQ", content)
    return [pointer, flags & ~SS_ONSTACK, size_bytes]


def pack_sigevent(value: int, signal: int, notify: int, thread: int) -> bytes:
    """struct sigevent (64 bytes)."""
    return struct.pack("<QiiI", value, signal, notify, thread).ljust(64, b"\0")


def thread_clock(tid: int) -> int:
    """The clock of a thread's processor time, as pthread_getcpuclockid(3) gives it."""
    return ~tid << 3 | 6


def signal_of(siginfo: bytes) -> int:
    """si_signo of a siginfo_t."""
    number: int = struct.unpack_from("<i", siginfo)[0]
    return number


def pack_limit(soft: int, hard: int) -> bytes:
    """struct rlimit."""
    return struct.pack("<QQ", soft, hard)


def pack_groups(groups: Sequence[int]) -> bytes:
    """gid_t[] of setgroups(2)."""
    return struct.pack(f"<{len(groups)}I", *groups)


def pack_capability_header() -> bytes:
    """struct __user_cap_header_struct for the calling thread."""
    return struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)


def pack_capabilities(effective: int, permitted: int, inheritable: int) -> bytes:
    """struct __user_cap_data_struct[2]."""
    sets = (effective, permitted, inheritable)
    return struct.pack("<6I", *[s & 0xFFFFFFFF for s in sets], *[s >> 32 for s in sets])


def pack_message_header(vector: int, control: int, control_bytes: int) -> bytes:
    """struct msghdr of recvmsg(2): one iovec at `vector`, room for ancillary data at `control`."""
    return struct.pack("<QIxxxxQQQQixxxx", 0, 0, vector, 1, control, control_bytes, 0)


def pack_nodemask(mask: int) -> bytes:
    """A NUMA node mask of NODEMASK_BITS."""
    return mask.to_bytes(NODEMASK_BITS // 8, "little")


def name_policy(mode: int, nodes: bytes) -> str:
    """A policy as numa(7) has it in numa_maps, of what get_mempolicy(2) says; empty if default."""
    kind = mode & ~(_MPOL_ALL_FLAGS)
    name = next((name for name, number in MPOL_NAMES.items() if number == kind), "")
    if not name:
        return ""
    flag = next((f"={flag}" for flag, bit in MPOL_FLAGS.items() if mode & bit), "")
    mask = int.from_bytes(nodes, "little")
    numbers = [str(node) for node in range(mask.bit_length()) if mask >> node & 1]
    return f"{name}{flag}" + (f":{','.join(numbers)}" if numbers else "")


RSEQ_SECTION_OFFSET: Final = 8  # of rseq_cs in struct rseq
RSEQ_SECTION_BYTES: Final = 32


def unpack_rseq_section(content: bytes) -> tuple[int, int, int]:
    """(start, length, abort handler) of a struct rseq_cs."""
    _, _, start, length, abort = struct.unpack("<IIQQQ", content)
    return start, length, abort


def unpack_u64(content: bytes) -> int:
    """A u64."""
    number: int = struct.unpack("<Q", content)[0]
    return number


def unpack_s32(content: bytes) -> int:
    """An int."""
    number: int = struct.unpack("<i", content)[0]
    return number


def pack_s32(number: int) -> bytes:
    """An int."""
    return struct.pack("<i", number)


def pack_s64(number: int) -> bytes:
    """A long."""
    return struct.pack("<q", number)
