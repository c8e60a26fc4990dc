"""Names of checkpoints, who belongs to which session, what to keep, and what changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import zoneinfo
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lzy.checkpoint import history, lineage, retention
from lzy.checkpoint.compare import compare_images
from lzy.checkpoint.content import FilePages, join_ranges, windows_of
from lzy.checkpoint.errors import Busy, LzyError, NotFound
from lzy.checkpoint.garbage import measure_garbage
from lzy.checkpoint.image import Image
from lzy.checkpoint.increment import plan_checkpoint
from lzy.checkpoint.log import Checkpoint, ancestors, read_log
from lzy.checkpoint.retention import choose_kept
from lzy.checkpoint.store import Store

PAGE = 4096


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


@pytest.fixture
def sleeper() -> Iterator[int]:
    """The pid of a living process that is ours."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield child.pid
    finally:
        child.kill()
        child.wait()
        assert child.stdin
        child.stdin.close()


def write(store: Store, name: str, session: dict[str, object] | None = None) -> None:
    """An image without memory."""
    document: dict[str, object] = {"taken_unix_s": 1e9}
    if session is not None:
        document["session"] = session
    with store.writer(name) as writer:
        writer.commit(document)


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "image"),
    [
        ("calm", "calm@10"),
        ("calm@1", "calm"),
        ("calm@2", "calm@2"),
        ("calm@10", "calm@10"),
        ("calmer", "calmer"),
        ("calmer@1", "calmer"),
        ("a", "a"),
        ("a@b", "a@b@3"),
        ("a@b@3", "a@b@3"),
        ("a@b@1", "a@b"),
        ("late", "late@7"),
        ("a@0", "a@0"),
        ("a@01", "a@01"),
    ],
)
def test_what_a_name_means(store: Store, asked: str, image: str) -> None:
    """NAME is the newest checkpoint by number, NAME@1 the first; other names with @ are names."""
    for name in (
        "calm",
        "calm@2",
        "calm@10",
        "calmer",
        "a",
        "a@b",
        "a@b@3",
        "late@7",
        "a@0",
        "a@01",
    ):
        write(store, name)
    assert history.resolve(store, asked) == image


def test_no_name_means_the_latest(store: Store) -> None:
    """Without a name the store says which image is the latest."""
    assert history.resolve(store, None) is None


def test_the_latest_is_the_latest_when_the_clock_was_set_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a session the last checkpoint is its newest; `lzy restore` must not go back to another."""
    for name, ahead_s in (("one", 0), ("calm", 100), ("calm@2", 7200), ("calm@3", -7200)):
        at_ns = (1_800_000_000 + ahead_s) * 10**9
        monkeypatch.setattr("lzy.checkpoint.writer.time.time_ns", lambda at_ns=at_ns: at_ns)
        write(store, name)
    assert [image.name for image in store.images()] == ["calm@3", "calm@2", "calm", "one"]
    with store.load() as image:
        assert image.name == "calm@3"


def test_what_is_not_there_is_told(store: Store) -> None:
    """A checkpoint that is not there is refused with those that are; a name with where to look."""
    for name in ("calm", "calm@2", "calm@3", "calm@7"):
        write(store, name)
    store.remove("calm")
    for number in (1, 4):
        with pytest.raises(NotFound, match=f"no checkpoint {number}") as caught:
            history.resolve(store, f"calm@{number}")
        assert caught.value.remedy == "it has 2-3, 7; see lzy log calm"
    for name in ("cal", "cal@2"):
        with pytest.raises(NotFound, match="there is no image"):
            history.resolve(store, name)
    for name in ("../calm", "cal\0m", "", "x" * 300):
        with pytest.raises(LzyError):
            history.resolve(store, name)


@given(st.from_regex(r"[a-z@0-9.]{1,12}", fullmatch=True), st.integers(1, 10**9 - 1))
def test_an_image_is_spelled_as_it_is_understood(session: str, number: int) -> None:
    """What a checkpoint is called leads back to it, whatever its session's name."""
    if not history.has_number(session):
        image = history.image_name(session, number)
        assert history.split_name(image) == (session, number)
        assert history.split_name(history.spell(image)) == (session, number)


# -- the next checkpoint -----------------------------------------------------------------------


def take(store: Store, pid: int, name: str | None = None) -> dict[str, object]:
    """What a dump that lets the process go on does with the history; its session document."""
    image, session = history.next_checkpoint(store, pid, name, unnamed=lambda: "fresh")
    write(store, image, session)
    notes: list[str] = []
    history.remember(store, pid, session, notes)
    assert notes == []
    return session


