"""First checkpoints that are read ahead, of a process that never ceases to change its memory."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import deeds
from deeds import BASE, PAGES
from oracle import compare_memory, stored_pages, untouched

from lzy.checkpoint import ahead, capture, mapping_flags, proc, tracking
from lzy.checkpoint.carried import write_content
from lzy.checkpoint.content import own_page_ranges
from lzy.checkpoint.dump import dump
from lzy.checkpoint.errors import NotFound
from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.store import Store
from lzy.checkpoint.writer import ImageWriter

ROUNDS = int(os.environ.get("LZY_TEST_ROUNDS", "8"))
RESTLESS = """
import os, random, sys
sys.path.insert(0, sys.argv[1])
import deeds
deeds.lay_out()
os.write(1, b".")
known = [deed for deed in deeds.DEEDS if deed is not deeds.nothing]
pick = random.Random(int(sys.argv[2]))
for seed in range(1 << 40):
    pick.choice(known)(seed)
"""


@pytest.fixture
def restless(request: pytest.FixtureRequest) -> Iterator[int]:
    """Its pid."""
    here = str(Path(__file__).parent)
    child = subprocess.Popen(
        [sys.executable, "-ESsc", RESTLESS, here, str(request.param)], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout
        assert child.stdout.read(1) == b"."
        yield child.pid
        assert child.poll() is None
    finally:
        child.kill()
        child.communicate()


def read_all(pid: int) -> dict[int, bytes]:
    """{address: content} of each page of its own that a stopped process has."""
    found: dict[int, bytes] = {}
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end in own_page_ranges(pid, proc.mappings(pid)):
            memory.seek(start)
            content = memory.read(end - start)
            for at in range(0, end - start, PAGE_BYTES):
                found[start + at] = content[at : at + PAGE_BYTES]
    return found


@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("restless", [1, 2], indirect=True)
def test_what_is_written_meanwhile_is_as_it_was_at_the_stop(
    restless: int, further: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every page of the image is that of the moment at which the process stood still.

    `further`: each after the first is held against the one before.
    """
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(capture, "LEAST_AHEAD_BYTES", 0)
    monkeypatch.setattr(ahead, "_PART", 1)
    monkeypatch.setattr(mapping_flags, "LARGE_BYTES", 0)
    monkeypatch.setattr(tracking, "find_dense", lambda written: [])  # or it would be left out
    pick, drafts = random.Random(restless), 0
    with Store.open(tmp_path / "store", create=True) as store:
        for number in range(ROUNDS):
            monkeypatch.setattr(capture, "_CLONE_LOOKS", pick.choice([0, math.inf]))
            monkeypatch.setattr(ahead, "_LITTLE_BYTES", pick.choice([0, 1 << 40]))
            at_the_stop: dict[int, bytes] = {}

            def look(stage: str, found: dict[int, bytes] = at_the_stop) -> None:
                if stage == "dump.tracked":
                    found |= read_all(restless)

            monkeypatch.setattr(capture, "reach", look)
            report = dump(restless, store, name=f"it{number}", leave_running=True)
            assert report.base == (f"it{number - 1}" if further and number else None)
            with store.load(report.image) as image:
                stored = stored_pages(image)
            place = range(BASE, BASE + 2 * PAGES * PAGE_BYTES)
            for page in at_the_stop.keys() | stored.keys():
                content = stored.get(page) or untouched(page)
                if page in at_the_stop or page in place:
                    assert content == at_the_stop.get(page, untouched(page)), f"{page:#x} differs"
            drafts += report.written_bytes > 0
            if not further:
                tracking.withdraw(restless)
    assert drafts == ROUNDS


def test_what_became_zeros_meanwhile_is_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a window that is read twice, the second time holds, even where that is nothing."""
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(capture, "LEAST_AHEAD_BYTES", 0)
    monkeypatch.setattr(ahead, "_LITTLE_BYTES", 0)
    monkeypatch.setattr(ahead, "_PART", 1)
    child = subprocess.Popen(
        [sys.executable, "-ESs", str(Path(__file__).with_name("deeds.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdin
        assert child.stdout
        assert child.stdout.read(1) == b"."
        add_space, calls = ImageWriter.add_space, []

        def add(writer: ImageWriter, *given: Any, space: int) -> None:
            add_space(writer, *given, space=space)
            calls.append(space)
            if len(calls) == 1:
                os.write(child.stdin.fileno(), b"%d 1\n" % deeds.DEEDS.index(deeds.clear))
                assert child.stdout.read(1) == b"."

        monkeypatch.setattr(ImageWriter, "add_space", add)
        with Store.open(tmp_path / "store", create=True) as store:
            dump(child.pid, store, name="it", leave_running=True)
            assert calls[:2] == [0, 0]
            with store.load("it") as image:
                compare_memory(child.pid, stored_pages(image))
    finally:
        child.kill()
        child.communicate()


def test_files_that_travel_along_are_no_part_of_a_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were written into the image before, and are in it whole; so is the memory."""
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(capture, "LEAST_AHEAD_BYTES", 0)
    (tmp_path / "data").write_bytes(content := os.urandom(3 << 20))
    child = subprocess.Popen(
        [sys.executable, "-ESs", str(Path(__file__).with_name("deeds.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout
        assert child.stdout.read(1) == b"."
        with Store.open(tmp_path / "store", create=True) as store:
            dump(child.pid, store, name="it", leave_running=True, carry=[str(tmp_path / "data")])
            with store.load("it") as image:
                compare_memory(child.pid, stored_pages(image))
                entry = next(e for e in image.document["carried"] if "space" in e)
                with open(tmp_path / "copy", "w+b") as copy:
                    write_content(image, entry["space"], copy.fileno(), len(content))
            assert (tmp_path / "copy").read_bytes() == content
    finally:
        child.kill()
        child.communicate()


def test_a_draft_that_cannot_be_made_costs_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who ends while it is read ahead has ended: no image, and nothing of it stays in the store."""
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(capture, "LEAST_AHEAD_BYTES", 0)
    child = subprocess.Popen(
        [sys.executable, "-ESsc", "import sys; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout
        assert child.stdout.readline() == b"\n"

        def end(*given: Any) -> tracking.Begun:
            begun = protect(*given)
            child.kill()
            child.wait()
            return begun

        protect = tracking.protect_running
        monkeypatch.setattr(tracking, "protect_running", end)
        with Store.open(tmp_path / "store", create=True) as store:
            with pytest.raises(NotFound, match="ended"):
                dump(child.pid, store, name="it", leave_running=True)
            assert store.images() == []
            assert list((tmp_path / "store" / "tmp").iterdir()) == []
    finally:
        child.kill()
        child.communicate()
