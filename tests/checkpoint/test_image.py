"""A manifest: loaded at once, searched in place, and refused when one bit of it is not right."""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from memory import PAGE_BYTES, Memory, write_image

from lzy.checkpoint import image as image_module
from lzy.checkpoint.errors import Damaged, StoreUnavailable
from lzy.checkpoint.image import (
    CHUNK_RECORD,
    HEADER_BYTES,
    Header,
    Image,
    encode_document,
    encode_manifest,
    encode_pack,
)
from lzy.checkpoint.keys import keyed_digest
from lzy.checkpoint.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as store:
        yield store


def made_up(made_in: Store, windows: int, pages: int, **changes: object) -> bytes:
    """A manifest of `windows` windows at every second place, all of one chunk."""
    document, document_bytes = encode_document({"made": "up"})
    mask = (1 << pages) - 1
    runs = b"".join(
        struct.pack("<QQQ", index * 2 * pages * PAGE_BYTES, mask, 0) for index in range(windows)
    )
    header = Header(
        name="made-up",
        store=made_in.identity,
        window_pages=pages,
        created_unix_ns=1,
        raw_bytes=0,
        zero_bytes=0,
        stored_bytes=0,
        reused_bytes=0,
        run_count=windows,
        piece_count=0,
        chunk_count=1,
        pack_count=1,
        document_stored_bytes=len(document),
        document_bytes=document_bytes,
    )._replace(**changes)  # type: ignore[arg-type]  # the names are checked by _replace itself
    chunk = CHUNK_RECORD.pack(bytes(32), 0, 4096, 32, 4096, 0)
    return encode_manifest(
        header,
        made_in.keys,
        runs=runs,
        pieces=b"",
        chunks=chunk,
        packs=encode_pack(bytes(16), 4096, 1),
        document=document,
    )


def test_every_window_is_found(store: Store) -> None:
    """Each address inside a window finds it, each one between finds nothing."""
    windows, window_bytes = 1000, 16 * PAGE_BYTES
    with Image(made_up(store, windows, 16), store.keys, -1, name="made-up") as image:
        assert image.space_extent(0) == (0, windows)
        for index in range(windows):
            start = index * 2 * window_bytes
            for address in (start, start + 1, start + window_bytes - 1):
                assert image.find_run(0, address) == index
            for address in (start + window_bytes, start + 2 * window_bytes - 1):
                assert image.find_run(0, address) == -1
        assert image.find_run(0, (1 << 64) - 1) == -1
        assert image.run_space(5) == 0


def test_loading_makes_nothing_per_entry(store: Store) -> None:
    """A manifest of 4 GiB in 64 KiB windows loads in milliseconds, not in a loop over them."""
    manifest = made_up(store, 65536, 16)
    digest_s, load_s = [], []
    for _ in range(9):
        started = time.perf_counter()
        keyed_digest(store.keys.manifest, manifest)
        digest_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        Image(manifest, store.keys, -1, name="made-up").close()
        load_s.append(time.perf_counter() - started)
    # Authentication reads it all and is the floor; a loop over 65536 entries would take 5 ms more.
    assert min(load_s) < 2 * min(digest_s) + 0.002


@pytest.mark.parametrize(
    "changes",
    [
        {"window_pages": 0},
        {"window_pages": 3},
        {"window_pages": 128},
        {"document_bytes": 1 << 40},
    ],
)
def test_impossible_headers_are_refused(store: Store, changes: dict[str, object]) -> None:
    """Even with a right signature, a header beyond the limits is refused before it is used."""
    manifest = made_up(store, 4, 16, **changes)
    with pytest.raises(Damaged, match="impossible header"):
        Image(manifest, store.keys, -1, name="made-up")


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (8, 3), (12, 1), (12, 0xFFFFFFFF)])
def test_unknown_versions_are_refused(store: Store, offset: int, value: int) -> None:
    """Another version or encryption suite is named as such, not called damage."""
    manifest = bytearray(made_up(store, 4, 16))
    struct.pack_into("<I", manifest, offset, value)
    with pytest.raises(Damaged, match="which are not known; use a newer version"):
        Image(bytes(manifest), store.keys, -1, name="made-up")


def test_forgery_needs_the_key(store: Store, tmp_path: Path) -> None:
    """A manifest rebuilt with other content, signed with any other key, is refused."""
    with Store.open(tmp_path / "other", create=True) as other:
        forged = made_up(other, 4, 16, store=store.identity)
    with pytest.raises(Damaged, match="forged"):
        Image(forged, store.keys, -1, name="made-up")
    genuine = made_up(store, 4, 16)
    # The header of one image with the tables of another: each half is genuine, the whole is not.
    spliced = genuine[:HEADER_BYTES] + made_up(store, 4, 32)[HEADER_BYTES:]
    with pytest.raises(Damaged, match="forged"):
        Image(spliced, store.keys, -1, name="made-up")