def test_a_process_continues_its_session(store: Store, sleeper: int) -> None:
    """Checkpoints count up, by the session's name or without one; each knows its parent."""
    assert take(store, sleeper, "calm") == {
        "name": "calm",
        "number": 1,
        "parent": None,
        "why": "asked",
    }
    assert take(store, sleeper)["parent"] == "calm"
    third = take(store, sleeper, "calm")
    assert (third["number"], third["parent"]) == (3, "calm@2")
    assert sorted(store.names()) == ["calm", "calm@2", "calm@3"]


def test_without_a_session_one_begins(store: Store, sleeper: int) -> None:
    """A process that belongs nowhere begins a session with the name that lzy chooses."""
    assert take(store, sleeper)["name"] == "fresh"
    assert take(store, sleeper)["number"] == 2


def test_another_name_begins_another_session(store: Store, sleeper: int) -> None:
    """Under a new name counting starts anew, and the parent is of the session before."""
    take(store, sleeper, "calm")
    other = take(store, sleeper, "storm")
    assert (other["number"], other["parent"]) == (1, "calm")
    assert take(store, sleeper)["name"] == "storm"


def test_somebody_elses_name_is_refused(store: Store, sleeper: int) -> None:
    """A session of many, of one, and one that has no image yet: none is anybody else's."""
    take(store, sleeper, "calm")
    with pytest.raises(Busy, match="there is an image calm already"):
        history.next_checkpoint(store, os.getpid(), "calm")
    take(store, sleeper, "calm")
    with pytest.raises(Busy, match="there is a session calm already"):
        history.next_checkpoint(store, os.getpid(), "calm")
    with store.load("calm") as image:
        history.remember_restored(image, sleeper, "twin", [])
    with pytest.raises(Busy, match=f"that of process {sleeper}"):
        history.next_checkpoint(store, os.getpid(), "twin")
    assert history.free_session_name(store, "calm") == "calm-fork"


def test_numbers_are_not_used_twice(store: Store, sleeper: int) -> None:
    """Though the newest was removed, the next one counts on from it."""
    take(store, sleeper, "calm")
    take(store, sleeper)
    store.remove("calm@2")
    assert take(store, sleeper)["number"] == 3
    store.remove("calm")
    store.remove("calm@3")
    assert take(store, sleeper, "calm")["number"] == 4


def test_going_back_makes_a_branch(store: Store, sleeper: int) -> None:
    """After a restore of an early checkpoint the next has a new number and that parent."""
    for _ in range(4):
        take(store, sleeper, "calm")
    with store.load("calm@2") as image:
        history.remember_restored(image, sleeper, None, [])
    branch = take(store, sleeper)
    assert (branch["number"], branch["parent"]) == (5, "calm@2")
    log = read_log(store, "calm")
    assert [entry.number for entry in log] == [5, 4, 3, 2, 1]
    assert [entry.number for entry in ancestors(log, 5)] == [5, 2, 1]


def test_a_fork_begins_a_session(store: Store, sleeper: int) -> None:
    """The first checkpoint of a copy is number 1 of its own session, from the original's."""
    take(store, os.getpid(), "calm")
    with store.load("calm") as image:
        history.remember_restored(image, sleeper, "twin", [])
    first = take(store, sleeper)
    assert (first["name"], first["number"], first["parent"]) == ("twin", 1, "calm")
    assert take(store, sleeper)["parent"] == "twin"


def test_a_number_that_is_being_written_is_passed_over(store: Store, sleeper: int) -> None:
    """Two lives of one process dump at once: both get a number."""
    take(store, sleeper, "calm")
    with store.writer("calm@2"):
        assert history.next_checkpoint(store, sleeper, None)[0] == "calm@3"
    assert history.next_checkpoint(store, sleeper, None)[0] == "calm@2"


@pytest.mark.parametrize("name", ["calm@2", "calm@0", "calm@007", "x" * 119, "../x", "-x"])
def test_names_that_no_session_may_have(store: Store, name: str) -> None:
    """Numbers are lzy's to give; room for them must be left."""
    with pytest.raises(LzyError) as caught:
        history.next_checkpoint(store, os.getpid(), name)
    assert caught.value.remedy


def test_another_store_is_another_history(store: Store, sleeper: int, tmp_path: Path) -> None:
    """A session is of one store: elsewhere the process begins one."""
    take(store, sleeper, "calm")
    with Store.open(tmp_path / "elsewhere", create=True) as other:
        first = take(other, sleeper)
        assert (first["name"], first["number"], first["parent"]) == ("fresh", 1, None)


