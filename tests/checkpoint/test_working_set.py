"""The order of need: learnt at a wake, kept with the image, followed at the next; only a hint."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import select
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from memory import patterned, write_image
from test_pager import (
    BASE,
    PATIENCE_S,
    Channel,
    FileImage,
    MakePaged,
    Memory,
    Paged,
    libc,
    paged,
)

from lzy.checkpoint import supply, working_set
from lzy.checkpoint.course import Course
from lzy.checkpoint.errors import StoreUnavailable
from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.missing import MissingPages
from lzy.checkpoint.pager import resume_pager, start_pager
from lzy.checkpoint.store import Store
from lzy.checkpoint.windows import Windows
from lzy.checkpoint.working_set import (
    inherit_order,
    merge_order,
    order_windows,
    read_order,
    seed_order,
    write_order,
)

__all__ = ["paged"]  # the fixture

WINDOW_PAGES = 16
WINDOW_BYTES = WINDOW_PAGES * PAGE_BYTES


# -- the rules


@pytest.mark.parametrize(
    ("known", "needed", "merged"),
    [
        ([], {5: 0, 3: 0, 4: 0}, [5, 3, 4]),
        ([1, 2, 3], {}, [1, 2, 3]),
        ([1, 2, 3, 4], {4: 1}, [1, 4, 2, 3]),  # wanted before the second was in
        ([1, 2, 3, 4], {9: 2, 8: 2}, [1, 2, 9, 8, 3, 4]),
        ([1, 2, 3, 4], {2: 3}, [1, 2, 3, 4]),  # known to be earlier already: taken back since
        ([1, 2], {7: 2, 6: 9}, [1, 2, 7, 6]),  # behind all that was known
        ([1, 1, 2], {3: 3}, [1, 2, 3]),  # a forged order names windows twice
    ],
)
def test_what_was_asked_for_goes_before_what_had_not_come(
    known: list[int], needed: dict[int, int], merged: list[int]
) -> None:
    """A window asked for goes where the stream was then; all others keep their order."""
    assert merge_order(known, needed) == merged


def test_a_wake_drops_no_more_than_it_teaches() -> None:
    """Of the windows that were held back for nothing, as many go as others were asked for."""
    known = list(range(100))
    assert merge_order(known, {}, [3, 4, 5]) == known
    assert merge_order(known, {200: 0, 201: 0}, [3, 4, 5]) == [200, 201, 0, 1, 2, *range(5, 100)]


def test_packs_are_laid_out_in_the_order_of_need() -> None:
    """Known windows first and in that order, the others as they were; none lost, none twice."""
    windows = [(address, address + 1) for address in range(0, 80, 10)]
    found = order_windows(windows, [50, 999, 20, 50])
    assert found[:2] == [(50, 51), (20, 21)]
    assert found[2:] == [window for window in windows if window[0] not in (50, 20)]


def test_an_order_is_inherited_and_joined_with_what_was_dirtied(tmp_path: Path) -> None:
    """A later image of the same process begins with what is known; what was dirtied follows."""
    with Store.open(tmp_path / "store", create=True) as store:
        inherit_order(store, "nothing", "two")
        assert read_order(store.path, "two") == []
        write_order(store.path, "one", [30, 10])
        inherit_order(store, "one", "two")
        seed_order(store, "two", [10, 20])
        seed_order(store, "three", [7])
        assert read_order(store.path, "two") == [30, 10, 20]
        assert read_order(store.path, "one") == [30, 10]
        assert read_order(store.path, "three") == [7]


def test_a_hint_goes_with_its_image(tmp_path: Path) -> None:
    """Removing an image removes its hint; a collection removes hints that no image has."""
    with Store.open(tmp_path / "store", create=True) as store:
        for name in ("one", "two"):
            write_image(store, name, patterned(64, 1))
            write_order(store.path, name, [1, 2, 3])
        store.remove("one")
        assert sorted(os.listdir(store.path / "hints")) == ["two.order"]
        write_order(store.path, "gone", [1])
        (store.path / "hints" / ".two.4711").write_bytes(b"a draft whose pager was killed")
        assert store.collect_garbage().removed_temporaries == 2
        assert sorted(os.listdir(store.path / "hints")) == ["two.order"]
        assert read_order(store.path, "two") == [1, 2, 3]


WHOLE = b"LZYORDER" + struct.pack("<II3Q", 1, 3, 1, 2, 3)
NO_HINTS = {
    "empty": b"",
    "cut": WHOLE[:-1],
    "longer": WHOLE + b"\0",
    "header only": WHOLE[:16],
    "half a header": WHOLE[:11],
    "another version": WHOLE[:8] + b"\2" + WHOLE[9:],
    "something else": b"LZYIMAGE" + WHOLE[8:],
    "count forged": WHOLE[:12] + b"\xff\xff\xff\xff" + WHOLE[16:],
}


@pytest.mark.parametrize("content", NO_HINTS.values(), ids=NO_HINTS)
def test_what_is_no_hint_is_none(tmp_path: Path, content: bytes) -> None:
    """A file that is not exactly a hint is read as no hint, and can be replaced by one."""
    assert read_order(tmp_path, "image") == []
    (tmp_path / "hints").mkdir()
    place = tmp_path / "hints" / "image.order"
    place.write_bytes(WHOLE)
    assert read_order(tmp_path, "image") == [1, 2, 3]
    place.write_bytes(content)
    assert read_order(tmp_path, "image") == []
    write_order(tmp_path, "image", [9])
    assert place.read_bytes() == b"LZYORDER" + struct.pack("<IIQ", 1, 1, 9)


def test_a_hint_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More windows than a hint may have are not written, and not read."""
    monkeypatch.setattr(working_set, "MOST_WINDOWS", 4)
    write_order(tmp_path, "image", list(range(10)))
    assert read_order(tmp_path, "image") == [0, 1, 2, 3]
    body = struct.pack("<II5Q", 1, 5, *range(5))
    (tmp_path / "hints" / "image.order").write_bytes(b"LZYORDER" + body)
    assert read_order(tmp_path, "image") == []


