"""A tree of processes: its memory is the same byte for byte, shared where it was, in any order."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lzy.checkpoint.dump import dump
from lzy.checkpoint.restore import restore
from lzy.checkpoint.store import Store

PAGE = 4096
PATIENCE_S = 30.0
RSEQ_BYTES = 32  # what the kernel writes to a thread's rseq area each time it runs

#: A family made at random from a seed: mappings made, written, moved, protected, given back, with
#: forks in between, so that generations share this and that; some has a name in /dev/shm.
FAMILY = """
import ctypes, mmap, os, random, signal, sys
chance = random.Random(int(sys.argv[1]))
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = 4096
areas = []

def new():
    size = chance.randrange(1, 400) * PAGE
    shared = chance.random() < 0.15
    place = libc.mmap(None, size, 3, (1 if shared else 2) | 32, -1, 0)
    areas.append([place, size, not shared])  # behind the end of shared memory there is none
    if chance.random() < 0.2:
        libc.madvise(place, size, 14)

def from_file():
    file = os.open(sys.argv[2], os.O_RDONLY)
    size = chance.randrange(1, 20) * PAGE
    areas.append([libc.mmap(None, size, 3, 2, file, 0), size, False])
    os.close(file)

def named(root=os.getpid(), count=[0]):
    count[0] += 1
    path = f"/dev/shm/lzy-test-{root}-{os.getpid()}-{count[0]}"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    size = chance.randrange(1, 90) * PAGE
    os.ftruncate(file, size + chance.choice((0, 0, 100, 800 * PAGE)))
    areas.append([libc.mmap(None, size, 3, 1, file, 0), size, False])
    if chance.random() < 0.3:
        areas.append([libc.mmap(None, size, 3, 2, file, 0), size, False])
    if chance.random() < 0.3:
        os.unlink(path)
    if chance.random() < 0.7:
        os.close(file)

def write(area):
    place, size, _ = area
    for _ in range(chance.randrange(1, 40)):
        at = chance.randrange(size)
        length = min(chance.choice((1, 100, 5000, 90000)), size - at)
        fill = chance.randrange(256)
        ctypes.memset(place + at, fill, length)

def move(area):
    size = max(PAGE, area[1] + chance.randrange(-50, 50 if area[2] else 1) * PAGE)
    found = libc.mremap(area[0], area[1], size, 1)
    if found is not None and found != 2**64 - 1:
        area[:2] = [found, size]

