"""Completing with tab."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def _complete(lzy: Run, line: str) -> list[str]:
    """What bash would offer at the end of `line`."""
    words = line.split(" ")
    answer = lzy(_LZY_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    return [offer.partition(",")[2] for offer in answer.stdout.split()]


def test_commands_complete(lzy: Run) -> None:
    """A command's name completes, without importing the command."""
    assert _complete(lzy, "lzy res") == ["restore"]


def test_choices_complete(lzy: Run) -> None:
    """An option's values complete."""
    assert _complete(lzy, "lzy restore --pid-namespace ") == ["host", "new", "auto"]


def test_pids_complete(lzy: Run) -> None:
    """A living process of ours is offered; the completing process itself is not."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert _complete(lzy, f"lzy dump {child.pid}") == [str(child.pid)]
        assert str(os.getpid()) in _complete(lzy, "lzy dump ")
    finally:
        child.kill()
        child.wait()
        assert child.stdin
        child.stdin.close()


def test_without_a_store_no_images_are_offered(lzy: Run) -> None:
    """A shell that waits for names gets none, and no traceback."""
    assert _complete(lzy, "lzy restore ca") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_for_shells(lzy: Run, shell: str) -> None:
    """Each shell gets a script that asks lzy for completions."""
    answer = lzy("completion", shell)
    assert answer.returncode == 0
    assert "_LZY_COMPLETE" in answer.stdout
