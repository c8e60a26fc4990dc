"""Every command, from the outside: help, usage, versions, and what it costs to start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from lzy.cli.app import COMMANDS

Run = Callable[..., subprocess.CompletedProcess[str]]

NAMES = [name for name, _, _ in COMMANDS]


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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "completion"])
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
        (["rm"], "IMAGE"),
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
    *("numpy", "psutil", "rich", "sqlite3", "subprocess"),
}


@pytest.mark.parametrize("module", ["lzy.cli.app", "lzy.cli.edge", "lzy.cli.restore"])
def test_a_restore_imports_nothing_heavy(module: str) -> None:
    """The path to `lzy restore` stays lean, and does not import its sister commands."""
    code = f"import {module}, sys; print('\\n'.join(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(answer.stdout.split())
    assert not loaded & HEAVY
    assert not loaded & {f"lzy.cli.{name}" for name in ("dump", "show", "doctor", "verify")}
