"""The pager against real processes that register their own memory and prove what they see."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from lzy.checkpoint import proc
from lzy.checkpoint.errors import Damaged, NotFound, StoreUnavailable
from lzy.checkpoint.home import run_directory
from lzy.checkpoint.journal import journal_path, read_status
from lzy.checkpoint.linux import PAGE_BYTES, libc
from lzy.checkpoint.linux import uffd as kernel
from lzy.checkpoint.linux.detached import take_descriptor
from lzy.checkpoint.pager import Plan, list_pagers, log_path, start_pager

BASE = 0x6000_0000_0000
UFFD_NUMBER = 1000
PATIENCE_S = 60.0
SEED = int(os.environ.get("LZY_TEST_SEED", "1"))

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
FIXED, MAYMOVE, DONTUNMAP = 2, 1, 4
ZERO_PAGE = bytes(PAGE_BYTES)


def page_content(address: int) -> bytes:
    """What the image has at `address`: never zero, different for each page."""
    return struct.pack("<QQ", address, ~address & 0xFFFFFFFFFFFFFFFF) * (PAGE_BYTES // 16)


class FileImage:
    """The image protocol over one file of chunks, authenticated; the file may be spoilt."""

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
    """One end of the talk between test and process: bytes with a deadline."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading = reading
        self._writing = writing

    def say(self, word: bytes = b".") -> None:
        os.write(self._writing, word)

    def hear(self, timeout_s: float = PATIENCE_S) -> bytes:
        if not select.select([self._reading], [], [], timeout_s)[0]:
            raise TimeoutError("the other side said nothing")
        return os.read(self._reading, 65536)

    def silent(self, for_s: float) -> bool:
        return not select.select([self._reading], [], [], for_s)[0]


Script = Callable[[Memory, Channel], None]


class Paged:
    """A real process whose memory is paged; `script` runs in it once the pager serves."""

    def __init__(
        self, folder: Path, script: Script, *, pages: int, holes: bool, window_pages: int
    ) -> None:
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
        down, up = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                status = self._be(script, Channel(down[0], up[1]))
            finally:
                os._exit(status)
        os.close(down[0])
        os.close(up[1])
        self.channel = Channel(up[0], down[1])
        self._ends = (up[0], down[1])
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
        )

    def page(self) -> None:
        """Start the pager, drop our own descriptor of the memory, let the process run."""
        self.pager_pid = start_pager(
            self.plan(), self.uffd, self.pidfd, self.image, open_image=open_file_image
        )
        os.close(self.uffd)
        self.uffd = -1
        self.channel.say()

    def expect_done(self) -> None:
        """The script has ended without an error."""
        heard = self.channel.hear()
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
        for fd in (*self._ends, self.pidfd, self.uffd):
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
        script: Script, *, pages: int = 2048, holes: bool = True, window_pages: int = 16
    ) -> Paged:
        folder = tmp_path / f"store{len(made)}"
        folder.mkdir()
        process = Paged(folder, script, pages=pages, holes=holes, window_pages=window_pages)
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
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(UFFD_NUMBER)
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
