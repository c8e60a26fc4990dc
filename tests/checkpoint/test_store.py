"""A store: images go in and come out bit for bit, share what they have, and go when told to."""

from __future__ import annotations

import os
import random
import stat
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from memory import PAGE_BYTES, Memory, descriptors, files, patterned, read_space, write_image

from lzy.checkpoint import packs, writer
from lzy.checkpoint.errors import Busy, Damaged, LzyError, NotFound
from lzy.checkpoint.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    before = descriptors()
    with Store.open(tmp_path / "store", create=True) as store:
        yield store
    assert descriptors() == before, "a store, a writer or an image left descriptors open"


@pytest.mark.parametrize("window_pages", [1, 4, 16, 64])
def test_round_trip(store: Store, window_pages: int) -> None:
    """Every page comes back as it was, whatever the size of the windows."""
    content = patterned(1500, seed=window_pages)
    summary = write_image(store, "one", content, window_pages=window_pages)
    assert summary.raw_bytes == len(content)
    assert summary.window_pages == window_pages
    with store.load("one") as image:
        assert image.document == {"length": len(content)}
        assert read_space(image, len(content)) == content
        assert image.stored_bytes == summary.stored_bytes
    report = store.verify("one")
    assert report.chunks == summary.chunk_count
    assert report.stored_bytes == summary.stored_bytes


def test_masks_and_spaces(store: Store) -> None:
    """Only the pages a mask names are read; spaces keep apart what has the same address."""
    pick = random.Random(5)
    high = 0x7FFF_0000_0000
    memories = {
        0: (Memory(patterned(640, 1), high), high),
        3: (Memory(patterned(320, 2)), 0),
        2**32 - 1: (Memory(patterned(64, 3)), 0),
    }
    expected = {}
    with store.writer("one", window_pages=16) as image:
        for space, (memory, start) in memories.items():
            windows = [
                (address, mask & pick.getrandbits(16)) for address, mask in memory.windows(16)
            ]
            image.add_space(memory, windows, space=space)
            kept = bytearray(len(memory.content))
            for address, mask in windows:
                for page in range(16):
                    if mask >> page & 1:
                        at = address - start + page * PAGE_BYTES
                        kept[at : at + PAGE_BYTES] = memory.content[at : at + PAGE_BYTES]
            expected[space] = bytes(kept)
        image.commit({})
    with store.load() as image:
        for space, (memory, start) in memories.items():
            found = read_space(image, len(memory.content), space=space, start=start)
            assert found == expected[space]
        assert image.space_extent(1) == (image.space_extent(0)[1],) * 2
        assert image.find_run(1, 0) == -1
        assert image.find_run(0, high - 1) == -1
        assert image.find_run(0, 0) == -1
        assert image.find_run(3, 320 * PAGE_BYTES) == -1
        first = image.space_extent(0)[0]
        address = image.run(first)[0]
        assert image.find_run(0, address + 16 * PAGE_BYTES - 1) == first


def test_windows_in_any_order(store: Store) -> None:
    """Windows and spaces may be given in any order; the run table is sorted all the same."""
    memory = Memory(patterned(512))
    windows = memory.windows(16)
    random.Random(1).shuffle(windows)
    with store.writer("one", window_pages=16) as image:
        image.add_space(memory, windows[:7], space=4)
        image.add_space(memory, windows, space=0)
        image.commit({})
    with store.load("one") as image:
        assert read_space(image, len(memory.content)) == memory.content
    store.verify("one")


def test_zero_pages_are_not_stored(store: Store) -> None:
    """Pages of zeros take no room, pages that only begin with zeros are kept."""
    content = bytearray(1024 * PAGE_BYTES)
    for page in range(0, 1024, 5):
        content[page * PAGE_BYTES + PAGE_BYTES - 1] = 1 + page % 255
    summary = write_image(store, "one", content)
    assert summary.zero_bytes == len(content) - 205 * PAGE_BYTES
    with store.load("one") as image:
        assert read_space(image, len(content)) == content
    summary = write_image(store, "nothing", bytes(len(content)))
    assert (summary.stored_bytes, summary.run_count, summary.pack_count) == (0, 0, 0)
    with store.load("nothing") as image:
        assert read_space(image, len(content)) == bytes(len(content))


