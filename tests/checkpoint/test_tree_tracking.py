"""Incremental checkpoints of whole trees against the plainest oracle: the memory of every process.

Processes fork, exec and end between checkpoints, and all of them write, move and drop memory.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from deeds import (
    DEEDS,
    FAMILY_DEEDS,
    PAGES,
    bear,
    begin_anew,
    lose,
    rewrite_all,
    write,
)
from oracle import compare_memory, stored_pages
from subjects import in_child

from lzy.checkpoint import ahead as reading_ahead
from lzy.checkpoint import bookkeeping, capture, mapping_flags, proc, tracking
from lzy.checkpoint.compare import compare_images
from lzy.checkpoint.dense import find_dense
from lzy.checkpoint.dump import DumpReport, dump
from lzy.checkpoint.errors import NotFound
from lzy.checkpoint.image import Image
from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.store import Store
from lzy.checkpoint.subject import Subject

EXAMPLES = int(os.environ.get("LZY_TEST_EXAMPLES", "8"))
LITTLE_BYTES = 64 * PAGE_BYTES
Path_ = tuple[int, ...]
"""Numbers of children that lead to a process; the first one's is empty."""


def read_all(image: Image) -> dict[int, dict[int, bytes]]:
    """{pid: {address: content}} of all processes, with what they have from their parents."""
    found = {image.document["pid"]: stored_pages(image)}
    for member in image.document.get("members", ()):
        view = image.in_space(member["space"])
        assert view is not None
        pages, parent = stored_pages(view), found[member["process"]["parent"]]
        for start, end in member["inherited"]:
            for page in range(start, end, PAGE_BYTES):
                assert page not in pages
                if page in parent:
                    pages[page] = parent[page]
        found[member["pid"]] = pages
    return found


