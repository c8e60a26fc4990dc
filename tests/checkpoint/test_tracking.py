"""Incremental checkpoints of real processes against the plainest oracle: all of their memory.

A child lays out, writes, moves, drops and forks its memory as it is told; after every checkpoint
what the image has is compared with what /proc/PID/mem has, byte for byte.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from deeds import BASE, DEEDS, HUGE_PAGES, PAGES, rewrite, rewrite_all, write
from oracle import compare_memory, stored_pages

from lzy.checkpoint import ahead as reading_ahead
from lzy.checkpoint import capture, mapping_flags, proc, tracking
from lzy.checkpoint import doze as engine
from lzy.checkpoint.content import (
    CLOSE_BYTES,
    guard_ranges,
    join_ranges,
    look_at_pages,
    own_page_ranges,
)
from lzy.checkpoint.dense import find_dense
from lzy.checkpoint.dump import DumpReport, dump
from lzy.checkpoint.errors import Busy
from lzy.checkpoint.image import Image
from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.store import Store
from lzy.checkpoint.tracee import stopped
from lzy.checkpoint.working_set import read_order, write_order

EXAMPLES = int(os.environ.get("LZY_TEST_EXAMPLES", "12"))


class Subject:
    """A child that does as it is told, and between its deeds waits in read(2)."""

    def __init__(self, folder: Path) -> None:
        self.store = Store.open(folder / "store", create=True)
        self.child = subprocess.Popen(
            [sys.executable, "-ESs", str(Path(__file__).with_name("deeds.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self.child.pid
        self._await("to begin")

    def _await(self, what: str) -> None:
        assert self.child.stdout
        assert os.read(self.child.stdout.fileno(), 1) == b".", f"the child failed {what}"
        while not Path(f"/proc/{self.pid}/syscall").read_text().startswith("0 0x0 "):
            os.sched_yield()  # on its way to read(2)

    def do(self, deed: Callable[[int], None], seed: int = 1) -> None:
        assert self.child.stdin
        os.write(self.child.stdin.fileno(), b"%d %d\n" % (DEEDS.index(deed), seed))
        self._await(deed.__name__)

    def checkpoint(self, **options: bool) -> DumpReport:
        """A checkpoint, compared with the memory: nobody runs in between."""
        report = dump(self.pid, self.store, name="it", leave_running=True, **options)
        with self.store.load(report.image) as image:
            self.compare(image)
        return report

    def compare(self, image: Image) -> None:
        """Every byte of the child's own pages is in the image, and the image has no others."""
        if engine.is_dozing(self.pid):
            engine.begin_to_rouse(self.pid)
            while engine.missing_bytes(self.pid):
                os.sched_yield()
        compare_memory(self.pid, stored_pages(image))

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
        self.store.close()


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    subject = Subject(tmp_path)
    try:
        yield subject
    finally:
        subject.close()


OFTEN = [DEEDS.index(rewrite), DEEDS.index(rewrite_all)]
"""Drawn often: what is rewritten is left out of an account."""

