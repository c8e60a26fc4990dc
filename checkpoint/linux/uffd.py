"""userfaultfd(2): asking to hear of a process's missing pages, and putting them in place.

Layouts and numbers from linux/userfaultfd.h; behaviour from ioctl_userfaultfd(2) and, where that
page is silent, fs/userfaultfd.c and mm/userfaultfd.c of Linux 6.18.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from . import PAGE_BYTES, libc, syscall

USERFAULTFD = 323  # system call number, x86-64
_KCMP = 312
_KCMP_FILE = 0

API_VERSION = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
UFFDIO_WRITEPROTECT = 0xC018AA06

REGISTER_MODE_MISSING = 1
REGISTER_MODE_WP = 2

COPY_MODE_WP = 2

FEATURE_EVENT_FORK = 1 << 1
FEATURE_EVENT_REMAP = 1 << 2
FEATURE_EVENT_REMOVE = 1 << 3
FEATURE_EVENT_UNMAP = 1 << 6
PAGER_FEATURES = (
    FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP | FEATURE_EVENT_REMOVE | FEATURE_EVENT_UNMAP
)
"""Every way in which a process can change what lies where: the pager must hear of all of them."""

DEVICE = "/dev/userfaultfd"
USERFAULTFD_IOC_NEW = 0xAA00  # ioctl on it: a userfaultfd of the calling process, Linux 6.1

UFFD_USER_MODE_ONLY = 1
"""Flag of userfaultfd(2): faults of the kernel's own are not served. Anybody may ask for that."""

FEATURE_WP_UNPOPULATED = 1 << 13  # which WP_ASYNC implies
FEATURE_WP_ASYNC = 1 << 15
ACCOUNT_FEATURES = FEATURE_WP_ASYNC | 1 << 11 | 1 << 8
"""WP_ASYNC, which is what an account of writes needs (`lzy.checkpoint.tracking`), with
EXACT_ADDRESS and THREAD_ID, which mean nothing to it: by this combination it is known again."""

DOZE_FEATURES = PAGER_FEATURES | FEATURE_WP_ASYNC
"""By one userfaultfd, for a mapping has but one, pages are served and writes are accounted for."""

EVENT_PAGEFAULT = 0x12
EVENT_FORK = 0x13
EVENT_REMAP = 0x14
EVENT_REMOVE = 0x15
EVENT_UNMAP = 0x16

MESSAGE_BYTES = 32
"""struct uffd_msg as four u64: event in the low byte of the first, then its arguments:
PAGEFAULT flags, address; FORK descriptor (u32); REMAP from, to, length; REMOVE/UNMAP start, end."""

_LOWEST_ADDRESS = 0x10000  # vm.mmap_min_addr at its usual value; below it the kernel says EINVAL
_TASK_SIZES = (0x7FFFFFFFF000, 0xFFFFFFFFFFF000)  # four-level and five-level page tables

_ioctl = libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int

# The same two calls without letting go of the GIL: for calls of a few microseconds the hand-over
# to a reading thread (and waiting to get the GIL back) costs more than the call.
_held = ctypes.PyDLL(None, use_errno=True)
_ioctl_held = _held.ioctl
_ioctl_held.argtypes = _ioctl.argtypes
_ioctl_held.restype = ctypes.c_int
_read_held = _held.read
_read_held.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_read_held.restype = ctypes.c_ssize_t

_SHORT_COPY_BYTES = 64 * 1024


def _raise(doing: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{doing}: {os.strerror(number)}")


def create(flags: int = os.O_CLOEXEC | os.O_NONBLOCK) -> int:
    """A userfaultfd of the calling process's own memory. Source: userfaultfd(2).

    It hears of faults taken inside system calls too, so it needs CAP_SYS_PTRACE or
    vm.unprivileged_userfaultfd=1.
    """
    return syscall(USERFAULTFD, flags)


def pack_api(features: int) -> bytes:
    """The argument of UFFDIO_API (struct uffdio_api)."""
    return struct.pack("<QQQ", API_VERSION, features, 0)


def enable(fd: int, features: int = PAGER_FEATURES) -> int:
    """UFFDIO_API, once per descriptor; returns the features the kernel knows.

    EVENT_FORK asks for CAP_SYS_PTRACE of the *caller*, who need not be the process itself.
    """
    argument = bytearray(pack_api(features))
    fcntl.ioctl(fd, UFFDIO_API, argument)
    known: int = struct.unpack("<QQQ", argument)[1]
    return known


def register(fd: int, start: int, length_bytes: int, mode: int = REGISTER_MODE_MISSING) -> None:
    """UFFDIO_REGISTER, for missing pages as a rule. The caller need not be the process itself."""
    argument = bytearray(pack_register(start, length_bytes, mode))
    fcntl.ioctl(fd, UFFDIO_REGISTER, argument)


def pack_register(start: int, length_bytes: int, mode: int = REGISTER_MODE_MISSING) -> bytes:
    """The argument of UFFDIO_REGISTER (struct uffdio_register)."""
    return struct.pack("<QQQQ", start, length_bytes, mode, 0)


def pack_range(start: int, length_bytes: int) -> bytes:
    """The argument of UFFDIO_UNREGISTER (struct uffdio_range)."""
    return struct.pack("<QQ", start, length_bytes)


def unregister(fd: int, start: int, length_bytes: int) -> None:
    """UFFDIO_UNREGISTER; wakes whoever waits there. Nothing happens to VMAs not registered."""
    fcntl.ioctl(fd, UFFDIO_UNREGISTER, pack_range(start, length_bytes))


def unprotect(fd: int, start: int, length_bytes: int) -> None:
    """UFFDIO_WRITEPROTECT: writes there are free. Huge pages stay whole. ENOENT: not registered."""
    fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, struct.pack("<QQQ", start, length_bytes, 0))


