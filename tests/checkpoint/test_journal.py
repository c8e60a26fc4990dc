"""Whoever takes over from a pager has its journal to itself, until the next one stands."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lzy.checkpoint.errors import Busy
from lzy.checkpoint.journal import Journal


def begin(path: Path, image: str) -> Journal:
    return Journal.create(path, {"pid": 1, "image": image}, [(0x1000, 0x2000, 0)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal whose pager has died."""
    made = tmp_path / "1.pager"
    begin(made, "old").close()
    return made


def before(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, do: Callable[[], None]) -> None:
    """Have something done just before the first call of a function."""
    function, left = getattr(place, name), [do]

    def called(*arguments: Any) -> Any:
        if left:
            left.pop()()
        return function(*arguments)

    monkeypatch.setattr(place, name, called)


@pytest.mark.parametrize("step", ["posix_fallocate", "rename"])
def test_nobody_takes_over_from_what_is_being_replaced(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Else two pagers would serve one process, and what one has not heard of it calls zeros."""
    refused: list[bool] = []

    def take_over() -> None:
        with pytest.raises(Busy):
            Journal.open(path).close()
        refused.append(True)

    before(monkeypatch, os, step, take_over)
    begin(path, "new").close()
    assert refused
    taken = Journal.open(path)
    assert taken.facts["image"] == "new"
    taken.close()


def test_who_came_for_the_old_one_gets_the_new_one_or_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was opened, then another took its place: it is not mistaken for that."""
    serving: list[Journal] = []
    before(monkeypatch, fcntl, "flock", lambda: serving.append(begin(path, "new")))
    with pytest.raises(Busy):
        Journal.open(path)
    serving.pop().close()
    taken = Journal.open(path)
    assert taken.facts["image"] == "new"
    taken.close()