# -- the course


class Tables:
    """The tables of an image whose windows are all full, at these numbers of windows."""

    window_pages = WINDOW_PAGES

    def __init__(self, numbers: set[int]) -> None:
        records = [(n * WINDOW_BYTES, 0xFFFF, i) for i, n in enumerate(sorted(numbers))]
        self.runs = memoryview(b"".join(struct.pack("<3Q", *record) for record in records)).cast(
            "Q"
        )
        self._count = len(records)

    def space_extent(self, space: int) -> tuple[int, int]:
        return 0, self._count

    def read_chunk(self, chunk: int, into: memoryview) -> int:
        raise AssertionError

    def close(self) -> None:
        pass


PAGES = st.integers(0, 30 * WINDOW_PAGES)


@settings(max_examples=300, deadline=None)
@given(
    stored=st.sets(st.integers(0, 30)),
    pieces=st.lists(st.tuples(PAGES, PAGES, st.sampled_from([0, 0, 16, 3])), max_size=6),
    order=st.lists(
        st.one_of(
            st.integers(0, 31).map(lambda n: n * WINDOW_BYTES),
            st.integers(0, (1 << 64) - 1),
        ),
        max_size=40,
    ),
    touched=st.lists(PAGES, max_size=12),
)
def test_a_course_comes_to_everything(
    stored: set[int], pieces: list[tuple[int, int, int]], order: list[int], touched: list[int]
) -> None:
    """Whatever an order names and wherever walks lead: all that is stored is proposed, and soon."""
    missing = MissingPages()
    for first, last, shift in pieces:
        missing.add(
            min(first, last) * PAGE_BYTES, max(first, last) * PAGE_BYTES, shift * PAGE_BYTES
        )
    windows = Windows(Tables(stored))  # type: ignore[arg-type]  # as much as is asked
    wanted = {
        page
        for start, end, shift in missing
        for page in range(start, end, PAGE_BYTES)
        if (page + shift) // WINDOW_BYTES in stored
    }
    course = Course(missing, order)
    ends = 0
    for turn in range(1000):
        if turn % 3 == 0 and touched:
            page = touched.pop() * PAGE_BYTES
            low = page & -WINDOW_BYTES
            course.follow(page, low, low + WINDOW_BYTES, WINDOW_BYTES)
        step = course.next(windows)
        if step is None:
            ends += 1
            if not missing or ends > 2:
                break
            continue
        assert step.address < step.end
        wanted -= set(range(step.address, step.end, PAGE_BYTES))
        missing.forget(step.address, step.end)
    assert not wanted
    assert not missing


