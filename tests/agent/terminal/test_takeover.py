"""Programs in somebody's terminal are moved, as they run, to one that lzy keeps."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pexpect
import pytest
from living import PATIENCE_S, CommandLine

if TYPE_CHECKING:
    from people import Terminals
    from service import Service

Shell = Callable[[], "pexpect.spawn"]

LOOP = """
import asyncio, sys
async def main():
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    def hear():
        line = sys.stdin.readline().strip()
        print('heard', line)
        if line == 'over': done.set()
    loop.add_reader(0, hear)
    print('ready')
    await done.wait()
asyncio.run(main())
"""


@pytest.fixture
def shell(nothing_left_behind: None) -> Iterator[pexpect.spawn]:
    """A person's shell, in which something runs."""
    made = pexpect.spawn(
        "bash", ["--norc"], env={**os.environ, "PS1": "%% "}, timeout=PATIENCE_S, encoding="utf-8"
    )
    try:
        made.expect_exact("%% ")
        yield made
    finally:
        made.close(force=True)


def child_of(shell: pexpect.spawn) -> int:
    """The only process that runs in the shell."""
    (pid,) = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
    return int(pid)


def start(shell: pexpect.spawn, code: str, folder: Path, after: str = "") -> int:
    """Start a program of Python's in the shell; its pid once it is ready."""
    (folder / "code.py").write_text(code)
    shell.send(f"{sys.executable} -u {folder}/code.py{after}\r")
    shell.expect_exact("ready")
    return 0 if after else child_of(shell)


def test_repl_is_taken_from_a_shell(
    terminals: Terminals, lzy: CommandLine, service: Service, shell: pexpect.spawn
) -> None:
    """It keeps its pid and what it knows, and its shell waits for it; lzy console reaches it.

    There it leads a session: Ctrl-C reaches it, and it sleeps and wakes as others do, which its
    shell does not notice.
    """
    service.begin().set()
    shell.send(f"{sys.executable} -q\r")
    shell.expect_exact(">>> ")
    shell.send("x = 41\r")
    shell.expect_exact(">>> ")
    pid = child_of(shell)
    taken = lzy.succeed("attach", str(pid), "--name", "calm", "--take-terminal")
    assert taken["pid"] == pid
    assert child_of(shell) == pid
    device = terminals.look()["device"]
    assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)} == {device}
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert fields[2:4] == [str(pid), str(pid)]
    assert fields[5] == str(pid)
    person = terminals.person("console", "calm")
    person.types("x + 1\r")
    person.sees("42")
    person.types("while True: pass\r\r")
    terminals.await_screen("pass")
    time.sleep(0.1)
    person.types("\x03")
    person.sees("KeyboardInterrupt")
    service.wait_until(lambda: service.look()["image"], "its first checkpoint is taken")
    service.wait_until(lambda: not service.look()["operation"], "nothing is done to it")
    assert not Path(f"/proc/{pid}/task/{pid}/children").read_text()  # no zombie of ours
    service.do("hibernate")
    shell.expect_exact("calm is asleep")
    person.types("x + 2\r")
    person.sees("43")
    shell.expect_exact("43")
    person.types("raise SystemExit(3)\r")
    assert person.exit_status() == 3
    shell.send("echo shell $?\r")
    shell.expect_exact("shell 3")


def test_event_loop_watches_the_new_terminal(
    terminals: Terminals, lzy: CommandLine, service: Service, shell: pexpect.spawn, tmp_path: Path
) -> None:
    """An epoll that watched the old terminal watches the new one, and no longer the old one."""
    service.begin().set()
    pid = start(shell, LOOP, tmp_path)
    lzy.succeed("attach", str(pid), "--name", "calm", "--take-terminal")
    shell.send("\x1a")
    shell.expect_exact("Stopped")
    shell.send("bg; echo mine\r")
    shell.expect_exact("\nmine")
    person = terminals.person("console", "calm")
    person.types("hello\r")
    person.sees("heard hello")
    assert "mine" not in "".join(terminals.screen())
    person.types("over\r")
    assert person.exit_status() == 0


def test_what_cannot_be_taken_runs_on(
    terminals: Terminals, lzy: CommandLine, service: Service, shell: pexpect.spawn, tmp_path: Path
) -> None:
    """A pipeline, a session's leader, what has no terminal or is on lzy's: by name, unharmed."""
    service.begin().set()
    code = "print('ready')\nwhile True: print('heard', input())"
    start(shell, code, tmp_path, after=" | cat")
    pids = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
    for pid in (*pids, str(shell.pid), str(os.getpid())):
        error = lzy.fail("attach", pid, "--name", "calm", "--take-terminal")
        assert error["kind"] == "unsupported", error
        assert error["remedy"]
    shell.send("still\r")
    shell.expect_exact("heard still")
    terminals.run(code, "--detach").exit_status()
    error = lzy.fail("attach", str(service.look()["pid"]), "--take-terminal")
    assert "already" in error["message"]
    assert [s["name"] for s in lzy.succeed("ps")] == ["calm"]
    notes = "\n".join(lzy.succeed("attach", pids[0], "--name", "piped")["notes"])
    assert f"it stays in its terminal: cat ({pids[1]}) is in one job with it" in notes
    assert "a pipe between them ends" in notes
    assert "lzy run -- sh -c 'A | B'" in notes
    shell.send("yet\r")
    shell.expect_exact("heard yet")


def test_lzy_is_killed_while_it_takes(
    terminals: Terminals, lzy: CommandLine, service: Service, shell: pexpect.spawn, tmp_path: Path
) -> None:
    """Whenever that is, the program lives, whole, on the one terminal or on the other."""
    service.begin().set()
    pid = start(shell, "print('ready')\nwhile True: print('heard', input())", tmp_path)
    old = os.readlink(f"/proc/{pid}/fd/0")
    for _ in range(3):
        taking = lzy.start("attach", str(pid), "--name", "calm", "--take-terminal")
        time.sleep(random.uniform(0.25, 0.9))
        taking.kill()
        taking.communicate()
        assert Path(f"/proc/{pid}/status").exists()
        if os.readlink(f"/proc/{pid}/fd/0") != old:
            break
    if os.readlink(f"/proc/{pid}/fd/0") == old:
        shell.send("where it was\r")
        shell.expect_exact("heard where it was")
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        person = terminals.person("console", "calm")
        person.types("moved\r")
        person.sees("heard moved")
    os.kill(pid, signal.SIGKILL)
