"""The loop of a terminal's host: what is due, and what is not any more."""

from __future__ import annotations

import os
import signal

import pytest

from lzy.agent.terminal.loop import Loop


class Over(Exception):
    """Raised by what a loop calls, to be out of it."""


def end() -> None:
    raise Over


def test_what_is_called_off_while_it_is_due_is_not_done() -> None:
    """Of two things that are due at once, the first may make the other unnecessary."""
    loop, done = Loop(), []

    def do_both() -> None:
        done.append("both")
        loop.never_mind(do_one)

    def do_one() -> None:
        done.append("one")

    for work in (do_both, do_one, end):
        loop.soon(work, 0)
    with pytest.raises(Over):
        loop.run()
    assert done == ["both"]
    loop.close()


def test_what_was_heard_of_is_heard_of_after_a_fork() -> None:
    """A loop that is made anew in a child hears what the old one heard, though that is closed."""
    loop = Loop()
    reading, writing = os.pipe()
    loop.hear(reading, lambda _: end())
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            loop.renew()
            loop.run()
        except Over:
            os._exit(0)
        finally:
            os._exit(1)
    try:
        loop.forget(reading)  # of an epoll(7) that the two shared, the child would hear no more
        loop.close()
    finally:
        os.write(writing, b"!")
        status = os.waitpid(child, 0)[1]
        os.close(reading)
        os.close(writing)
    assert os.waitstatus_to_exitcode(status) == 0