def test_a_walk_is_followed_twice_as_far_each_time() -> None:
    """Two walks at once: each is found again, and gone ahead of by 2, 4, 8 windows."""
    missing = MissingPages()
    missing.add(0, 1000 * WINDOW_BYTES)
    windows = Windows(Tables(set(range(1000))))  # type: ignore[arg-type]  # as much as is asked
    course = Course(missing)

    def fault(number: int) -> list[int]:
        low = number * WINDOW_BYTES
        missing.forget(low, low + WINDOW_BYTES)
        course.follow(low, low, low + WINDOW_BYTES, WINDOW_BYTES)
        found = []
        while (step := course.next(windows)) is not None and step.place < 0:
            found.append(step.number)
            missing.forget(step.address, step.end)
        course.restart()
        return found

    assert fault(100) == []
    assert fault(500) == []
    assert fault(101) == [102, 103]
    assert fault(501) == [502, 503]
    assert fault(104) == [105, 106, 107, 108]
    assert fault(504) == [505, 506, 507, 508]
    assert fault(300) == []
    assert fault(109) == list(range(110, 118))


# -- the pager


class GatedImage(FileImage):
    """Readers, but not the pager itself, wait until the file `open` is there; reads are noted."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._gate = path.with_suffix(".open")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._log = os.open(path.with_suffix(".reads"), flags, 0o600)

    def descriptors(self) -> list[int]:
        return [*super().descriptors(), self._log]

    def read_chunk(self, chunk: int, into: memoryview) -> int:
        with open("/proc/self/comm") as comm:
            if comm.read() == "lzy-reader\n":
                while not self._gate.exists():
                    time.sleep(0.001)
        os.write(self._log, struct.pack("<Q", chunk))
        return super().read_chunk(chunk, into)

    def close(self) -> None:
        super().close()
        os.close(self._log)


def open_gated_image(store: str, image: str) -> GatedImage:
    try:
        return GatedImage(Path(store) / image)
    except OSError as error:
        raise StoreUnavailable(f"cannot open {image}: {error.strerror}") from error


def page_gated(process: Paged) -> None:
    """As `Paged.page`, with readers that wait."""
    image = GatedImage(process.image.path)
    process.pager_pid = start_pager(
        process.plan(), process.uffd, process.pidfd, image, open_image=open_gated_image
    )
    image.close()
    os.close(process.uffd)
    process.uffd = -1
    process.channel.say()


def open_gate(process: Paged) -> None:
    process.image.path.with_suffix(".open").touch()


def chunks_read(process: Paged) -> list[int]:
    content = process.image.path.with_suffix(".reads").read_bytes()
    return [number for (number,) in struct.iter_unpack("<Q", content)]


def window_at(number: int) -> int:
    return BASE + number * WINDOW_BYTES


def scattered(count: int, windows: int, seed: int) -> list[int]:
    """Numbers of windows in an order in which no two look like a walk."""
    numbers = list(range(0, windows, 6))
    random.Random(seed).shuffle(numbers)
    order = numbers[:count]
    while any(0 <= b - a <= 12 for i, a in enumerate(order) for b in order[i + 1 : i + 9]):
        random.Random(seed := seed + 1).shuffle(numbers)
        order = numbers[:count]
    return order


def touching(numbers: list[int]) -> object:
    def script(memory: Memory, channel: Channel) -> None:
        for number in numbers:
            memory.check(number * WINDOW_PAGES + 3)
        channel.say(b"touched")
        channel.hear()
        memory.check_all()

    return script


def find_readers(pager: int) -> list[int]:
    with open(f"/proc/{pager}/task/{pager}/children") as children:
        return [int(pid) for pid in children.read().split()]


def test_the_order_of_touches_is_learnt(paged: MakePaged) -> None:
    """What a program asked for, in the order in which it did, stands in the hint afterwards."""
    touched = scattered(12, 512, 1)
    process = paged(touching(touched), pages=512 * WINDOW_PAGES, holes=False)
    page_gated(process)
    assert process.hear() == b"touched"
    assert read_order(process.store, "image") == []
    open_gate(process)
    process.expect_pager_gone()
    assert read_order(process.store, "image") == [window_at(number) for number in touched]
    process.channel.say()
    process.expect_done()


def test_a_known_order_is_brought_in_first(
    paged: MakePaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything else, in that order but for what is held back; then all the rest."""
    monkeypatch.setattr(supply, "_MOST_READERS", 1)  # two may be a ring of slots apart
    numbers = list(range(256))
    random.Random(2).shuffle(numbers)
    order = numbers[:64]
    process = paged(touching([]), pages=256 * WINDOW_PAGES, holes=False)
    write_order(process.store, "image", [window_at(number) for number in order])
    open_gate(process)
    page_gated(process)
    process.expect_pager_gone()
    reads = chunks_read(process)
    assert sorted(reads) == list(range(256))
    held_back = reads[-2:]  # of 64
    assert reads[:62] == [number for number in order if number not in held_back]
    assert reads[62:-2] == [number for number in range(256) if number not in order]
    assert read_order(process.store, "image") == [window_at(number) for number in order]
    assert process.hear() == b"touched"
    process.channel.say()
    process.expect_done()