def test_a_store_by_another_path_is_the_same(store: Store, sleeper: int, tmp_path: Path) -> None:
    """A symbolic link to the store leads to the same history."""
    take(store, sleeper, "calm")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    with Store.open(tmp_path / "link") as other:
        assert take(other, sleeper)["number"] == 2


def test_an_image_from_before_sessions(store: Store) -> None:
    """It is a session of one, without a parent or a reason."""
    write(store, "old")
    (entry,) = read_log(store, "old")
    assert (entry.number, entry.parent, entry.why) == (1, None, "")
    assert entry.taken_unix_s == 1e9


def test_a_damaged_checkpoint_is_told(store: Store, sleeper: int, tmp_path: Path) -> None:
    """The log shows the others, and what is wrong with it."""
    take(store, sleeper, "calm")
    take(store, sleeper)
    path = tmp_path / "store" / "images" / "calm.image"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    two, one = read_log(store, "calm")
    assert (two.damage, bool(one.damage)) == ("", True)


# -- the record of a process -------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"start_time": 1}, {"boot_id": "another"}, {"number": "2"}])
def test_a_stale_record_is_ignored_and_removed(
    store: Store, sleeper: int, change: dict[str, object]
) -> None:
    """One of another process with that pid, of another boot, or garbled counts for nothing."""
    take(store, sleeper, "calm")
    path = lineage.lineage_path(sleeper)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert lineage.list_lineages(store) == []
    assert not path.exists()


def test_a_torn_record_is_ignored_and_removed(store: Store, sleeper: int) -> None:
    """As a power failure may leave it."""
    take(store, sleeper, "calm")
    path = lineage.lineage_path(sleeper)
    for text in (b"", b"{", path.read_bytes()[:-3], b"[]", b"{}", b"null"):
        path.write_bytes(text)
        assert lineage.find_lineage(sleeper, store) is None
        assert not path.exists()


def test_a_record_ends_with_its_process(store: Store) -> None:
    """The next one that looks removes it."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        take(store, child.pid, "calm")
        assert [found.pid for found in lineage.list_lineages(store)] == [child.pid]
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.stdin
        child.stdin.close()
    assert lineage.list_lineages(store) == []
    assert list(lineage.lineage_path(child.pid).parent.iterdir()) == []


def test_what_cannot_be_kept_is_a_note(
    store: Store, sleeper: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is whole though nobody will know what it belongs to: that is said, not raised."""
    image, session = history.next_checkpoint(store, sleeper, "calm")
    write(store, image, session)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "file"))
    notes: list[str] = []
    history.remember(store, sleeper, session, notes)
    assert len(notes) == 1
    assert "new session" in notes[0]


# -- what to keep ------------------------------------------------------------------------------

ZONES = ["UTC", "Asia/Kathmandu", "America/New_York", "Pacific/Auckland"]
HOUR_S, DAY_S = 3600, 86400


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, float]]:
    """Numbers and times, mostly ascending, over the changes of summer time, with clock trouble."""
    unix_s = draw(st.sampled_from([0.0, 1_774_000_000.0, 1_793_000_000.0]))
    steps = draw(
        st.lists(st.sampled_from([0, 1, 600, 1800, HOUR_S, 5 * HOUR_S, DAY_S, -600]), max_size=40)
    )
    number, found = 0, []
    for step in steps:
        number += draw(st.integers(1, 2))
        unix_s = max(unix_s + step, 0.0)
        found.append((number, unix_s))
    return draw(st.permutations(found))


def keep_naively(
    taken: list[tuple[int, float]], last: int, hourly: int, daily: int, zone: zoneinfo.ZoneInfo
) -> set[int]:
    """The same by the rule's words: for each checkpoint, whether any rule keeps it."""

    def hour(unix_s: float) -> object:
        moment = datetime.fromtimestamp(unix_s, zone)
        return moment.date(), moment.hour, moment.utcoffset()

    def day(unix_s: float) -> object:
        return datetime.fromtimestamp(unix_s, zone).date()

    kept = set()
    for number, unix_s in taken:
        newer = [other for other in taken if other[0] > number]
        if len(newer) < max(last, 1):
            kept.add(number)
        for wanted, period in ((hourly, hour), (daily, day)):
            periods_after = {period(other[1]) for other in newer}
            if period(unix_s) not in periods_after and len(periods_after) < wanted:
                kept.add(number)
    return kept


@given(
    histories(),
    st.integers(0, 5),
    st.integers(0, 6),
    st.integers(0, 6),
    st.sampled_from(ZONES),
)
@settings(max_examples=400)
def test_what_is_kept(
    taken: list[tuple[int, float]], last: int, hourly: int, daily: int, zone_name: str
) -> None:
    """Exactly what the rules say is kept, in any zone, and the newest whatever they say."""
    zone = zoneinfo.ZoneInfo(zone_name)
    kept = choose_kept(taken, last=last, hourly=hourly, daily=daily, zone=zone)
    assert set(kept) == keep_naively(taken, last, hourly, daily, zone)
    assert all(kept.values())


