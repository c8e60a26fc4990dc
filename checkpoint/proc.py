"""What /proc tells about a process, parsed: mappings, status, stat, timers, limits.

Everything here only reads; see proc(5).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from .errors import AccessDenied, NotFound

_HEADER = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$"
)
_KEYED = re.compile(rb"\nProtectionKey: +[1-9]")
_PAGE_SIZE = re.compile(rb"\nKernelPageSize: +(\d+) kB")
_HUGE_PAGES = b"/anon_hugepage (deleted)"  # what the kernel calls memory by MAP_HUGETLB
_PIECE_BYTES = 512  # less than smaps says of any mapping
_PIECES = 512
_PIECES_BYTES = 1 << 14
_PF_EXITING, _PF_IO_WORKER, _PF_FORKNOEXEC = 0x4, 0x10, 0x40  # linux/sched.h
_SPECIAL = {
    b"[vdso]": "vdso",
    b"[vvar]": "vvar",
    b"[vvar_vclock]": "vvar",
    b"[vsyscall]": "vsyscall",
}


class Vma(NamedTuple):
    """One mapped range: addresses, permissions, what is behind it, and the kernel's VmFlags.

    `kind` is anonymous, file (behind a path), memory (shared anonymous or deleted or memfd:
    content that lives in no directory), huge (private, of huge pages that are set aside), ring (of
    an io_uring), segment (of System V shared memory), vdso, vvar or vsyscall. Besides the kernel's
    flags there are `pk`, under a protection key, and `h2048`, of pages of so many KiB (with `ht`).
    """

    start: int
    end: int
    permissions: str
    offset: int
    device: int
    inode: int
    path: str
    kind: str
    flags: frozenset[str]

    @property
    def shared(self) -> bool:
        return self.permissions[3] == "s"

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def protection(self) -> int:
        """PROT_READ 1 | PROT_WRITE 2 | PROT_EXEC 4."""
        p = self.permissions
        return (p[0] == "r") | (p[1] == "w") << 1 | (p[2] == "x") << 2


def _unescape(path: bytes) -> bytes:
    return path.replace(b"\\012", b"\n")


def parse_mappings(text: bytes) -> list[Vma]:
    """The VMAs of /proc/PID/maps or, with flags, of /proc/PID/smaps."""
    if b"\nVmFlags: " not in text:
        return [_vma(line, frozenset()) for line in text.split(b"\n") if line]
    return [_vma(details.partition(b"\n")[0], flags) for details, flags in _with_flags(text)]


def parse_flags(text: bytes) -> dict[int, frozenset[str]]:
    """The flags of each VMA of /proc/PID/smaps, by its start: a quarter of what takes time."""
    return {int(details[: details.index(b"-")], 16): flags for details, flags in _with_flags(text)}


def _with_flags(text: bytes) -> Iterator[tuple[bytes, frozenset[str]]]:
    """(what /proc/PID/smaps says of a VMA, its flags)."""
    known: dict[bytes, frozenset[str]] = {}
    has_keys = _KEYED.search(text) is not None
    pieces = text.split(b"\nVmFlags: ")
    details = pieces[0]  # those of a mapping end in its flags; the next one's follow
    for piece in pieces[1:]:
        words, _, following = piece.partition(b"\n")
        flags = known.get(words)
        if flags is None:
            flags = known[words] = frozenset(words.decode().split())
        if has_keys and _KEYED.search(details):
            flags |= {"pk"}
        if "ht" in flags and (size := _PAGE_SIZE.search(details)):
            flags |= {f"h{size[1].decode()}"}
        yield details, flags
        details = following


def huge_page_bytes(flags: Iterable[str]) -> int:
    """How large the pages that are set aside are, of a mapping with these flags; 0: ordinary."""
    return next((int(f[1:]) << 10 for f in flags if f[0] == "h" and f[1:].isdigit()), 0)


def _vma(line: bytes, flags: frozenset[str]) -> Vma:
    match = _HEADER.match(line)
    if match is None:
        raise ValueError(f"no mapping of /proc/PID/maps: {line!r}")
    start, end, permissions, offset, major, minor, inode, name = match.groups()
    path, kind, device = _behind(name, inode, major, minor)
    if name == _HUGE_PAGES and permissions.endswith(b"p"):
        kind = "huge"
    return Vma(
        int(start, 16),
        int(end, 16),
        permissions.decode(),
        int(offset, 16),
        device,
        int(inode),
        path,
        kind,
        flags,
    )


@lru_cache(maxsize=4096)
def _behind(name: bytes, inode: bytes, major: bytes, minor: bytes) -> tuple[str, str, int]:
    """(path, kind, device) of a mapping. A library is mapped in five parts or so."""
    path = _unescape(name)
    if path in _SPECIAL:
        kind = _SPECIAL[path]
    elif int(inode) == 0 and (
        not path or path.startswith((b"[heap]", b"[stack", b"[anon:", b"[anon_shmem:"))
    ):
        kind = "anonymous"
    elif path == b"anon_inode:[io_uring]":
        kind = "ring"
    elif path.startswith(b"/SYSV"):
        kind = "segment"
    elif path.startswith((b"/memfd:", b"/dev/zero (deleted)", b"[anon_shmem:")) or path.endswith(
        b" (deleted)"
    ):
        kind = "memory"
    else:
        kind = "file"
    return os.fsdecode(path), kind, os.makedev(int(major, 16), int(minor, 16))


def read_file(path: str) -> bytes:
    """The whole content of a file of /proc or /sys."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.read(descriptor, _PIECES_BYTES)
        while piece := os.read(descriptor, _PIECES_BYTES):
            found += piece
        return found
    finally:
        os.close(descriptor)