def test_what_is_asked_for_before_it_came_moves_to_the_front(paged: MakePaged) -> None:
    """New windows join the order, where the stream was when they were asked for."""
    known = scattered(40, 512, 3)
    touched = [number + 2 for number in scattered(5, 400, 4)]
    process = paged(touching(touched), pages=512 * WINDOW_PAGES, holes=False)
    write_order(process.store, "image", [window_at(number) for number in known])
    page_gated(process)
    assert process.hear() == b"touched"
    open_gate(process)
    process.expect_pager_gone()
    learnt = read_order(process.store, "image")
    assert learnt[:5] == [window_at(number) for number in touched]
    # What was held back and not asked for is dropped, one or two of forty; the others stay.
    kept = [window_at(number) for number in known]
    assert [window for window in kept if window in learnt] == learnt[5:]
    assert 38 <= len(learnt) - 5 < 40
    process.channel.say()
    process.expect_done()


FORGED = {
    "nonsense": [random.Random(n).randrange(1 << 64) for n in range(3000)],
    "one window a thousand times": [BASE] * 1000,
    "between windows": [BASE + 64 * n + 1 for n in range(5000)],
    "around the image": [0, BASE - WINDOW_BYTES, BASE + (1 << 30), (1 << 64) - 1],
}


@pytest.mark.parametrize("order", FORGED.values(), ids=FORGED)
def test_a_forged_order_costs_no_byte(paged: MakePaged, order: list[int]) -> None:
    """Whatever a hint names, all bytes are as in the image and the pager leaves."""

    def script(memory: Memory, channel: Channel) -> None:
        memory.check_all(memory.shuffled())

    process = paged(script)
    write_order(process.store, "image", order)
    process.page()
    process.expect_done()
    process.expect_pager_gone()


def test_an_order_that_cannot_be_kept_is_forgotten(paged: MakePaged) -> None:
    """A store that takes no hint: the wake is as it would be."""

    def script(memory: Memory, channel: Channel) -> None:
        memory.check_all(memory.shuffled())

    process = paged(script)
    (process.store / "hints").write_bytes(b"no folder")
    process.page()
    process.expect_done()
    process.expect_pager_gone()


