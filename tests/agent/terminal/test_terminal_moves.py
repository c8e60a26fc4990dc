"""A session moves to another node, and its terminal is there as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from living import CommandLine
from pair import Pair
from people import Terminals


@pytest.fixture
def pair(tmp_path: Path, nothing_left_behind: None) -> Iterator[Pair]:
    made = Pair(tmp_path, own_stores=True)
    try:
        yield made
    finally:
        made.close()


def test_terminal_moves_with_its_session(pair: Pair) -> None:
    """Screen, settings and window are in the image; whoever was connected is told that it has gone.

    There it leads its session again: Ctrl-C reaches it. And back.
    """
    code = "import os, time; os.system('stty -echo'); print('\\x1b[35mhere\\x1b[0m')\n"
    code += "while True:\n  try: print('heard', input(), *os.get_terminal_size())\n"
    code += "  except KeyboardInterrupt: print('interrupted')\n"
    pair.begin()
    nodes = {
        name: Terminals(CommandLine(service.home), service)
        for name, service in pair.services.items()
    }
    try:
        person = nodes["source"].run(code, rows=31, columns=77)
        person.sees("here")
        for to in ("target", "source"):
            pair.move(to)
            assert pair.await_settled()[0] == to
            assert person.exit_status() == 0
            assert nodes[to].screen()[0] == "here"
            person = nodes[to].person("console", "calm", rows=31, columns=77)
            person.sees("\x1b[0;35mhere")
            person.types(f"at {to}\r")
            person.sees(f"heard at {to} 77 31")
            assert f"at {to}" not in nodes[to].screen()  # it does not echo
            person.types("\x03")
            person.sees("interrupted")
        person.types("\x04")
        assert person.exit_status() == 1
    finally:
        pair.close()
        for terminals in nodes.values():
            terminals.close()
