"""People at terminals of a fleet whose nodes are namespaces of this machine."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from living import PATIENCE_S, CommandLine
from people import Person
from test_nodes import Trial


@pytest.fixture
def trial(lzy: CommandLine) -> Iterator[Trial]:
    made = Trial(lzy)
    try:
        yield made.up()
    finally:
        made.down()


def test_programs_are_run_and_reached_from_outside(trial: Trial) -> None:
    """`lzy run` starts one on a node, and `lzy console` reaches it on whichever it is.

    Who is connected goes along, with half a line, the window and Ctrl-C; names are the fleet's.
    """
    lzy = trial.lzy
    begins = ("run", "--node", "one", "--name", "calm", "--", sys.executable, "-q")
    person = Person(lzy, 24, 80, *begins)
    person.sees("leaves it running")
    trial.wait_until(lambda: lzy.succeed("console", "calm")["screen"][0].startswith(">>>"))
    person.types("x = 41\rx + ")
    person.sees("x + ")
    refused = lzy.fail("run", "--node", "two", "--name", "calm", "--", "sleep", "9")
    assert "there is a session calm already" in refused["message"]
    lzy.succeed("migrate", "calm", "--node", "two")
    person.types("1\r")
    person.sees("42")
    person.resizes(20, 70)
    person.types("import os; print('window', *os.get_terminal_size())\r")
    person.sees("window 70 20")
    person.types("while True: pass\r\r")
    person.sees("...")
    person.types("\x03")
    person.sees("KeyboardInterrupt")
    person.leaves()
    assert "window 70 20" in lzy.succeed("console", "calm")["screen"]
    lzy.succeed("hibernate", "calm")
    person = Person(lzy, 20, 70, "console", "calm")
    person.sees("hibernates; a key wakes it")
    lzy.succeed("drain", "two")
    person.types("x + 2\r")
    person.sees("43")
    assert trial.client.get("/v1/sessions/calm")["node"] == "one"
    person.types("raise SystemExit(6)\r")
    assert person.exit_status() == 6


@pytest.mark.slow
def test_shell_of_a_node_and_a_program_taken_from_it(trial: Trial, tmp_path: Path) -> None:
    """`lzy enter` has a terminal of its own there: job control, windows, this directory.

    A program is taken from it as from any terminal; ours is as it was when the shell has ended.
    """
    lzy = trial.lzy
    environment = {**os.environ, "LZY_HOME": str(lzy.home), "PS1": "%% ", "TERM": "xterm"}
    environment["SHELL"] = "/bin/sh"
    person = pexpect.spawn("/bin/sh", [], env=environment, encoding="utf-8", timeout=PATIENCE_S,
                           cwd=str(tmp_path), dimensions=(24, 90))  # fmt: skip
    try:
        person.expect_exact("%% ")
        person.sendline(f"{lzy.executable[0]} enter one")
        person.expect_exact("%% ")
        person.sendline("pwd; cat")
        person.expect_exact(str(tmp_path))
        person.sendline("heard")
        person.expect_exact("heard\r\nheard")
        person.send("\x1a")
        person.expect_exact("Stopped")
        person.expect_exact("%% ")
        person.sendline("fg")
        person.expect_exact("\ncat")
        person.sendline("again")
        person.expect_exact("again\r\nagain")
        person.send("\x03")
        person.expect_exact("%% ")
        person.setwinsize(30, 91)
        person.sendline(f"{sys.executable} -q")
        person.expect_exact(">>> ")
        person.sendline("import os; print('at', os.getpid(), *os.get_terminal_size())")
        person.expect(r"at (\d+) 91 30")
        pid = find_process(lzy.home / "nodes" / "one", sys.executable, "-q")
        own = ("--limit", "900M", "--doze-after", "90s", "--hibernate-after", "never")
        lzy.succeed("attach", str(pid), "--name", "calm", *own)
        found = trial.client.get("/v1/sessions/calm")
        held = found["settings"]
        assert found["limit"]["limit_bytes"] == 900 << 20
        assert (held["doze_after_s"], held["hibernate_after_s"]) == (90, None)
        trial.wait_until(lambda: trial.client.get("/v1/sessions/calm")["image"])
        lzy.succeed("migrate", "calm")
        person.sendline("print('still', os.getpid())")
        person.expect(rf"still {person.match[1]}")
        person.sendline("raise SystemExit(5)")
        person.expect_exact("%% ")
        person.sendline("exit $?")
        person.expect_exact("%% ")
        person.sendline("echo ended $?; cat")
        person.expect_exact("ended 5")
        person.sendline("heard")
        person.expect_exact("heard\r\nheard")
        person.send("\x03")
        person.expect_exact("%% ")
    finally:
        person.close(force=True)


def find_process(home: Path, *words: str) -> int:
    """The process of that command which has that home."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            said = (folder / "cmdline").read_bytes().split(b"\0")[:-1]
            facts = (folder / "environ").read_bytes().split(b"\0")
            if f"LZY_HOME={home}".encode() in facts and said == [w.encode() for w in words]:
                return int(folder.name)
    raise AssertionError(f"nobody runs {words}")
