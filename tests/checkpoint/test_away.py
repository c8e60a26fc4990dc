"""Processes that doze, dumped and sent to doze again as they are, against all of their memory.

A child does as it is told (see `deeds`) while its memory goes and comes back; an image of it must
have every byte that the child would see, those that are away included.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from deeds import BASE, DEEDS, PAGES, remap, rewrite, write
from oracle import untouched
from test_tracking import Subject

from lzy.checkpoint import doze as engine
from lzy.checkpoint import proc, warm
from lzy.checkpoint.away import find_doze, hold_pager, is_unroused, read_away
from lzy.checkpoint.content import join_ranges, own_page_ranges, subtract
from lzy.checkpoint.dump import DumpReport, dump
from lzy.checkpoint.errors import Busy, LzyError
from lzy.checkpoint.home import run_directory
from lzy.checkpoint.image import Image
from lzy.checkpoint.journal import journal_path, read_status
from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.linux.memory import read_process
from lzy.checkpoint.pager import resume_pager
from lzy.checkpoint.pages import present_pages

EXAMPLES = int(os.environ.get("LZY_TEST_EXAMPLES", "6"))
PATIENCE_S = 30.0


class Dozer(Subject):
    """A child that dozes now and then."""

    def doze(self) -> engine.DozeReport:
        return engine.doze(self.pid, self.store, name="it")

    def rouse(self) -> None:
        """Have all of its memory come back, and wait for it."""
        engine.begin_to_rouse(self.pid)
        deadline = time.monotonic() + PATIENCE_S
        while self.is_served():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def is_served(self) -> bool:
        """Whether a pager has yet to leave it."""
        return journal_path(run_directory(), self.pid).exists()

    def resident_bytes(self) -> int:
        return engine.resident_bytes(self.pid)

    def read(self, address: int, length_bytes: int = PAGE_BYTES) -> bytes:
        """Its memory as it sees it; what is away comes in. (/proc/PID/mem gives EIO for that.)"""
        content = memoryview(bytearray(length_bytes))
        try:
            read_process(self.pid, [(address, length_bytes)], content)
        except OSError:  # PROT_NONE, then: that can only be read by /proc/PID/mem
            with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
                memory.seek(address)
                return memory.read(length_bytes)
        return bytes(content)

    def glance(self, image: Image, pick: random.Random | None) -> None:
        """Compare what is there with the image, and some of what is away; None: all of it.

        To look at what is away brings it in.
        """
        buffer = memoryview(bytearray(image.window_pages * PAGE_BYTES))
        there = join_ranges(own_page_ranges(self.pid, proc.mappings(self.pid)))
        seen = []
        for index in range(*image.space_extent(0)):
            address, mask, chunk = image.run(index)
            image.read_chunk(chunk, buffer)
            for number, bit in enumerate(present_pages(mask)):
                page = address + bit * PAGE_BYTES
                seen.append((page, page + PAGE_BYTES))
                away = bool(subtract([seen[-1]], there))
                if away and pick is not None and pick.randrange(50):
                    continue
                mine = buffer[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
                assert self.read(page) == mine, f"{page:#x} differs ({away = })"
        for start, end in subtract(there, join_ranges(seen)):  # pages of zeros are not stored
            assert self.read(start, end - start) == b"".join(
                map(untouched, range(start, end, PAGE_BYTES))
            ), f"the image lacks {start:#x}-{end:#x}"

    def checkpoint_glanced(self, pick: random.Random | None) -> DumpReport:
        report = dump(self.pid, self.store, name="it", leave_running=True)
        with self.store.load(report.image) as image:
            self.glance(image, pick)
        return report

    def close(self) -> None:
        super().close()
        deadline = time.monotonic() + PATIENCE_S
        while self.is_served():
            assert time.monotonic() < deadline, "a pager stays behind"
            time.sleep(0.005)


@pytest.fixture
def dozer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dozer]:
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    dozer = Dozer(tmp_path)
    try:
        yield dozer
    finally:
        dozer.close()


plans = st.lists(
    st.tuples(
        st.sampled_from(range(len(DEEDS))),
        st.integers(0, 1 << 30),
        st.sampled_from(["", "", "doze", "doze", "checkpoint", "rouse", "kill"]),
    ),
    min_size=1,
    max_size=14,
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(plan=plans, seed=st.integers(0, 1 << 30))
def test_what_dozes_is_dumped_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    plan: list[tuple[int, int, str]],
    seed: int,
) -> None:
    """Deeds, dozes, checkpoints, rouses and killed pagers in any order: nothing is missed."""
    folder = tmp_path_factory.mktemp("dozer")
    monkeypatch.setenv("LZY_HOME", str(folder / "home"))
    dozer = Dozer(folder)
    pick = random.Random(seed)
    try:
        dozer.doze()
        for deed, deed_seed, then in plan:
            dozer.do(DEEDS[deed], deed_seed)
            if then == "doze":
                dozer.doze()
            elif then == "checkpoint":
                dozer.checkpoint_glanced(pick)
            elif then == "rouse" and engine.is_dozing(dozer.pid):
                dozer.rouse()
            elif then == "kill":
                kill_pager(dozer)
        dozer.checkpoint_glanced(None)
    finally:
        dozer.close()


def kill_pager(dozer: Dozer) -> None:
    """kill -9 of pager and keeper, if there are any, and another takes over."""
    ends = []
    with contextlib.suppress(LzyError):  # it has left by now
        status = read_status(journal_path(run_directory(), dozer.pid))[1]
        for pid in status[:2]:
            with contextlib.suppress(OSError):
                ends.append(os.pidfd_open(pid))
                signal.pidfd_send_signal(ends[-1], signal.SIGKILL)
    for end in ends:
        assert select.select([end], [], [], PATIENCE_S)[0]
        os.close(end)
    with contextlib.suppress(Busy):  # the keeper had just started another
        if dozer.is_served():
            resume_pager(dozer.pid)


def test_a_dozing_process_is_dumped_without_being_roused(dozer: Dozer) -> None:
    """A checkpoint of what dozes reads what was written; what is away stays away, and is in it."""
    dozer.doze()
    dozer.do(write, 3)
    before = dozer.resident_bytes()
    report = dump(dozer.pid, dozer.store, name="it", leave_running=True)
    assert report.base == "it"
    assert report.written_bytes < report.raw_bytes / 4
    assert not report.notes
    assert dozer.resident_bytes() < before + 64 * PAGE_BYTES
    with dozer.store.load(report.image) as image:
        dozer.glance(image, None)


def test_what_came_back_unwritten_goes_without_being_stored(dozer: Dozer) -> None:
    """Reading all of the memory and dozing again: next to nothing is stored, and it all goes."""
    first = dozer.doze()
    dozer.read(BASE, PAGES * PAGE_BYTES)
    written_once = PAGES // 2 * PAGE_BYTES
    assert dozer.resident_bytes() >= first.resident_after_bytes + written_once
    again = dozer.doze()
    assert again.dropped_bytes >= written_once
    assert again.stored_bytes < 32 * PAGE_BYTES
    assert dozer.resident_bytes() < first.resident_after_bytes + 64 * PAGE_BYTES
    dozer.checkpoint_glanced(None)


def test_what_comes_back_each_time_is_left_there(dozer: Dozer) -> None:
    """Touched after each doze, as by a heartbeat: at the third it stays, sometime it goes again."""
    part, length_bytes = BASE + 64 * PAGE_BYTES, 100 * PAGE_BYTES
    came_back = []
    for _ in range(12):
        dozer.doze()
        before = dozer.resident_bytes()
        dozer.read(part, length_bytes)
        came_back.append(dozer.resident_bytes() - before)
    assert min(came_back[:2]) > length_bytes // 3  # every second page has been written to
    assert max(came_back[2:7]) < length_bytes // 10
    assert max(came_back[7:]) > length_bytes // 3
    dozer.checkpoint_glanced(None)


def test_who_works_between_dozes_keeps_nothing(
    dozer: Dozer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a heartbeat comes back: all of it goes each time."""
    monkeypatch.setattr(warm, "MOST_BYTES", 64 * PAGE_BYTES)
    for _ in range(4):
        dozer.doze()
        left = dozer.resident_bytes()
        dozer.read(BASE, PAGES * PAGE_BYTES)
        assert dozer.resident_bytes() - left > PAGES // 3 * PAGE_BYTES


