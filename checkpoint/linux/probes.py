"""What `lzy doctor` asks of the kernel: each probe tries one interface on lzy's own memory.

A probe returns what it learned and raises OSError (the kernel's answer) where the interface is
missing or refused. Nothing outlives a probe: what could change this process runs in a forked child.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import PAGE_BYTES, libc, syscall
from .namespaces import mount_own_proc
from .users import enter_own_users

# System calls, x86-64 (syscall_64.tbl).
_PTRACE = 101
_PRCTL = 157
_KCMP = 312
_USERFAULTFD = 323
_PIDFD_OPEN = 434
_CLONE3 = 435
_PIDFD_GETFD = 438

# ptrace(2), <linux/ptrace.h>
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
_WALL = 0x40000000

# unshare(2)
_CLONE_NEWTIME = 0x80
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNS = 0x20000

# prctl(2): PR_SET_MM, PR_SET_MM_MAP_SIZE (needs CONFIG_CHECKPOINT_RESTORE)
_PR_SET_MM = 35
_PR_SET_MM_MAP_SIZE = 15

# userfaultfd(2), <linux/userfaultfd.h>
_UFFD_API = 0xAA
_UFFD_USER_MODE_ONLY = 1
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_WRITEPROTECT = 0xC018AA06
_REGISTER_MISSING = 1
_REGISTER_WRITE_PROTECT = 2
_WRITEPROTECT_ON = 1
_FEATURE_BITS = {
    "pagefault_flag_wp": 0,
    "event_fork": 1,
    "event_remap": 2,
    "event_remove": 3,
    "missing_hugetlbfs": 4,
    "missing_shmem": 5,
    "event_unmap": 6,
    "sigbus": 7,
    "thread_id": 8,
    "minor_hugetlbfs": 9,
    "minor_shmem": 10,
    "exact_address": 11,
    "wp_hugetlbfs_shmem": 12,
    "wp_unpopulated": 13,
    "poison": 14,
    "wp_async": 15,
    "move": 16,
}

# ioctl_pagemap_scan(2), <linux/fs.h>
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_WRITTEN = 1 << 1
_PAGE_IS_PRESENT = 1 << 3

_MFD_CLOEXEC = 0x1
_MFD_EXEC = 0x10

# <linux/capability.h>
CAPABILITIES = tuple(
    """
    chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable
    net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio
    sys_chroot sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time
    sys_tty_config mknod lease audit_write audit_control setfcap mac_override mac_admin syslog
    wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore
    """.split()  # noqa: SIM905 - forty-one quoted words would hide the order, which counts
)


def effective_capabilities() -> list[str]:
    """Names of this process's effective capabilities, as capabilities(7) has them in lower case."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                bits = int(line.split()[1], 16)
                return [name for i, name in enumerate(CAPABILITIES) if bits >> i & 1]
    return []


def seize_sibling() -> None:
    """Seize, stop and let go a process that is not our child, as a dump does; ptrace(2).

    The tracer is one forked child, the tracee another, because a mere child may be traced where
    anything else may not (Yama's ptrace_scope 1).
    """
    with _parked_child() as pid:

        def trace() -> None:
            syscall(_PTRACE, _PTRACE_SEIZE, pid, 0, 0)
            syscall(_PTRACE, _PTRACE_INTERRUPT, pid, 0, 0)
            os.waitpid(pid, _WALL)
            # The tracer's exit detaches and lets the tracee go on.

        _in_child(trace)


def read_rseq_configuration() -> None:
    """Ask a stopped process for its restartable sequences; PTRACE_GET_RSEQ_CONFIGURATION, 5.13."""
    with _parked_child() as pid:

        def trace() -> None:
            syscall(_PTRACE, _PTRACE_SEIZE, pid, 0, 0)
            syscall(_PTRACE, _PTRACE_INTERRUPT, pid, 0, 0)
            os.waitpid(pid, _WALL)
            answer = ctypes.create_string_buffer(24)
            syscall(
                _PTRACE, _PTRACE_GET_RSEQ_CONFIGURATION, pid, len(answer), ctypes.addressof(answer)
            )

        _in_child(trace)


def userfaultfd_features() -> tuple[list[str], bool]:
    """Names of the features that userfaultfd offers, and whether it serves the kernel's faults too.

    Faults that the kernel takes for a process (read(2) into memory that is not there yet) are only
    served for a privileged descriptor; userfaultfd(2).
    """
    uffd, everywhere = _open_userfaultfd()
    try:
        bits = _negotiate(uffd, 0)
    finally:
        os.close(uffd)
    return [name for name, bit in _FEATURE_BITS.items() if bits >> bit & 1], everywhere