def same_description(pid: int, number: int, fd: int) -> bool:
    """Whether descriptor `number` of `pid` and our `fd` are one open file. Source: kcmp(2)."""
    try:
        return syscall(_KCMP, os.getpid(), pid, _KCMP_FILE, fd, number) == 0
    except OSError:
        return False


def is_userfaultfd(fd: int) -> bool:
    """Whether our descriptor `fd` is a userfaultfd."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
    except OSError:
        return False


def keeps_account(information: str) -> bool:
    """Whether fdinfo, proc_pid_fdinfo(5), is that of a userfaultfd with ACCOUNT_FEATURES."""
    for line in information.splitlines():
        if line.startswith("API:"):
            features = int(line.split(":")[2], 16) & (1 << 24) - 1  # above: the kernel's own marks
            return features & ~FEATURE_WP_UNPOPULATED == ACCOUNT_FEATURES
    return False


class Userfaultfd:
    """One userfaultfd, seen by who answers it; allocates nothing per call.

    Preconditions: one thread uses it. Every method may raise OSError; what matters to a pager:
    EAGAIN   an event waits to be read, whatever we were about to install may be out of date
    EEXIST   there is a page already
    ENOENT   no registered VMA holds the whole range
    ESRCH    the memory is gone: its process ended or called execve
    """

    __slots__ = ("_argument", "_argument_address", "_copy_mode", "fd")

    def __init__(self, fd: int, *, keeps_account: bool = False) -> None:
        """With `keeps_account` what is copied counts as not written (see DOZE_FEATURES)."""
        self.fd = fd
        self._copy_mode = COPY_MODE_WP if keeps_account else 0
        buffer = (ctypes.c_int64 * 5)()
        self._argument = memoryview(buffer).cast("B").cast("q")
        self._argument_address = ctypes.addressof(buffer)

    def make_pollable(self) -> None:
        """Make it O_NONBLOCK: poll(2) answers POLLERR for any other userfaultfd."""
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        if not flags & os.O_NONBLOCK:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)

    def read(self, into_address: int, length_bytes: int) -> int:
        """Take messages to memory at `into_address`; their length in bytes, 0 when there is none.

        The kernel takes each message off its queue and writes it within this one call.
        """
        length = _read_held(self.fd, into_address, length_bytes)
        if length < 0:
            if ctypes.get_errno() in (errno.EAGAIN, errno.EINTR):
                return 0
            _raise("reading userfaultfd messages")
        return int(length)

    def copy(self, target: int, source: int, length_bytes: int) -> int:
        """UFFDIO_COPY: install pages and wake who waits for them; the bytes installed, > 0."""
        argument = self._argument
        argument[0] = target
        argument[1] = source
        argument[2] = length_bytes
        argument[3] = self._copy_mode
        argument[4] = 0
        call = _ioctl_held if length_bytes <= _SHORT_COPY_BYTES else _ioctl
        if call(self.fd, UFFDIO_COPY, self._argument_address):
            if argument[4] > 0:
                return argument[4]
            _raise(f"installing {length_bytes} bytes at {target:#x}")
        return length_bytes

    def zero(self, target: int, length_bytes: int) -> int:
        """UFFDIO_ZEROPAGE: map zeros and wake who waits for them; the bytes mapped, > 0."""
        argument = self._argument
        argument[0] = target
        argument[1] = length_bytes
        argument[2] = 0
        argument[3] = 0
        if _ioctl_held(self.fd, UFFDIO_ZEROPAGE, self._argument_address):
            if argument[3] > 0:
                return argument[3]
            _raise(f"mapping {length_bytes} zero bytes at {target:#x}")
        return length_bytes

    def wake(self, start: int, length_bytes: int) -> None:
        """UFFDIO_WAKE: whoever waits in the range looks again and, if need be, faults again."""
        argument = self._argument
        argument[0] = start
        argument[1] = length_bytes
        if _ioctl_held(self.fd, UFFDIO_WAKE, self._argument_address):
            _raise(f"waking {start:#x}")

    def wake_all(self) -> None:
        """Wake whoever waits anywhere: faults read by a pager that is gone are raised again."""
        for size in _TASK_SIZES:
            try:
                self.wake(_LOWEST_ADDRESS, size - _LOWEST_ADDRESS)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise

    def layout_is_changing(self) -> bool:
        """Whether an event is about to be queued or waits to be read.

        Asked by trying to install at an address where nothing can be: the kernel looks for pending
        changes first (EAGAIN), then for the VMA (ENOENT). ESRCH is raised.
        """
        try:
            self.zero(_LOWEST_ADDRESS, PAGE_BYTES)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return True
            if error.errno == errno.ESRCH:
                raise
        return False
