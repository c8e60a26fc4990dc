"""The pager against real processes that register their own memory and prove what they see."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import select
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from lzy.checkpoint import proc, stages
from lzy.checkpoint.errors import Busy, Damaged, NotFound, StoreUnavailable
from lzy.checkpoint.harbour import Harbour
from lzy.checkpoint.home import run_directory
from lzy.checkpoint.journal import CLOSING, journal_path, log_path, read_status
from lzy.checkpoint.linux import PAGE_BYTES, libc
from lzy.checkpoint.linux import uffd as kernel
from lzy.checkpoint.linux.detached import take_descriptor
from lzy.checkpoint.pager import Plan, begin_pager, resume_pager, start_pager
from lzy.checkpoint.tracee import stopped
from lzy.checkpoint.unfinished import close_unfinished
from lzy.checkpoint.waiting import list_pagers

BASE = 0x6000_0000_0000
UFFD_NUMBER, HARBOUR_NUMBERS = 1000, (1001, 1002)
PATIENCE_S = float(os.environ.get("LZY_TEST_PATIENCE_S", "60"))
SEED = int(os.environ.get("LZY_TEST_SEED", "1"))

_POINTER, _LENGTH, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
libc.mmap.restype = _POINTER
libc.mmap.argtypes = [_POINTER, _LENGTH, _INT, _INT, _INT, ctypes.c_long]
libc.mremap.restype = _POINTER
libc.mremap.argtypes = [_POINTER, _LENGTH, _LENGTH, _INT, _POINTER]
libc.munmap.argtypes = [_POINTER, _LENGTH]
libc.madvise.argtypes = [_POINTER, _LENGTH, _INT]
libc.mprotect.argtypes = [_POINTER, _LENGTH, _INT]
libc.memcmp.argtypes = [_POINTER, ctypes.c_char_p, _LENGTH]
FIXED, MAYMOVE, DONTUNMAP = 2, 1, 4
ZERO_PAGE = bytes(PAGE_BYTES)


def page_content(address: int) -> bytes:
    """What the image has at `address`: never zero, different for each page."""
    return struct.pack("<QQ", address, ~address & 0xFFFFFFFFFFFFFFFF) * (PAGE_BYTES // 16)


class FileImage:
    """The image protocol over one file of chunks, authenticated; the file may be spoilt.

    A file `away` beside it makes it unavailable; each read takes `pause_s` longer.
    """

    pause_s = 0.0

    def __init__(self, path: Path) -> None:
        self.path = path
        head = path.with_suffix(".runs").read_bytes()
        self.window_pages, count = struct.unpack_from("<QQ", head)
        body = memoryview(head)[16:]
        self.runs = body[: count * 24].cast("Q")
        self._digests = body[count * 24 : count * 56]
        self._masks = self.runs[1::3]
        self._count = count
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._away = path.with_suffix(".away")

    @staticmethod
    def write(path: Path, windows: dict[int, int], window_pages: int) -> FileImage:
        runs, digests = [], []
        stride = window_pages * PAGE_BYTES
        with open(path, "wb") as file:
            for number, (address, mask) in enumerate(sorted(windows.items())):
                chunk = b"".join(
                    page_content(address + bit * PAGE_BYTES)
                    for bit in range(window_pages)
                    if mask >> bit & 1
                )
                runs.append(struct.pack("<QQQ", address, mask, number))
                digests.append(blake3(chunk).digest())
                file.write(chunk.ljust(stride, b"\0"))
        head = struct.pack("<QQ", window_pages, len(runs))
        path.with_suffix(".runs").write_bytes(head + b"".join(runs) + b"".join(digests))
        return FileImage(path)

    def descriptors(self) -> list[int]:
        return [self._fd]

    def space_extent(self, space: int) -> tuple[int, int]:
        return (0, self._count) if space == 0 else (self._count, self._count)

    def read_chunk(self, chunk: int, into: memoryview) -> int:
        length = self._masks[chunk].bit_count() * PAGE_BYTES
        target = into[:length]
        if self._away.exists():
            raise StoreUnavailable("the store is away")
        if self.pause_s:
            time.sleep(self.pause_s)
        try:
            got = os.preadv(self._fd, (target,), chunk * self.window_pages * PAGE_BYTES)
        except OSError as error:
            raise StoreUnavailable(f"cannot read: {error}") from error
        if got != length or blake3(target).digest() != self._digests[chunk * 32 : chunk * 32 + 32]:
            raise Damaged(f"chunk {chunk} is damaged")
        return length

    def close(self) -> None:
        os.close(self._fd)


def open_file_image(store: str, image: str) -> FileImage:
    try:
        return FileImage(Path(store) / image)
    except OSError as error:
        raise StoreUnavailable(f"cannot open {image}: {error.strerror}") from error


class Memory:
    """The paged range as the process under test sees it, `pages` long from BASE."""

    def __init__(self, pages: int, present: frozenset[int]) -> None:
        self.pages = pages
        self.present = present

    def expected(self, page: int) -> bytes:
        return page_content(BASE + page * PAGE_BYTES) if page in self.present else ZERO_PAGE

    def seen(self, page: int, base: int = BASE) -> bytes:
        return ctypes.string_at(base + page * PAGE_BYTES, PAGE_BYTES)

    def check(self, page: int, at: int | None = None) -> None:
        """Page `page` of the image is what lies at `at` (its own address by default)."""
        address = BASE + page * PAGE_BYTES if at is None else at
        seen = ctypes.string_at(address, PAGE_BYTES)
        if seen != self.expected(page):
            what = "zeros" if seen == ZERO_PAGE else f"{seen[:16].hex()}"
            raise AssertionError(f"page {page} at {address:#x} reads {what}")

    def check_all(self, order: list[int] | None = None) -> None:
        for page in range(self.pages) if order is None else order:
            self.check(page)

    def shuffled(self, seed: int = SEED) -> list[int]:
        order = list(range(self.pages))
        random.Random(seed).shuffle(order)
        return order


class Channel:
    """One end of the talk between test and process: whole messages, with a deadline."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def say(self, word: bytes = b".") -> None:
        self.end.send(word)

    def hear(self, timeout_s: float = PATIENCE_S) -> bytes:
        if self.silent(timeout_s):
            raise TimeoutError("the other side said nothing")
        return self.end.recv(65536)

    def become_standard(self) -> None:
        """Make this end standard input and output."""
        os.dup2(self.end.fileno(), 0)
        os.dup2(self.end.fileno(), 1)

    def silent(self, for_s: float) -> bool:
        return not select.select([self.end], [], [], for_s)[0]