def test_the_newest_of_each_day_stays() -> None:
    """Days without a checkpoint do not count: two days are the last two that have one."""
    days = [(1, 0.0), (2, 10.0), (3, 5 * DAY_S), (4, 5 * DAY_S + 10), (5, 9 * DAY_S)]
    zone = zoneinfo.ZoneInfo("UTC")
    assert sorted(choose_kept(days, daily=2, zone=zone)) == [4, 5]
    assert choose_kept(days, last=1, daily=3, zone=zone) == {
        5: ["newest", "last", "daily"],
        4: ["daily"],
        2: ["daily"],
    }


def test_the_hour_that_comes_twice_is_two() -> None:
    """When summer time ends, the same hour on the clock is two hours."""
    zone = zoneinfo.ZoneInfo("Europe/Berlin")
    first = datetime(2026, 10, 25, 2, 30, fold=0, tzinfo=zone).timestamp()
    second = datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zone).timestamp()
    assert second - first == HOUR_S
    assert sorted(choose_kept([(1, first), (2, second)], hourly=2, zone=zone)) == [1, 2]


def test_what_a_collection_would_give_back(store: Store) -> None:
    """The estimate is what the collection then does; an image in use is known as such."""
    fill(store, "calm", {0: b"a" * PAGE})
    fill(store, "calm@2", {0: b"b" * PAGE})
    assert measure_garbage(store) == 0
    with store.load("calm"):
        assert retention.is_in_use(store, "calm")
    assert not retention.is_in_use(store, "calm")
    assert not retention.is_in_use(store, "gone")
    expected = measure_garbage(store, {"calm"})
    assert expected > 0
    store.remove("calm")
    assert measure_garbage(store) == expected
    assert store.collect_garbage().removed_bytes == expected


# -- what changed ------------------------------------------------------------------------------


def fill(
    store: Store,
    name: str,
    pages: dict[int, bytes],
    *,
    window_pages: int = 64,
    vmas: list[tuple[int, int]] | None = None,
    changed: list[int] | None = None,
    base: Image | None = None,
    written: set[int] | None = None,
) -> None:
    """An image with those pages (by page number) at its addresses, and mappings (page numbers).

    With `base` only the pages `written` are stored, the others taken from there.
    """
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), 1024 * PAGE)
        for number, content in pages.items():
            os.pwrite(file.fileno(), content, number * PAGE)

        def ranges_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
            return join_ranges((number * PAGE, (number + 1) * PAGE) for number in numbers)

        with store.writer(name, window_pages=window_pages) as writer:
            fresh = windows_of(ranges_of(pages), window_pages)
            if base is not None:
                plan = plan_checkpoint(base, ranges_of(pages), ranges_of(written or ()))
                writer.keep([(0, base, plan.kept)])
                fresh = plan.fresh
            writer.add_space(FilePages(file.fileno()), fresh, space=0)
            writer.commit(
                {
                    "vmas": [
                        {"start": a * PAGE, "end": b * PAGE, "permissions": "rw-p", "kind": "heap"}
                        for a, b in vmas or [(0, 1024)]
                    ],
                    "changed": [[n * PAGE, (n + 1) * PAGE] for n in changed or []],
                }
            )


CONTENTS = [bytes([letter]) * PAGE for letter in b"abc"]


