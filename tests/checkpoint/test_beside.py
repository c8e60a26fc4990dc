"""Calls that run beside their caller."""

from __future__ import annotations

import threading

import pytest

from lzy.checkpoint.beside import Beside


def test_it_runs_while_its_caller_goes_on() -> None:
    """The call waits for something that its caller does afterwards; the answer is the call's."""
    told = threading.Event()
    call = Beside(lambda: told.wait(20) and threading.current_thread() is not main)
    main = threading.current_thread()
    told.set()
    assert call.result() is True
    assert call.result() is True


def test_what_it_raises_is_raised_where_it_is_waited_for() -> None:
    """Nothing is lost, and nothing is raised before."""

    def fail() -> int:
        raise KeyError("nothing there")

    call = Beside(fail)
    with pytest.raises(KeyError, match="nothing there"):
        call.result()