Script = Callable[[Memory, Channel], None]


class Paged:
    """A real process whose memory is paged; `script` runs in it once the pager serves."""

    def __init__(
        self,
        folder: Path,
        script: Script,
        *,
        pages: int,
        holes: bool,
        window_pages: int,
        harbour: bool,
    ) -> None:
        self.harbour = harbour
        picture = random.Random(SEED * 7919 + pages)
        present = frozenset(
            page
            for page in range(pages)
            if not holes or (picture.random() < 0.8 and page % 300 < 260)
        )
        self.memory = Memory(pages, present)
        self.store = folder
        windows: dict[int, int] = {}
        for page in present:
            at = page // window_pages
            address = BASE + at * window_pages * PAGE_BYTES
            windows[address] = windows.get(address, 0) | 1 << page % window_pages
        self.image = FileImage.write(folder / "image", windows, window_pages)
        self.pager_pid = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                status = self._be(script, Channel(theirs))
            finally:
                os._exit(status)
        theirs.close()
        self.channel = Channel(ours)
        self.pidfd = os.pidfd_open(self.pid)
        assert self.channel.hear() == b"registered"
        self.uffd = take_descriptor(self.pidfd, UFFD_NUMBER)

    def _be(self, script: Script, channel: Channel) -> int:
        """The process under test: registers its memory and runs the script when told."""
        length = self.memory.pages * PAGE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
        assert libc.mmap(BASE, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == BASE
        fd = kernel.create()
        os.dup2(fd, UFFD_NUMBER, inheritable=False)
        os.close(fd)
        if self.harbour:
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for end, number in zip(ends, HARBOUR_NUMBERS, strict=True):
                os.dup2(end.fileno(), number, inheritable=False)
                end.close()
        kernel.enable(UFFD_NUMBER)
        kernel.register(UFFD_NUMBER, BASE, length)
        channel.say(b"registered")
        channel.hear()
        try:
            script(self.memory, channel)
        except BaseException:
            channel.say(traceback.format_exc().encode())
            return 1
        channel.say(b"done")
        return 0

    def plan(self) -> Plan:
        end = BASE + self.memory.pages * PAGE_BYTES
        return Plan(
            self.pid,
            proc.start_time(self.pid),
            UFFD_NUMBER,
            str(self.store),
            "image",
            [(BASE, end)],
            harbour_numbers=HARBOUR_NUMBERS if self.harbour else None,
        )

    def page(self) -> None:
        """Start the pager, drop our own descriptor of the memory, let the process run."""
        self.pager_pid = start_pager(
            self.plan(), self.uffd, self.pidfd, self.image, open_image=open_file_image
        )
        os.close(self.uffd)
        self.uffd = -1
        self.channel.say()

    def away(self, away: bool) -> None:
        """Take the store away, or bring it back."""
        mark = self.store / "image.away"
        if away:
            mark.touch()
        else:
            mark.unlink()

    def kill(self, who: str, *, resume: bool = True) -> None:
        """kill -9 the `pager`, its `keeper`, or `both`, and wait until they are dead.

        After both, take over.
        """
        if who == "none":
            return
        pager, keeper = self.lzy_pids()
        # The pager first: a keeper that dies first could be replaced before its pager is killed.
        victims = {"pager": [pager], "keeper": [keeper], "both": [keeper, pager]}[who]
        ends = []
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                ends.append(os.pidfd_open(pid))
                signal.pidfd_send_signal(ends[-1], signal.SIGSTOP)
        for end in ends:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(end, signal.SIGKILL)
        for end in ends:
            assert select.select([end], [], [], PATIENCE_S)[0]
            os.close(end)
        if who == "both" and resume:
            resumed = resume_pager(self.pid, open_image=open_file_image)
            assert list(resumed) == [self.pid]

    def kill_a_reader(self) -> None:
        """kill -9 one of those who read ahead, if there is one."""
        pager = self.lzy_pids()[0] if self.lzy_pids() else 0
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{pager}/task/{pager}/children").read_text().split()
            names = {int(pid): Path(f"/proc/{pid}/comm").read_text() for pid in children}
            victims = [pid for pid, name in names.items() if name == "lzy-reader\n"]
            if victims:
                os.kill(victims[0], signal.SIGKILL)

    def hear(self) -> bytes:
        """What the script says next; with the pager's log when it says nothing."""
        try:
            return self.channel.hear()
        except TimeoutError as error:
            raise TimeoutError(self.describe()) from error

    def expect_done(self) -> None:
        """The script has ended without an error."""
        heard = self.hear()
        assert heard == b"done", heard.decode()

    @property
    def journal(self) -> Path:
        return journal_path(run_directory(), self.pid)

    def lzy_pids(self) -> list[int]:
        """Pager and keeper as the journal names them."""
        try:
            status = read_status(self.journal)[1]
        except NotFound:
            return []
        return [pid for pid in (status.pager_pid, status.keeper_pid) if pid]

    def expect_pager_gone(self) -> None:
        """Pager and keeper end by themselves and leave nothing in the run directory."""
        deadline = time.monotonic() + PATIENCE_S
        while list(run_directory().iterdir()):
            assert time.monotonic() < deadline, self.describe()
            time.sleep(0.01)

    def await_harbour(self, children: int) -> None:
        """The userfaultfds of so many forked children lie in the process's own socket.

        The pager puts them there right after the message of the fork, which lets the fork go on.
        """
        ends = [take_descriptor(self.pidfd, number) for number in HARBOUR_NUMBERS]
        with contextlib.closing(Harbour(*ends)) as harbour:
            deadline = time.monotonic() + PATIENCE_S
            found: dict[int, int] = {}
            while len(found) != children:
                assert time.monotonic() < deadline, f"{found} instead of {children} children"
                found = harbour.look()
                for fd in found.values():
                    os.close(fd)
        for end in ends:
            os.close(end)

    def describe(self) -> str:
        text = log_path(self.journal)
        return f"{list_pagers()} {text.read_text() if text.exists() else ''}"

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        deadline = time.monotonic() + 5
        while run_directory().exists() and any(report.alive for report in list_pagers()):
            if time.monotonic() > deadline:
                for pid in self.lzy_pids()[::-1]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.channel.end.close()
        for fd in (self.pidfd, self.uffd):
            if fd >= 0:
                os.close(fd)
        self.image.close()


MakePaged = Callable[..., Paged]


@pytest.fixture
def paged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePaged]:
    """Makes paged processes, and ends them."""
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    made: list[Paged] = []

    def make(
        script: Script,
        *,
        pages: int = 2048,
        holes: bool = True,
        window_pages: int = 16,
        harbour: bool = True,
    ) -> Paged:
        folder = tmp_path / f"store{len(made)}"
        folder.mkdir()
        process = Paged(
            folder,
            script,
            pages=pages,
            holes=holes,
            window_pages=window_pages,
            harbour=harbour,
        )
        made.append(process)
        return process

    yield make
    for process in made:
        process.close()