def serve_missing_page(features: list[str]) -> None:
    """With `features`, install a page into registered memory and read it; UFFDIO_COPY."""
    uffd, _ = _open_userfaultfd()
    with _private_pages(2) as (memory, address):
        try:
            _negotiate(uffd, sum(1 << _FEATURE_BITS[name] for name in features))
            _register(uffd, address, PAGE_BYTES, _REGISTER_MISSING)
            source = ctypes.create_string_buffer(b"\x5a" * PAGE_BYTES, PAGE_BYTES)
            copy = struct.pack("<QQQQq", address, ctypes.addressof(source), PAGE_BYTES, 0, 0)
            fcntl.ioctl(uffd, _UFFDIO_COPY, copy)
        finally:
            os.close(uffd)
        if memory[:PAGE_BYTES] != b"\x5a" * PAGE_BYTES:
            raise OSError(5, "the page installed by userfaultfd reads otherwise")


def scan_present_pages() -> None:
    """Find the one touched page among four; ioctl_pagemap_scan(2), 6.7."""
    with _private_pages(4) as (memory, address):
        memory[2 * PAGE_BYTES] = 1
        found = _scan(address, 4 * PAGE_BYTES, _PAGE_IS_PRESENT)
    if found != [(address + 2 * PAGE_BYTES, address + 3 * PAGE_BYTES)]:
        raise OSError(5, "PAGEMAP_SCAN does not find a page that was touched")


def track_written_pages() -> None:
    """Find the one page of four written since they were protected; UFFD_FEATURE_WP_ASYNC, 6.7."""
    uffd, _ = _open_userfaultfd()
    length_bytes = 4 * PAGE_BYTES
    with _private_pages(4) as (memory, address):
        try:
            memory[:] = b"\x01" * length_bytes
            wanted = ("pagefault_flag_wp", "wp_unpopulated", "wp_async")
            _negotiate(uffd, sum(1 << _FEATURE_BITS[name] for name in wanted))
            _register(uffd, address, length_bytes, _REGISTER_WRITE_PROTECT)
            protect = struct.pack("<QQQ", address, length_bytes, _WRITEPROTECT_ON)
            fcntl.ioctl(uffd, _UFFDIO_WRITEPROTECT, protect)
            memory[PAGE_BYTES] = 2
            found = _scan(address, length_bytes, _PAGE_IS_WRITTEN)
        finally:
            os.close(uffd)
    if found != [(address + PAGE_BYTES, address + 2 * PAGE_BYTES)]:
        raise OSError(5, "write tracking does not find the page that was written")


def clone_with_pid() -> None:
    """Make a child whose pid we choose; clone3(2) with set_tid, 5.5."""

    def clone() -> None:
        # A pid that was free a moment ago; another process may take it meanwhile, so try again.
        for attempt in range(8):
            wanted = os.fork()
            if wanted == 0:
                os._exit(0)
            os.waitpid(wanted, 0)
            try:
                _clone3(wanted)
            except FileExistsError:
                if attempt == 7:
                    raise
                continue
            return

    _in_child(clone)


def enter_pid_namespace() -> None:
    """Make a child that is pid 1 of a namespace of its own; pid_namespaces(7)."""

    def enter() -> None:
        _unshare(_CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if os.getpid() == 1 else 1)
        if os.waitpid(pid, 0)[1]:
            raise OSError(5, "the first process of a new pid namespace is not its pid 1")

    _in_child(enter)


def shift_clocks() -> None:
    """Set CLOCK_MONOTONIC and CLOCK_BOOTTIME forward in a namespace; time_namespaces(7), 5.6."""

    def shift() -> None:
        _unshare(_CLONE_NEWTIME)
        with open("/proc/self/timens_offsets", "w") as offsets:
            offsets.write("monotonic 86400 0\nboottime 86400 0\n")

    _in_child(shift)


def among_own_users(probe: Callable[[], None]) -> None:
    """Run a probe in a user namespace of our own, as lzy restores without root."""

    def run() -> None:
        enter_own_users()
        probe()

    _in_child(run)


def choose_pid_apart() -> None:
    """In a PID namespace of our own: have /proc there, and make a child whose pid we choose."""

    def first() -> None:
        mount_own_proc()
        _clone3(1000)

    def enter() -> None:
        _unshare(_CLONE_NEWPID | _CLONE_NEWNS)
        _in_child(first)

    _in_child(enter)


def compare_descriptions() -> None:
    """Tell descriptors of one description from others; kcmp(2), KCMP_FILE."""
    first = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    same, other = os.dup(first), os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        me = os.getpid()
        equal = syscall(_KCMP, me, me, 0, first, same)
        unequal = syscall(_KCMP, me, me, 0, first, other)
    finally:
        for descriptor in (first, same, other):
            os.close(descriptor)
    if equal != 0 or unequal == 0:
        raise OSError(5, "kcmp does not tell descriptions apart")


