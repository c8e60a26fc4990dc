"""Terminals: pairs of the process's own, and the one it was run in."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from typing import Any

import pytest

from lzy.checkpoint.errors import Unsupported
from lzy.checkpoint.resources import RestoreOptions


@pytest.mark.shows("survives", "pairs of terminals of its own")
def test_own_pair_keeps_settings_and_window(cycle: Any) -> None:
    """Master and slave are connected again, under the same number where it is free."""

    def hold() -> Any:
        master, slave = pty.openpty()
        settings = termios.tcgetattr(slave)
        settings[3] &= ~(termios.ECHO | termios.ICANON)
        settings[6][termios.VMIN] = 3
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 44, 132, 0, 0))
        return master, slave, os.ttyname(slave), termios.tcgetattr(slave)

    def prove(state: Any) -> Any:
        master, slave, name, settings = state
        os.write(master, b"abc")
        heard = os.read(slave, 10)
        os.write(slave, b"def")
        window = struct.unpack("4H", fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8)))
        return (
            heard,
            os.read(master, 10),
            window[:2],
            termios.tcgetattr(slave) == settings,
            os.ttyname(slave) == name,
        )

    assert cycle(hold, prove) == (b"abc", b"def", (44, 132), True, True)


@pytest.mark.shows("refused", "unread bytes in a pair of terminals of its own")
def test_unread_bytes_in_a_pair_are_a_reason_to_wait(cycle: Any) -> None:
    """They cannot be copied without being read."""

    def hold() -> Any:
        master, slave = pty.openpty()
        os.write(slave, b"unread")
        return master, slave

    with pytest.raises(Unsupported, match="unread"):
        cycle.describe(hold)


@pytest.mark.shows("changed", "a terminal of the outside: the caller's, else /dev/null")
def test_outside_terminal_becomes_the_chosen_one_or_dev_null(cycle: Any) -> None:
    """A terminal that is gone is replaced, also where an epoll watches it."""
    import select

    master, slave = pty.openpty()
    name = os.ttyname(slave)

    def hold() -> int:
        for number in (0, 1):
            os.dup2(os.open(name, os.O_RDWR | os.O_NOCTTY), number)
        epoll = select.epoll()
        epoll.register(0, select.EPOLLIN)
        return os.dup(epoll.fileno())

    try:
        number = cycle.describe(hold)
        chosen = RestoreOptions(terminal=name)
        assert cycle.restore(lambda: os.ttyname(0), chosen) == name
        events = cycle.restore(lambda: select.epoll.fromfd(number).poll(0), chosen)
        assert events == []
        options = RestoreOptions(stdin="/dev/zero", terminal="/dev/null")
        assert cycle.restore(
            lambda: (os.read(0, 1), os.write(1, b"x"), os.readlink("/proc/self/fd/1")), options
        ) == (b"\0", 1, "/dev/null")
    finally:
        os.close(master)
        os.close(slave)