def test_every_byte_arrives_whatever_is_touched_first(paged: MakePaged) -> None:
    """Random touches while the rest streams in: all pages, stored or zero, are as in the image."""

    def script(memory: Memory, channel: Channel) -> None:
        memory.check_all(memory.shuffled())
        channel.hear()
        memory.check_all()

    process = paged(script)
    process.page()
    process.expect_pager_gone()
    process.channel.say()
    process.expect_done()


def test_the_pager_leaves_no_trace(paged: MakePaged) -> None:
    """When all is in, nothing is registered, the descriptor is closed, files and pagers gone."""

    def script(memory: Memory, channel: Channel) -> None:
        channel.hear()
        for number in (UFFD_NUMBER, *HARBOUR_NUMBERS):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(number)
        memory.check_all()

    process = paged(script)
    process.page()
    ends = [os.pidfd_open(pid) for pid in process.lzy_pids()]
    process.expect_pager_gone()
    for end in ends:
        assert select.select([end], [], [], PATIENCE_S)[0]
        os.close(end)
    assert "um" not in {
        flag for vma in proc.mappings(process.pid) if vma.start >= BASE for flag in vma.flags
    }
    process.channel.say()
    process.expect_done()


@pytest.mark.parametrize("heard_of", [False, True])
def test_what_goes_later_is_not_forgotten(paged: MakePaged, heard_of: bool) -> None:
    """Pages that a pager knows of, but that go only after it has served their neighbours.

    So a process goes to doze, a slice at a time: what is still there when the pager brings in a
    cluster of pages around a fault is asked for later.
    """
    later = range(4, 12)

    def script(memory: Memory, channel: Channel) -> None:
        start, length = page_at(later.start), len(later) * PAGE_BYTES
        content = b"".join(map(memory.expected, later))
        kernel.unregister(UFFD_NUMBER, start, length)
        ctypes.memmove(start, content, length)
        if heard_of:
            kernel.register(UFFD_NUMBER, start, length)
        channel.say(b"there")
        channel.hear()
        memory.check_all([0, 15])  # on both sides of what is there
        kernel.unregister(UFFD_NUMBER, start, length)
        libc.madvise(start, length, mmap.MADV_DONTNEED)
        kernel.register(UFFD_NUMBER, start, length)
        memory.check_all(list(later))

    process = paged(script, holes=False)
    process.channel.say()
    assert process.channel.hear() == b"there"
    plan = process.plan()._replace(on_demand=True)
    start_pager(plan, process.uffd, process.pidfd, process.image, open_image=open_file_image)
    process.channel.say()
    process.expect_done()


def memory_equals(address: int, content: bytes) -> bool:
    """Compare without holding the GIL, so that one thread's fault does not stop the others."""
    return bool(libc.memcmp(address, content, len(content)) == 0)


def page_at(page: int) -> int:
    return BASE + page * PAGE_BYTES


ELSEWHERE = BASE + (1 << 40)
FIRST, LAST = 100, 300  # what the scripts below change; neither is a multiple of a window


