"""Numbers and layouts for making processes and threads: clone3, prctl, timers, scheduling.

Sources: clone(2), prctl(2), PR_SET_MM(2const), sched_setattr(2), ioprio_set(2), capset(2),
arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/linux/*.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

from . import libc, syscall

# x86-64 system call numbers, those that lzy makes by number or injects
SYS_MMAP: Final = 9
SYS_MPROTECT: Final = 10
SYS_MUNMAP: Final = 11
SYS_BRK: Final = 12
SYS_RT_SIGACTION: Final = 13
SYS_MREMAP: Final = 25
SYS_MADVISE: Final = 28
SYS_GETITIMER: Final = 36
SYS_SETITIMER: Final = 38
SYS_RECVMSG: Final = 47
SYS_SOCKETPAIR: Final = 53
SYS_CLONE: Final = 56
SYS_WAIT4: Final = 61
SYS_KILL: Final = 62
SYS_WAITID: Final = 247
SYS_RT_SIGSUSPEND: Final = 130
SYS_FCNTL: Final = 72
SYS_CLOSE: Final = 3
SYS_FCHDIR: Final = 81
SYS_SETPGID: Final = 109
SYS_SETSID: Final = 112
SYS_GETPGID: Final = 121
SYS_RT_SIGTIMEDWAIT: Final = 128
SYS_CHROOT: Final = 161
SYS_EXIT: Final = 60
SYS_EXIT_GROUP: Final = 231
SYS_PIDFD_OPEN: Final = 434
SYS_PIDFD_GETFD: Final = 438
SYS_CLOSE_RANGE: Final = 436
SYS_DUP3: Final = 292
SYS_EPOLL_CTL: Final = 233
SYS_IOCTL: Final = 16
SYS_GETPPID: Final = 110
SYS_PERSONALITY: Final = 135
SYS_UMASK: Final = 95
SYS_SETGROUPS: Final = 116
SYS_SETRESUID: Final = 117
SYS_SETRESGID: Final = 119
SYS_SETFSUID: Final = 122
SYS_SETFSGID: Final = 123
SYS_CAPSET: Final = 126
SYS_RT_SIGQUEUEINFO: Final = 129
SYS_SIGALTSTACK: Final = 131
SYS_PRCTL: Final = 157
SYS_ARCH_PRCTL: Final = 158
SYS_SETRLIMIT: Final = 160
SYS_SET_TID_ADDRESS: Final = 218
SYS_TIMER_CREATE: Final = 222
SYS_TIMER_SETTIME: Final = 223
SYS_TIMER_GETTIME: Final = 224
SYS_TIMER_DELETE: Final = 226
SYS_MBIND: Final = 237
SYS_SET_MEMPOLICY: Final = 238
SYS_GET_MEMPOLICY: Final = 239
MPOL_F_ADDR: Final = 2
SYS_IOPRIO_SET: Final = 251
SYS_IOPRIO_GET: Final = 252
SYS_SET_ROBUST_LIST: Final = 273
SYS_GET_ROBUST_LIST: Final = 274
SYS_RT_TGSIGQUEUEINFO: Final = 297
SYS_PRLIMIT64: Final = 302
SYS_KCMP: Final = 312
SYS_SCHED_SETATTR: Final = 314
SYS_SCHED_GETATTR: Final = 315
SYS_SECCOMP: Final = 317
SYS_USERFAULTFD: Final = 323
SYS_MEMBARRIER: Final = 324
SYS_MLOCK2: Final = 325
SYS_MLOCKALL: Final = 151
SYS_RSEQ: Final = 334
SYS_CLONE3: Final = 435
SYS_MSEAL: Final = 462
SYS_UNSHARE: Final = 272
SYS_RESTART_SYSCALL: Final = 219
SYS_FUTEX: Final = 202
SYS_CLOCK_GETTIME: Final = 228
FUTEX_WAIT_PRIVATE: Final = 128
FUTEX_WAKE_PRIVATE: Final = 129

RESTARTED_CALLS: Final = frozenset({7, 35, 202, 230})
"""poll, nanosleep, futex, clock_nanosleep: what restart_syscall(2) goes on with."""

AF_UNIX: Final = 1
SOCK_SEQPACKET: Final = 5
SOCK_CLOEXEC: Final = 0o2000000

CLONE_VM: Final = 0x100
CLONE_FS: Final = 0x200
CLONE_FILES: Final = 0x400
CLONE_SIGHAND: Final = 0x800
CLONE_PARENT: Final = 0x8000
CLONE_THREAD: Final = 0x10000
CLONE_NEWNS: Final = 0x20000
CLONE_SYSVSEM: Final = 0x40000
CLONE_CHILD_CLEARTID: Final = 0x200000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWTIME: Final = 0x80

PR_SET_PDEATHSIG: Final = 1
PR_GET_PDEATHSIG: Final = 2
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_SET_KEEPCAPS: Final = 8
PR_SET_NAME: Final = 15
PR_CAPBSET_DROP: Final = 24
PR_GET_SECUREBITS: Final = 27
PR_SET_SECUREBITS: Final = 28
PR_SET_TIMERSLACK: Final = 29
PR_GET_TIMERSLACK: Final = 30
PR_SET_MM: Final = 35
PR_SET_MM_MAP: Final = 14
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37
PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_TID_ADDRESS: Final = 40
PR_SET_THP_DISABLE: Final = 41
PR_GET_THP_DISABLE: Final = 42
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_RAISE: Final = 2
PR_SET_MDWE: Final = 65
PR_GET_MDWE: Final = 66
PR_SET_MEMORY_MERGE: Final = 67
PR_GET_MEMORY_MERGE: Final = 68
PR_TIMER_CREATE_RESTORE_IDS: Final = 77

F_SETFD: Final = 2
F_DUPFD_CLOEXEC: Final = 1030

SECCOMP_SET_MODE_STRICT: Final = 0
SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_FILTER_FLAG_TSYNC: Final = 1

ARCH_GET_XCOMP_PERM: Final = 0x1022
ARCH_REQ_XCOMP_PERM: Final = 0x1023

SIGNALS: Final = range(1, 65)
IOPRIO_WHO_PROCESS: Final = 1

_PyDLL_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_PyDLL_syscall.restype = ctypes.c_long


def clone3(*, flags: int = 0, exit_signal: int = 17, set_tid: int = 0) -> int:
    """Fork with a chosen pid (in the innermost namespace); 0 in the child, the pid in the parent.

    The GIL is kept during the call and Python's own fork hooks run, so the child may go on in
    Python; the caller must have no other running threads. EEXIST: the pid is taken. EPERM:
    CAP_CHECKPOINT_RESTORE is missing. Source: clone(2).
    """
    tids = (ctypes.c_int32 * 1)(set_tid)
    arguments = ctypes.create_string_buffer(
        struct.pack(
            "<11Q", flags, 0, 0, 0, exit_signal, 0, 0, 0,
            ctypes.addressof(tids) if set_tid else 0, 1 if set_tid else 0, 0,
        ),
        88,
    )  # fmt: skip
    ctypes.pythonapi.PyOS_BeforeFork()
    result: int = _PyDLL_syscall(SYS_CLONE3, ctypes.byref(arguments), ctypes.c_size_t(88))
    error = ctypes.get_errno() if result < 0 else 0
    if result == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    if result < 0:
        raise OSError(error, os.strerror(error))
    return result


def thread_clone_arguments(tid_address: int, clear_tid_address: int) -> bytes:
    """struct clone_args (88 bytes) for a thread whose id stands at `tid_address` of the caller."""
    flags = (
        CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM
    )  # fmt: skip
    if clear_tid_address:
        flags |= CLONE_CHILD_CLEARTID
    return struct.pack("<11Q", flags, 0, clear_tid_address, 0, 0, 0, 0, 0, tid_address, 1, 0)


def fork_arguments(tid_address: int, exit_signal: int, flags: int = 0) -> bytes:
    """struct clone_args (88 bytes) for a child whose pid stands at `tid_address` of the caller."""
    return struct.pack("<11Q", flags, 0, 0, 0, exit_signal, 0, 0, 0, tid_address, 1, 0)


def prctl(option: int, *arguments: int) -> int:
    """prctl(2) on ourselves."""
    return syscall(SYS_PRCTL, option, *arguments, *[0] * (4 - len(arguments)))


def io_priority(tid: int) -> int:
    """The thread's I/O priority as a number, ioprio_get(2)."""
    return syscall(SYS_IOPRIO_GET, IOPRIO_WHO_PROCESS, tid)


