"""The README's first command goes through to its end, and ends cleanly when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "bench" / "demo.py"
FEW_ROWS = "60000"


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


def test_demo_shows_figures(tmp_path: Path, nothing_left_behind: None) -> None:
    """The kernel that came back proves its state, and all figures are there."""
    with demo(tmp_path, "--json", str(tmp_path / "figures.json")) as process:
        printed, _ = process.communicate(timeout=110)
    assert process.returncode == 0, printed
    assert "every byte is as it was" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < figures["stored_bytes"] < figures["raw_bytes"]
    assert 0 < figures["restore_s"] <= figures["first_reply_s"] <= figures["everything_s"]
    assert figures["freeze_s"] > 0
    assert os.listdir(tmp_path) == ["figures.json"]


@pytest.mark.parametrize("moment", ["Work in it", "$ lzy dump", "$ lzy restore", "Once more"])
def test_demo_interrupted(tmp_path: Path, nothing_left_behind: None, moment: str) -> None:
    """Ctrl-C at any step leaves no process and no file."""
    with demo(tmp_path) as process:
        assert process.stdout
        for line in process.stdout:
            if moment in line:
                break
        else:
            pytest.fail(f"the demo never came to {moment!r}")
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "nothing is left behind" in rest
    assert os.listdir(tmp_path) == []