def test_repeats_are_stored_once(store: Store) -> None:
    """A chunk that occurs often is stored once, within an image and between images."""
    window = os.urandom(16 * PAGE_BYTES)
    other = os.urandom(16 * PAGE_BYTES)
    summary = write_image(store, "one", window * 50 + other)
    assert summary.chunk_count == 2
    assert summary.stored_bytes == 2 * len(window)
    second = write_image(store, "two", other + os.urandom(16 * PAGE_BYTES) + window)
    assert second.stored_bytes == len(window)
    assert second.reused_bytes == 2 * len(window)
    store.remove("one")
    store.collect_garbage()
    with store.load("two") as image:
        found = read_space(image, 48 * PAGE_BYTES)
    assert found[: len(other)] == other
    assert found[-len(window) :] == window


def test_rotten_chunks_are_stored_anew(store: Store) -> None:
    """What an old pack no longer has right is not shared: the new image is whole regardless."""
    content = os.urandom(64 * PAGE_BYTES)
    write_image(store, "old", content)
    (pack,) = (store.path / "packs").iterdir()
    damaged = bytearray(pack.read_bytes())
    damaged[5000] ^= 1
    pack.write_bytes(damaged)
    with pytest.raises(Damaged):
        store.verify("old")
    summary = write_image(store, "new", content)
    assert summary.stored_bytes == 16 * PAGE_BYTES
    assert summary.reused_bytes == 48 * PAGE_BYTES
    with store.load("new") as image:
        assert read_space(image, len(content)) == content
    store.verify("new")