def remove(memory: Memory) -> Callable[[], None]:
    """madvise(MADV_DONTNEED): the range reads zeros, all else is as in the image."""
    assert libc.madvise(page_at(FIRST), (LAST - FIRST) * PAGE_BYTES, mmap.MADV_DONTNEED) == 0

    def check() -> None:
        for page in memory.shuffled():
            if FIRST <= page < LAST:
                assert memory.seen(page) == ZERO_PAGE, page
            else:
                memory.check(page)

    return check


def unmap(memory: Memory) -> Callable[[], None]:
    """munmap, and new memory in its place: zeros."""
    length = (LAST - FIRST) * PAGE_BYTES
    assert libc.munmap(page_at(FIRST), length) == 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000
    assert libc.mmap(page_at(FIRST), length, mmap.PROT_READ, flags, -1, 0) == page_at(FIRST)
    return lambda: _check_split(memory, lambda page: None)


def move(memory: Memory) -> Callable[[], None]:
    """mremap to elsewhere, with twice the size: content there, zeros in what it grew by."""
    length = (LAST - FIRST) * PAGE_BYTES
    flags = FIXED | MAYMOVE
    assert libc.mremap(page_at(FIRST), length, 2 * length, flags, ELSEWHERE) == ELSEWHERE

    def check() -> None:
        _check_split(memory, lambda page: ELSEWHERE + (page - FIRST) * PAGE_BYTES)
        assert memory_equals(ELSEWHERE + length, bytes(length))

    return check


def move_over(memory: Memory) -> Callable[[], None]:
    """mremap onto other paged memory, which is unmapped by that; then part of it on and back."""
    length = (LAST - FIRST) * PAGE_BYTES
    target = page_at(1000)
    flags = FIXED | MAYMOVE
    assert libc.mremap(page_at(FIRST), length, length, flags, target) == target
    part = target + 10 * PAGE_BYTES
    for source, goal in ((part, ELSEWHERE), (ELSEWHERE, part)):
        assert libc.mremap(source, 50 * PAGE_BYTES, 50 * PAGE_BYTES, flags, goal) == goal

    def check() -> None:
        for page in memory.shuffled():
            if FIRST <= page < LAST:
                memory.check(page, target + (page - FIRST) * PAGE_BYTES)
            elif not 1000 <= page < 1000 + LAST - FIRST:
                memory.check(page)

    return check


def move_but_keep(memory: Memory) -> Callable[[], None]:
    """mremap with MREMAP_DONTUNMAP: content elsewhere, zeros where it was."""
    length = (LAST - FIRST) * PAGE_BYTES
    flags = FIXED | MAYMOVE | DONTUNMAP
    assert libc.mremap(page_at(FIRST), length, length, flags, ELSEWHERE) == ELSEWHERE

    def check() -> None:
        _check_split(memory, lambda page: ELSEWHERE + (page - FIRST) * PAGE_BYTES)
        assert memory_equals(page_at(FIRST), bytes(length))

    return check


def protect(memory: Memory) -> Callable[[], None]:
    """mprotect splits the mapping in the middle of windows; every byte arrives all the same."""
    for first in range(FIRST, LAST, 7):
        assert libc.mprotect(page_at(first), 3 * PAGE_BYTES, mmap.PROT_READ) == 0
    return lambda: memory.check_all(memory.shuffled())


def fork_reader(memory: Memory) -> Callable[[], None]:
    """A forked child that looks at all of the memory when it is told to."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(writing)
            os.read(reading, 1)
            memory.check_all(memory.shuffled(SEED + 1))
            status = 0
        except AssertionError:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(reading)

    def check() -> None:
        os.write(writing, b".")
        assert os.waitpid(child, 0)[1] == 0, "the forked child saw something else"

    return check


def fork(memory: Memory) -> Callable[[], None]:
    """fork: the child has all of it too, whatever becomes of the parent's."""
    check_child = fork_reader(memory)
    assert libc.madvise(page_at(FIRST), (LAST - FIRST) * PAGE_BYTES, mmap.MADV_DONTNEED) == 0

    def check() -> None:
        for page in memory.shuffled():
            if FIRST <= page < LAST:
                assert memory.seen(page) == ZERO_PAGE
            else:
                memory.check(page)
        check_child()

    return check


def write(memory: Memory) -> Callable[[], None]:
    """What the process writes is never written over, whenever the rest arrives."""
    for page in range(0, memory.pages, 3):
        ctypes.memset(page_at(page) + 100, 0xAB, 50)

    def check() -> None:
        for page in memory.shuffled():
            expected = bytearray(memory.expected(page))
            if page % 3 == 0:
                expected[100:150] = b"\xab" * 50
            assert memory.seen(page) == expected

    return check


def _check_split(memory: Memory, place: Callable[[int], int | None]) -> None:
    """The changed range lies at `place(page)`, if anywhere; all else where it was."""
    for page in memory.shuffled():
        if not FIRST <= page < LAST:
            memory.check(page)
        elif (at := place(page)) is not None:
            memory.check(page, at)


CHANGES = [remove, unmap, move, move_over, move_but_keep, protect, fork]


