"""Memory that no account is kept of, compared with an image: against comparing page by page."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from memory import PAGE_BYTES, Memory, patterned

from lzy.checkpoint.linux.hugepages import HUGE_PAGE_BYTES
from lzy.checkpoint.pages import present_pages
from lzy.checkpoint.recheck import recheck
from lzy.checkpoint.store import Store

UNIT_PAGES = HUGE_PAGE_BYTES // PAGE_BYTES
UNITS, WINDOW_PAGES = 3, 64
PAGES = UNITS * UNIT_PAGES
CONTENT = patterned(PAGES, 4)
ZERO = bytes(PAGE_BYTES)

counts = st.sampled_from([0, 1, 3, 40, 200, 256, 300, 511])


def page_of(content: bytes | bytearray, page: int) -> bytes:
    return bytes(content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])


def masks(present: set[int]) -> list[tuple[int, int]]:
    """Pages as windows."""
    found: dict[int, int] = {}
    for page in sorted(present):
        address = page // WINDOW_PAGES * WINDOW_PAGES * PAGE_BYTES
        found[address] = found.get(address, 0) | 1 << page % WINDOW_PAGES
    return list(found.items())


def pages_in(ranges: list[tuple[int, int]]) -> set[int]:
    return {page for start, end in ranges for page in range(start // PAGE_BYTES, end // PAGE_BYTES)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with an image, `it`, of which every seventh page is missing."""
    with Store.open(tmp_path_factory.mktemp("recheck") / "store", create=True) as store:
        with store.writer("it", window_pages=WINDOW_PAGES) as writer:
            before = set(range(PAGES)) - set(range(0, PAGES, 7))
            writer.add_space(Memory(CONTENT), masks(before), space=0)
            writer.commit({})
        yield store


@settings(max_examples=40, deadline=None)
@given(
    changes=st.tuples(counts, counts, counts),
    gone=st.sets(st.integers(0, PAGES - 1), max_size=40),
    in_a_row=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pages_are_the_same_or_not(
    store: Store, changes: tuple[int, int, int], gone: set[int], in_a_row: bool, seed: int
) -> None:
    """No page that differs is called the same; all that are, unless their unit is dense."""
    pick = random.Random(seed)
    content = bytearray(CONTENT)
    for unit, count in enumerate(changes):
        first = pick.randrange(UNIT_PAGES - count + 1)
        places = range(first, first + count)
        for place in places if in_a_row else pick.sample(range(UNIT_PAGES), count):
            at = (unit * UNIT_PAGES + place) * PAGE_BYTES
            content[at + pick.randrange(PAGE_BYTES)] ^= 1 + pick.randrange(255)
    present = set(range(PAGES)) - gone
    with store.load("it") as image:
        stored = {
            address // PAGE_BYTES + bit
            for address, mask, _ in map(image.run, range(*image.space_extent(0)))
            for bit in present_pages(mask)
        }
        found = recheck(image, Memory(content), masks(present))
    alike = {page for page in stored & present if page_of(content, page) == page_of(CONTENT, page)}
    zeros = {page for page in present - stored if page_of(content, page) == ZERO}
    same, dense = pages_in(found.same), pages_in(found.dense)
    assert same <= alike
    assert alike - same <= dense
    for unit in range(UNITS):
        mine = set(range(unit * UNIT_PAGES, (unit + 1) * UNIT_PAGES)) & present
        head = set(range(unit * UNIT_PAGES, unit * UNIT_PAGES + WINDOW_PAGES)) & present
        changed = mine - alike - zeros
        is_dense = 2 * len(changed) >= len(mine) or 2 * len(changed & head) >= len(head)
        assert (unit * UNIT_PAGES in dense) == is_dense


def test_what_cannot_be_read_is_not_the_same(store: Store, tmp_path: Path) -> None:
    """Nothing is compared with a chunk that does not authenticate."""
    with Store.open(tmp_path / "other", create=True) as other:
        with other.writer("it", window_pages=WINDOW_PAGES) as writer:
            writer.add_space(Memory(CONTENT), masks(set(range(UNIT_PAGES))), space=0)
            writer.commit({})
        everything = masks(set(range(UNIT_PAGES)))
        with other.load("it") as image:
            whole = recheck(image, Memory(CONTENT), everything)
        for pack in (tmp_path / "other" / "packs").glob("*.pack"):
            raw = bytearray(pack.read_bytes())
            raw[len(raw) // 2 : len(raw) * 3 // 4] = bytes(len(raw) * 3 // 4 - len(raw) // 2)
            pack.write_bytes(raw)
        with other.load("it") as image:
            found = recheck(image, Memory(CONTENT), everything)
    assert not whole.dense
    assert pages_in(found.same) < pages_in(whole.same)
