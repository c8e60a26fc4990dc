"""A session moves to another node, and its terminal is there as it was."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_of_two import Migrator
from living import CommandLine
from pair import Pair
from panes import Pane, begin_tmux
from people import Terminals

from lzy.checkpoint.errors import LzyError


@pytest.fixture
def migrator(tmp_path: Path, pair: Pair) -> Iterator[Migrator]:
    made = Migrator(tmp_path, pair)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def pair(tmp_path: Path, nothing_left_behind: None) -> Iterator[Pair]:
    made = Pair(tmp_path, own_stores=True)
    try:
        yield made
    finally:
        made.close()


def numbers(pane: Pane) -> list[int]:
    """The rows of it that are numbers."""
    return [int(row) for row in pane.history() if row.isdecimal()]


SHOWS_WINDOW = """
import os, select, signal
# A signal that comes just before read(2) is heard of only behind that: so it is waited for, too.
woken, wakes = os.pipe()
os.set_blocking(wakes, False)
signal.set_wakeup_fd(wakes)
signal.signal(signal.SIGINT, lambda *_: print('interrupted'))
os.system('stty -echo')
print('\\x1b[35mhere\\x1b[0m')
while True:
    if woken in select.select([0, woken], [], [])[0]:
        os.read(woken, 100)
        continue
    line = input()
    os.system('stty echo')
    print('heard', line, *os.get_terminal_size())