def duplicate_descriptor() -> None:
    """Take a descriptor out of another process; pidfd_getfd(2), 5.6."""
    with _parked_child() as pid:
        pidfd = syscall(_PIDFD_OPEN, pid, 0)
        try:
            os.close(syscall(_PIDFD_GETFD, pidfd, 0, 0))
        except OSError as error:
            if error.errno != 9:  # EBADF: the child has no descriptor 0, but we were let look
                raise
        finally:
            os.close(pidfd)


def read_memory_map_size() -> int:
    """Bytes of the structure that sets what /proc shows of a process; PR_SET_MM_MAP_SIZE."""
    answer = ctypes.c_uint32()
    syscall(_PRCTL, _PR_SET_MM, _PR_SET_MM_MAP_SIZE, ctypes.addressof(answer), 0, 0)
    return answer.value


def make_executable_memfd() -> None:
    """Make a file in memory that may be executed; memfd_create(2), sysctl vm.memfd_noexec."""
    try:
        descriptor = os.memfd_create("lzy-probe", _MFD_CLOEXEC | _MFD_EXEC)
    except OSError as error:
        if error.errno != 22:  # EINVAL: a kernel before 6.3, where all of them may be executed
            raise
        descriptor = os.memfd_create("lzy-probe", _MFD_CLOEXEC)
    try:
        if not os.fstat(descriptor).st_mode & 0o100:
            raise OSError(13, "a file in memory may not be executed")
    finally:
        os.close(descriptor)


def _open_userfaultfd() -> tuple[int, bool]:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return syscall(_USERFAULTFD, flags), True
    except PermissionError:
        return syscall(_USERFAULTFD, flags | _UFFD_USER_MODE_ONLY), False


def _negotiate(uffd: int, features: int) -> int:
    """Ask for `features` (bits); return all that the kernel has."""
    answer = fcntl.ioctl(uffd, _UFFDIO_API, struct.pack("<QQQ", _UFFD_API, features, 0))
    return int(struct.unpack("<QQQ", answer)[1])


def _register(uffd: int, address: int, length_bytes: int, mode: int) -> None:
    fcntl.ioctl(uffd, _UFFDIO_REGISTER, struct.pack("<QQQQ", address, length_bytes, mode, 0))


def _scan(address: int, length_bytes: int, category: int) -> list[tuple[int, int]]:
    """Ranges (start, end) of our own memory whose pages are of `category`; struct pm_scan_arg."""
    regions = (ctypes.c_uint64 * (3 * 8))()
    argument = struct.pack(
        "<12Q",
        96,
        0,
        address,
        address + length_bytes,
        0,
        ctypes.addressof(regions),
        8,
        0,
        0,
        category,
        0,
        category,
    )
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        number = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, bytearray(argument))
    finally:
        os.close(pagemap)
    return [(regions[3 * i], regions[3 * i + 1]) for i in range(number)]


def _clone3(pid: int) -> None:
    """Make a child with the pid `pid` in this namespace and reap it."""
    wanted = ctypes.c_int32(pid)
    # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls,
    # set_tid, set_tid_size, cgroup
    arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17, 0, 0, 0, ctypes.addressof(wanted), 1, 0)
    made = syscall(_CLONE3, ctypes.addressof(arguments), ctypes.sizeof(arguments))
    if made == 0:
        os._exit(0)
    os.waitpid(made, 0)
    if made != pid:
        raise OSError(5, f"clone3 made pid {made} where {pid} was asked for")


def _unshare(flags: int) -> None:
    if libc.unshare(flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def _private_pages(number: int) -> Iterator[tuple[mmap.mmap, int]]:
    """Fresh private anonymous memory of `number` pages, and its address."""
    memory = mmap.mmap(-1, number * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        holder = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(holder)
        del holder
        yield memory, address
    finally:
        memory.close()


@contextmanager
def _parked_child() -> Iterator[int]:
    """A child that waits until it is not needed any more; its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)  # end of file when the parent lets go, or dies
        os._exit(0)
    os.close(reader)
    try:
        yield pid
    finally:
        os.close(writer)
        os.waitpid(pid, 0)


def _in_child(function: Callable[[], None]) -> None:
    """Run `function` in a forked child; raise here the OSError that it raised there."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except OSError as error:
            os.write(writer, f"{error.errno or 5} {error.strerror}".encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if answer:
        number, _, words = answer.decode().partition(" ")
        raise OSError(int(number), words)
    if status:
        raise OSError(5, f"the probe's process ended with wait status {status:#x}")