def give_back(area):
    at = chance.randrange(area[1] // PAGE)
    libc.madvise(area[0] + at * PAGE, chance.randrange(1, area[1] // PAGE - at + 1) * PAGE, 4)

def cut(area):
    if area[1] > 8 * PAGE:
        half = area[1] // PAGE // 2 * PAGE
        libc.munmap(area[0] + half, area[1] - half)
        area[1] = half

def act():
    deed = chance.choice((new, from_file, named, write, write, write, move, give_back, cut))
    if deed in (new, from_file, named) or not areas:
        (deed if deed in (from_file, named) else new)()
    else:
        deed(chance.choice(areas))

def live(depth):
    for _ in range(chance.randrange(3, 12)):
        act()
    for _ in range(chance.randrange(0, 3) if depth < 3 else 0):
        seed = chance.random()
        if os.fork() == 0:
            chance.seed(seed)
            live(depth + 1)
            while True:
                signal.pause()
        for _ in range(chance.randrange(6)):
            act()

live(0)
while True:
    signal.pause()
"""


def list_tree(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for task in os.listdir(f"/proc/{pid}/task"):
        children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        found += [below for child in map(int, children) for below in list_tree(child)]
    return found


def number_of(pid: int) -> int:
    """The pid as the process itself sees it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    raise AssertionError(pid)


def await_rest(root: int) -> list[int]:
    """Wait until the family is complete: all wait for a signal, twice in a row; stop them."""
    deadline = time.monotonic() + PATIENCE_S
    before: list[int] = []
    while time.monotonic() < deadline:
        tree = list_tree(root)
        states = [Path(f"/proc/{pid}/wchan").read_text() for pid in tree]
        if tree == before and all("pause" in state for state in states):
            for pid in tree:
                os.kill(pid, signal.SIGSTOP)
            return tree
        before = tree
        time.sleep(0.05)
    raise AssertionError(f"they do not come to rest: {states}")


@contextlib.contextmanager
def family(seed: int, folder: Path) -> Iterator[list[int]]:
    """The processes of a family, stopped, the first one first."""
    file = folder / "mapped"
    file.write_bytes(os.urandom(1000 * PAGE))
    command = [sys.executable, "-I", "-c", FAMILY, str(seed), str(file)]
    child = subprocess.Popen(command, start_new_session=True)
    try:
        yield await_rest(child.pid)
    finally:
        for pid in list_tree(child.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()
        for left in Path("/dev/shm").glob(f"lzy-test-{child.pid}-*"):
            left.unlink()


def spans(maps: str) -> list[list[object]]:
    """Where something is mapped, and how; neighbours that are alike joined, as the kernel may."""
    found: list[list[object]] = []
    for line in maps.splitlines():
        span, permissions, _, *_, name = [*line.split(None, 5), ""][:6]
        start, end = (int(address, 16) for address in span.split("-"))
        name = re.split("[/:]", name)[-1]  # shared memory without a name is made again as a memfd
        if found and found[-1][1:] == [start, permissions, name]:
            found[-1][1] = end
        else:
            found.append([start, end, permissions, name])
    return found


def differing_bytes(one: int, other: int) -> tuple[int, list[str]]:
    """How many bytes of memory differ, and where; of mappings that are not the kernel's own."""
    count, where = 0, []
    maps = Path(f"/proc/{one}/maps").read_text()
    assert spans(maps) == spans(Path(f"/proc/{other}/maps").read_text())
    with open(f"/proc/{one}/mem", "rb", 0) as ours, open(f"/proc/{other}/mem", "rb", 0) as theirs:
        for line in maps.splitlines():
            if "[v" in line:
                continue
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            for place in range(start, end, 1 << 20):
                length = min(1 << 20, end - place)
                contents = []
                for file in (ours, theirs):
                    file.seek(place)
                    try:
                        contents.append(file.read(length))
                    except OSError:  # nobody can read it (PROT_NONE of a file, a guard)
                        contents.append(b"")
                if contents[0] != contents[1]:
                    assert len(contents[0]) == len(contents[1])
                    found = [i for i in range(length) if contents[0][i] != contents[1][i]]
                    count += len(found)
                    where.append(f"{len(found)} from {place + found[0]:#x} in {line}")
    return count, where


def shared_frames(tree: list[int]) -> int:
    """How many private anonymous pages of the tree lie in a frame that another process has too."""
    rest = 0
    for pid in tree:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "Anonymous":
                rest += int(value.split()[0])
            if name == "Pss_Anon":
                rest -= int(value.split()[0])
    return rest // 4


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "lazy"])
@pytest.mark.parametrize("seed", range(int(os.environ.get("LZY_TEST_EXAMPLES", "3"))))
def test_memory_of_a_family(tmp_path: Path, seed: int, eager: bool) -> None:
    """Dumped while it is left running, restored beside: every byte of every process is equal.

    And what generations shared copy-on-write they share again, as far as they had it from their
    parents.
    """
    with family(seed, tmp_path) as tree, Store.open(tmp_path / "store", create=True) as store:
        dump(tree[0], store, name="family", leave_running=True, track=False)
        assert list_tree(tree[0]) == tree
        with store.load("family") as image:
            copy = restore(image, eager=eager, pid_namespace="new")
        others = list_tree(copy.pid)
        try:
            by_number = {number_of(pid): pid for pid in others}
            assert len(by_number) == len(tree)
            if copy.pager_pid:
                await_gone(copy.pager_pid)  # until all of it is there, /proc/PID/mem reads short
            for pid in tree:
                count, where = differing_bytes(pid, by_number[number_of(pid)])
                assert count <= RSEQ_BYTES, where
            if eager:
                assert shared_frames(others) >= shared_frames(tree) // 2
        finally:
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def await_gone(pid: int) -> None:
    """Wait until a process, child or not, has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
                continue
        return
    raise AssertionError(f"process {pid} is still there")