def test_memory_that_was_moved_is_found_though_the_order_names_its_old_place(
    paged: MakePaged,
) -> None:
    """The order names addresses of the image; what lies elsewhere by now comes with the rest."""
    elsewhere = BASE + (1 << 40)
    length = 64 * WINDOW_BYTES

    def script(memory: Memory, channel: Channel) -> None:
        assert libc.mremap(BASE, length, length, 3, elsewhere) == elsewhere
        channel.say(b"moved")
        channel.hear()
        for page in memory.shuffled():
            inside = page < 64 * WINDOW_PAGES
            memory.check(page, elsewhere + page * PAGE_BYTES if inside else None)

    process = paged(script)
    write_order(process.store, "image", [window_at(n) for n in range(100, -1, -1)])
    page_gated(process)
    assert process.hear() == b"moved"
    open_gate(process)
    process.expect_pager_gone()
    process.channel.say()
    process.expect_done()


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("killed", ["none", "first", "all"])
def test_readers_may_die(
    paged: MakePaged, readers: int, killed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are and whichever is killed in the midst of reading: all bytes arrive."""
    monkeypatch.setattr(supply, "_MOST_READERS", readers)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def script(memory: Memory, channel: Channel) -> None:
        channel.hear()
        memory.check_all(memory.shuffled())

    process = paged(script)
    page_gated(process)
    deadline = time.monotonic() + PATIENCE_S
    while len(found := find_readers(process.pager_pid)) < readers:
        assert time.monotonic() < deadline
    ends = [os.pidfd_open(pid) for pid in found]
    for end in {"none": [], "first": ends[:1], "all": ends}[killed]:
        with contextlib.suppress(ProcessLookupError):  # the pager ends all when it misses one
            signal.pidfd_send_signal(end, signal.SIGKILL)
    if killed != "none":  # the pager puts others in the place of all of them
        for end in ends:
            assert select.select([end], [], [], PATIENCE_S)[0]
    for end in ends:
        os.close(end)
    open_gate(process)
    process.expect_pager_gone()
    process.channel.say()
    process.expect_done()


def test_a_pager_that_takes_over_follows_the_order(paged: MakePaged) -> None:
    """All of lzy is killed in the midst of the order: all bytes arrive, and an order is kept."""
    touched = scattered(8, 128, 6)

    def script(memory: Memory, channel: Channel) -> None:
        for number in touched[:4]:
            memory.check(number * WINDOW_PAGES)
        channel.say(b"touched")
        channel.hear()
        for number in touched[4:]:
            memory.check(number * WINDOW_PAGES)
        channel.say(b"touched")
        channel.hear()
        memory.check_all()

    process = paged(script, pages=128 * WINDOW_PAGES, holes=False)
    write_order(process.store, "image", [window_at(number) for number in touched])
    page_gated(process)
    assert process.hear() == b"touched"
    process.kill("both", resume=False)
    resume_pager(process.pid, open_image=open_gated_image)
    process.channel.say()
    assert process.hear() == b"touched"
    open_gate(process)
    process.expect_pager_gone()
    assert set(read_order(process.store, "image")) <= {window_at(number) for number in touched}
    assert len(read_order(process.store, "image")) >= 4
    process.channel.say()
    process.expect_done()


def huge_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/smaps") as smaps:
        inside = False
        for line in smaps:
            if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
                inside = int(line.split("-")[0], 16) == BASE
            elif inside and line.startswith("AnonHugePages:"):
                return int(line.split()[1]) * 1024
    return 0


@pytest.mark.parametrize("asked", [True, False])
def test_huge_pages_come_back_where_they_were_asked_for(paged: MakePaged, asked: bool) -> None:
    """Behind the wake, pages that are all there become huge ones; the bytes stay."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    if "[madvise]" not in setting:
        pytest.fail(f"this test needs huge pages on request (madvise), they are {setting.strip()}")

    def script(memory: Memory, channel: Channel) -> None:
        if asked:
            assert libc.madvise(BASE, memory.pages * PAGE_BYTES, mmap.MADV_HUGEPAGE) == 0
        channel.say(b"ready")
        channel.hear()
        memory.check_all()

    process = paged(script, pages=2048, holes=False)
    page_gated(process)
    assert process.hear() == b"ready"
    end = os.pidfd_open(process.pager_pid)
    open_gate(process)
    assert select.select([end], [], [], PATIENCE_S)[0]
    os.close(end)
    assert huge_bytes(process.pid) == (2048 * PAGE_BYTES if asked else 0)
    process.channel.say()
    process.expect_done()
