"""Every command, from the outside: help, usage, versions, and what it costs to start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lzy.cli.app import COMMANDS

Run = Callable[..., subprocess.CompletedProcess[str]]

NAMES = [name for name, _, _ in COMMANDS]
WORDLESS = ("completion", "enter", "agent", "migrator")
"""What has no answer: a script, and those that become another program."""


def test_lzy_alone_helps(lzy: Run) -> None:
    """`lzy` without arguments prints the help, with every command in it, and succeeds."""
    answer = lzy()
    assert answer.returncode == 0
    for name, _, words in COMMANDS:
        assert f"  {name} " in answer.stdout
        assert words in answer.stdout


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples(lzy: Run, name: str) -> None:
    """`lzy COMMAND --help` shows how it is used, one example to a line."""
    answer = lzy(name, "--help")
    assert answer.returncode == 0, answer.stderr
    assert "Examples:" in answer.stdout
    assert f"lzy {name}" in answer.stdout.partition("Examples:")[2]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WORDLESS])
def test_every_command_speaks_json(lzy: Run, name: str) -> None:
    """Programs can talk to every command that has an answer."""
    assert "--json" in lzy(name, "--help").stdout


def test_version(lzy: Run) -> None:
    """`lzy --version` is one line."""
    answer = lzy("--version")
    assert answer.returncode == 0
    assert answer.stdout.startswith("lzy ")
    assert answer.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dump"], "PID"),
        (["dump", "abc"], "abc"),
        (["dump", "0"], "0"),
        (["dump", "1", "--window-size", "3K"], "3K"),
        (["frobnicate"], "frobnicate"),
        (["restore", "--pid-namespace", "moon"], "moon"),
        (["rm"], "NAME"),
        (["pager"], "--resume"),
    ],
)
def test_usage_errors(lzy: Run, arguments: list[str], words: str) -> None:
    """A wrong command line is one clear line, a way out, and exit status 2."""
    answer = lzy(*arguments)
    assert answer.returncode == 2
    error, remedy = answer.stderr.splitlines()
    assert error.startswith("lzy: error: ")
    assert words in error
    assert remedy.startswith("what to do: lzy ")
    assert "--help" in remedy
    assert answer.stdout == ""


# What may not be imported before a process is made again: each of these costs milliseconds.
HEAVY = {
    *("asyncio", "concurrent.futures", "http", "importlib.metadata", "logging", "multiprocessing"),
    *("click", "numpy", "psutil", "rich", "sqlite3", "subprocess"),
}


def test_a_restore_imports_nothing_heavy(tmp_path: Path) -> None:
    """A plain `lzy restore` reaches the engine without click and without its sister commands."""
    code = """
import sys
from lzy.checkpoint import restore
restore.restore = lambda image, **_: sys.exit(print(*sys.modules))
from pathlib import Path
from lzy.checkpoint.store import Store
Store.open(Path(sys.argv[1]), create=True)
Store.load = lambda *_: None
sys.argv[1:] = ["restore", "--store", sys.argv[1]]
from lzy.cli import main
main()
"""
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    loaded = set(answer.stdout.split())
    assert "lzy.checkpoint.restore" in loaded, answer.stderr
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("lzy.cli.")} == {
        *("lzy.cli.edge", "lzy.cli.quick", "lzy.cli.restoring", "lzy.cli.stores"),
    }
