"""Two lzys that would look after the same process at once: one has it, the other waits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from living import CommandLine

from lzy.checkpoint import capture, claim, tracking
from lzy.checkpoint.claim import Claim
from lzy.checkpoint.doze import doze
from lzy.checkpoint.dump import dump
from lzy.checkpoint.errors import Busy, NotFound
from lzy.checkpoint.store import Store


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that waits."""
    child = subprocess.Popen(
        [sys.executable, "-ESsc", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout
        assert child.stdout.readline() == b"\n"
        yield child
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("by_pidfd", [True, False])
def test_who_has_it_has_it_alone(
    sleeper: subprocess.Popen[bytes],
    by_pidfd: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the process itself, or by a file where the kernel cannot tell pidfds apart."""
    monkeypatch.setenv("LZY_HOME", str(tmp_path))
    if by_pidfd:
        pidfd = os.pidfd_open(sleeper.pid)
        assert claim._has_file_of_its_own(pidfd)
        os.close(pidfd)
    else:
        monkeypatch.setattr(claim, "_has_file_of_its_own", lambda pidfd: False)
    ours, other = Claim(sleeper.pid), Claim(sleeper.pid)
    ours.take()
    ours.take()
    with pytest.raises(Busy, match="another lzy"):
        other.take(patience_s=0)
    assert ours.is_held
    assert not other.is_held
    ours.let_go()
    ours.let_go()
    other.take(patience_s=0)
    other.let_go()


def test_who_waits_has_it_next(sleeper: subprocess.Popen[bytes]) -> None:
    """And tells that it waits."""
    told = threading.Event()
    other = Claim(sleeper.pid)
    waiting = threading.Thread(target=other.take, args=(lambda *_: told.set(),))
    with Claim(sleeper.pid):
        waiting.start()
        assert told.wait(60)
        assert not other.is_held
    waiting.join(60)
    assert other.is_held
    other.let_go()


def test_nobody_has_who_has_ended() -> None:
    """It is not found."""
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(NotFound, match="ended"):
        Claim(child.pid).take()


def test_nobody_else_dumps_or_dozes_what_is_read_ahead(
    sleeper: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose memory is protected while it runs, of him nobody else may ask what he has written."""
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(capture, "LEAST_AHEAD_BYTES", 0)
    monkeypatch.setattr(claim, "_PATIENCE_S", 0.0)
    protect = tracking.protect_running
    refused = []
    with Store.open(tmp_path / "store", create=True) as store:

        def interrupt(*given: Any) -> tracking.Begun:
            for other in (dump, doze):
                with pytest.raises(Busy, match="another lzy"):
                    other(sleeper.pid, store, name="other")
                refused.append(other)
            return protect(*given)

        monkeypatch.setattr(tracking, "protect_running", interrupt)
        dump(sleeper.pid, store, name="it", leave_running=True)
        assert refused
        assert [image.name for image in store.images()] == ["it"]
        dump(sleeper.pid, store, name="it", leave_running=True)  # and now it is anybody's


@pytest.mark.parametrize("stage", ["dump.ahead", "dump.seized", "dump.split"])
def test_who_is_killed_has_it_no_more(
    sleeper: subprocess.Popen[bytes], stage: str, tmp_path: Path
) -> None:
    """The next dump does not wait."""
    lzy = CommandLine(tmp_path)
    where = ("dump", str(sleeper.pid), "--leave-running", "--store", str(tmp_path / "store"))
    assert lzy.run(*where, kill_at=stage).returncode == -9
    with Claim(sleeper.pid) as ours:
        assert ours.is_held
    lzy.succeed(*where)
