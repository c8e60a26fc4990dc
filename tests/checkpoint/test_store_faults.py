"""A dump that is killed, or that meets a full disk, leaves garbage at most, and never damage."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from memory import PAGE_BYTES, descriptors, files, patterned, read_space, write_image

from lzy.checkpoint import packs, writer
from lzy.checkpoint.errors import Busy, Damaged, LzyError, StoreUnavailable
from lzy.checkpoint.packs import PACK_HEADER_BYTES, pack_file
from lzy.checkpoint.store import Store

# Whatever changes a file system goes through one of these.
STEPS = ("open", "pwritev", "pwrite", "ftruncate", "fsync", "link", "rename", "unlink", "close")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as store:
        yield store


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many packs from little memory, so that every stage is met."""
    monkeypatch.setattr(packs, "PACK_BYTES", 128 << 10)
    monkeypatch.setattr(writer, "_BATCH_BYTES", 64 << 10)


def run_child(work: Callable[[], object]) -> int:
    """Fork, do `work` there, and answer how the child ended: 0, an exit status, or -signal."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def count_steps(at: Callable[[int, str], None]) -> None:
    """In this process, call `at(number, "before"/"after")` around every step of the store."""
    number = 0

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **keywords: Any) -> Any:
            nonlocal number
            number += 1
            here = number
            at(here, "before")
            result = real(*arguments, **keywords)
            at(here, "after")
            return result

        return step

    for name in STEPS:
        setattr(os, name, around(getattr(os, name)))


def dump_again(store: Store, content: bytes | bytearray) -> None:
    write_image(store, "new", content, window_pages=4, workers=1)


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_step(store: Store, moment: str) -> None:
    """Killed (-9) around any of its steps a dump is either not there or whole; the old image stays.

    The new image shares chunks with the old one. After each death: every image that is listed
    verifies, a collection leaves exactly what the images need, and the same name can be written.
    """
    old = patterned(160, seed=1)
    new = old[: 80 * PAGE_BYTES] + patterned(100, seed=2)
    write_image(store, "old", old, window_pages=4)
    kept = files(store.path)
    step, seen = 0, set()
    while True:
        step += 1

        def die(number: int, when: str, step: int = step) -> None:
            if (number, when) == (step, moment):
                os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            count_steps(die)
            dump_again(store, new)

        ended = run_child(work)
        names = {image.name for image in store.images()}
        seen.add((ended, "new" in names))
        assert ended in (0, -signal.SIGKILL)
        assert names - {"new"} == {"old"}
        for name, content in (("old", old), ("new", new)):
            if name in names:
                store.verify(name)
                with store.load(name) as image:
                    assert read_space(image, len(content)) == content
        if "new" in names:
            store.remove("new")
        store.collect_garbage()
        assert files(store.path) == kept | {"lock"}
        store.verify("old")
        if ended == 0:
            break
    assert step > 25
    assert (-signal.SIGKILL, False) in seen, "no death was early enough to matter"
    assert (-signal.SIGKILL, True) in seen, "no death was late enough to matter"


@pytest.mark.usefixtures("small_packs")
def test_every_step_fails(store: Store) -> None:
    """Each step that answers "no space left" ends the dump with StoreUnavailable, and no image.

    A failure while tidying up is none; the writer's own garbage goes at once where that works.
    """
    old = patterned(100, seed=1)
    new = old[: 40 * PAGE_BYTES] + patterned(60, seed=2)
    write_image(store, "old", old, window_pages=4)
    real = {name: getattr(os, name) for name in STEPS}
    before, kept = descriptors(), files(store.path)
    outcomes = []
    for step in range(1, 400):
        hit = False

        def fail(number: int, when: str, step: int = step) -> None:
            nonlocal hit
            if (number, when) == (step, "before"):
                hit = True
                raise OSError(28, os.strerror(28))

        try:
            # close(2) is left out: it gives nothing back that could be full.
            with pytest.MonkeyPatch.context() as patch:
                for name in STEPS:
                    patch.setattr(os, name, real[name])
                count_steps(fail)
                os.close = real["close"]
                dump_again(store, new)
            outcomes.append("written")
        except StoreUnavailable:
            outcomes.append("refused")
        finally:
            for name, function in real.items():
                setattr(os, name, function)
        if not hit:
            break
        assert descriptors() == before
        names = {image.name for image in store.images()}
        assert ("new" in names) == (outcomes[-1] == "written")
        if "new" in names:
            store.verify("new")
            store.remove("new")
        store.collect_garbage()
        assert files(store.path) == kept | {"lock"}
    else:
        pytest.fail("the dump never came to its end")
    assert outcomes.count("refused") > 15


@pytest.mark.usefixtures("small_packs")
def test_what_was_verified_is_not_read_again(store: Store) -> None:
    """Of an image what it has in common with another is left out; all else is still read."""
    old = patterned(100, seed=1)
    write_image(store, "old", old, window_pages=4)
    with store.load("old") as image:
        shared = {pack for pack, _ in image.packs}
    write_image(store, "new", old[: 40 * PAGE_BYTES] + patterned(60, seed=2), window_pages=4)
    with store.load("new") as image:
        own = {pack for pack, _ in image.packs} - shared
    everything = store.verify("new")
    rest = store.verify("new", known="old")
    assert 0 < rest.content_bytes < everything.content_bytes
    assert store.verify("new", known="new").content_bytes == 0
    assert store.verify("new", known="gone").content_bytes == everything.content_bytes
    for pack in (min(own), min(shared)):
        damage(store.path / "packs" / pack_file(pack))
    with pytest.raises(Damaged):
        store.verify("new", known="old")
    with pytest.raises(Damaged):
        store.verify("new", known="gone")


@pytest.mark.usefixtures("small_packs")
def test_known_packs_are_there_with_their_size(store: Store) -> None:
    """What was looked at a moment ago is not opened again, but it has to be there, and whole."""
    write_image(store, "one", patterned(100, seed=1), window_pages=4)
    with store.load("one") as image:
        packs = [pack for pack, _ in image.packs]
    with store.load("one", known=packs) as image:
        assert not image.descriptors()[2:]  # no pack was opened
    path = store.path / "packs" / pack_file(packs[0])
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(Damaged, match="bytes instead of"):
        store.load("one", known=packs)
    path.unlink()
    with pytest.raises(Damaged, match="is missing"):
        store.load("one", known=packs)


def damage(path: Path) -> None:
    """Turn over one bit in the midst of the chunks of a pack."""
    with open(path, "r+b") as file:
        file.seek(PACK_HEADER_BYTES + 5)
        (byte,) = file.read(1)
        file.seek(PACK_HEADER_BYTES + 5)
        file.write(bytes([byte ^ 1]))


def test_file_size_limit(store: Store) -> None:
    """A limit on file sizes (EFBIG) is met as a full disk is: told, and nothing left behind."""
    content = os.urandom(4 << 20)
    told, tell = os.pipe()

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            write_image(store, "new", content)
        except StoreUnavailable as error:
            os.write(tell, str(error).encode())

    try:
        assert run_child(work) == 0
        os.close(tell)
        message = os.read(told, 4096).decode()
    finally:
        os.close(told)
    assert "File too large" in message
    assert "make room" in message
    assert store.images() == []
    assert files(store.path) == {"config.json", "secret", "lock"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes; mounting needs CAP_SYS_ADMIN."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = tmp_path / "disk"
    path.mkdir()
    if libc.mount(b"tmpfs", bytes(path), b"tmpfs", 0, b"size=2m"):
        number = ctypes.get_errno()
        if os.environ.get("CI"):
            pytest.fail(f"CI must be able to mount a tmpfs: {os.strerror(number)}")
        pytest.skip("CAP_SYS_ADMIN is missing: a small file system cannot be mounted")
    try:
        yield path
    finally:
        assert libc.umount2(bytes(path), 2) == 0


def test_full_disk(small_disk: Path) -> None:
    """A disk that fills up: told with a way out, the old image whole, and room again afterwards."""
    old = os.urandom(512 << 10)
    with Store.open(small_disk / "store", create=True) as store:
        write_image(store, "old", old)
        free_bytes = os.statvfs(small_disk).f_bavail
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match=r"No space left.*make room"):
                write_image(store, "new", os.urandom(8 << 20))
            assert os.statvfs(small_disk).f_bavail == free_bytes, "garbage was left"
        assert [image.name for image in store.images()] == ["old"]
        store.verify("old")
        write_image(store, "new", os.urandom(512 << 10))
        store.verify("new")


def test_no_room_for_a_store(small_disk: Path) -> None:
    """A store that cannot even be made is told as such."""
    with open(small_disk / "filler", "wb") as filler, contextlib.suppress(OSError):
        filler.write(bytes(4 << 20))
    with pytest.raises(StoreUnavailable, match="No space left"):
        Store.open(small_disk / "store", create=True)


def test_an_unreadable_pack(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that answers EIO is StoreUnavailable, which may pass; it is not called damage."""
    write_image(store, "one", os.urandom(64 * PAGE_BYTES))
    buffer = memoryview(bytearray(1 << 18))

    def broken(*_: object) -> bytes:
        raise OSError(5, os.strerror(5))

    with store.load("one") as image:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", broken)
            patch.setattr(os, "pread", broken)
            with pytest.raises(StoreUnavailable, match="Input/output error"):
                image.read_chunk(0, buffer)
        assert image.read_chunk(0, buffer) == 16 * PAGE_BYTES