@pytest.mark.parametrize(
    ("change", "victim"),
    [
        pytest.param(change, victim, id=f"{change.__name__}-{victim}")
        for change in CHANGES
        for victim in ("none", "pager", "keeper", "both")
    ],
)
def test_a_change_of_layout_outlives_the_pager(
    paged: MakePaged, change: Callable[[Memory], Callable[[], None]], victim: str
) -> None:
    """Nothing is loaded yet, the process changes its layout, lzy is killed: all bytes right."""

    def script(memory: Memory, channel: Channel) -> None:
        check = change(memory)
        channel.say(b"changed")
        channel.hear()
        check()

    process = paged(script)
    process.away(True)
    process.page()
    assert process.channel.hear() == b"changed"
    if change is fork:
        process.await_harbour(1)
    process.kill(victim)
    process.away(False)
    process.channel.say()
    process.expect_done()


@pytest.mark.parametrize("change", [*CHANGES, write], ids=lambda change: change.__name__)
def test_a_change_of_layout_in_the_middle_of_loading(
    paged: MakePaged, change: Callable[[Memory], Callable[[], None]]
) -> None:
    """The process changes its layout while pages stream in: all bytes right."""

    def script(memory: Memory, channel: Channel) -> None:
        memory.check_all(memory.shuffled()[:20])
        change(memory)()

    process = paged(script)
    process.page()
    process.expect_done()


