"""Descriptors as the kernel knows them: copying, comparing, and the calls that make each kind.

Sources: the man page of each call, linux/fcntl.h, linux/kcmp.h, linux/timerfd.h, linux/eventpoll.h,
linux/inotify.h, asm-generic/fcntl.h. Numbers are those of x86-64 and aarch64 (the generic table)
except where a table by machine says otherwise.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import Any

from . import libc, syscall

# --- open flags (asm-generic/fcntl.h; O_DIRECT and O_DIRECTORY differ by machine, so os's are used)
O_PATH = os.O_PATH
O_ASYNC = os.O_ASYNC
O_TMPFILE = os.O_TMPFILE
SETTABLE_FLAGS = os.O_APPEND | os.O_NONBLOCK | os.O_NOATIME | os.O_DIRECT  # F_SETFL, fcntl(2)

# --- fcntl commands that Python's module lacks
F_SETSIG = 10
F_GETSIG = 11
F_SETOWN_EX = 15
F_GETOWN_EX = 16
F_OFD_SETLK = 37
OWNER_TID, OWNER_PID, OWNER_PGRP = 0, 1, 2

# --- file systems (linux/magic.h) whose files have no content of their own to compare
MESSAGE_QUEUES = 0x19800202  # mq_overview(7)
PSEUDO_FILE_SYSTEMS = {
    0x9FA0: "proc",
    0x62656572: "sysfs",
    0x63677270: "cgroup2",
    0x27E0EB: "cgroup",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0x73636673: "securityfs",
    0xDE5E81E4: "efivarfs",
    0xCAFE4A11: "bpf",
}

_KCMP = 312 if os.uname().machine == "x86_64" else 272  # the generic table's
_PIDFD_GETFD = 438
_CLOSE_RANGE = 436
_KCMP_FILE = 0
_KCMP_EPOLL_TFD = 7
_TFD_IOC_SET_TICKS = 0x40085400  # _IOW('T', 0, u64)
_INOTIFY_IOC_SETNEXTWD = 0x40044900  # _IOW('I', 0, s32)
FIONREAD = 0x541B
TIOCOUTQ = 0x5411
TIOCGPTN = 0x80045430
TIOCSPTLCK = 0x40045431
TIOCGPTLCK = 0x80045439
TIOCPKT = 0x5420
TIOCGPKT = 0x80045438
TIOCGEXCL = 0x80045440
TIOCEXCL = 0x540C
TIOCGWINSZ = 0x5413
TIOCSWINSZ = 0x5414
TIOCSCTTY = 0x540E
TIOCNOTTY = 0x5422
TIOCSPGRP = 0x5410
SYS_OPENAT = 257  # x86-64
TCGETS2 = 0x802C542A
TCSETS2 = 0x402C542B
TERMIOS2_BYTES = 44
WINSIZE_BYTES = 8
EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD = 1, 2, 3
EPOLL_PRIVATE_BITS = 0xF0000000  # wakeup, one-shot, edge-triggered, exclusive: no readiness bits
EPOLL_ONESHOT = 1 << 30
EPOLL_ANY = 0x201F  # in, pri, out, err, hup, rdhup
TFD_ABSTIME = 1
FH_MAX_BYTES = 128


def _function(name: str, *argtypes: Any, restype: Any = ctypes.c_int) -> Any:
    function = getattr(libc, name)
    function.argtypes = argtypes
    function.restype = restype
    return function


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


_I, _U, _P, _S = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p
_epoll_create1 = _function("epoll_create1", _I)
_epoll_ctl = _function("epoll_ctl", _I, _I, _I, _P)
_epoll_wait = _function("epoll_wait", _I, _P, _I, _I)
_signalfd = _function("signalfd", _I, _P, _I)
_inotify_init1 = _function("inotify_init1", _I)
_inotify_add_watch = _function("inotify_add_watch", _I, _S, ctypes.c_uint32)
_inotify_rm_watch = _function("inotify_rm_watch", _I, _I)
_tee = _function("tee", _I, _I, ctypes.c_size_t, _U, restype=ctypes.c_ssize_t)
_timerfd_create = _function("timerfd_create", _I, _I)
_timerfd_settime = _function("timerfd_settime", _I, _I, _P, _P)
_timerfd_gettime = _function("timerfd_gettime", _I, _P)
_open_by_handle_at = _function("open_by_handle_at", _I, _P, _I)
# struct statfs (bits/statfs.h, LP64): f_type is the first word of 120 bytes.
_statx = _function("statx", _I, _S, _I, _U, _P)
_fstatfs = _function("fstatfs", _I, _P)

# struct epoll_event is packed on x86-64 only (linux/eventpoll.h).
_EPOLL_EVENT = "=IQ" if os.uname().machine == "x86_64" else "=I4xQ"


_kcmp = libc["syscall"]  # some thousand times for a tree: `linux.syscall` takes twice as long
_kcmp.argtypes, _kcmp.restype = [ctypes.c_long] * 6, ctypes.c_long


# --- copying and comparing ----------------------------------------------------------------------


def duplicate_from(pidfd: int, number: int) -> int:
    """Duplicate descriptor `number` of the process behind `pidfd`; ours is close-on-exec.

    The duplicate shares the open file description. Source: pidfd_getfd(2), Linux 5.6.
    """
    return syscall(_PIDFD_GETFD, pidfd, number, 0)


def compare_descriptions(pid: int, one: int, other: int, other_pid: int = 0) -> int:
    """Order the descriptions behind two descriptors: 0 the same, -1 or 1 a total order.

    `one` is of process `pid`, `other` of `other_pid` (0: of the same). Source: kcmp(2), KCMP_FILE.
    """
    answer = _checked(_kcmp(_KCMP, pid, other_pid or pid, _KCMP_FILE, one, other))
    return {0: 0, 1: -1, 2: 1}.get(answer, 1)


def watches_description(pid: int, number: int, epoll: int, target: int, occurrence: int) -> bool:
    """Tell whether `epoll`'s entry registered as `target` watches the description of `number`.

    `occurrence` counts entries of the same target number, in the order of fdinfo. False also when
    the epoll has no such entry. Source: kcmp(2), KCMP_EPOLL_TFD.
    """
    slot = struct.pack("=III", epoll, target, occurrence)
    buffer = ctypes.create_string_buffer(slot, len(slot))
    try:
        answer = syscall(
            _KCMP,
            pid,
            pid,
            _KCMP_EPOLL_TFD,
            number,
            ctypes.addressof(buffer),
        )
    except FileNotFoundError:
        return False
    return answer == 0


def close_range(first: int, last: int) -> None:
    """Close every descriptor from `first` to `last`, both included. Source: close_range(2)."""
    if first <= last:
        syscall(_CLOSE_RANGE, first, last, 0)


def file_system_type(fd: int) -> int:
    """Tell the magic number of the file system that `fd` lies on. Source: fstatfs(2)."""
    buffer = ctypes.create_string_buffer(256)
    _checked(_fstatfs(fd, buffer))
    return int(struct.unpack_from("=Q", buffer)[0]) & 0xFFFFFFFF


def birth_ns(path: str | int) -> int:
    """When the file at `path` (or open as that) was made, in ns; 0 if the file system says not.

    With device and inode it tells a file from a later one that got the inode. Source: statx(2).
    """
    buffer = ctypes.create_string_buffer(256)
    wanted, at_fdcwd, no_follow = 0x800, -100, 0x100  # STATX_BTIME, AT_FDCWD, AT_SYMLINK_NOFOLLOW
    empty_path = 0x1000  # AT_EMPTY_PATH
    if isinstance(path, int):
        _checked(_statx(path, b"", empty_path, wanted, buffer))
    else:
        _checked(_statx(at_fdcwd, os.fsencode(path), no_follow, wanted, buffer))
    if not struct.unpack_from("=I", buffer)[0] & wanted:
        return 0
    seconds, rest_ns = struct.unpack_from("=qI", buffer, 80)
    return int(seconds * 1_000_000_000 + rest_ns)


def open_by_handle(mount_fd: int, handle_type: int, handle: bytes, flags: int) -> int:
    """Open a file by its handle (fdinfo's `f_handle`). Source: open_by_handle_at(2)."""
    raw = struct.pack("=Ii", len(handle), handle_type) + handle
    buffer = ctypes.create_string_buffer(raw, len(raw))
    return _checked(_open_by_handle_at(mount_fd, buffer, flags))


def unread_bytes(fd: int) -> int:
    """Tell how many bytes a read could give now. Source: ioctl FIONREAD, ioctl_tty(2)."""
    return int(struct.unpack("=i", fcntl.ioctl(fd, FIONREAD, bytes(4)))[0])


# --- owners of input signals, leases, locks ------------------------------------------------------


def signal_owner(fd: int) -> tuple[int, int]:
    """Who gets a description's signals: (OWNER_*, id); id 0 means nobody. Source: fcntl(2)."""
    kind, identity = struct.unpack("=ii", fcntl.fcntl(fd, F_GETOWN_EX, bytes(8)))
    return kind, identity


def set_signal_owner(fd: int, kind: int, identity: int) -> None:
    """Say who gets a description's signals. Source: fcntl(2), F_SETOWN_EX."""
    fcntl.fcntl(fd, F_SETOWN_EX, struct.pack("=ii", kind, identity))


def pack_lock(kind: int, start: int, length_bytes: int) -> bytes:
    """A struct flock (LP64) counted from the file's start; length 0 reaches to the end."""
    return struct.pack("=hh4xqqi4x", kind, os.SEEK_SET, start, length_bytes, 0)


def find_lock_holder(fd: int, lock: bytes) -> int | None:
    """Who would refuse us that POSIX lock: a pid, -1 for an open file's lock; None if nobody.

    Takes nothing. Source: F_GETLK in fcntl(2), which tells neither of our own locks.
    """
    kind, _, _, _, holder = struct.unpack("=hh4xqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, lock))
    return None if kind == fcntl.F_UNLCK else holder


# --- pipes ---------------------------------------------------------------------------------------


def tee(source: int, target: int, length_bytes: int) -> int:
    """Copy up to `length_bytes` between pipes without consuming, never waiting.

    0 means that the source is empty and has no writer; BlockingIOError that it is empty.
    Source: tee(2).
    """
    return _checked(_tee(source, target, length_bytes, 2))  # SPLICE_F_NONBLOCK


# --- event sources -------------------------------------------------------------------------------


def make_epoll() -> int:
    """An epoll instance that watches nothing. Source: epoll_create1(2)."""
    return _checked(_epoll_create1(os.O_CLOEXEC))


def epoll_control(epoll: int, operation: int, fd: int, events: int, data: int) -> None:
    """Change what `epoll` watches; `data` is the program's own 64 bits. Source: epoll_ctl(2)."""
    raw = pack_epoll_event(events, data)
    buffer = ctypes.create_string_buffer(raw, len(raw))
    _checked(_epoll_ctl(epoll, operation, fd, buffer))


def pack_epoll_event(events: int, data: int) -> bytes:
    """struct epoll_event."""
    return struct.pack(_EPOLL_EVENT, events & 0xFFFFFFFF, data & 0xFFFFFFFFFFFFFFFF)


def epoll_ready(epoll: int, limit: int) -> int:
    """Take at most `limit` ready events off `epoll` without waiting; tell how many."""
    buffer = ctypes.create_string_buffer(limit * struct.calcsize(_EPOLL_EVENT))
    return _checked(_epoll_wait(epoll, buffer, limit, 0))


def make_signalfd(mask: int) -> int:
    """A signalfd for the signals in `mask` (bit n-1 = signal n). Source: signalfd(2)."""
    buffer = ctypes.create_string_buffer(struct.pack("=Q", mask), 128)
    return _checked(_signalfd(-1, buffer, os.O_CLOEXEC))


def make_timerfd(clock: int) -> int:
    """A disarmed timerfd on `clock` (CLOCK_*). Source: timerfd_create(2)."""
    return _checked(_timerfd_create(clock, os.O_CLOEXEC))


def set_timerfd(fd: int, flags: int, value_ns: int, interval_ns: int) -> None:
    """Arm (or with `value_ns` 0 disarm) a timerfd. Source: timerfd_settime(2)."""
    second = 1_000_000_000
    raw = struct.pack("=qqqq", *divmod(interval_ns, second), *divmod(value_ns, second))
    buffer = ctypes.create_string_buffer(raw, len(raw))
    _checked(_timerfd_settime(fd, flags, buffer, None))


def get_timerfd(fd: int) -> tuple[int, int]:
    """(time to the next expiry, interval), both in ns; 0 means disarmed. Source: timerfd_gettime.

    A periodic timer that has expired is wound on by this call and its ticks are counted, so that
    what a read gives stays the same.
    """
    buffer = ctypes.create_string_buffer(32)
    _checked(_timerfd_gettime(fd, buffer))
    interval_s, interval_ns, value_s, value_ns = struct.unpack("=qqqq", buffer.raw)
    return value_s * 1_000_000_000 + value_ns, interval_s * 1_000_000_000 + interval_ns


def set_timerfd_ticks(fd: int, ticks: int) -> None:
    """Set how many expiries wait to be read. Source: timerfd_create(2), TFD_IOC_SET_TICKS."""
    fcntl.ioctl(fd, _TFD_IOC_SET_TICKS, struct.pack("=Q", ticks))


def make_inotify() -> int:
    """An inotify instance without watches. Source: inotify_init1(2)."""
    return _checked(_inotify_init1(os.O_CLOEXEC))


def watch_inotify(fd: int, path: str, mask: int) -> int:
    """Watch `path`; return the watch's number. Source: inotify_add_watch(2)."""
    return _checked(_inotify_add_watch(fd, os.fsencode(path), mask))


def unwatch_inotify(fd: int, watch: int) -> None:
    """Remove a watch; an IN_IGNORED event is queued. Source: inotify_rm_watch(2)."""
    _checked(_inotify_rm_watch(fd, watch))


def set_next_watch(fd: int, watch: int) -> None:
    """Choose the number of the next watch. Source: linux/inotify.h, INOTIFY_IOC_SETNEXTWD (4.16).

    Raises OSError (ENOTTY) where the kernel lacks CONFIG_CHECKPOINT_RESTORE.
    """
    # The argument is the number itself, not a pointer to it (fs/notify/inotify/inotify_user.c).
    fcntl.ioctl(fd, _INOTIFY_IOC_SETNEXTWD, watch)