@pytest.mark.parametrize("lie", ["flip", "short"])
def test_what_reads_back_differently_is_not_committed(
    store: Store, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    """Were a single byte on its way to the disk lost, the dump fails before anything is visible."""
    real = os.pwritev
    content = patterned(64, seed=3)
    for victim in range(2, 5):
        calls = 0

        def lying(
            descriptor: int, blobs: list[bytes | memoryview], offset: int, victim: int = victim
        ) -> int:
            nonlocal calls
            calls += 1
            if calls != victim:
                return real(descriptor, blobs, offset)
            whole = bytearray(b"".join(blobs))
            if lie == "flip":
                whole[len(whole) // 3] ^= 1
                return real(descriptor, [whole], offset)
            real(descriptor, [whole[:-7]], offset)
            return len(whole)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", lying)
            patch.setattr(writer, "_BATCH_BYTES", 64 << 10)
            with pytest.raises(LzyError, match=r"reads back|damaged|trailer|its end is missing"):
                write_image(store, "one", content, workers=1)
        assert store.images() == []
    store.collect_garbage()
    write_image(store, "one", content)
    store.verify("one")


def test_the_lock_of_a_dead_writer(store: Store) -> None:
    """A writer that dies lets go of its name and of the store; a living one keeps both."""
    held, hold = os.pipe()
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            store.writer("one")
            os.write(tell, b"x")
            os.close(hold)
            os.read(held, 1)
        os._exit(1)
    try:
        assert os.read(ready, 1) == b"x"
        with pytest.raises(Busy):
            store.writer("one")
        with pytest.raises(Busy):
            store.collect_garbage()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for descriptor in (held, hold, ready, tell):
            os.close(descriptor)
    assert store.collect_garbage().removed_temporaries == 1
    write_image(store, "one", patterned(16))