def set_io_priority(tid: int, priority: int) -> None:
    """Set the thread's I/O priority, ioprio_set(2)."""
    syscall(SYS_IOPRIO_SET, IOPRIO_WHO_PROCESS, tid, priority)


def scheduling(tid: int) -> bytes:
    """struct sched_attr of a thread: policy, nice, priority, deadline, clamps; sched_getattr(2)."""
    buffer = ctypes.create_string_buffer(64)
    syscall(SYS_SCHED_GETATTR, tid, ctypes.addressof(buffer), 64, 0)
    return buffer.raw[: struct.unpack_from("<I", buffer)[0]]


def set_scheduling(tid: int, attributes: bytes) -> None:
    """Set what `scheduling` gave, sched_setattr(2)."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    syscall(SYS_SCHED_SETATTR, tid, ctypes.addressof(buffer), 0)


def robust_list(tid: int) -> tuple[int, int]:
    """(head address, length in bytes) of a thread's robust futexes, get_robust_list(2)."""
    head = ctypes.c_uint64()
    length = ctypes.c_uint64()
    syscall(SYS_GET_ROBUST_LIST, tid, ctypes.addressof(head), ctypes.addressof(length))
    return head.value, length.value


def pack_filter_program(length_bytes: int, address: int) -> bytes:
    """struct sock_fprog: so many bytes of classic BPF at that address, linux/filter.h."""
    return struct.pack("<H6xQ", length_bytes // 8, address)


_CAP_SYS_ADMIN: Final = 21
_CAP_CHECKPOINT_RESTORE: Final = 40


def may_choose_pids() -> bool:
    """Whether we may make processes with chosen pids, clone3(2): capabilities(7)."""
    return bool(_effective() & (1 << _CAP_CHECKPOINT_RESTORE | 1 << _CAP_SYS_ADMIN))


def is_administrator() -> bool:
    """Whether we have CAP_SYS_ADMIN, capabilities(7)."""
    return bool(_effective() & 1 << _CAP_SYS_ADMIN)


def _effective() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        found = next(line for line in file if line.startswith("CapEff:"))
    return int(found.split()[1], 16)


_PIDFD_THREAD: Final = os.O_EXCL
KCMP_FILES: Final = 2
KCMP_FS: Final = 3


def open_thread(tid: int) -> int:
    """A pidfd of one thread, which need not lead its process. Source: pidfd_open(2), Linux 6.9."""
    return os.pidfd_open(tid, _PIDFD_THREAD)


def is_shared(first: int, second: int, what: int) -> bool:
    """Whether two tasks share their descriptors (KCMP_FILES) or directory (KCMP_FS); kcmp(2)."""
    return syscall(SYS_KCMP, first, second, what, 0, 0) == 0


def unshare(flags: int) -> None:
    """unshare(2) for ourselves."""
    syscall(SYS_UNSHARE, flags)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{os.strerror(error)}: mount {kind} on {target}")


MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
