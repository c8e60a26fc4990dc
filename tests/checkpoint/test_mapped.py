"""Mapped files are known again, or refused by name before anything is made."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from subjects import PRELUDE, living

from lzy.checkpoint import proc
from lzy.checkpoint.errors import Unsupported
from lzy.checkpoint.mapped import Mappings, refuse_mappings
from lzy.checkpoint.objects import Objects

if TYPE_CHECKING:
    from living import CommandLine, Program

MAPPING = """
places = []
for name in sys.argv[1:]:
    fd = os.open(name, os.O_RDONLY)
    places.append(allocate(16384, 1, 0x2, fd))
    os.close(fd)
say("ready")
while (line := hear()): say(*[ctypes.string_at(place, 8).hex() for place in places])
"""


def elf_with_build_id(identity: bytes, padding: bytes) -> bytes:
    """A file that has a build-id and is nothing else."""
    note = struct.pack("<III", 4, 20, 3) + b"GNU\0" + identity.ljust(20, b"\0")
    head = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return (head + segment + note + padding).ljust(16384, b"\0")


def touch_later(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def rewrite(path: Path, content: bytes) -> None:
    """New content, old modification time."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_in_place(path: Path) -> None:
    """The same bytes and time, but another file."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.rename(path)


DATA, LIBRARY = b"some data" * 2000, elf_with_build_id(b"one", b"")
REFUSED: list[tuple[str, str, Callable[[Path], object]]] = [
    ("data", "touched", touch_later),
    ("data", "longer", lambda path: rewrite(path, DATA + b"!")),
    ("data", "truncated", lambda path: rewrite(path, DATA[:8192])),
    ("data", "gone", lambda path: path.unlink()),
    ("library", "rebuilt", lambda path: rewrite(path, elf_with_build_id(b"two", b""))),
    ("library", "no library", lambda path: rewrite(path, bytes(16384))),
    ("library", "truncated", lambda path: rewrite(path, LIBRARY[:12000])),
]


def test_changed_files_are_refused_at_restore(
    start: Callable[..., Program], lzy: CommandLine, tmp_path: Path
) -> None:
    """By build-id where there is one, else by modification time, by size in any case.

    The refusal names the file and makes nothing. The same bytes as another file will do, and a
    library with the same build-id whenever it was written: then the process comes back.
    """
    paths = {"data": tmp_path / "some data", "library": tmp_path / "library.so"}
    paths["data"].write_bytes(DATA)
    paths["library"].write_bytes(LIBRARY)
    command = [sys.executable, "-I", "-S", "-c", PRELUDE + MAPPING, *map(str, paths.values())]
    program = start(command=command).await_ready()
    lzy.dump(program)
    for name, what, change in REFUSED:
        path = paths[name]
        content, status = path.read_bytes(), path.stat()
        change(path)
        error = lzy.fail("restore", "image", "--store", str(lzy.store))
        assert error["kind"] == "incompatible", what
        assert str(path) in error["message"], what
        assert error["remedy"], what
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy_in_place(paths["data"])
    touch_later(paths["library"])
    lzy.restore(program)
    assert program.ask("content") == f"{DATA[:8].hex()} {LIBRARY[:8].hex()}"


def describe(pid: int, vmas: list[proc.Vma]) -> list[dict[str, object]]:
    objects = Objects()
    try:
        mappings = Mappings(pid, vmas)
        mappings.take_objects(objects)
        return mappings.describe()
    finally:
        objects.close()


@pytest.mark.shows(
    "refused",
    "a mapped file whose path leads to another one (a package was upgraded)",
)
def test_replaced_file_is_refused_at_dump(tmp_path: Path) -> None:
    """A path that leads to another file than the mapped one is refused, naming it."""
    path = tmp_path / "file"
    path.write_bytes(bytes(16384))
    with living(MAPPING, str(path)) as subject:
        vmas = proc.mappings(subject.pid)
        described = describe(subject.pid, vmas)
        (mine,) = [d for d in described if d.get("path") == str(path)]
        assert mine["kind"] == "file"
        changed = [v._replace(inode=v.inode + 1) if v.path == str(path) else v for v in vmas]
        with pytest.raises(Unsupported, match="replaced") as caught:
            describe(subject.pid, changed)
        assert str(path) in caught.value.message
        elsewhere = [v._replace(path="/no/where") if v.path == str(path) else v for v in vmas]
        with pytest.raises(Unsupported, match="/no/where"):
            describe(subject.pid, elsewhere)


def test_deleted_file_is_carried_in_the_image(tmp_path: Path) -> None:
    """What a newer file has replaced lives only in the process: its content is an object."""
    path = tmp_path / "file"
    path.write_bytes(b"old." * 4096)
    with living(MAPPING, str(path)) as subject:
        new = tmp_path / "new"
        new.write_bytes(b"new." * 4096)
        new.rename(path)
        objects = Objects()
        try:
            mappings = Mappings(subject.pid, proc.mappings(subject.pid))
            mappings.take_objects(objects)
            (mine,) = [d for d in mappings.describe() if str(path) in str(d.get("path"))]
            assert mine["kind"] == "memory"
            assert mine["object"] == 1
            assert os.pread(objects.descriptors[0], 4, 0) == b"old."
        finally:
            objects.close()
        assert subject.ask("content") == b"old.old.".hex()


@pytest.mark.parametrize(
    ("path", "flags", "word"),
    [
        ("/[aio] (deleted)", set(), "asynchronous"),
        ("/dev/nvidia0", set(), "GPU"),
        ("/dev/fb0", set(), "device"),
        ("anon_inode:[perf_event]", set(), "perf_event"),
        ("/mnt/huge/file", {"ht"}, "huge-page"),
        ("", {"ss"}, "shadow stack"),
        ("/x", {"pf", "io"}, "device memory"),
    ],
)
@pytest.mark.shows(
    "refused",
    "mappings: asynchronous I/O, GPUs, devices, perf, files on hugetlbfs, shadow stacks",
)
def test_mappings_that_cannot_be_made_again(path: str, flags: set[str], word: str) -> None:
    """Each is named with its address and a way out."""
    kind = "memory" if "deleted" in path else "file" if path else "anonymous"
    vma = proc.Vma(0x7000, 0x8000, "rw-s", 0, 0, 1, path, kind, frozenset(flags))
    with pytest.raises(Unsupported, match="0x7000") as caught:
        refuse_mappings(7, [vma])
    assert word in caught.value.message
    assert caught.value.remedy


@pytest.mark.shows("refused", "an io_uring that is mapped and whose descriptor is closed")
def test_ring_without_descriptor_is_refused() -> None:
    """Nothing can be asked of an io_uring that is only mapped."""
    path = "anon_inode:[io_uring]"
    vma = proc.Vma(0x7000, 0x8000, "rw-s", 0, 0, 1, path, "ring", frozenset())
    with pytest.raises(Unsupported, match="io_uring") as caught:
        refuse_mappings(os.getpid(), [vma])
    assert caught.value.remedy


def test_ordinary_mappings_are_not_refused() -> None:
    """Shared memory in /dev/shm, /dev/zero, and all that an interpreter has."""
    with living("allocate(4096, 3, 0x21); say('ready'); hear()") as subject:
        refuse_mappings(subject.pid, proc.mappings(subject.pid))
    for path in ("/dev/shm/mine", "/dev/zero (deleted)", "/dev/zero"):
        vma = proc.Vma(0x7000, 0x8000, "rw-s", 0, 0, 1, path, "file", frozenset())
        refuse_mappings(7, [vma])


@pytest.mark.shows("refused", "asynchronous I/O (io_setup)")
def test_a_context_of_asynchronous_io_is_refused() -> None:
    """Nobody tells whether requests are in flight in it."""
    code = """
context = ctypes.c_ulong()
assert libc.syscall(206, 8, ctypes.byref(context)) == 0
say("ready"); hear()
"""
    with living(code) as subject:
        with pytest.raises(Unsupported, match="io_setup") as caught:
            refuse_mappings(subject.pid, proc.mappings(subject.pid))
        assert "io_destroy" in caught.value.remedy


@pytest.mark.shows("refused", "a part of System V shared memory (the rest is unmapped)")
def test_a_part_of_system_v_memory_is_refused() -> None:
    """shmat(2) attaches all of it."""
    code = """
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(0, 8192, 0o1600)
place = libc.shmat(segment, None, 0)
libc.shmctl(segment, 0, None)
assert libc.munmap(ctypes.c_void_p(place + int(sys.argv[1])), ctypes.c_size_t(4096)) == 0
say("ready"); hear()
"""
    for unmapped in ("0", "4096"):
        with living(code, unmapped) as subject:
            with pytest.raises(Unsupported, match="System V") as caught:
                refuse_mappings(subject.pid, proc.mappings(subject.pid))
            assert caught.value.remedy