"""


def test_terminal_moves_with_its_session(pair: Pair) -> None:
    """Screen, settings and window are in the image, and a console that is connected goes along.

    There it leads its session again: Ctrl-C reaches it. And back, with what it printed there. Half
    a line that the kernel holds comes, too, and is shown once, or not at all where nothing is.
    """
    pair.begin()
    nodes = {
        name: Terminals(CommandLine(service.home), service)
        for name, service in pair.services.items()
    }
    try:
        person = nodes["source"].run(SHOWS_WINDOW, rows=31, columns=77)
        person.sees("here")
        for to in ("target", "source"):
            person.types("half a line ")
            if to == "source":
                nodes["target"].await_screen("half a line")
            pair.move(to)
            assert pair.await_settled()[0] == to
            assert nodes[to].screen()[0] == "here"
            person.sees("\x1b[0;35mhere")
            person.types(f"at {to}\r")
            person.sees(f"heard half a line at {to} 77 31")
            echoes = nodes[to].screen().count(f"half a line at {to}")
            assert echoes == (1 if to == "source" else 0)  # at first nothing is shown
            person.types("\x03")
            person.sees("interrupted")
            other = nodes[to].person("console", "calm", rows=31, columns=77)
            other.sees("interrupted")
            other.leaves()
        assert "heard half a line at target 77 31" in nodes["source"].screen()
        person.types("\x04")
        assert person.exit_status() == 1
    finally:
        pair.close()
        for terminals in nodes.values():
            terminals.close()


def test_window_follows_its_session(pair: Pair, tmp_path: Path) -> None:
    """A window that a program was taken from, and lzy console on a node that it was on, go along.

    There and back, asleep and awake; the shell in the window waits for it all the time.
    """
    pair.begin()
    lzy = CommandLine(pair.source.home)
    terminals = Terminals(lzy, pair.source)
    try:
        with begin_tmux(terminals, tmp_path) as tmux:
            pane = tmux.begin()
            pane.types(f"clear; {sys.executable} -q\r")
            pane.sees_text(">>>")
            pane.types("x = 41\rx + ")
            pane.sees(">>> x = 41", ">>> x +")
            lzy.succeed("attach", str(pane.child()), "--name", "calm")
            pair.source.wait_until(lambda: pair.source.look()["image"], "it has a checkpoint")
            pane.sees(">>> x = 41", ">>> x +")
            pair.move()
            assert pair.await_settled()[0] == "target"
            pane.types("1\r")
            pane.sees(">>> x + 1", "42", ">>>")
            person = terminals.person("console", "calm")
            person.sees("42")
            person.types("x + 2\r")
            person.sees("43")
            person.leaves()
            pane.sees("43", ">>>")
            pair.target.do("hibernate")
            pane.sees_text("any key wakes it")
            pane.types("x * 2\r")
            pane.sees(">>> x * 2", "82", ">>>")
            pane.presses("C-z")
            pane.sees_text("Stopped")
            pane.types("fg\r")
            pane.sees(f"{sys.executable} -q")
            pair.move("source")
            assert pair.await_settled()[0] == "source"
            pane.types("x * 3\r")
            pane.sees_text("123")
            pane.types("raise SystemExit(5)\r")
            pane.sees("%%")
            pane.types("echo $?; stty -a | grep -wo icanon\r")
            pane.sees("5", "icanon", "%%")
    finally:
        pair.close()
        terminals.close()
        Terminals(CommandLine(pair.target.home), pair.target).close()


def test_sleeper_moves_with_its_terminal(pair: Pair) -> None:
    """A session moves asleep: its console shows its screen from there, and a key wakes it there.

    Also when the agent of the node that it left was killed meanwhile.
    """
    pair.begin()
    nodes = {
        name: Terminals(CommandLine(service.home), service)
        for name, service in pair.services.items()
    }
    try:
        person = nodes["source"].person("run", "--name", "calm", "--", sys.executable, "-q")
        person.sees("leaves it running")
        nodes["source"].await_screen(">>>")
        person.types("x = 41\rx + ")
        nodes["source"].await_screen("x +")
        pair.source.do("hibernate")
        person.sees("hibernates; a key wakes it")
        pair.move(wake=False)
        name, session = pair.await_settled()
        assert (name, session["state"]) == ("target", "hibernated")
        person.sees("\x1b[2;1H>>> x +")
        person.sees("hibernates; a key wakes it")
        person.leaves()
        pair.source.kill()
        pair.begin()
        person = nodes["source"].person("console", "calm")
        person.sees("hibernates; a key wakes it")
        person.types("1\r")
        person.sees("42")
        pair.target.await_state("running")  # the agent hears of it after it has begun to run
    finally:
        pair.close()
        for terminals in nodes.values():
            terminals.close()


def test_window_misses_no_line_of_a_move(pair: Pair, tmp_path: Path) -> None:
    """What a program prints there before its window has followed it is shown in its order."""
    code = "import itertools, os, time\nfor n in itertools.count():\n"
    code += "  print(n, flush=True); time.sleep(0.003)\n  if os.path.exists('stop'): break\n"
    (tmp_path / "count.py").write_text(code)
    pair.begin()
    lzy = CommandLine(pair.source.home)
    terminals = Terminals(lzy, pair.source)
    try:
        with begin_tmux(terminals, tmp_path) as tmux:
            pane = tmux.begin()
            pane.types(f"cd {tmp_path}; clear; {sys.executable} count.py\r")
            pair.source.wait_until(lambda: 100 in numbers(pane), "it counts")
            lzy.succeed("attach", str(pane.child()), "--name", "calm")
            pair.source.wait_until(lambda: pair.source.look()["image"], "it has a checkpoint")
            pair.move()
            assert pair.await_settled()[0] == "target"
            printed = numbers(pane)[-1]
            pair.source.wait_until(lambda: numbers(pane)[-1] > printed + 50, "it goes on")
            (tmp_path / "stop").touch()
            pane.sees("%%")
            shown = numbers(pane)
            assert shown == list(range(shown[0], shown[-1] + 1))
            assert shown[0] < printed - 200
    finally:
        pair.close()
        terminals.close()
        Terminals(CommandLine(pair.target.home), pair.target).close()


def test_screen_misses_nothing_of_a_move(pair: Pair) -> None:
    """What a program prints while its last dump is taken is on the screen that comes with it."""
    code = "import itertools, os, time\nfor n in itertools.count():\n"
    code += "  print(n, end=' '); time.sleep(0.001)\n  if os.path.exists('stop'): break\n"
    code += "print('\\nend'); input()"
    folder = pair.source.home.parent
    pair.begin()
    terminals = Terminals(CommandLine(pair.source.home), pair.source)
    there = Terminals(CommandLine(pair.target.home), pair.target)
    try:
        person = terminals.run(
            f"import os; os.chdir({str(folder)!r})\n{code}", rows=60, columns=250
        )
        person.sees(" 99 ")
        pair.move()
        assert pair.await_settled()[0] == "target"
        (folder / "stop").touch()
        there.await_screen("end")
        rows = "".join(row.ljust(250) for row in there.look()["screen"])
        shown = [int(word) for word in rows.partition("end")[0].split()[1:]]
        assert shown == list(range(shown[0], shown[-1] + 1))
    finally:
        pair.close()
        terminals.close()
        there.close()


def test_key_wakes_it_where_there_is_room(pair: Pair, migrator: Migrator, tmp_path: Path) -> None:
    """A key while its node takes no sessions: another has it, and the key, once.

    So in the window that it was taken from, and back again from there.
    """
    pair.begin()
    migrator.begin().await_up()
    lzy = CommandLine(pair.source.home)
    terminals = Terminals(lzy, pair.source)
    try:
        with begin_tmux(terminals, tmp_path) as tmux:
            pane = tmux.begin()
            pane.types(f"clear; {sys.executable} -q\r")
            pane.sees_text(">>>")
            pane.types("x = 41\rx + ")
            pane.sees(">>> x = 41", ">>> x +")
            lzy.succeed("attach", str(pane.child()), "--name", "calm")
            pair.source.wait_until(lambda: pair.source.look()["image"], "it has a checkpoint")
            pair.source.do("hibernate")
            pair.source.client.post("/v1/node/drain", {"draining": True})
            person = terminals.person("console", "calm")
            person.sees("hibernates; a key wakes it")
            pane.types("1\r")
            pane.sees(">>> x + 1", "42", ">>>")
            assert pair.await_settled()[0] == "target"
            person.sees("42")
            person.types("x + 2\r")
            person.sees("43")
            pane.sees("43", ">>>")
            pair.source.client.post("/v1/node/drain", {"draining": False})
            pair.target.client.post("/v1/node/drain", {"draining": True})
            pair.target.do("hibernate")
            person.sees("hibernates; a key wakes it")
            person.types("x + 3\r")
            person.sees("44")
            assert pair.await_settled()[0] == "source"
            pane.sees("44", ">>>")
            pane.types("raise SystemExit(5)\r")
            pane.sees("%%")
            assert person.exit_status() == 5
    finally:
        migrator.end()
        pair.close()
        terminals.close()
        Terminals(CommandLine(pair.target.home), pair.target).close()


@pytest.mark.slow
def test_refused_move_leaves_what_was_typed(pair: Pair) -> None:
    """The other node dies over it: the session wakes here, with half a line, shown once."""
    pair.source.begin()
    pair.target.begin(kill_at="move.accepting")
    terminals = Terminals(CommandLine(pair.source.home), pair.source)
    try:
        person = terminals.run("print('ready')\nwhile True: print('heard', input())")
        person.sees("ready")
        person.types("ha")
        terminals.await_screen("ha")
        with contextlib.suppress(LzyError):
            pair.move()
        pair.target.await_death()
        pair.target.begin()
        assert pair.await_settled()[0] == "source"
        person.types("lf\r")
        person.sees("heard half")
        assert terminals.screen()[-2:] == ["half", "heard half"]
        person.types("\x04")
        assert person.exit_status() == 1
    finally:
        pair.close()
        terminals.close()


@pytest.mark.parametrize(
    "stage", ["restore.threads", pytest.param("move.accepting", marks=pytest.mark.slow)]
)
def test_console_reaches_it_when_it_could_not_return(pair: Pair, stage: str) -> None:
    """The node that it left refuses it, or dies over it: `lzy console` there leads to it as before.

    And once more after that node's agent was started anew.
    """
    pair.begin()
    terminals = {
        name: Terminals(CommandLine(service.home), service)
        for name, service in pair.services.items()
    }
    here = terminals["source"]
    try:
        here.run("print('ready')\nwhile True: print('heard', input())").sees("ready")
        pair.move()
        pair.source.end()
        pair.source.begin(kill_at=stage)
        with pytest.raises(LzyError, match="did not take"):
            pair.move("source")
        if stage == "move.accepting":
            pair.source.await_death()
            pair.source.begin()
        assert pair.await_settled()[0] == "target"
        for words in ("one", "two"):
            person = here.person("console", "calm")
            person.sees("ready")
            person.types(f"{words}\r")
            person.sees(f"heard {words}")
            person.leaves()
            if words == "one":
                pair.source.end()
                pair.source.begin()
    finally:
        pair.close()
        for each in terminals.values():
            each.close()


def test_nothing_that_is_typed_is_lost(pair: Pair) -> None:
    """Somebody types on while the session goes to another node and back: all arrives, once each."""
    folder = pair.source.home.parent
    code = f"import os, tty; os.chdir({str(folder)!r}); tty.setraw(0)\n"
    code += "file = open('typed', 'wb', 0); print('ready')\nwhile True: file.write(os.read(0, 999))"
    pair.begin()
    nodes = [Terminals(CommandLine(s.home), s) for s in pair.services.values()]
    typed, enough = [], threading.Event()

    def type_on() -> None:
        while not enough.wait(0.003):
            person.types(f"{len(typed)} ")
            typed.append(f"{len(typed)} ")

    person = nodes[0].run(code)
    hands = threading.Thread(target=type_on)
    try:
        person.sees("ready")
        hands.start()
        for to in ("target", "source"):
            pair.move(to)
            assert pair.await_settled()[0] == to
        enough.set()
        hands.join()
        wanted = "".join(typed)
        pair.source.wait_until(
            lambda: len((folder / "typed").read_text()) >= len(wanted), "all has come"
        )
        assert (folder / "typed").read_text() == wanted
    finally:
        enough.set()
        pair.close()
        for terminals in nodes:
            terminals.close()
