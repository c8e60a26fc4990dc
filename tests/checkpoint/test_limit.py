"""A running process is kept below a resident limit: what is cold goes, and nothing is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from deeds import BASE, PAGES, rewrite, write
from test_away import Dozer

from lzy.checkpoint.doze import resident_bytes
from lzy.checkpoint.errors import NotFound
from lzy.checkpoint.limit import Heat, Round, keep_below, release
from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.log import read_log

MIB = 1 << 20
HOT, HOT_PAGES = BASE + 64 * PAGE_BYTES, 256


@pytest.fixture
def dozer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dozer]:
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    dozer = Dozer(tmp_path)
    try:
        dozer.do(rewrite, 3)
        yield dozer
    finally:
        dozer.close()


def limit_once(dozer: Dozer, limit_bytes: int) -> list[Round]:
    return keep_below(dozer.pid, dozer.store, limit_bytes, name="it", every_s=0.01, once=True)


def test_what_is_too_much_goes(dozer: Dozer) -> None:
    """One round: it is below the limit, what is away comes back right, one checkpoint stays."""
    limit_bytes = resident_bytes(dozer.pid) - 2 * MIB
    (done,) = limit_once(dozer, limit_bytes)
    assert resident_bytes(dozer.pid) < limit_bytes
    assert done.dropped_bytes >= 2 * MIB
    dozer.do(write, 4)
    dozer.read(BASE, PAGES * PAGE_BYTES)
    (again,) = limit_once(dozer, limit_bytes)
    assert again.dropped_bytes > MIB
    assert resident_bytes(dozer.pid) < limit_bytes
    assert [checkpoint.why for checkpoint in read_log(dozer.store, "it")] == ["limit"]
    dozer.checkpoint_glanced(None)


def test_who_needs_little_is_left_alone(dozer: Dozer) -> None:
    """Below the limit nothing is done, not even a checkpoint."""
    assert limit_once(dozer, 1 << 40) == []
    with pytest.raises(NotFound):
        read_log(dozer.store, "it")


def test_what_is_read_again_and_again_seldom_goes(dozer: Dozer) -> None:
    """A part of one mapping is read all the time, the others in turn: those go, as a rule."""
    limit_bytes = resident_bytes(dozer.pid) - 4 * MIB
    heat = Heat(dozer.pid)
    went = {True: 0, False: 0}
    for turn in range(24):
        other = BASE + PAGES // 4 * PAGE_BYTES * (1 + turn % 3)
        for part, is_hot in ((HOT, True), (other, False)):
            before = resident_bytes(dozer.pid)
            dozer.read(part, HOT_PAGES * PAGE_BYTES)
            went[is_hot] += resident_bytes(dozer.pid) - before
        if resident_bytes(dozer.pid) > limit_bytes:
            release(dozer.pid, dozer.store, limit_bytes, heat, name="it")
    assert went[True] < MIB < went[False]  # without a memory of what came back: 1.5 MiB
    dozer.checkpoint_glanced(None)


def test_it_is_kept_below_as_it_grows_until_it_ends(dozer: Dozer) -> None:
    """It grows, and is seen to in time; when it ends so does who looks after it."""
    limit_bytes = resident_bytes(dozer.pid) - MIB
    below = threading.Event()

    def note(done: Round) -> None:
        if done.resident_after_bytes < limit_bytes:
            below.set()

    found: list[list[Round]] = []
    keeper = threading.Thread(
        target=lambda: found.append(
            keep_below(dozer.pid, dozer.store, limit_bytes, name="it", every_s=0.05, note=note)
        )
    )
    keeper.start()
    try:
        for seed in range(3):
            assert below.wait(60)
            below.clear()
            dozer.do(rewrite, seed * 2 + 3)
            dozer.do(rewrite, seed * 2 + 4)
            dozer.read(BASE, PAGES * PAGE_BYTES)
    finally:
        dozer.child.kill()
        keeper.join(60)  # a zombie has ended, too
        dozer.child.wait()
    assert not keeper.is_alive()
    assert len(found[0]) >= 3


def test_by_the_command(dozer: Dozer) -> None:
    """`lzy doze --limit --once --json` says what went; a limit that is no size is refused."""
    limit_bytes = resident_bytes(dozer.pid) - 2 * MIB

    def lzy(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                str(Path(sys.executable).with_name("lzy")),
                "doze",
                str(dozer.pid),
                "--json",
                *arguments,
            ],
            env={**os.environ},
            capture_output=True,
            text=True,
            timeout=60,
        )

    done = lzy("--limit", f"{limit_bytes // 1024}k", "--once")
    assert '"ended_by": "once"' in done.stdout, done.stderr
    assert resident_bytes(dozer.pid) < limit_bytes
    assert "is no size" in lzy("--limit", "much").stderr
    assert "goes with --limit" in lzy("--once").stderr