plans = st.lists(
    st.tuples(
        st.sampled_from([*range(len(DEEDS)), *OFTEN * (len(DEEDS) // 2)]),
        st.integers(0, 1 << 30),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    plan=plans,
    dozed=st.booleans(),
    copied=st.booleans(),
    ahead=st.sampled_from(["nothing", "first", "most", "all"]),
)
def test_every_checkpoint_equals_the_memory(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    plan: list[tuple[int, int, bool]],
    dozed: bool,
    copied: bool,
    ahead: str,
) -> None:
    """Whatever a process does to its memory between checkpoints, none of it is missed.

    `copied`: what it wrote is copied while it stands still, however much that is; `ahead`: which
    images are read ahead (`all`: nothing is ever left out of an account, so that every one is).
    """
    monkeypatch.setattr(capture, "_CLONE_LOOKS", math.inf if copied else 0)
    monkeypatch.setattr(mapping_flags, "LARGE_BYTES", 0 if copied else 128 << 20)
    monkeypatch.setattr(capture, "LEAST_AHEAD_BYTES", math.inf if ahead == "nothing" else 0)
    monkeypatch.setattr(reading_ahead, "_LITTLE_BYTES", 1 << 40 if ahead == "first" else 0)
    if ahead == "all":
        monkeypatch.setattr(tracking, "find_dense", lambda written: [])
    else:
        monkeypatch.setattr(tracking, "find_dense", find_dense)
    folder = tmp_path_factory.mktemp("subject")
    monkeypatch.setenv("LZY_HOME", str(folder / "home"))
    subject = Subject(folder)
    try:
        subject.checkpoint()
        for deed, seed, checkpointed in plan:
            subject.do(DEEDS[deed], seed)
            if checkpointed:
                assert subject.checkpoint().base is not None
        report = subject.checkpoint()
        assert report.base is not None
        assert report.written_bytes < report.raw_bytes
        if dozed:
            engine.doze(subject.pid, subject.store, name="it")
            assert not left_out(subject)
            for deed, seed, _ in plan[:3]:
                subject.do(DEEDS[deed], seed + 1)
            subject.checkpoint()
    finally:
        subject.close()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(plan=plans)
def test_one_look_sees_what_several_do(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    plan: list[tuple[int, int, bool]],
) -> None:
    """What pages there are and which were written: as asked one after the other."""
    folder = tmp_path_factory.mktemp("subject")
    monkeypatch.setenv("LZY_HOME", str(folder / "home"))
    subject = Subject(folder)
    try:
        subject.checkpoint()
        for deed, seed, checkpointed in plan:
            subject.do(DEEDS[deed], seed)
            vmas = proc.mappings(subject.pid)
            with stopped(subject.pid):
                pages, written = tracking.look_at_all(subject.pid, vmas)
                assert join_ranges(pages) == join_ranges(own_page_ranges(subject.pid, vmas))
                assert written == tracking.written_ranges(subject.pid, vmas)
                again, guards = look_at_pages(subject.pid, vmas)
                assert join_ranges(again) == join_ranges(pages)
                assert guards == guard_ranges(subject.pid, vmas)
            assert any(vma.length > CLOSE_BYTES for vma in vmas if vma.kind == "anonymous")
            if checkpointed:
                subject.checkpoint()
    finally:
        subject.close()


def left_out(subject: Subject) -> list[tuple[int, int]]:
    """What of its memory is not under account, being written densely."""
    account = tracking.find_account(subject.pid)
    assert account is not None
    return list(account.left_out)


def test_an_idle_process_has_nothing_to_store(subject: Subject) -> None:
    """The second checkpoint reads a few pages, those that the child's own waiting touches."""
    subject.checkpoint()
    subject.checkpoint()
    report = subject.checkpoint()
    assert report.base == "it@2"
    assert report.written_bytes < 64 * PAGE_BYTES


def test_the_account_is_seen_by_nobody(subject: Subject) -> None:
    """An image has no trace of the account, and the process is dumped and ends as ever."""
    before = set(os.listdir(f"/proc/{subject.pid}/fd"))
    subject.checkpoint()
    (number,) = set(os.listdir(f"/proc/{subject.pid}/fd")) - before
    subject.do(write, 5)
    report = dump(subject.pid, subject.store, name="it")
    assert report.base == "it"
    assert report.written_bytes < report.raw_bytes / 2
    with subject.store.load(report.image) as image:
        assert number not in image.document["descriptors"]["descriptors"]
        assert set(image.document["descriptors"]["descriptors"]) == before
    subject.store.verify(report.image)


def test_no_account_is_kept_unless_wanted(subject: Subject) -> None:
    """`track=False` leaves no descriptor in the process, and the next checkpoint reads all."""
    before = os.listdir(f"/proc/{subject.pid}/fd")
    subject.checkpoint(track=False)
    assert os.listdir(f"/proc/{subject.pid}/fd") == before
    assert subject.checkpoint().base is None


def test_a_forgotten_account_is_not_relied_on(subject: Subject) -> None:
    """The record is gone (another LZY_HOME, say): all of the memory is read, and rightly so."""
    subject.checkpoint()
    subject.do(write, 1)
    tracking.withdraw(subject.pid)
    subject.do(write, 2)
    assert subject.checkpoint().base is None
    subject.do(write, 3)
    subject.checkpoint()


def test_a_base_that_is_gone_costs_only_time(subject: Subject) -> None:
    """The image before was removed: the next one is whole all the same."""
    subject.checkpoint()
    subject.do(write, 1)
    subject.store.remove("it")
    subject.store.collect_garbage()
    report = dump(subject.pid, subject.store, name="other", leave_running=True)
    assert report.base is None
    with subject.store.load("other") as image:
        subject.compare(image)


def test_two_stores_do_not_mix(subject: Subject, tmp_path: Path) -> None:
    """A checkpoint into another store is whole there, and the account goes on with that one."""
    subject.checkpoint()
    subject.do(write, 1)
    with Store.open(tmp_path / "other", create=True) as other:
        assert dump(subject.pid, other, name="there", leave_running=True).base is None
        subject.do(write, 2)
        assert dump(subject.pid, subject.store, name="again", leave_running=True).base is None
    with subject.store.load("again") as image:
        subject.compare(image)


def test_an_account_can_be_ended(subject: Subject) -> None:
    """Its descriptor goes, nothing is relied on any more, and another one can be begun."""
    before = os.listdir(f"/proc/{subject.pid}/fd")
    subject.checkpoint()
    account = tracking.find_account(subject.pid)
    assert account is not None
    with stopped(subject.pid) as tracee:
        tracee.prepare()
        tracking.end_account(tracee, account.number)
    assert tracking.find_account(subject.pid) is None
    assert os.listdir(f"/proc/{subject.pid}/fd") == before
    subject.do(write, 4)
    assert subject.checkpoint().base is None
    assert subject.checkpoint().base is not None


def test_what_was_written_last_is_needed_first(subject: Subject) -> None:
    """A checkpoint hands on which memory a wake needs, and adds what was written since the last."""
    subject.checkpoint()
    write_order(subject.store.path, "it", [BASE + 64 * PAGE_BYTES, BASE])
    subject.do(write, 3)
    report = subject.checkpoint()
    order = read_order(subject.store.path, report.image)
    assert order[:2] == read_order(subject.store.path, "it")
    assert len(order) > 2
    with subject.store.load(report.image) as image:
        first, last = image.space_extent(0)
        places = {image.run(index)[0] for index in range(first, last)}
    assert places.issuperset(order[2:])


def test_two_homes_do_not_mislead_each_other(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another lzy, with another LZY_HOME, begins an account: ours is not relied on any more."""
    subject.checkpoint()
    subject.do(write, 1)
    home = os.environ["LZY_HOME"]
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "elsewhere"))
    with Store.open(tmp_path / "other", create=True) as other:
        dump(subject.pid, other, name="there", leave_running=True)
    monkeypatch.setenv("LZY_HOME", home)
    subject.do(write, 2)
    assert subject.checkpoint().base is None


def test_a_dump_between_two_looks_at_the_account(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another dump comes after ours has found its base, before the process stands still."""
    subject.checkpoint()
    subject.do(write, 1)
    find, found = tracking.find_accounts, []

    def find_then_dump(pid: int) -> dict[int, tracking.Account]:
        accounts = find(pid)
        if not found:
            found.append(accounts)
            dump(subject.pid, subject.store, name="between", leave_running=True)
            subject.do(write, 2)
        return accounts

    monkeypatch.setattr(tracking, "find_accounts", find_then_dump)
    report = dump(subject.pid, subject.store, name="after", leave_running=True)
    assert found[0]
    assert report.base is None
    with subject.store.load("after") as image:
        subject.compare(image)


def rewrite_unit(subject: Subject, number: int, pages: range) -> None:
    """Write to pages of one huge page's worth."""
    with open(f"/proc/{subject.pid}/mem", "r+b", buffering=0) as memory:
        for page in pages:
            memory.seek(BASE + (number * HUGE_PAGES + page) * PAGE_BYTES + 77)
            memory.write(os.urandom(8))


def test_what_is_rewritten_is_left_out(subject: Subject) -> None:
    """It is not protected any more, is compared each time, and no write to it is missed."""
    subject.checkpoint()
    for seed in range(4):
        subject.do(rewrite_all, seed)
        report = subject.checkpoint()
        assert report.written_bytes > PAGES * PAGE_BYTES // 2
        assert left_out(subject) == [(BASE, BASE + PAGES * PAGE_BYTES)]
        account = tracking.find_account(subject.pid)
        assert account is not None
        with stopped(subject.pid):
            written = tracking.written_ranges(subject.pid, proc.mappings(subject.pid))
        assert any(start <= BASE and end >= BASE + PAGES * PAGE_BYTES for start, end in written)


def test_of_what_is_left_out_only_pages_that_changed_are_stored(subject: Subject) -> None:
    """Some pages scattered over memory that was rewritten just before: they, not their windows."""
    subject.checkpoint()
    subject.do(rewrite_all, 2)
    subject.checkpoint()
    assert left_out(subject)
    for unit in range(PAGES // HUGE_PAGES):
        rewrite_unit(subject, unit, range(5, HUGE_PAGES, 64))
    report = subject.checkpoint()
    assert report.stored_bytes < (8 * PAGES // HUGE_PAGES + 64) * PAGE_BYTES


def test_what_is_rewritten_no_more_comes_under_account(subject: Subject) -> None:
    """A checkpoint finds by its contents that nobody wrote to it: it was protected by then."""
    subject.checkpoint()
    subject.do(rewrite_all, 3)
    assert subject.checkpoint().stored_bytes > 0
    assert left_out(subject)
    assert subject.checkpoint().stored_bytes < 64 * PAGE_BYTES
    assert not left_out(subject)
    for seed in range(3):
        subject.do(write, seed)
        assert subject.checkpoint().written_bytes < PAGES * PAGE_BYTES // 4


def test_only_what_is_rewritten_stays_left_out(subject: Subject) -> None:
    """Each huge page's worth is judged by itself: one that is still rewritten stays left out."""
    subject.checkpoint()
    subject.do(rewrite_all, 2)
    subject.checkpoint()
    assert left_out(subject)
    rewrite_unit(subject, 1, range(HUGE_PAGES - 300, HUGE_PAGES))
    rewrite_unit(subject, 2, range(HUGE_PAGES - 100, HUGE_PAGES))
    subject.checkpoint()
    assert left_out(subject) == [
        (BASE + HUGE_PAGES * PAGE_BYTES, BASE + 2 * HUGE_PAGES * PAGE_BYTES)
    ]


def test_what_is_left_out_dozes_like_all(subject: Subject) -> None:
    """A process that goes to doze gives back what it had rewritten, too: all is under account."""
    subject.checkpoint()
    subject.do(rewrite_all, 1)
    subject.checkpoint()
    assert left_out(subject)
    report = engine.doze(subject.pid, subject.store, name="it")
    assert not left_out(subject)
    assert report.dropped_bytes >= PAGES * PAGE_BYTES


def test_an_older_record_is_relied_on(subject: Subject) -> None:
    """A record that says nothing of what was left out is as good as one that does."""
    subject.checkpoint()
    record = next(Path(os.environ["LZY_HOME"]).glob("run/*.account"))
    facts = json.loads(record.read_bytes())
    del facts["left_out"]
    record.write_text(json.dumps(facts))
    subject.do(write, 1)
    assert subject.checkpoint().base is not None


@pytest.mark.parametrize("stage", ["doze.taken", "doze.served"])
def test_a_dump_while_it_goes_to_doze(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """What is unwritten since another image is not dropped: every byte is still there."""

    def dump_between(reached: str) -> None:
        if reached == stage:
            subject.do(write, 1)
            dump(subject.pid, subject.store, name="between", leave_running=True)
            subject.do(write, 2)

    monkeypatch.setattr(engine, "reach", dump_between)
    if stage == "doze.taken":
        with pytest.raises(Busy, match="another dump"):
            engine.doze(subject.pid, subject.store, name="it")
    else:
        report = engine.doze(subject.pid, subject.store, name="it")
        assert report.dropped_bytes == 0
        assert report.notes
    seen = dump(subject.pid, subject.store, name="after", leave_running=True)
    with subject.store.load(seen.image) as image:
        subject.compare(image)
