"""The README's first command goes through to its end, and ends cleanly when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

DEMO = Path(__file__).parent.parent / "bench" / "demo.py"
FEW_ROWS = "60000"


@pytest.fixture
def folder(nothing_left_behind: None) -> Iterator[Path]:
    """A folder of its own with a short name, for sockets of nodes are to be in it."""
    with tempfile.TemporaryDirectory(prefix="lzy-test-") as name:
        yield Path(name)


@contextmanager
def demo(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The demo in a process group of its own, as a shell starts it; its files go to `folder`."""
    process = subprocess.Popen(
        [sys.executable, str(DEMO), "--rows", FEW_ROWS, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its kernel itself
            process.wait(timeout=60)
        assert process.stdout
        process.stdout.close()


def test_demo_shows_figures(folder: Path) -> None:
    """The kernel that woke on the larger node proves its state; figures and timeline are there."""
    picture = folder / "demo.svg"
    options = ("--json", str(folder / "figures.json"), "--svg", str(picture))
    with demo(folder, *options) as process:
        printed, _ = process.communicate(timeout=110)
    assert process.returncode == 0, printed
    assert "every byte is as it was" in printed
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["dozing_bytes"] < figures["held_bytes"] / 2
    assert 0 < figures["wake_s"] <= figures["first_reply_s"] <= figures["everything_s"]
    drawn = printed.partition("What happened")[2]
    kinds = ("attached", "cell", "dozed", "notice", "hibernated", "woken", "migrated")
    for words in (*kinds, "small has no room"):
        assert words in drawn, drawn
    shapes = ElementTree.parse(picture)
    told = "".join(shapes.getroot().itertext())
    for words in (*kinds, "small", "large", "in the store"):
        assert words in told, f"{words} is not in the picture: {told}"
    assert sorted(os.listdir(folder)) == ["demo.svg", "figures.json"]


MOMENTS = ["$ lzy up", "notices nothing", "Nobody types", "$ lzy wake"]


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (MOMENTS[0], signal.SIGINT),
        pytest.param(MOMENTS[1], signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(MOMENTS[2], signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(MOMENTS[3], signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_demo_interrupted(folder: Path, moment: str, number: signal.Signals) -> None:
    """Ctrl-C at any step, or kill, leaves no process and no file."""
    with demo(folder) as process:
        await_words(process, moment)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, rest
    assert "nothing is left behind" in rest
    assert os.listdir(folder) == []


@pytest.mark.slow
def test_demo_killed(folder: Path) -> None:
    """Also kill -9 leaves nothing: its child sees to that, and is seen to itself."""
    with demo(folder) as process:
        await_words(process, "Nobody types")
        process.kill()
        process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while os.listdir(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert os.listdir(folder) == []


def await_words(process: subprocess.Popen[str], words: str) -> None:
    """Read what it prints until it has said so."""
    assert process.stdout
    heard = ""
    for line in process.stdout:
        heard += line
        if words in line:
            return
    pytest.fail(f"the demo never came to {words!r}: {heard}")