def read_at_once(path: str) -> bytes:
    """As `read_file`, of one that is long: by a single system call, if the kernel plays along.

    read(2) gives no more than 4 KiB of such a file, and between two of them another thread may
    have the GIL for 5 ms. Into buffers each of which it can fill readv(2) goes on to the end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        room = memoryview(bytearray(_PIECES * _PIECE_BYTES))
        pieces = [room[at : at + _PIECE_BYTES] for at in range(0, len(room), _PIECE_BYTES)]
        found = b""
        while got := os.readv(descriptor, pieces):
            found += room[:got]
        return found
    finally:
        os.close(descriptor)


def read_bytes(pid: int, name: str) -> bytes:
    """/proc/PID/name; NotFound or AccessDenied."""
    try:
        read = read_at_once if name in ("smaps", "numa_maps") else read_file
        return read(f"/proc/{pid}/{name}")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotFound(f"no process has pid {pid}", pid=pid) from error
    except PermissionError as error:
        raise AccessDenied(
            f"cannot read /proc/{pid}/{name}: {error.strerror}",
            remedy="lzy looks after your own processes; run it as their owner or as root",
            pid=pid,
        ) from error


def kernel_mappings(pid: int) -> list[Vma]:
    """Only the mappings the kernel itself makes: vDSO, its data pages, vsyscall."""
    lines = read_bytes(pid, "maps").splitlines()
    return parse_mappings(b"\n".join(line for line in lines if b" [v" in line))


def mappings(pid: int, *, with_flags: bool = True) -> list[Vma]:
    """The process's VMAs in address order; without flags it is much faster."""
    pid = witness(pid)
    return look_up(pid, parse_mappings(read_bytes(pid, "smaps" if with_flags else "maps")))


def referenced_bytes(pid: int) -> dict[int, int]:
    """How much of each mapping, by its start, was touched lately; proc_pid_smaps(5) Referenced."""
    found: dict[int, int] = {}
    start = 0
    for line in read_bytes(witness(pid), "smaps").splitlines():
        if line.startswith(b"Referenced:"):
            found[start] = int(line.split()[1]) * 1024
        elif not line[:1].isupper():
            start = int(line.split(b"-", 1)[0], 16)
    return found


def places_in(details: bytes) -> bytes:
    """What /proc/PID/maps would have said, of /proc/PID/smaps: the first line of each mapping."""
    return b"".join([b"%b\n" % part.partition(b"\n")[0] for part, _ in _with_flags(details)])