class Family:
    """A tree of processes that do as they are told, and between their deeds wait in read(2)."""

    def __init__(self, folder: Path) -> None:
        self.store = Store.open(folder / "store", create=True)
        self.child = subprocess.Popen(
            [sys.executable, "-ESs", str(Path(__file__).with_name("deeds.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self.child.pid
        self.paths: list[Path_] = [()]
        """Who lives, in the order of birth."""
        self._born = 0
        self._await("to begin")

    def _await(self, what: str) -> None:
        assert self.child.stdout
        assert os.read(self.child.stdout.fileno(), 1) == b".", f"a process failed {what}"
        for pid in self.pids():
            while not Path(f"/proc/{pid}/syscall").read_text().startswith("0 0x0 "):
                os.sched_yield()  # on its way to read(2)

    def pids(self) -> list[int]:
        """All who live, parents before their children."""
        found = [self.pid]
        for pid in found:
            found += [child for child in proc.children(pid) if not proc.has_ended(child)]
        return found

    def pid_of(self, path: Path_) -> int:
        """Its pid."""
        pid = self.pid
        for depth in range(len(path)):
            siblings = [p for p in self.paths if p[:-1] == path[:depth] and len(p) == depth + 1]
            pid = proc.children(pid)[siblings.index(path[: depth + 1])]
        return pid

    def do(self, path: Path_, deed: Callable[[int], None], seed: int = 1) -> None:
        assert self.child.stdin
        words = [*path, FAMILY_DEEDS.index(deed), seed]
        os.write(self.child.stdin.fileno(), " ".join(map(str, words)).encode())
        if deed is begin_anew:
            self._forget_below(path)
        self._await(deed.__name__)

    def bear(self, path: Path_) -> Path_:
        """Have a process bear one that stays."""
        self._born += 1
        self.do(path, bear, self._born)
        self.paths.append((*path, self._born))
        return self.paths[-1]

    def lose(self, path: Path_) -> None:
        """Have a process end, and all below it."""
        self.do(path[:-1], lose, path[-1])
        self._forget_below(path)
        self.paths.remove(path)

    def _forget_below(self, path: Path_) -> None:
        self.paths = [p for p in self.paths if p == path or p[: len(path)] != path]

    def checkpoint(self, **options: bool) -> DumpReport:
        """A checkpoint, compared with the memory of all: nobody runs in between."""
        report = dump(self.pid, self.store, name="it", leave_running=True, **options)
        assert report.processes == len(self.paths)
        with self.store.load(report.image) as image:
            self.compare(image)
        return report

    def compare(self, image: Image) -> None:
        found = read_all(image)
        assert set(found) == set(self.pids())
        for pid, pages in found.items():
            compare_memory(pid, pages)

    def close(self) -> None:
        pids: list[int] = []
        with contextlib.suppress(NotFound):  # dumped to its end
            pids = self.pids()[1:]
        self.child.kill()
        self.child.communicate()  # the others end when nobody tells them any more
        for pid in pids:
            await_end(pid)
        self.store.close()


def await_end(pid: int) -> None:
    """Wait for the end of a process, our child by now or another's."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        while Path(f"/proc/{pid}").exists() and not proc.has_ended(pid):
            os.sched_yield()


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    family = Family(tmp_path)
    try:
        yield family
    finally:
        family.close()


LATER = ["bear", "bear", "lose", "begin_anew", "alone", *["checkpoint"] * 4]
plans = st.lists(
    st.tuples(
        st.sampled_from([*DEEDS, *LATER]),
        st.integers(0, 1 << 30),
        st.integers(0, 1 << 30),
    ),
    min_size=1,
    max_size=14,
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(plan=plans, copied=st.booleans(), ahead=st.booleans())
def test_every_checkpoint_equals_the_memory_of_all(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    plan: list[tuple[Any, int, int]],
    copied: bool,
    ahead: bool,
) -> None:
    """Whoever forks, execs, ends or changes its memory between checkpoints: nothing is missed.

    `copied`: what they wrote is copied while they stand still; `ahead`: memory is read ahead.
    """
    monkeypatch.setattr(capture, "_CLONE_LOOKS", math.inf if copied else 0)
    monkeypatch.setattr(mapping_flags, "LARGE_BYTES", 0 if copied else 128 << 20)
    monkeypatch.setattr(capture, "LEAST_AHEAD_BYTES", 0 if ahead else math.inf)
    monkeypatch.setattr(reading_ahead, "_LITTLE_BYTES", 0)
    if ahead:  # each time, so nothing may be left out of an account
        monkeypatch.setattr(tracking, "find_dense", lambda written: [])
    else:
        monkeypatch.setattr(tracking, "find_dense", find_dense)
    folder = tmp_path_factory.mktemp("family")
    monkeypatch.setenv("LZY_HOME", str(folder / "home"))
    family = Family(folder)
    try:
        family.bear(family.bear(()))
        family.checkpoint()
        for deed, who, seed in plan:
            path = family.paths[who % len(family.paths)]
            if deed == "checkpoint":
                assert family.checkpoint().base is not None
            elif deed == "bear":
                if len(family.paths) < 5:
                    family.bear(path)
            elif deed == "lose":
                if path:
                    family.lose(path)
            elif deed == "alone":  # of all that have an account, some begin it anew
                if path:
                    pid = family.pid_of(path)
                    dump(pid, family.store, name=f"alone-{pid}", leave_running=True)
            elif deed == "begin_anew":
                if path:  # the first one's account ends with it, and with that all of them
                    family.do(path, begin_anew)
            else:
                family.do(path, deed, seed)
        family.checkpoint()
        report = family.checkpoint()
        assert report.base is not None
        assert report.written_bytes < report.raw_bytes
    finally:
        family.close()


def inherited_bytes(family: Family, image: str) -> int:
    """How much the processes of an image have from their parents."""
    with family.store.load(image) as loaded:
        members = loaded.document["members"]
    return sum(end - start for member in members for start, end in member["inherited"])


def test_what_little_a_tree_wrote_is_copied(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is known what they share, none is cloned; not even one that executed a program."""
    monkeypatch.setattr(capture, "_CLONE_LOOKS", math.inf)
    monkeypatch.setattr(mapping_flags, "LARGE_BYTES", 0)
    child, other = family.bear(()), family.bear(())
    family.do(other, begin_anew)
    family.checkpoint()

    def split(subject: Subject) -> str:
        raise AssertionError(f"{subject.pid} is cloned")

    monkeypatch.setattr(Subject, "split", split)
    for seed in range(3):
        family.do((), write, seed)
        family.do(child, write, seed + 3)
        if seed:
            family.do(other, write, seed + 6)
        assert family.checkpoint().base is not None


@pytest.mark.parametrize("copied", [False, True])
def test_who_could_not_be_read_ahead_is_read_whole(
    family: Family, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote does not count as unwritten because its account had begun anew by then."""
    monkeypatch.setattr(capture, "_CLONE_LOOKS", math.inf if copied else 0)
    monkeypatch.setattr(mapping_flags, "LARGE_BYTES", 0 if copied else 128 << 20)
    monkeypatch.setattr(capture, "LEAST_AHEAD_BYTES", 0)
    monkeypatch.setattr(reading_ahead, "_LITTLE_BYTES", 0)
    monkeypatch.setattr(tracking, "find_dense", lambda written: [])
    child = family.bear(())
    family.do(child, begin_anew)
    family.checkpoint()
    read_ahead, failed = bookkeeping.read_ahead, []

    def fail(pid: int, number: int, *given: Any, **named: Any) -> reading_ahead.Ahead:
        if pid == family.pid:
            return read_ahead(pid, number, *given, **named)
        tracking.protect_running(pid, number, mapping_flags.mappings(pid))
        failed.append(pid)
        raise OSError(errno.EIO, "as if")

    monkeypatch.setattr(bookkeeping, "read_ahead", fail)
    for seed in range(3):
        family.do(child, write, seed)
        family.do((), write, seed)
        family.checkpoint()
    assert len(failed) == 3


def test_an_idle_tree_has_nothing_to_store(family: Family) -> None:
    """The second checkpoint reads a few pages of each process, and shares what was shared."""
    family.bear(())
    family.bear(family.bear(()))
    first = family.checkpoint()
    family.checkpoint()
    third = family.checkpoint()
    assert third.base == "it@2"
    assert third.written_bytes < LITTLE_BYTES * third.processes
    assert inherited_bytes(family, third.image) == inherited_bytes(family, first.image) > 0


def test_what_one_process_wrote_is_read_of_that_one(family: Family) -> None:
    """All of its memory is rewritten, and nothing of the others is read."""
    children = [family.bear(()), family.bear(())]
    family.checkpoint()
    family.checkpoint()
    family.do(children[1], rewrite_all, 5)
    report = family.checkpoint()
    assert 0 <= report.written_bytes - PAGES * PAGE_BYTES < LITTLE_BYTES * 3
    family.do((), rewrite_all, 6)  # what the children had from it is theirs now
    report = family.checkpoint()
    assert report.written_bytes < 2.5 * PAGES * PAGE_BYTES
    assert family.checkpoint().written_bytes < LITTLE_BYTES * 3


def test_who_came_since_or_became_another_program_is_read_whole(family: Family) -> None:
    """An account is relied on of whom it was begun with, and the next one has all of them."""
    older, newer = family.bear(()), family.bear(())
    family.checkpoint()
    pids = family.pids()
    assert set(tracking.find_accounts(family.pid)) == set(pids)
    family.do(older, begin_anew)
    born = family.bear(newer)
    assert set(tracking.find_accounts(family.pid)) == {pids[0], pids[2]}
    report = family.checkpoint()
    assert report.written_bytes > PAGES * PAGE_BYTES // 2
    assert set(tracking.find_accounts(family.pid)) == set(family.pids())
    family.lose(newer)
    assert born not in family.paths
    family.checkpoint()
    assert set(tracking.find_accounts(family.pid)) == set(family.pids())


def test_a_process_dumped_by_itself_takes_what_it_can(family: Family) -> None:
    """A member's own checkpoints, and those of the tree, do not mislead each other."""
    path = family.bear(())
    member = family.pid_of(path)
    family.checkpoint()
    family.do(path, write, 1)
    for name in ("alone", "alone@2"):
        report = dump(member, family.store, name="alone", leave_running=True)
        with family.store.load(name) as image:
            compare_memory(member, stored_pages(image))
        family.do(path, write, 2)
    assert report.base == "alone"
    family.checkpoint()
    assert family.checkpoint().written_bytes < LITTLE_BYTES * 2


def test_the_accounts_are_seen_by_nobody(family: Family) -> None:
    """An image has no trace of them; the tree that is dumped to its end takes from the last."""
    family.bear(family.bear(()))
    before = [set(os.listdir(f"/proc/{pid}/fd")) for pid in family.pids()]
    family.checkpoint()
    assert all(
        len(set(os.listdir(f"/proc/{pid}/fd")) - was) == 1
        for pid, was in zip(family.pids(), before, strict=True)
    )
    report = dump(family.pid, family.store, name="it")
    assert report.base == "it"
    assert report.written_bytes < LITTLE_BYTES * report.processes
    with family.store.load(report.image) as image:
        members = [image, *map(image.in_space, (m["space"] for m in image.document["members"]))]
        held = [set(member.document["descriptors"]["descriptors"]) for member in members if member]
    assert held == before
    family.store.verify(report.image)


def test_a_comparison_tells_what_each_process_changed(family: Family) -> None:
    """By process, as many pages as really differ; what they lost in common counts with neither."""
    writer, idler = family.bear(()), family.bear(())
    gone = family.bear(idler)
    first = family.checkpoint()
    family.lose(gone)
    born = family.bear(writer)
    family.do(writer, write, 3)
    family.do((), write, 4)  # until then the children had these pages from it
    second = family.checkpoint()
    with family.store.load(first.image) as one, family.store.load(second.image) as two:
        found = compare_images(one, two)
        before, after = read_all(one), read_all(two)
    presences = {process.pid: process.presence for process in found.processes}
    assert found.processes[0].pid == family.pid
    assert presences == dict.fromkeys(before, "gone") | {
        pid: "both" if pid in before else "new" for pid in after
    }
    assert sorted(presences.values()) == ["both", "both", "both", "gone", "new"]
    for process in found.processes:
        if process.presence == "both":
            had, has = before[process.pid], after[process.pid]
            differing = sum(had.get(page) != content for page, content in has.items())
            told = process.sum("changed_bytes") + process.sum("new_bytes")
            assert told == differing * PAGE_BYTES
    wrote = {process.pid: process.sum("changed_bytes") for process in found.processes}
    assert wrote[family.pid_of(writer)] > 40 * PAGE_BYTES > wrote[family.pid_of(idler)]
    assert born in family.paths


@pytest.mark.parametrize("stage", ["dump.tracked", "dump.split", "dump.written", "dump.committed"])
def test_a_checkpoint_that_was_killed_is_not_relied_on(
    family: Family, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Whatever of the accounts it had begun anew, the next one reads all, and all is there."""
    child = family.bear(())
    family.checkpoint()
    family.do(child, write, 1)

    def end_at(reached: str) -> None:
        if reached == stage:
            os.kill(os.getpid(), signal.SIGKILL)

    def take() -> None:
        monkeypatch.setattr(capture, "reach", end_at)
        dump(family.pid, family.store, name="it", leave_running=True)

    status = in_child(take)
    assert os.WTERMSIG(status) == signal.SIGKILL
    family.do(child, write, 2)
    assert family.checkpoint().base is None
    family.do(child, write, 3)
    assert family.checkpoint().base is not None