@pytest.mark.parametrize("victim", ["pager", "keeper", "both"])
def test_kill_9_at_random_moments(
    paged: MakePaged, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pager, keeper or both are killed again and again while the process reads everything."""
    monkeypatch.setattr(FileImage, "pause_s", 0.001)

    def script(memory: Memory, channel: Channel) -> None:
        for page in memory.shuffled():
            memory.check(page)
            if page % 16 == 0:
                libc.madvise(page_at(page), PAGE_BYTES, mmap.MADV_DONTNEED)
                assert memory.seen(page) == ZERO_PAGE

    process = paged(script, pages=4096)
    process.page()
    moments = random.Random(SEED)
    for _ in range(6):
        time.sleep(moments.random() * 0.04)
        try:
            process.kill(victim)
        except (NotFound, ValueError):
            break  # it was done before we came
    process.expect_done()
    process.expect_pager_gone()


_RUN_PAGES = 24  # no multiple of a window


class Shuffle:
    """What a process sees that moves its memory about: runs of pages, each with what it holds.

    Every page of a run is one of the image (its number), zeros (-1) or as it was written (-2).
    """

    def __init__(self, memory: Memory, seed: int) -> None:
        self.memory, self.chance = memory, random.Random(seed)
        pages = range(memory.pages // _RUN_PAGES * _RUN_PAGES)
        self.runs = [list(pages[at : at + _RUN_PAGES]) for at in pages[::_RUN_PAGES]]
        self.length = _RUN_PAGES * PAGE_BYTES

    def at(self, run: int, page: int = 0) -> int:
        return BASE + run * self.length + page * PAGE_BYTES

    def swap(self) -> None:
        """Two runs change places by mremap(2)."""
        one, other = self.chance.sample(range(len(self.runs)), 2)
        ways = (
            (self.at(one), ELSEWHERE),
            (self.at(other), self.at(one)),
            (ELSEWHERE, self.at(other)),
        )
        for source, target in ways:
            moved = libc.mremap(source, self.length, self.length, FIXED | MAYMOVE, target)
            assert moved == target, os.strerror(ctypes.get_errno())
        self.runs[one], self.runs[other] = self.runs[other], self.runs[one]

    def remove(self) -> None:
        run = self.chance.randrange(len(self.runs))
        first = self.chance.randrange(_RUN_PAGES)
        last = self.chance.randint(first + 1, _RUN_PAGES)
        length = (last - first) * PAGE_BYTES
        assert libc.madvise(self.at(run, first), length, mmap.MADV_DONTNEED) == 0
        self.runs[run][first:last] = [-1] * (last - first)

    def replace(self) -> None:
        """munmap(2), and new memory in its place."""
        run = self.chance.randrange(len(self.runs))
        assert libc.munmap(self.at(run), self.length) == 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mmap(self.at(run), self.length, protection, flags, -1, 0) == self.at(run)
        self.runs[run] = [-1] * _RUN_PAGES

    def write(self) -> None:
        run, page = self.chance.randrange(len(self.runs)), self.chance.randrange(_RUN_PAGES)
        ctypes.memset(self.at(run, page), 0xAB, PAGE_BYTES)
        self.runs[run][page] = -2

    def fork(self) -> None:
        """A child that looks at some of it, and goes."""
        child = os.fork()
        if child == 0:
            try:
                self.look(200)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, "the forked child saw something else"

    def look(self, pages: int) -> None:
        for _ in range(pages):
            self.check(self.chance.randrange(len(self.runs)), self.chance.randrange(_RUN_PAGES))

    def check(self, run: int, page: int) -> None:
        held, at = self.runs[run][page], self.at(run, page)
        if held >= 0:
            self.memory.check(held, at)
        else:
            expected = ZERO_PAGE if held == -1 else b"\xab" * PAGE_BYTES
            seen = ctypes.string_at(at, PAGE_BYTES)
            assert seen == expected, f"{at:#x} reads {seen[:16].hex()} instead of {held}"


def move_about(seed: int, deeds: int, *, forks: bool) -> Script:
    """Change the layout so often, look at some pages in between and at all of them at the end."""

    def script(memory: Memory, channel: Channel) -> None:
        shuffle = Shuffle(memory, seed)
        ways = [shuffle.swap, shuffle.remove, shuffle.replace, shuffle.write]
        for number in range(deeds):
            shuffle.chance.choices(ways, [6, 1, 1, 1])[0]()
            shuffle.look(3)
            if forks and number % 40 == 0:
                shuffle.fork()
        for run in range(len(shuffle.runs)):
            for page in range(_RUN_PAGES):
                shuffle.check(run, page)

    return script


# Forked children whose message was read but not yet kept are lost with both (docs/pager.md).
@pytest.mark.parametrize(
    ("victim", "forks"),
    [(victim, False) for victim in ("none", "reader", "pager", "keeper", "both")]
    + [(victim, True) for victim in ("none", "reader", "pager", "keeper")],
)
def test_memory_that_is_moved_about_while_readers_install_it(
    paged: MakePaged, victim: str, forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved, dropped, replaced, written, forked while it comes in, and lzy is killed: all right."""
    monkeypatch.setattr(FileImage, "pause_s", 0.0005)
    seed = SEED * 31 + forks

    process = paged(move_about(seed, 200, forks=forks), pages=256 * _RUN_PAGES)
    process.page()
    moments = random.Random(seed)
    for _ in range(0 if victim == "none" else 5):
        time.sleep(moments.random() * 0.04)
        try:
            if victim == "reader":
                process.kill_a_reader()
            else:
                process.kill(victim)
        except (NotFound, ValueError):
            break  # it was done before we came
    process.expect_done()
    process.expect_pager_gone()


def test_many_threads_fault_at_once(paged: MakePaged) -> None:
    """Eight threads read the same pages in different orders: all right, none left waiting."""

    def script(memory: Memory, channel: Channel) -> None:
        wrong: list[int] = []

        def read(seed: int) -> None:
            for page in memory.shuffled(seed):
                if not memory_equals(page_at(page), memory.expected(page)):
                    wrong.append(page)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    process = paged(script)
    process.page()
    process.expect_done()


def test_faults_inside_system_calls(paged: MakePaged) -> None:
    """write(2) from memory that is not there yet sends the image's bytes; read(2) into it stays."""

    def script(memory: Memory, channel: Channel) -> None:
        reading, writing = os.pipe()
        for page in memory.shuffled()[:200]:
            view = (ctypes.c_char * PAGE_BYTES).from_address(page_at(page))
            os.write(writing, view)
            assert os.read(reading, PAGE_BYTES) == memory.expected(page)
        other = (ctypes.c_char * 16).from_address(page_at(1) + 8)
        os.write(writing, b"x" * 16)
        os.readv(reading, [other])
        expected = bytearray(memory.expected(1))
        expected[8:24] = b"x" * 16
        assert memory.seen(1) == expected

    process = paged(script)
    process.page()
    process.expect_done()


def test_forked_children_end_as_they_like(paged: MakePaged) -> None:
    """Children that exit at once, call execve, or fork on; the parent loses nothing."""

    def script(memory: Memory, channel: Channel) -> None:
        pids = []
        for number in range(6):
            pid = os.fork()
            if pid == 0:
                try:
                    if number % 3 == 0:
                        os._exit(0)
                    if number % 3 == 1:
                        os.execv("/bin/true", ["true"])
                    grandchild = os.fork()
                    memory.check_all(memory.shuffled(number))
                    if grandchild:
                        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
                    os._exit(0)
                finally:
                    os._exit(1)
            pids.append(pid)
        memory.check_all(memory.shuffled())
        for pid in pids:
            assert os.waitpid(pid, 0)[1] == 0

    process = paged(script)
    process.page()
    process.expect_done()
    process.expect_pager_gone()


def test_lost_children_do_not_keep_the_process_waiting(paged: MakePaged) -> None:
    """Without a harbour, pager and keeper die while forked children lack memory: it goes on."""

    def script(memory: Memory, channel: Channel) -> None:
        reading, writing = os.pipe()
        children = [pid for _ in range(3) if (pid := os.fork())]
        if len(children) < 3:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        channel.say(b"forked")
        channel.hear()
        memory.check_all(memory.shuffled())
        os.close(writing)
        for pid in children:
            os.waitpid(pid, 0)

    process = paged(script, harbour=False)
    process.away(True)
    process.page()
    assert process.channel.hear() == b"forked"
    process.kill("both")
    assert "lost" in log_path(process.journal).read_text()
    process.kill("pager")
    process.away(False)
    process.channel.say()
    process.expect_done()
    process.expect_pager_gone()


def test_forked_children_outlive_every_pager(paged: MakePaged) -> None:
    """Children forked at different times; all of lzy dies, again and again: all bytes right."""

    def script(memory: Memory, channel: Channel) -> None:
        reading, writing = os.pipe()
        children: list[int] = []
        for number in range(5):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    os.close(writing)
                    os.read(reading, 1)
                    if number == 3:
                        os._exit(0)
                    if number == 4 and (grandchild := os.fork()):
                        os.waitpid(grandchild, 0)
                    memory.check_all(memory.shuffled(number))
                    status = 0
                finally:
                    os._exit(status)
            children.append(pid)
            channel.say(b"forked")
            channel.hear()
        os.close(writing)
        memory.check_all(memory.shuffled())
        for pid in children:
            assert os.waitpid(pid, 0)[1] == 0

    process = paged(script)
    process.away(True)
    process.page()
    for turn in range(5):
        assert process.channel.hear() == b"forked"
        process.await_harbour(turn + 1)
        process.kill(("both", "pager", "both", "keeper", "both")[turn])
        process.channel.say()
    process.away(False)
    process.kill("both")
    process.expect_done()
    process.expect_pager_gone()


def test_a_forked_child_outlives_the_process(paged: MakePaged) -> None:
    """The process forks and ends, as daemons do: its child still gets its memory."""

    def script(memory: Memory, channel: Channel) -> None:
        if os.fork():
            os._exit(0)
        channel.hear()
        memory.check_all(memory.shuffled())

    process = paged(script)
    process.away(True)
    process.page()
    os.waitpid(process.pid, 0)
    process.away(False)
    process.channel.say()
    process.expect_done()
    process.expect_pager_gone()


def test_execve_ends_the_paging(paged: MakePaged) -> None:
    """After execve there is nothing to page: the pager leaves, the new program is not touched."""

    def script(memory: Memory, channel: Channel) -> None:
        memory.check_all(memory.shuffled()[:10])
        channel.become_standard()
        os.execv("/bin/cat", ["cat"])

    process = paged(script, pages=8192)
    process.page()
    process.expect_pager_gone()
    process.channel.say(b"still there")
    assert process.channel.hear() == b"still there"


def test_the_pager_leaves_when_the_process_is_killed(paged: MakePaged) -> None:
    """kill -9 of a process that waits for a page: pager and keeper end, files are removed."""

    def script(memory: Memory, channel: Channel) -> None:
        memory.check_all()

    process = paged(script)
    process.away(True)
    process.page()
    pagers = [os.pidfd_open(pid) for pid in process.lzy_pids()]
    os.kill(process.pid, signal.SIGKILL)
    process.expect_pager_gone()
    for end in pagers:
        assert select.select([end], [], [], PATIENCE_S)[0]
        os.close(end)


@pytest.mark.parametrize("harm", ["away", "truncated", "damaged"])
def test_what_cannot_be_read_stalls_and_goes_on_once_it_can(paged: MakePaged, harm: str) -> None:
    """No zeros and no wrong bytes: the fault waits until the store is whole, others go on."""
    whole = 64  # the first pages stay readable unless all is away

    def script(memory: Memory, channel: Channel) -> None:
        def read() -> None:
            good = memory_equals(page_at(memory.pages - 1), memory.expected(memory.pages - 1))
            channel.say(b"right" if good else b"wrong")

        reader = threading.Thread(target=read)
        reader.start()
        if harm != "away":
            memory.check_all(list(range(whole)))
            channel.say(b"others")
        reader.join()
        channel.hear()
        memory.check_all()

    process = paged(script, holes=False)
    file = process.store / "image"
    content = file.read_bytes()
    if harm == "away":
        process.away(True)
    elif harm == "truncated":
        os.truncate(file, whole * PAGE_BYTES)
    else:
        with open(file, "r+b") as spoilt:
            spoilt.seek(len(content) - 5000)
            spoilt.write(b"!")
    process.page()
    if harm != "away":
        assert process.channel.hear() == b"others"
    assert process.channel.silent(0.3)
    deadline = time.monotonic() + PATIENCE_S
    while not (reports := list_pagers())[0].status.message:  # a busy machine lets it wait
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [(report.pid, report.alive) for report in reports] == [(process.pid, True)]
    assert "trying again" in log_path(process.journal).read_text()
    if harm == "away":
        process.away(False)
    else:  # a whole file comes in place of the bad one, as a person would repair it
        (process.store / "new").write_bytes(content)
        os.rename(process.store / "new", file)
    assert process.channel.hear() == b"right"
    process.channel.say()
    process.expect_done()
    process.expect_pager_gone()


def test_only_one_pager_serves_a_process(paged: MakePaged) -> None:
    """A second pager is refused, whoever asks for it."""

    def script(memory: Memory, channel: Channel) -> None:
        channel.hear()

    process = paged(script)
    process.away(True)
    uffd = os.dup(process.uffd)
    process.page()
    with pytest.raises(Busy):
        resume_pager(process.pid, open_image=open_file_image)
    with pytest.raises(Busy):
        start_pager(process.plan(), uffd, process.pidfd, process.image)
    os.close(uffd)
    assert resume_pager(open_image=open_file_image) == {}
    process.channel.say()
    process.expect_done()


def test_nothing_to_resume(paged: MakePaged) -> None:
    """A process without a journal is NotFound; a journal whose process is gone is removed."""

    def script(memory: Memory, channel: Channel) -> None:
        channel.hear()

    process = paged(script)
    with pytest.raises(NotFound):
        resume_pager(process.pid)
    process.away(True)
    process.page()
    os.kill(process.pid, signal.SIGSTOP)
    journal, log = process.journal.read_bytes(), process.journal.with_suffix(".log")
    os.kill(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)
    process.expect_pager_gone()
    process.journal.write_bytes(journal)
    log.touch()
    assert resume_pager() == {}
    assert list(run_directory().iterdir()) == []


@pytest.mark.parametrize("victim", ["none", "both"])
def test_the_journal_stays_small(paged: MakePaged, victim: str) -> None:
    """Far more events than it has room for: it is written anew, and still right afterwards."""

    def script(memory: Memory, channel: Channel) -> None:
        for turn in range(25):
            for page in range(turn % 2, memory.pages, 2):
                if page % 4 != 3:
                    libc.madvise(page_at(page), PAGE_BYTES, mmap.MADV_DONTNEED)
        channel.say(b"removed")
        channel.hear()
        for page in memory.shuffled():
            if page % 4 != 3:
                assert memory.seen(page) == ZERO_PAGE
            else:
                memory.check(page)

    process = paged(script)
    process.away(True)
    process.page()
    assert process.channel.hear() == b"removed"
    assert process.journal.stat().st_size < 4 << 20
    process.kill(victim)
    process.away(False)
    process.channel.say()
    process.expect_done()


def test_a_pager_that_follows_another_writes_the_journal_anew(paged: MakePaged) -> None:
    """What it closes then is its own: no forked child's userfaultfd is among it."""

    def script(memory: Memory, channel: Channel) -> None:
        channel.hear()
        checks = [fork_reader(memory) for _ in range(12)]
        for _ in range(10000):  # twice what there is room for
            libc.madvise(page_at(FIRST), PAGE_BYTES, mmap.MADV_DONTNEED)
        channel.say(b"changed")
        for check in checks:
            check()

    process = paged(script)
    process.away(True)
    process.page()
    process.kill("pager")
    deadline = time.monotonic() + PATIENCE_S
    while process.lzy_pids()[0] == process.pager_pid:
        assert time.monotonic() < deadline, process.describe()
    process.channel.say()
    assert process.hear() == b"changed"
    process.away(False)
    process.expect_done()


def test_the_pager_serves_though_its_starter_was_killed(paged: MakePaged) -> None:
    """Nobody is there any more to hear that it serves: that is no reason to end."""
    ready, go = os.pipe()

    class SlowToOpen(FileImage):
        def space_extent(self, space: int) -> tuple[int, int]:
            os.read(ready, 1)
            return super().space_extent(space)

        def descriptors(self) -> list[int]:
            return [*super().descriptors(), ready]

    process = paged(lambda memory, channel: memory.check_all(memory.shuffled()))
    image = SlowToOpen(process.image.path)
    starter = os.fork()
    if starter == 0:
        begin_pager(process.plan(), process.uffd, process.pidfd, image, open_image=open_file_image)
        os._exit(0)
    os.close(ready)
    os.waitpid(starter, 0)
    log = log_path(process.journal)
    assert log.read_text() == ""
    os.write(go, bytes(8))
    os.close(go)
    image.close()
    end = os.open(log, os.O_RDONLY)
    os.close(process.uffd)
    process.uffd = -1
    process.channel.say()
    process.expect_done()
    process.expect_pager_gone()
    assert os.read(end, 1000) == b"", "a second pager was needed"
    os.close(end)


@pytest.mark.parametrize("victim", ["none", "keeper", "pager"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_layout_waits_for_a_pager(
    paged: MakePaged, change: Callable[[Memory], Callable[[], None]], victim: str
) -> None:
    """Nobody serves while the process changes its layout: it waits, and then all is right."""

    def script(memory: Memory, channel: Channel) -> None:
        channel.hear()
        change(memory)()

    process = paged(script)
    process.away(True)
    process.page()
    process.kill("both", resume=False)
    process.channel.say()
    assert process.channel.silent(0.02)
    resume_pager(process.pid, open_image=open_file_image)
    process.kill(victim)  # before there is anything to serve, or it might have left
    process.away(False)
    process.expect_done()


def test_what_a_pager_cannot_close_goes_later(paged: MakePaged) -> None:
    """Its descriptors stay, noted by number and inode; a dump closes them, and no others."""

    def script(memory: Memory, channel: Channel) -> None:
        memory.check_all()
        channel.hear()

    process = paged(script)
    start_pager(
        process.plan(),
        process.uffd,
        process.pidfd,
        process.image,
        open_image=open_file_image,
        close_descriptor=lambda pid, number: -errno.ETIMEDOUT,
    )
    os.close(process.uffd)
    process.uffd = -1
    process.channel.say()
    deadline = time.monotonic() + PATIENCE_S
    while process.journal.exists():
        assert time.monotonic() < deadline, process.describe()
        time.sleep(0.01)
    folder = Path(f"/proc/{process.pid}/fd")
    ours = {str(number) for number in (UFFD_NUMBER, *HARBOUR_NUMBERS)}
    before = set(os.listdir(folder))
    assert ours <= before
    close_unfinished(process.pid)
    assert set(os.listdir(folder)) == before - ours
    assert not list(run_directory().glob("*.unfinished"))
    process.channel.say()
    process.expect_done()


def test_pager_waits_for_who_traces_the_process(paged: MakePaged) -> None:
    """All is in before a restore has let go of the process: what is the pager's is closed then."""

    def script(memory: Memory, channel: Channel) -> None:
        memory.check_all()
        channel.hear()

    process = paged(script)
    with stopped(process.pid):
        process.page()
        deadline = time.monotonic() + PATIENCE_S
        while read_status(process.journal)[1].phase != CLOSING:
            assert time.monotonic() < deadline, process.describe()
            time.sleep(0.01)
        assert process.channel.silent(0.2)
        assert process.lzy_pids()
    process.expect_pager_gone()
    process.channel.say()
    process.expect_done()


@pytest.mark.parametrize("stage", ["serving", "loaded", "unregistered", "closed"])
def test_killed_at_each_stage_of_its_own(
    paged: MakePaged, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pager kills itself at a stage: the next one ends the work, and no trace stays."""
    monkeypatch.setattr(stages, "_KILL_AT", f"pager.{stage}")

    def script(memory: Memory, channel: Channel) -> None:
        memory.check_all(memory.shuffled())
        channel.hear()
        for number in (UFFD_NUMBER, *HARBOUR_NUMBERS):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(number)
        memory.check_all()

    process = paged(script)
    process.page()
    with contextlib.suppress(ProcessLookupError):  # it has killed itself already
        end = os.pidfd_open(process.pager_pid)
        assert select.select([end], [], [], PATIENCE_S)[0]
        os.close(end)
    process.expect_pager_gone()
    process.channel.say()
    process.expect_done()