def look_up(pid: int, vmas: list[Vma]) -> list[Vma]:
    """The mappings of a process, with files known as such that are only called ` (deleted)`."""
    return [_look_up(pid, vma) if vma.kind == "memory" else vma for vma in vmas]


def _look_up(pid: int, vma: Vma) -> Vma:
    """A file that is only called ` (deleted)` lives in its directory like any other."""
    if vma.path.startswith(("/memfd:", "/dev/zero", "[")):
        return vma
    try:
        same = os.stat(f"/proc/{pid}/root{vma.path}").st_ino == vma.inode
    except OSError:
        return vma
    return vma._replace(kind="file") if same else vma


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """/proc/PID/status (or of one thread) as names and values."""
    text = read_bytes(pid, f"task/{tid}/status" if tid else "status").decode(
        "utf-8", "surrogateescape"
    )
    return dict([line.split(":\t", 1) for line in text.split("\n") if ":\t" in line])


def is_ending(pid: int) -> bool:
    """Whether it is on the way out, and its memory perhaps gone, or has ended."""
    task = witness(pid)
    return not _goes_on(stat(task)) or is_killed(task)


def _goes_on(fields: list[str]) -> bool:
    return fields[2] not in "ZX" and not int(fields[8]) & _PF_EXITING


def is_killed(pid: int) -> bool:
    """Whether a SIGKILL is on its way to the process, of which `pid` is a `witness`."""
    told = status(pid)
    pending = int(told.get("SigPnd", "0"), 16) | int(told.get("ShdPnd", "0"), 16)
    return bool(pending >> signal.SIGKILL - 1 & 1)


def has_ended(pid: int) -> bool:
    """Whether all its threads have ended: it is a zombie, or about to go. Raises NotFound."""
    fields = stat(pid)
    return fields[2] == "X" or (fields[2] == "Z" and int(fields[19]) < 2)


def witness(pid: int) -> int:
    """The task in whose folder of /proc the process is seen: its main thread, or another.

    Where the main thread has ended and others live, /proc/PID shows neither memory nor descriptors;
    /proc/TID of a living thread, which is not listed but there, shows all. So do system calls
    that take a pid to find them: process_vm_readv(2), kcmp(2).
    """
    with contextlib.suppress(NotFound):
        fields = stat(pid)
        if fields[2] == "Z" and int(fields[19]) > 1:
            for tid in threads(pid)[1:]:
                with contextlib.suppress(NotFound):
                    if _goes_on(stat(pid, tid)):
                        return tid
    return pid


def shares_with_parent(pid: int) -> bool:
    """Whether it was forked and has executed no program since: its memory is its parent's, too."""
    return bool(int(stat(pid)[8]) & _PF_FORKNOEXEC)


def stat(pid: int, tid: int | None = None) -> list[str]:
    """The fields of /proc/PID/stat, index 0 being the pid and 1 the comm, as proc_pid_stat(5)."""
    text = read_bytes(pid, f"task/{tid}/stat" if tid else "stat").decode("utf-8", "surrogateescape")
    head, _, tail = text.rpartition(")")
    number, _, comm = head.partition(" (")
    return [number, comm, *tail.split()]


def is_kernel_worker(pid: int, tid: int) -> bool:
    """Whether the thread is one that the kernel runs for an io_uring: it executes no program."""
    try:
        if not read_file(f"/proc/{pid}/task/{tid}/comm").startswith(b"iou-"):
            return False
        return bool(int(stat(pid, tid)[8]) & _PF_IO_WORKER)
    except (OSError, NotFound):
        return False


def open_shared(pid: int) -> int:
    """A pidfd by which its descriptors are reached, pidfd_getfd(2); see `witness`.

    Where the main thread has ended it is one of another thread, and says nothing of the process's
    end. Raises ProcessLookupError; OSError (EINVAL) where that takes Linux 6.9.
    """
    task = witness(pid)
    if task == pid:
        return os.pidfd_open(pid)
    from .linux.process import open_thread

    return open_thread(task)


def start_time(pid: int) -> int:
    """Clock ticks after boot at which the process began: tells a reused pid from the old one."""
    return int(stat(pid)[21])