def test_what_was_moved_while_it_dozed_is_not_taken_for_what_it_was(dozer: Dozer) -> None:
    """Memory that came back, moved, and was never written: it is stored where it is now."""
    dozer.doze()
    dozer.read(BASE, PAGES * PAGE_BYTES)
    for seed in range(5):
        dozer.do(remap, seed)
    dozer.checkpoint_glanced(random.Random(1))
    dozer.doze()
    dozer.checkpoint_glanced(None)


def test_the_end_of_what_dozes(dozer: Dozer) -> None:
    """Hibernating stores next to nothing; the pager leaves by itself, and the image is whole."""
    dozer.doze()
    dozer.do(write, 9)
    content = dozer.read(BASE, PAGES * PAGE_BYTES)
    dozer.doze()
    report = dump(dozer.pid, dozer.store, name="it")
    assert report.stored_bytes < 32 * PAGE_BYTES
    dozer.store.verify(report.image)
    buffer = memoryview(bytearray(64 * PAGE_BYTES))
    with dozer.store.load(report.image) as image:
        found = bytearray(PAGES * PAGE_BYTES)
        for index in range(*image.space_extent(0)):
            address, mask, chunk = image.run(index)
            image.read_chunk(chunk, buffer)
            for number, bit in enumerate(present_pages(mask)):
                at = address + bit * PAGE_BYTES - BASE
                if 0 <= at < len(found):
                    page = buffer[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
                    found[at : at + PAGE_BYTES] = page
        numbers = set(image.document["descriptors"]["descriptors"])
    assert found == content
    assert numbers == {"0", "1", "2"}


def test_a_pager_is_held_only_for_a_moment(dozer: Dozer) -> None:
    """Who holds a pager and dies leaves one that goes on; so does who holds it and lets go."""
    dozer.doze()
    doze = find_doze(dozer.pid)
    assert doze is not None
    holder = os.fork()
    if holder == 0:
        with hold_pager(doze):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(holder, 0)[1]) == -signal.SIGKILL
    with hold_pager(doze):
        assert is_unroused(doze)
        there = own_page_ranges(dozer.pid, proc.mappings(dozer.pid))
        away = read_away(doze, there)
        assert sum(end - start for start, end in away.missing) > PAGES // 3 * PAGE_BYTES
        assert not away.moved
    dozer.do(rewrite, 1)
    dozer.checkpoint_glanced(None)
