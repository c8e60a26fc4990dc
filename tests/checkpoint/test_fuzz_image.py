"""Mutated stores: whatever is flipped, cut, spliced or extended is refused, or does no harm.

No harm means: every byte that is answered is the byte that was written. Two ways lead inside:
mutations as damage makes them, which the signatures must catch, and mutations signed again with
the store's own key, which stand for a faulty writer and must meet the bounds behind them.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from memory import PAGE_BYTES, Memory, descriptors, patterned, write_image

from lzy.checkpoint.errors import Damaged, LzyError
from lzy.checkpoint.image import HEADER_BYTES, Image
from lzy.checkpoint.increment import plan_checkpoint
from lzy.checkpoint.keys import keyed_digest
from lzy.checkpoint.store import Store

CONTENT = patterned(96, seed=4)
WINDOW_BYTES = 4 * PAGE_BYTES
FIELDS_BYTES = HEADER_BYTES - 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path = tmp_path_factory.mktemp("fuzz") / "store"
    with Store.open(path, create=True) as store:
        old = bytearray(CONTENT)  # of which "one" keeps all but every fifth page
        for page in range(0, len(old) // PAGE_BYTES, 5):
            old[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes([page + 1]) * PAGE_BYTES
        write_image(store, "old", old, window_pages=4, workers=1)
        memory = Memory(CONTENT)
        written = [(at, at + PAGE_BYTES) for at in range(0, len(CONTENT), 5 * PAGE_BYTES)]
        with store.load("old") as image, store.writer("one", window_pages=4, workers=1) as writer:
            plan = plan_checkpoint(image, [(0, len(CONTENT))], written)
            writer.keep([(0, image, plan.kept)])
            writer.add_space(memory, plan.fresh, space=0)
            writer.commit({"length": len(CONTENT)})
        with store.load("one") as image:
            assert image.patchwork_count
        write_image(store, "other", patterned(200, seed=5), window_pages=16, workers=1)
        yield store


def mutate(pick: random.Random, whole: bytes, donor: bytes) -> bytes:
    """One of the things that happen to files, or that somebody makes happen to them."""
    kind = pick.randrange(8)
    mutated = bytearray(whole)
    at = pick.randrange(len(whole))
    if kind == 0:
        mutated[at] ^= 1 << pick.randrange(8)
    elif kind == 1:
        for _ in range(pick.randrange(1, 9)):
            mutated[pick.randrange(len(whole))] = pick.randrange(256)
    elif kind == 2:
        del mutated[at:]
    elif kind == 3:
        mutated += pick.randbytes(pick.randrange(1, 400))
    elif kind == 4:  # numbers at the edges
        value = pick.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1])
        struct.pack_into("<Q", mutated, min(at, len(whole) - 8) & -4, value)
    elif kind == 5:  # a piece of another file
        length = pick.randrange(1, min(500, len(donor)))
        start = pick.randrange(len(donor) - length)
        mutated[at : at + length] = donor[start : start + length]
    elif kind == 6:  # a piece lost, or doubled
        length = pick.randrange(1, 200)
        mutated[at:at] = mutated[at : at + length]
        if pick.random() < 0.5:
            del mutated[at : at + 2 * length]
    else:
        length = pick.randrange(1, 300)
        mutated[at : at + length] = bytes(len(mutated[at : at + length]))
    return bytes(mutated)


def sign(store: Store, manifest: bytes) -> bytes:
    """The same manifest with signatures that hold: what only the owner of the key can make."""
    fields, rest = manifest[:FIELDS_BYTES], manifest[HEADER_BYTES:-32]
    head = fields + keyed_digest(store.keys.manifest, b"header", fields)
    return head + rest + keyed_digest(store.keys.manifest, b"image", head + rest)


def use(image: Image) -> int:
    """Do with an image all that an engine and a pager do; answer how many right chunks it gave."""
    right = 0
    buffer = memoryview(bytearray(64 * PAGE_BYTES))
    with contextlib.suppress(LzyError):
        assert isinstance(image.document, dict)
    with contextlib.suppress(LzyError):
        image.check_packs()
    image.space_extent(0)
    image.find_run(0, 5 * WINDOW_BYTES)
    for index in range(min(image.run_count, 100)):
        address, mask, chunk = image.run(index)
        try:
            length = image.read_chunk(chunk, buffer)
        except (LzyError, IndexError):
            continue
        kept = b"".join(
            CONTENT[address + page * PAGE_BYTES : address + (page + 1) * PAGE_BYTES]
            for page in range(4)
            if mask >> page & 1
        )
        right += bytes(buffer[:length]) == kept
    return right


def test_mutated_manifests_are_refused(store: Store) -> None:
    """Two thousand damaged manifests: each is refused, whether loaded or listed."""
    pick = random.Random(1)
    path = store.path / "images" / "one.image"
    donor = (store.path / "images" / "other.image").read_bytes()
    genuine = path.read_bytes()
    before = descriptors()
    try:
        for _ in range(2000):
            mutated = mutate(pick, genuine, donor)
            if mutated == genuine:
                continue
            path.write_bytes(mutated)
            with pytest.raises(Damaged):
                store.load("one")
            store.images()
    finally:
        path.write_bytes(genuine)
    assert descriptors() == before
    store.verify("one")


def test_signed_mutations_do_no_harm(store: Store) -> None:
    """Two thousand manifests that are wrong but rightly signed: refused, or only right bytes.

    Every content that is answered is one that was written under that id; a run may be said to lie
    elsewhere by whoever has the key, which is why a count of right ones is all that is asked.
    """
    pick = random.Random(2)
    genuine = (store.path / "images" / "one.image").read_bytes()
    donor = (store.path / "images" / "other.image").read_bytes()
    outcomes = {"refused": 0, "used": 0}
    before = descriptors()
    for _ in range(2000):
        mutated = mutate(pick, genuine, donor)
        if len(mutated) < HEADER_BYTES + 32:
            continue
        packs = os.dup(store.packs)
        try:
            image = Image(sign(store, mutated), store.keys, packs, name="one")
        except Damaged:
            os.close(packs)
            outcomes["refused"] += 1
            continue
        with image:
            use(image)
        outcomes["used"] += 1
    assert descriptors() == before
    assert min(outcomes.values()) > 300, "the mutations no longer reach what they should test"


def test_mutated_packs_are_refused_or_harmless(store: Store) -> None:
    """Two thousand damaged packs: what is answered is right, the rest is refused by name."""
    pick = random.Random(3)
    with store.load("one") as image:
        pack = image.packs[0][0]
        whole = use(image)
    path = store.path / "packs" / f"{pack.hex()}.pack"
    donor_path = min(set((store.path / "packs").iterdir()) - {path})
    genuine, donor = path.read_bytes(), donor_path.read_bytes()
    before = descriptors()
    noticed = 0
    try:
        for _ in range(2000):
            mutated = mutate(pick, genuine, donor)
            path.write_bytes(mutated)
            store.known_chunks()  # what a new dump would do: skip it, never fail
            try:
                image = store.load("one")
            except Damaged:
                noticed += 1
                continue
            buffer = memoryview(bytearray(64 * PAGE_BYTES))
            with image:
                for index in range(image.run_count):
                    address, mask, chunk = image.run(index)
                    try:
                        length = image.read_chunk(chunk, buffer)
                    except Damaged:
                        noticed += 1
                        continue
                    pages = [page for page in range(4) if mask >> page & 1]
                    assert bytes(buffer[:length]) == b"".join(
                        CONTENT[address + page * PAGE_BYTES : address + (page + 1) * PAGE_BYTES]
                        for page in pages
                    )
    finally:
        path.write_bytes(genuine)
    assert noticed > 1500
    assert descriptors() == before
    with store.load("one") as image:
        assert use(image) == whole


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_bytes_for_a_manifest(store: Store, data: st.DataObject) -> None:
    """Arbitrary bytes, also arbitrary fields under a right signature, are only ever refused."""
    genuine = (store.path / "images" / "one.image").read_bytes()
    draw: dict[str, Callable[[], bytes]] = {
        "bytes": lambda: data.draw(st.binary(max_size=600)),
        "fields": lambda: (
            genuine[:8]
            + data.draw(st.binary(min_size=FIELDS_BYTES - 8, max_size=FIELDS_BYTES - 8))
            + genuine[FIELDS_BYTES:]
        ),
        "known version": lambda: (
            genuine[:16]
            + data.draw(st.binary(min_size=FIELDS_BYTES - 16, max_size=FIELDS_BYTES - 16))
            + genuine[FIELDS_BYTES:]
        ),
    }
    manifest = draw[data.draw(st.sampled_from(sorted(draw)))]()
    if data.draw(st.booleans()) and len(manifest) > HEADER_BYTES + 32:
        manifest = sign(store, manifest)
    packs = os.dup(store.packs)
    try:
        image = Image(manifest, store.keys, packs, name="one")
    except Damaged:
        os.close(packs)
        return
    with image:
        use(image)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
def test_any_bytes_for_a_configuration(store: Store, text: bytes) -> None:
    """Arbitrary bytes in place of config.json are Damaged, nothing else."""
    path = store.path / "config.json"
    genuine = path.read_bytes()
    try:
        path.write_bytes(text)
        with pytest.raises(Damaged):
            Store.open(store.path)
    finally:
        path.write_bytes(genuine)