def test_many_packs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content that fills more packs than may be open at once comes back as well."""
    monkeypatch.setattr(packs, "PACK_BYTES", 64 << 10)
    monkeypatch.setattr(writer, "_BATCH_BYTES", 64 << 10)
    content = os.urandom(3000 * PAGE_BYTES)
    summary = write_image(store, "one", content, window_pages=4)
    assert summary.pack_count > 80
    again = write_image(store, "two", content, window_pages=4)
    assert again.stored_bytes == 0
    assert again.pack_count == summary.pack_count
    with store.load("two") as image:
        assert read_space(image, len(content)) == content
        open_packs = [name for name in descriptors() if name.endswith(".pack")]
        assert len(open_packs) <= 64


def test_images_are_listed_newest_first(store: Store) -> None:
    """A list tells names, sizes and times without loading; `load` takes the newest."""
    with pytest.raises(NotFound, match="no image"):
        store.load()
    for name in ("b", "c", "a"):
        write_image(store, name, patterned(32, seed=ord(name)))
    assert [image.name for image in store.images()] == ["a", "c", "b"]
    image = store.images()[0]
    assert image.manifest_bytes == (store.path / "images" / "a.image").stat().st_size
    with store.load() as latest:
        assert latest.name == "a"


def test_a_name_is_given_once(store: Store) -> None:
    """A name in use, by an image or by a dump under way, is refused before anything is read."""
    write_image(store, "one", patterned(16))
    with pytest.raises(Busy, match="already"):
        store.writer("one")
    with store.writer("two") as image:
        with pytest.raises(Busy, match="being written"):
            store.writer("two")
        image.commit({})
    with pytest.raises(Busy):
        store.writer("two")
    store.remove("two")
    with store.writer("two") as image:
        image.commit({})


def test_a_name_taken_meanwhile(store: Store) -> None:
    """Should the name be taken at the last moment, nothing is replaced."""
    with store.writer("one") as image:
        (store.path / "images" / "one.image").write_bytes(b"somebody else's")
        with pytest.raises(Busy):
            image.commit({})
    assert (store.path / "images" / "one.image").read_bytes() == b"somebody else's"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        ".hidden",
        "a" * 129,
        "a\n",
        "ä",
        "a b",
        "a\0b",
        "$x",
        "a;b",
        "-x",
    ],
)
def test_impossible_names(store: Store, name: str) -> None:
    """A name that could lead elsewhere, or hide, is refused everywhere."""
    for use in (store.writer, store.load, store.remove, store.verify):
        with pytest.raises(LzyError, match="cannot be called"):
            use(name)


@pytest.mark.parametrize("name", ["a" * 128, "user@host-1_2.3", "_-", "0"])
def test_possible_names(store: Store, name: str) -> None:
    """All that is promised is possible."""
    write_image(store, name, patterned(8))
    store.verify(name)
    store.remove(name)
    with pytest.raises(NotFound):
        store.load(name)


def test_garbage(store: Store) -> None:
    """A collection removes what no image needs, what dead writers left, and nothing else."""
    shared = os.urandom(16 * PAGE_BYTES)
    write_image(store, "one", shared + os.urandom(160 * PAGE_BYTES), workers=1)
    write_image(store, "two", shared + os.urandom(32 * PAGE_BYTES), workers=1)
    (store.path / "tmp" / "dead.image").write_bytes(b"x" * 100)
    (store.path / "tmp" / "0123.pack").write_bytes(b"y" * 1000)
    report = store.collect_garbage()
    assert (report.removed_packs, report.removed_temporaries, report.kept_packs) == (0, 2, 2)
    store.remove("two")
    report = store.collect_garbage()
    assert (report.removed_packs, report.kept_packs) == (1, 1)
    assert report.removed_bytes > 32 * PAGE_BYTES
    store.verify("one")
    store.remove("one")
    assert store.collect_garbage().kept_packs == 0
    assert files(store.path) == {"config.json", "secret", "lock"}


def test_garbage_waits_for_writers(store: Store) -> None:
    """While an image is written nothing is collected, for its packs have no manifest yet."""
    memory = Memory(patterned(64))
    with store.writer("one") as image:
        image.add_space(memory, memory.windows(64), space=0)
        with pytest.raises(Busy, match="being written"):
            store.collect_garbage()
        image.commit({})
    store.collect_garbage()
    store.verify("one")


def test_garbage_stops_at_what_it_cannot_read(store: Store) -> None:
    """With one manifest damaged nothing is removed; once that image is removed all is well."""
    write_image(store, "one", patterned(64))
    path = store.path / "images" / "one.image"
    manifest = bytearray(path.read_bytes())
    manifest[-1] ^= 1
    path.write_bytes(manifest)
    before = files(store.path)
    with pytest.raises(Damaged):
        store.collect_garbage()
    assert files(store.path) == before
    store.remove("one")
    store.collect_garbage()
    assert files(store.path) == {"config.json", "secret", "lock"}


def test_an_image_in_use_stays(store: Store) -> None:
    """An image that somebody reads, even a child that inherited it, cannot be removed."""
    write_image(store, "one", patterned(64))
    image = store.load("one")
    with pytest.raises(Busy, match="in use"):
        store.remove("one")
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:  # the pager's part: it holds on until it is told to go
        os.close(tell)
        os.read(ready, 1)
        os._exit(0)
    try:
        os.close(ready)
        image.close()
        with pytest.raises(Busy, match="in use"):
            store.remove("one")
    finally:
        os.close(tell)
        os.waitpid(pid, 0)
    store.remove("one")


def test_leaving_without_commit(store: Store) -> None:
    """A writer that is left without commit leaves nothing at all."""
    before = files(store.path)
    memory = Memory(patterned(256))
    with store.writer("one") as image:
        image.add_space(memory, memory.windows(64), space=0)
    assert store.images() == []
    assert files(store.path) - {"lock"} == before - {"lock"}
    with pytest.raises(ValueError, match="closed"):
        image.commit({})


def test_a_failing_source_fails_the_image(store: Store) -> None:
    """What the source raises comes out of add_space as it is, and the image cannot be committed."""

    class Vanishing(Memory):
        def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
            raise ProcessLookupError(3, "No such process")

    memory = Vanishing(patterned(256))
    with store.writer("one", window_pages=16) as image:
        with pytest.raises(ProcessLookupError):
            image.add_space(memory, memory.windows(16), space=0)
        with pytest.raises(ProcessLookupError):
            image.commit({})
    assert store.images() == []


def test_windows_that_are_none(store: Store) -> None:
    """A crooked address, an impossible mask, the same window twice: refused, nothing visible."""
    memory = Memory(os.urandom(64 * PAGE_BYTES))
    for windows in ([(4096, 1)], [(0, 1 << 16)], [(-65536, 1)], [(1 << 64, 1)]):
        with store.writer("one", window_pages=16) as image:
            with pytest.raises(ValueError, match="no window"):
                image.add_space(memory, windows, space=0)
            with pytest.raises(ValueError, match="no window"):
                image.commit({})
    with store.writer("one", window_pages=16) as image:
        image.add_space(memory, [(0, 3), (65536, 1), (0, 3)], space=0)
        with pytest.raises(ValueError, match="twice"):
            image.commit({})
    for window_pages in (0, 3, 128):
        with pytest.raises(ValueError, match="window"):
            store.writer("one", window_pages=window_pages)
    with store.writer("one") as image:
        image.commit({})


def test_reading_from_many_threads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks read from eight threads at once, with few packs open, are what was written."""
    monkeypatch.setattr(packs, "PACK_BYTES", 128 << 10)
    monkeypatch.setattr(writer, "_BATCH_BYTES", 64 << 10)
    content = patterned(1500, seed=9)
    write_image(store, "one", content, window_pages=4)
    failures: list[BaseException] = []
    with store.load("one") as image:
        image._files._most_open = 3

        def read(seed: int) -> None:
            pick = random.Random(seed)
            buffer = memoryview(bytearray(4 * PAGE_BYTES))
            try:
                for _ in range(400):
                    address, mask, chunk = image.run(pick.randrange(image.run_count))
                    length = image.read_chunk(chunk, buffer)
                    window = content[address : address + 4 * PAGE_BYTES]
                    kept = b"".join(
                        window[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
                        for page in range(4)
                        if mask >> page & 1
                    )
                    assert buffer[:length] == kept
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_a_buffer_that_is_too_small(store: Store) -> None:
    """A chunk is never cut to fit; a chunk that does not exist is no chunk."""
    write_image(store, "one", os.urandom(16 * PAGE_BYTES))
    with store.load("one") as image:
        with pytest.raises(ValueError, match="does not fit"):
            image.read_chunk(0, memoryview(bytearray(PAGE_BYTES)))
        for chunk in (-1, 1):
            with pytest.raises(IndexError):
                image.read_chunk(chunk, memoryview(bytearray(1 << 20)))


def test_progress_is_told(store: Store) -> None:
    """Verifying tells how far it is, and ends at all of it."""
    content = patterned(3000)
    write_image(store, "one", content)
    told: list[tuple[str, int, int]] = []
    report = store.verify("one", lambda *step: told.append(step))
    assert told[-1] == ("verify", report.content_bytes, report.content_bytes)


class TestOpening:
    """Opening a store: made once, trusted only with its own secret, foreign folders left alone."""

    def test_where_there_is_none(self, tmp_path: Path) -> None:
        """No folder, an empty folder, a file: no store; a folder with other things is left."""
        (tmp_path / "file").write_text("x")
        (tmp_path / "empty").mkdir()
        for name in ("none", "empty", "file"):
            with pytest.raises(NotFound):
                Store.open(tmp_path / name)
        with pytest.raises(NotFound, match="holds other things"):
            Store.open(tmp_path, create=True)
        assert files(tmp_path) == {"file"}

    def test_is_private(self, tmp_path: Path) -> None:
        """Memory holds passwords: nobody else may read any of it, whatever the umask."""
        before = os.umask(0)
        try:
            with Store.open(tmp_path / "store", create=True) as store:
                write_image(store, "one", patterned(64))
        finally:
            os.umask(before)
        for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path

    def test_twice(self, tmp_path: Path) -> None:
        """Opening with `create` what is there already opens it; a half-made store is completed."""
        with Store.open(tmp_path / "store", create=True) as store:
            write_image(store, "one", patterned(64))
            identity = store.identity
        with Store.open(tmp_path / "store", create=True) as store:
            assert store.identity == identity
            store.verify("one")
        half = tmp_path / "half"
        (half / "tmp").mkdir(parents=True)
        (half / "secret").write_bytes(os.urandom(32))
        with Store.open(half, create=True) as store:
            write_image(store, "one", patterned(64))

    def test_made_by_two_at_once(self, tmp_path: Path) -> None:
        """Two that create the same store at the same moment share one."""
        for attempt in range(20):
            path = tmp_path / str(attempt)
            found: list[bytes] = []
            barrier = threading.Barrier(4)

            def make(
                path: Path = path,
                found: list[bytes] = found,
                barrier: threading.Barrier = barrier,
            ) -> None:
                barrier.wait()
                with Store.open(path, create=True) as store:
                    found.append(store.identity + store.keys.manifest)

            threads = [threading.Thread(target=make) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(found) == 4
            assert len(set(found)) == 1

    def test_another_secret(self, tmp_path: Path) -> None:
        """With the secret lost, cut or exchanged nothing is believed."""
        path = tmp_path / "store"
        Store.open(path, create=True).close()
        for secret in (os.urandom(32), b"", os.urandom(31), os.urandom(33)):
            (path / "secret").write_bytes(secret)
            with pytest.raises(Damaged, match="secret"):
                Store.open(path)
        (path / "secret").unlink()
        with pytest.raises(Damaged, match="secret"):
            Store.open(path)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"version": 1', '"version": 2'),
            ('"encryption": 0', '"encryption": 1'),
            ('"lzy store"', '"other store"'),
            ('"check": "', '"check": "zz'),
            ('"identity": "', '"identity": "00'),
            ("{", "["),
            ("}", ""),
            ("{", "{" * 3000),
        ],
    )
    def test_another_configuration(self, tmp_path: Path, old: str, new: str) -> None:
        """A configuration that is damaged, or newer than this lzy, is refused."""
        path = tmp_path / "store"
        Store.open(path, create=True).close()
        text = (path / "config.json").read_text()
        assert old in text
        (path / "config.json").write_text(text.replace(old, new, 1))
        with pytest.raises(Damaged):
            Store.open(path)

    def test_images_of_another_store(self, tmp_path: Path) -> None:
        """An image carried into another store, or to another name, is refused there."""
        with (
            Store.open(tmp_path / "a", create=True) as one,
            Store.open(tmp_path / "b", create=True) as other,
        ):
            write_image(one, "x", patterned(64))
            manifest = (one.path / "images" / "x.image").read_bytes()
            (other.path / "images" / "x.image").write_bytes(manifest)
            with pytest.raises(Damaged, match="damaged or forged"):
                other.load("x")
            (one.path / "images" / "y.image").write_bytes(manifest)
            with pytest.raises(Damaged, match="was written as x"):
                one.load("y")
            assert [bool(image.damage) for image in one.images()] == [False, True]