def threads(pid: int) -> list[int]:
    """The thread ids of a process, the leader first."""
    try:
        found = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError as error:
        raise NotFound(f"no process has pid {pid}", pid=pid) from error
    return sorted(found, key=lambda tid: (tid != pid, tid))


def children(pid: int) -> list[int]:
    """The pids of all children, of whichever thread, zombies included."""
    found: list[int] = []
    for tid in threads(pid):
        try:
            found += map(int, read_file(f"/proc/{pid}/task/{tid}/children").split())
        except FileNotFoundError:
            continue
    return found


def innermost(value: str) -> int:
    """The last number of an NSpid-like line: what the process itself sees."""
    return int(value.split()[-1])


class PosixTimer(NamedTuple):
    """One line group of /proc/PID/timers; `value` is what the signal carries (sigev_value)."""

    number: int
    signal: int
    value: int
    notify: str
    target: int
    clock: int


def posix_timers(pid: int) -> list[PosixTimer]:
    """The POSIX timers of a process, timer_create(2), from /proc/PID/timers (Linux 3.10)."""
    found: list[PosixTimer] = []
    fields: dict[str, str] = {}
    for line in read_bytes(pid, "timers").decode().splitlines():
        name, _, value = line.partition(": ")
        fields[name] = value
        if name == "ClockID":
            signal, _, carried = fields["signal"].partition("/")
            notify, _, target = fields["notify"].rpartition(".")
            found.append(
                PosixTimer(
                    int(fields["ID"]),
                    int(signal),
                    int(carried, 16),
                    notify,
                    int(target),
                    int(fields["ClockID"]),
                )
            )
    return found


def memory_policies(pid: int) -> dict[str, str]:
    """NUMA policies set for ranges, mbind(2): {start address in hex: policy}; numa(7)."""
    try:
        lines = read_bytes(pid, "numa_maps").decode("utf-8", "surrogateescape").splitlines()
    except NotFound:  # a kernel without CONFIG_NUMA
        return {}
    fields = (line.replace("prefer (many)", "prefer_many").split(" ", 2) for line in lines)
    return {
        start: policy.replace("prefer_many", "prefer (many)")
        for start, policy, *_ in fields
        if policy != "default"
    }


LIMIT_NAMES = (
    "Max cpu time", "Max file size", "Max data size", "Max stack size", "Max core file size",
    "Max resident set", "Max processes", "Max open files", "Max locked memory",
    "Max address space", "Max file locks", "Max pending signals", "Max msgqueue size",
    "Max nice priority", "Max realtime priority", "Max realtime timeout",
)  # fmt: skip
INFINITE = 0xFFFFFFFFFFFFFFFF


def limits(pid: int) -> dict[int, tuple[int, int]]:
    """Resource limits {number: (soft, hard)}; infinite is 2**64-1."""
    found: dict[int, tuple[int, int]] = {}
    for line in read_bytes(pid, "limits").decode().splitlines()[1:]:
        name = line[:26].strip()
        if name in LIMIT_NAMES:
            soft, hard = line[26:].split()[:2]
            found[LIMIT_NAMES.index(name)] = (
                INFINITE if soft == "unlimited" else int(soft),
                INFINITE if hard == "unlimited" else int(hard),
            )
    return found


def boot_id() -> str:
    """A name for this boot of the kernel."""
    return read_file("/proc/sys/kernel/random/boot_id").decode().strip()


def clock_offsets(pid: int) -> dict[str, int]:
    """How far a process's clocks are ahead of the machine's, in ns; time_namespaces(7)."""
    try:
        lines = read_bytes(pid, "timens_offsets").decode().splitlines()
    except NotFound:  # a kernel without time namespaces
        return {"monotonic": 0, "boottime": 0}
    parts = (line.split() for line in lines)
    return {name: int(seconds) * 10**9 + int(ns) for name, seconds, ns in parts}


def cpu_features() -> list[str]:
    """The CPU's features by the kernel's names: those of the first; all of them have the same."""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("flags"):
                return line.partition(":")[2].split()
    return []
