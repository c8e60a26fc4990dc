"""The terminal that a program was taken from goes on showing it: tmux tells what a person sees."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from panes import Pane, Tmux, begin_tmux

if TYPE_CHECKING:
    from living import CommandLine
    from people import Terminals
    from service import Service

REPL = f"{sys.executable} -q\r"


@pytest.fixture
def tmux(terminals: Terminals, service: Service, tmp_path: Path) -> Iterator[Tmux]:
    service.begin().set()
    with begin_tmux(terminals, tmp_path) as made:
        yield made


def begin_line(pane: Pane) -> int:
    """Start a REPL in a shell, and half a line in it; its pid."""
    pane.types(f"clear; {REPL}")
    pane.sees_text(">>>")
    pane.types("x = 41\r")
    pane.sees(">>> x = 41", ">>>")
    pane.types("x + ")
    pane.sees(">>> x = 41", ">>> x +")
    return pane.child()


def test_person_notices_nothing(tmux: Tmux, terminals: Terminals, lzy: CommandLine) -> None:
    """A REPL is taken in the midst of a line, from elsewhere: the window stays as it was.

    The line is finished in it; a console elsewhere shows all of it, too, and what either types
    comes to both. Ctrl-C and a change of the window reach the program. When it ends the shell has
    its prompt, and the terminal its settings.
    """
    pane = tmux.begin()
    pane.types("clear; stty -g | cksum\r")
    pane.sees_text("\n%%")
    settings = pane.screen()[-2]
    pid = begin_line(pane)
    shown = pane.screen()
    taken = lzy.succeed("attach", str(pid), "--name", "calm")
    assert taken["pid"] == pid == pane.child()
    assert os.readlink(f"/proc/{pid}/fd/0") == terminals.look()["device"]
    assert pane.screen() == shown
    pane.types("1\r")
    pane.sees("42", ">>>")
    person = terminals.person("console", "calm")
    person.sees("x + 1")
    person.types("x * 2\r")
    person.sees("82")
    pane.sees(">>> x * 2", "82", ">>>")
    pane.types("while True: pass\r\r")
    pane.presses("C-c")
    pane.sees("KeyboardInterrupt", ">>>")
    person.sees("KeyboardInterrupt")
    person.leaves()
    pane.resizes(30, 100)
    terminals.service.wait_until(lambda: terminals.look()["columns"] == 100, "its window follows")
    pane.types("import os; os.get_terminal_size()\r")
    pane.sees("os.terminal_size(columns=100, lines=30)", ">>>")
    pane.types("print('bye'); raise SystemExit(3)\r")
    pane.sees("bye", "%%")
    pane.types("echo $?; stty -g | cksum\r")
    pane.sees("3", settings, "%%")


def test_job_control(tmux: Tmux, lzy: CommandLine) -> None:
    """Ctrl-Z gives the shell its terminal; `fg` the program; it is a job as it was."""
    pane = tmux.begin()
    pid = begin_line(pane)
    lzy.succeed("attach", str(pid), "--name", "calm")
    for _ in range(2):
        pane.presses("C-z")
        pane.sees("%%")
        assert "[1]+  Stopped" in pane.screen()[-2]
        pane.types("echo $((1 + 1)); stty -a | grep -wo icanon\r")
        pane.sees("2", "icanon", "%%")
        pane.types("fg\r")
        pane.sees(f"{sys.executable} -q")
        pane.types("1\r")
        pane.sees("42", ">>>")
        pane.types("x + ")
        pane.sees("42", ">>> x +")
    pane.presses("C-z")
    pane.sees("%%")
    pane.types("bg\r")
    pane.sees("%%")
    pane.types("sleep 0\r")  # the shell waits, but not for the program
    pane.sees("%% sleep 0", "%%")
    pane.types("jobs; kill %1; wait %1; echo $?\r")
    pane.sees("143", "%%")
    assert "Running" in "".join(pane.screen())
    assert "Terminated" in "".join(pane.screen())


def test_line_that_the_kernel_holds(tmux: Tmux, lzy: CommandLine) -> None:
    """Half a line that no program has read goes along, and is shown once."""
    pane = tmux.begin()
    pane.types("clear; echo go; cat\r")
    pane.sees("go")  # only now the terminal is as programs have it, not as editors do
    pane.types("hal")
    pane.sees("go", "hal")
    lzy.succeed("attach", str(pane.child()), "--name", "calm")
    pane.types("f\r")
    pane.sees("half", "half")
    pane.presses("C-d")
    pane.sees("half", "half", "%%")


def test_window_of_a_session_that_sleeps(
    tmux: Tmux, terminals: Terminals, service: Service, lzy: CommandLine
) -> None:
    """The window stays, and says so; a key wakes the session, in the midst of its line, again and
    again. Its shell notices nothing: job control is as it was, and it is told how the program ends.
    """
    pane = tmux.begin()
    pid = begin_line(pane)
    lzy.succeed("attach", str(pid), "--name", "calm")
    service.wait_until(lambda: service.look()["image"], "its first checkpoint is taken")
    pane.sees(">>> x = 41", ">>> x +")
    for answer in ("42", "42"):
        service.do("hibernate")
        pane.sees_text("any key wakes it")
        assert "Killed" not in "".join(pane.screen())
        pane.types("1\r")
        pane.sees(">>> x + 1", answer, ">>>")
        pane.types("x + ")
        pane.sees(answer, ">>> x +")
    assert ">>> x = 41" in pane.screen()
    pane.types("1\r")
    pane.sees("42", ">>>")
    for sleeps in (False, True):
        if sleeps:
            service.do("hibernate")
            pane.sees_text("any key wakes it")
        pane.presses("C-z")
        pane.sees("%%")
        assert "[1]+  Stopped" in pane.screen()[-2]
        pane.types("echo $((1 + 1)); stty -a | grep -wo icanon\r")
        pane.sees("2", "icanon", "%%")
        pane.types("fg\r")
        if sleeps:
            pane.sees_text("any key wakes it")
        else:
            pane.sees(f"{sys.executable} -q")
        pane.types("x * 2\r")
        pane.sees("82", ">>>")
    pane.types("raise SystemExit(7)\r")
    pane.sees("%%")
    pane.types("echo $?; stty -a | grep -wo icanon\r")
    pane.sees("7", "icanon", "%%")


def test_bridge_is_killed_while_the_session_sleeps(
    tmux: Tmux, service: Service, lzy: CommandLine
) -> None:
    """Without an agent it says why a key wakes nothing. Without the bridge the shell is told what
    is true, and has its settings; the session sleeps on, and wakes where a console asks for it."""
    pane = tmux.begin("dash", "-i")
    pid = begin_line(pane)
    lzy.succeed("attach", str(pid), "--name", "calm")
    service.wait_until(lambda: service.look()["image"], "its first checkpoint is taken")
    service.do("hibernate")
    pane.sees_text("any key wakes it")
    service.kill()
    pane.types("1")
    pane.sees_text("calm cannot be woken: no agent runs")
    service.begin()
    pane.sees(">>> x = 41", ">>> x + 1")
    pane.types("\r")
    pane.sees("42", ">>>")
    service.do("hibernate")
    pane.sees_text("any key wakes it")
    os.kill(find_bridge(pid), signal.SIGKILL)
    pane.sees_text("Killed")
    pane.types("lzy console calm\n")
    pane.sees_text("calm hibernates; a key wakes it")
    pane.types("x\r")
    pane.sees(">>> x", "41", ">>>")


def test_leader_of_a_terminal(tmux: Tmux, terminals: Terminals, lzy: CommandLine) -> None:
    """A window that has no shell: it stays, with all that is in it, and closes with its program."""
    tmux.begin()
    pane = tmux.open(sys.executable, "-q")
    pane.sees(">>>")
    pane.types("x = 41\rx + ")
    pane.sees(">>> x = 41", ">>> x +")
    lzy.succeed("attach", str(pane.pid), "--name", "calm")
    assert os.readlink(f"/proc/{pane.pid}/fd/0") == terminals.look()["device"]
    pane.types("1\r")
    pane.sees(">>> x = 41", ">>> x + 1", "42", ">>>")
    pane.types("while True: pass\r\r")
    pane.presses("C-c")
    pane.sees("KeyboardInterrupt", ">>>")
    pane.resizes(30, 100)
    terminals.service.wait_until(lambda: terminals.look()["columns"] == 100, "its window follows")
    pane.types("exit()\r")
    terminals.service.wait_until(lambda: not pane.is_open(), "its window has closed")


def test_window_is_closed(tmux: Tmux, terminals: Terminals, lzy: CommandLine) -> None:
    """A program without a shell outlives its window."""
    tmux.begin()
    pane = tmux.open(sys.executable, "-q")
    pane.sees(">>>")
    lzy.succeed("attach", str(pane.pid), "--name", "calm")
    tmux.call("kill-pane", "-t", "%1")
    person = terminals.person("console", "calm")
    person.types("6 * 7\r")
    person.sees("42")
    person.types("exit()\r")
    assert person.exit_status() == 0


def test_bridge_is_killed(tmux: Tmux, terminals: Terminals, lzy: CommandLine) -> None:
    """The shell has its prompt and its settings again; the program lives, where a console is."""
    pane = tmux.begin()
    pid = begin_line(pane)
    lzy.succeed("attach", str(pid), "--name", "calm")
    os.kill(find_bridge(pid), signal.SIGKILL)
    pane.sees_text("Stopped")
    pane.types("stty -a | grep -wo icanon; lzy console calm\r")
    pane.sees(">>> x = 41", ">>> x +")
    pane.types("1\r")
    pane.sees("42", ">>>")


def find_bridge(program: int) -> int:
    """Who shows the program in its old terminal: not the child that watches over it."""
    found = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes()
            parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if b"lzy.cli.bridge" in words and f'"program": {program},'.encode() in words:
            found[int(name)] = int(parent)
    (bridge,) = (pid for pid, parent in found.items() if parent not in found)
    return bridge