def test_chunk_records_are_as_documented(store: Store) -> None:
    """The layout in docs/format.md is the one on disk: read a page with nothing but struct."""
    content = os.urandom(16 * PAGE_BYTES)
    write_image(store, "one", content)
    manifest = (store.path / "images" / "one.image").read_bytes()
    assert manifest[:8] == b"LZYIMAGE"
    version, suite, window_pages = struct.unpack_from("<III", manifest, 8)
    assert (version, suite, window_pages) == (2, 0, 16)
    counts = struct.unpack_from("<QQQQ", manifest, 80)
    assert counts == (1, 0, 1, 1)  # runs, pieces, chunks, packs
    address, mask, owner = struct.unpack_from("<QQQ", manifest, 288)
    assert (address, mask, owner) == (0, 0xFFFF, 0)
    _, pack, stored, offset, raw, encoding = struct.unpack_from("<32sIIQII", manifest, 312)
    assert (pack, stored, offset, raw, encoding) == (0, 65536, 32, 65536, 0)
    pack_id, pack_bytes, chunks = struct.unpack_from("<16sQQ", manifest, 368)
    path = store.path / "packs" / f"{pack_id.hex()}.pack"
    assert (path.stat().st_size, chunks) == (pack_bytes, 1)
    assert path.read_bytes()[offset : offset + stored] == content
