"""Incremental images against the plainest oracle there is: the memory itself."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from memory import PAGE_BYTES, Memory, patterned, read_space

from lzy.checkpoint.content import join_ranges
from lzy.checkpoint.errors import Damaged
from lzy.checkpoint.increment import plan_checkpoint
from lzy.checkpoint.patchwork import MOST_PIECES
from lzy.checkpoint.store import ImageSummary, Store

PAGES, WINDOW_PAGES = 96, 16


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as store:
        yield store


def masks(pages: set[int]) -> list[tuple[int, int]]:
    """Pages as windows."""
    found: dict[int, int] = {}
    for page in sorted(pages):
        address = page // WINDOW_PAGES * WINDOW_PAGES * PAGE_BYTES
        found[address] = found.get(address, 0) | 1 << page % WINDOW_PAGES
    return list(found.items())


def ranges(pages: set[int]) -> list[tuple[int, int]]:
    """Pages as ranges of addresses."""
    return join_ranges((page * PAGE_BYTES, (page + 1) * PAGE_BYTES) for page in pages)


def checkpoint(
    store: Store, name: str, base: str, content: bytearray, present: set[int], written: set[int]
) -> ImageSummary:
    """Write `name` on top of `base`."""
    with store.load(base) as image, store.writer(name, window_pages=WINDOW_PAGES) as writer:
        plan = plan_checkpoint(image, ranges(present), ranges(written))
        writer.keep([(0, image, plan.kept)])
        writer.add_space(Memory(content), plan.fresh, space=0)
        return writer.commit({})


Step = tuple[list[int], list[int], list[int], int]
page_lists = st.lists(st.integers(0, PAGES - 1), max_size=PAGES)
steps = st.lists(
    st.tuples(page_lists, page_lists, page_lists, st.integers(0, 2)), min_size=1, max_size=14
)


@settings(max_examples=60, deadline=None)
@given(steps=steps, seed=st.integers(0, 9))
def test_every_checkpoint_is_the_memory(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step], seed: int
) -> None:
    """Whatever was written, dropped and brought back: each image equals memory, byte for byte."""
    content = patterned(PAGES, seed)
    present = set(range(0, PAGES, 1 + seed % 3))
    pick = random.Random(seed)
    path = tmp_path_factory.mktemp("increments")
    with Store.open(path, create=True) as store:
        with store.writer("0", window_pages=WINDOW_PAGES) as writer:
            writer.add_space(Memory(content), masks(present), space=0)
            writer.commit({})
        expected = []
        for number, (write, drop, bring, kind) in enumerate(steps, 1):
            written = set(write) & present
            present -= set(drop)
            present |= set(bring)
            written |= set(bring)
            for page in written:
                fresh = [bytes(PAGE_BYTES), pick.randbytes(PAGE_BYTES), b"\7" * PAGE_BYTES][kind]
                content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = fresh
            checkpoint(store, str(number), str(number - 1), content, present, written)
            whole = bytearray(PAGES * PAGE_BYTES)
            for page in present:
                at = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
                whole[at] = content[at]
            expected.append(bytes(whole))
        for number, whole_bytes in enumerate(expected, 1):
            with store.load(str(number)) as image:
                assert read_space(image, PAGES * PAGE_BYTES) == whole_bytes
        for number in range(0, len(steps), 2):  # what is left needs none of those that go
            store.remove(str(number))
        store.collect_garbage()
        for number, whole_bytes in enumerate(expected, 1):
            if number % 2:
                store.verify(str(number))
                with store.load(str(number)) as image:
                    assert read_space(image, PAGES * PAGE_BYTES) == whole_bytes


def test_an_idle_checkpoint_stores_nothing(store: Store) -> None:
    """Nothing was written: no pack grows, and all of the memory is in the image."""
    content = patterned(PAGES, 3)
    everything = set(range(PAGES))
    with store.writer("a", window_pages=WINDOW_PAGES) as writer:
        writer.add_space(Memory(content), masks(everything), space=0)
        first = writer.commit({})
    second = checkpoint(store, "b", "a", content, everything, set())
    assert second.stored_bytes == 0
    assert (second.raw_bytes, second.zero_bytes) == (first.raw_bytes, first.zero_bytes)
    assert second.reused_bytes == first.stored_bytes
    with store.load("b") as image:
        assert read_space(image, len(content)) == content
        assert image.patchwork_count == 0


def test_what_was_not_written_is_not_looked_at(store: Store) -> None:
    """Windows between those that were written are rows of the base's table, and stay its chunks."""
    content = bytearray(random.Random(4).randbytes(PAGES * PAGE_BYTES))
    everything = set(range(PAGES))
    with store.writer("a", window_pages=WINDOW_PAGES) as writer:
        writer.add_space(Memory(content), masks(everything), space=0)
        writer.commit({})
    with store.load("a") as image:
        assert plan_checkpoint(image, ranges(everything), []) == (
            ([(0, PAGES // WINDOW_PAGES)], {}, PAGES),
            [],
        )
        plan = plan_checkpoint(image, ranges(everything), ranges({2 * WINDOW_PAGES + 1}))
        assert plan.kept.rows == [(0, 2), (3, PAGES // WINDOW_PAGES)]
        assert list(plan.kept.pieces) == [2 * WINDOW_PAGES * PAGE_BYTES]
        assert plan.fresh == [(2 * WINDOW_PAGES * PAGE_BYTES, 2)]
    checkpoint(store, "b", "a", content, everything, set())
    with store.load("a") as first, store.load("b") as second:
        assert bytes(second.run_records) == bytes(first.run_records)
        assert bytes(second.chunk_records) == bytes(first.chunk_records)


def test_content_that_comes_back_is_known(store: Store) -> None:
    """A window is given what another one that was not written holds: nothing is stored for it."""
    content = bytearray(random.Random(5).randbytes(PAGES * PAGE_BYTES))
    everything = set(range(PAGES))
    with store.writer("a", window_pages=WINDOW_PAGES) as writer:
        writer.add_space(Memory(content), masks(everything), space=0)
        writer.commit({})
    size = WINDOW_PAGES * PAGE_BYTES
    content[:size] = content[3 * size : 4 * size]
    summary = checkpoint(store, "b", "a", content, everything, set(range(WINDOW_PAGES)))
    assert summary.stored_bytes == 0
    with store.load("b") as image:
        assert image.run(0)[2] == image.run(3)[2]
        assert read_space(image, len(content)) == content


def test_scattered_pages_are_stored_alone(store: Store) -> None:
    """One page of each window was written: that many pages are stored, not the windows."""
    content = bytearray(random.Random(1).randbytes(PAGES * PAGE_BYTES))
    everything = set(range(PAGES))
    with store.writer("a", window_pages=WINDOW_PAGES) as writer:
        writer.add_space(Memory(content), masks(everything), space=0)
        writer.commit({})
    written = set(range(3, PAGES, WINDOW_PAGES))
    for page in written:
        content[page * PAGE_BYTES + 5] ^= 0xFF
    summary = checkpoint(store, "b", "a", content, everything, written)
    assert summary.stored_bytes == len(written) * PAGE_BYTES
    with store.load("b") as image:
        assert read_space(image, len(content)) == content
        assert image.patchwork_count == len(written)


def test_windows_in_too_many_pieces_are_stored_anew(store: Store) -> None:
    """A page here, a page there, again and again: pieces and space kept for nothing are bounded."""
    content = bytearray(random.Random(1).randbytes(PAGES * PAGE_BYTES))
    everything = set(range(PAGES))
    with store.writer("0", window_pages=WINDOW_PAGES) as writer:
        writer.add_space(Memory(content), masks(everything), space=0)
        writer.commit({})
    for number in range(1, 40):
        content[(number * 5 % WINDOW_PAGES) * PAGE_BYTES] ^= 0xFF
        written = {number * 5 % WINDOW_PAGES}
        checkpoint(store, str(number), str(number - 1), content, everything, written)
        with store.load(str(number)) as image:
            _, mask, chunk = image.run(0)
            pieces = image.pieces(chunk, mask)
            assert len(pieces) <= MOST_PIECES
            assert sum(p.held.bit_count() for p in pieces) <= 2 * WINDOW_PAGES
            assert read_space(image, len(content)) == content


def test_garbage_inside_packs_is_given_back(store: Store) -> None:
    """Of the first image a few pages are still needed: the disk keeps little more than those."""
    content = bytearray(random.Random(1).randbytes(PAGES * PAGE_BYTES * 8))
    windows = Memory(content).windows(64)
    with store.writer("a", window_pages=64, workers=1) as writer:
        writer.add_space(Memory(content), windows, space=0)
        writer.commit({})
    half = len(windows) // 2
    changed = random.Random(2).randbytes(len(content))
    mixed = Memory(changed[: half * 64 * PAGE_BYTES] + content[half * 64 * PAGE_BYTES :])
    with store.load("a") as image, store.writer("b", window_pages=64, workers=1) as writer:
        behind = (windows[half][0], len(content))
        writer.keep([(0, image, plan_checkpoint(image, [behind], []).kept)])
        writer.add_space(mixed, windows[:half], space=0)
        writer.commit({})
    store.remove("a")
    needed = sum(mask.bit_count() for _, mask in windows) * PAGE_BYTES

    def on_disk() -> int:
        return sum(pack.stat().st_blocks * 512 for pack in (store.path / "packs").iterdir())

    before = on_disk()
    report = store.collect_garbage()
    assert report.removed_packs == 0
    assert report.hollowed_bytes == before - on_disk() > needed / 4
    assert on_disk() < needed + (64 << 10) * len(windows) // 8 + (64 << 10)
    assert store.collect_garbage().hollowed_bytes == 0
    store.verify("b")
    with store.load("b") as image:
        assert read_space(image, len(content)) == bytes(mixed.content)
    with store.writer("c", window_pages=64) as writer:  # what was given back is stored anew
        writer.add_space(Memory(content), windows, space=0)
        writer.commit({})
    store.verify("c")
    with store.load("c") as image:
        assert read_space(image, len(content)) == content


def test_a_damaged_piece_is_found(store: Store) -> None:
    """A patchwork is as authentic as its chunks: a flipped bit in any of them is Damaged."""
    content = bytearray(random.Random(1).randbytes(WINDOW_PAGES * PAGE_BYTES))
    everything = set(range(WINDOW_PAGES))
    with store.writer("a", window_pages=WINDOW_PAGES) as writer:
        writer.add_space(Memory(content), masks(everything), space=0)
        writer.commit({})
    content[0] ^= 1
    checkpoint(store, "b", "a", content, everything, {0})
    buffer = memoryview(bytearray(len(content)))
    for pack in sorted((store.path / "packs").iterdir()):
        whole = pack.read_bytes()
        spoilt = bytearray(whole)
        spoilt[32 + 8 * PAGE_BYTES if len(whole) > 9 * PAGE_BYTES else 40] ^= 1
        pack.write_bytes(spoilt)
        with store.load("b") as image, pytest.raises(Damaged):
            image.read_chunk(image.run(0)[2], buffer)
        with pytest.raises(Damaged):
            store.verify("b")
        pack.write_bytes(whole)
    store.verify("b")