def test_a_tag_serves_one_purpose(store: Store) -> None:
    """The id of a chunk that holds a manifest's bytes is no signature of that manifest.

    The owner of a process decides what is in its memory, and thus which ids the store computes.
    """
    manifest = made_up(store, 4, 16)
    body = manifest[:-32]
    as_chunk = keyed_digest(store.keys.chunk, b"image" + body)
    with pytest.raises(Damaged, match="forged"):
        Image(body + as_chunk, store.keys, -1, name="made-up")
    assert len({*store.keys}) == 4


def test_documents(store: Store) -> None:
    """Any JSON object comes back equal; one that is too large is refused when it is written."""
    document = {"threads": [{"pid": 1, "name": "ü"}], "big": "x" * 100_000, "n": 2**63, "f": 0.1}
    with store.writer("one") as writer:
        writer.commit(document)
    with store.load("one") as image:
        assert image.document == document


def test_a_document_beyond_the_limit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on documents holds on the way in, too."""
    monkeypatch.setattr(image_module, "MOST_DOCUMENT_BYTES", 1000)
    with (
        store.writer("one") as writer,
        pytest.raises(ValueError, match="too large"),
    ):
        writer.commit({"big": "x" * 2000})
    assert store.images() == []


def test_packs_are_looked_at_when_loading(store: Store) -> None:
    """A pack that is missing, cut, longer or another one is noticed before anything is made."""
    write_image(store, "one", os.urandom(64 * PAGE_BYTES))
    (path,) = (store.path / "packs").iterdir()
    pack = path.read_bytes()
    for damage in (
        pack[:-1],
        pack[:1000],
        b"",
        pack + b"\0",
        pack[:-100] + pack,
        b"X" + pack[1:],
        pack[:16] + bytes(16) + pack[32:],
        pack[:8] + b"\2" + pack[9:],
        pack[:12] + b"\1" + pack[13:],
    ):
        path.write_bytes(damage)
        with pytest.raises(Damaged):
            store.load("one")
    path.unlink()
    with pytest.raises(Damaged, match="missing"):
        store.load("one")
    path.mkdir()
    with pytest.raises((Damaged, StoreUnavailable)):
        store.load("one")
    path.rmdir()
    path.write_bytes(pack)
    store.verify("one")


def test_a_pack_cut_while_in_use(store: Store) -> None:
    """A pack that is cut after loading gives Damaged with its name: no SIGBUS, no wrong byte."""
    content = os.urandom(64 * PAGE_BYTES)
    write_image(store, "one", content)
    (path,) = (store.path / "packs").iterdir()
    buffer = memoryview(bytearray(1 << 18))
    with store.load("one") as image:
        assert image.read_chunk(0, buffer) == 16 * PAGE_BYTES
        os.truncate(path, 40 * PAGE_BYTES)
        whole = []
        for chunk in range(image.chunk_count):
            offset = image.chunk_place(chunk)[2].offset - 32
            if offset + 16 * PAGE_BYTES < 40 * PAGE_BYTES:
                length = image.read_chunk(chunk, buffer)
                whole.append(bytes(buffer[:length]))
            else:
                with pytest.raises(Damaged, match=path.name):
                    image.read_chunk(chunk, buffer)
        assert sorted(whole) == sorted([content[:65536], content[65536:131072]])


def test_swapped_chunks_are_noticed(store: Store) -> None:
    """Two stored chunks that change places are both refused: content is bound to its id."""
    write_image(store, "one", os.urandom(32 * PAGE_BYTES))
    (path,) = (store.path / "packs").iterdir()
    pack = bytearray(path.read_bytes())
    one, other = slice(32, 32 + 65536), slice(32 + 65536, 32 + 131072)
    pack[one], pack[other] = pack[other], pack[one]
    path.write_bytes(pack)
    buffer = memoryview(bytearray(1 << 18))
    with store.load("one") as image:
        for chunk in (0, 1):
            with pytest.raises(Damaged, match="not what was written"):
                image.read_chunk(chunk, buffer)


def test_source_reads_only_what_is_present(store: Store) -> None:
    """Holes inside a window are not read: neighbours on both sides make one run with nothing."""
    asked: list[tuple[int, int]] = []

    class Asked(Memory):
        def read_runs(self, runs, into):  # type: ignore[no-untyped-def]  # as in the base
            asked.extend(runs)
            super().read_runs(runs, into)

    memory = Asked(os.urandom(64 * PAGE_BYTES))
    with store.writer("one", window_pages=16, workers=1) as writer:
        writer.add_space(memory, [(0, 0x8001), (65536, 0x0003), (131072, 0x00F0)], space=0)
        writer.commit({})
    page = PAGE_BYTES
    assert asked == [(0, page), (15 * page, 3 * page), (36 * page, 4 * page)]