@st.composite
def two_memories(draw: st.DrawFn) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Two memories that share much; none of the pages is all zeros."""
    numbers = st.integers(0, 200) | st.integers(0, 12)
    before = draw(st.dictionaries(numbers, st.sampled_from(CONTENTS), max_size=40))
    after = dict(before)
    after.update(draw(st.dictionaries(numbers, st.sampled_from(CONTENTS), max_size=10)))
    for number in draw(st.lists(numbers, max_size=10)):
        after.pop(number, None)
    return before, after


@given(two_memories(), st.sampled_from([(64, 64), (16, 16), (64, 16), (16, 64)]))
@settings(max_examples=60, deadline=None)
def test_a_comparison_counts_every_page(
    memories: tuple[dict[int, bytes], dict[int, bytes]], windows: tuple[int, int]
) -> None:
    """Changed, new and gone pages are those of the memories themselves, in the right mapping."""
    before, after = memories
    vmas = [(0, 10), (10, 70), (70, 201)]
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.open(Path(folder) / "store", create=True) as store,
    ):
        fill(store, "one", before, window_pages=windows[0], vmas=vmas)
        fill(store, "two", after, window_pages=windows[1], vmas=vmas)
        with store.load("one") as one, store.load("two") as two:
            found = compare_images(one, two)
    for mapping, (start, end) in zip(found.mappings, vmas, strict=True):
        here = range(start, end)
        common = [n for n in here if n in before and n in after]
        assert mapping.changed_bytes == PAGE * sum(before[n] != after[n] for n in common)
        assert mapping.new_bytes == PAGE * sum(n in after and n not in before for n in here)
        assert mapping.gone_bytes == PAGE * sum(n in before and n not in after for n in here)


@given(st.lists(two_memories(), min_size=1, max_size=4), st.sampled_from([16, 64]))
@settings(max_examples=40, deadline=None)
def test_a_comparison_sees_through_patchworks(
    steps: list[tuple[dict[int, bytes], dict[int, bytes]]], window_pages: int
) -> None:
    """Checkpoints that store only what was written compare as the memories do."""
    memories = [steps[0][0], *(after for _, after in steps)]
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.open(Path(folder) / "store", create=True) as store,
    ):
        fill(store, "step", memories[0], window_pages=window_pages)
        for number in range(1, len(memories)):
            old, new = memories[number - 1], memories[number]
            written = {n for n in new if new[n] != old.get(n)}
            written |= set(list(new)[:1])  # with what it held before
            with store.load(history.image_name("step", number)) as base:
                name = history.image_name("step", number + 1)
                fill(store, name, new, window_pages=window_pages, base=base, written=written)
        first, last = memories[0], memories[-1]
        with store.load("step") as one, store.load(f"step@{len(memories)}") as two:
            found = compare_images(one, two)
    common = set(first) & set(last)
    assert found.sum("changed_bytes") == PAGE * sum(first[n] != last[n] for n in common)
    assert found.sum("new_bytes") == PAGE * len(set(last) - common)
    assert found.sum("gone_bytes") == PAGE * len(set(first) - common)


def test_what_is_the_same_is_not_read(store: Store) -> None:
    """Equal windows cost no reading; one page that differs costs its two windows."""
    pages = {number: CONTENTS[number % 3] for number in range(256)}
    fill(store, "one", pages)
    fill(store, "two", pages)
    fill(store, "three", pages | {70: b"z" * PAGE})
    with store.load("one") as one, store.load("two") as two, store.load("three") as three:
        assert compare_images(one, two).read_bytes == 0
        found = compare_images(one, three)
    assert found.sum("changed_bytes") == PAGE
    assert found.read_bytes == 2 * 64 * PAGE


def test_mappings_that_came_and_went(store: Store) -> None:
    """Pages belong to the mapping that is there; parts of mappings that are gone are told."""
    one_page = CONTENTS[0]
    fill(store, "one", {5: one_page, 15: one_page, 25: one_page}, vmas=[(0, 20), (20, 30)])
    fill(store, "two", {5: CONTENTS[1], 45: one_page}, vmas=[(0, 10), (40, 50)])
    with store.load("one") as one, store.load("two") as two:
        found = compare_images(one, two)
    assert [
        (m.start // PAGE, m.end // PAGE, m.presence, m.changed_bytes, m.new_bytes, m.gone_bytes)
        for m in found.mappings
    ] == [
        (0, 10, "both", PAGE, 0, 0),
        (10, 20, "gone", 0, 0, PAGE),
        (20, 30, "gone", 0, 0, PAGE),
        (40, 50, "new", 0, PAGE, 0),
    ]


def test_zeros_over_a_file_are_a_change(store: Store) -> None:
    """A page of a file that was overwritten with zeros is stored nowhere and has changed."""
    fill(store, "one", {7: CONTENTS[0]}, changed=[7, 9])
    fill(store, "two", {7: CONTENTS[0], 9: CONTENTS[0]}, changed=[7, 8, 9])
    with store.load("one") as one, store.load("two") as two:
        found = compare_images(one, two)
        assert (found.sum("changed_bytes"), found.sum("new_bytes")) == (PAGE, PAGE)
        back = compare_images(two, one)
        assert (back.sum("changed_bytes"), back.sum("gone_bytes")) == (PAGE, PAGE)


def test_a_checkpoint_is_called_with_its_number() -> None:
    """Its image has the session's name alone when it is the first."""
    assert (Checkpoint("calm", 1).name, Checkpoint("calm", 1).image) == ("calm@1", "calm")
    assert (Checkpoint("calm", 2).name, Checkpoint("calm", 2).image) == ("calm@2", "calm@2")
