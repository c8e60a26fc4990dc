"""What every descriptor has: its number, its flags, and what it shares with others."""

from __future__ import annotations

import fcntl
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from lzy.checkpoint.linux import descriptors as kernel
from lzy.checkpoint.resources import free_number, place_descriptors


def _flags() -> dict[int, tuple[int, int]]:
    """Every open descriptor with its status flags and its descriptor flags."""
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            found[number] = (
                fcntl.fcntl(number, fcntl.F_GETFL),
                fcntl.fcntl(number, fcntl.F_GETFD),
            )
        except OSError:
            continue  # the listing's own
    return found


def _open_one_of_each(folder: Path) -> None:
    path, fifo = folder / "file", folder / "fifo"
    os.pipe2(os.O_NONBLOCK)
    os.pipe2(os.O_CLOEXEC | os.O_DIRECT)
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_APPEND, os.O_WRONLY | os.O_SYNC):
        os.open(path, flags)
        os.open(path, flags | os.O_NONBLOCK | os.O_NOATIME)
    os.open(path, os.O_PATH)
    os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    for device in ("null", "zero", "random"):
        os.open(f"/dev/{device}", os.O_RDWR)
    os.eventfd(1)
    for fd in (
        os.eventfd(1, os.EFD_NONBLOCK),
        kernel.make_epoll(),
        kernel.make_timerfd(1),
        kernel.make_signalfd(1),
        kernel.make_inotify(),
        os.memfd_create("x"),
        os.pidfd_open(os.getpid()),
    ):
        twin = os.dup(fd)
        fcntl.fcntl(twin, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)
    for family, kind in (
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET6, socket.SOCK_DGRAM),
    ):
        socket.socket(family, kind | socket.SOCK_NONBLOCK).detach()
        socket.socket(family, kind).detach()
    socket.socketpair()[0].detach()
    os.dup2(3, 77, inheritable=False)
    os.dup2(3, 78, inheritable=True)
    os.dup2(5, 1000)


def test_numbers_and_flags_of_every_kind_are_exactly_as_before(cycle: Any, tmp_path: Path) -> None:
    """F_GETFL and F_GETFD answer the same for each number, and no other number is open."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")

    def hold() -> Any:
        (channel,) = set(_flags()) - {0, 1, 2}
        _open_one_of_each(tmp_path)
        return {number: flags for number, flags in _flags().items() if number != channel}

    before = cycle.describe(hold)
    after = cycle.restore(_flags)
    ours = {number for number in after if number > 1000}  # the way back to the test
    assert len(ours) == 2
    assert {n: f for n, f in after.items() if n not in ours} == before


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_descriptors_share_what_they_shared(
    cycle: Any, tmp_path: Path, seed: int
) -> None:
    """Descriptors made by dup share a position; those that merely look alike do not."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))

    def hold() -> dict[int, int]:
        chance = random.Random(seed)
        position_of: dict[int, int] = {}
        originals = []
        for group in range(300):
            originals.append(os.open(path, os.O_RDONLY))
            os.lseek(originals[-1], group, os.SEEK_SET)
            position_of[originals[-1]] = group
        for _ in range(700):
            group = chance.randrange(300)
            position_of[os.dup(originals[group])] = group
        return position_of

    def prove(position_of: dict[int, int]) -> bool:
        right = all(os.lseek(n, 0, os.SEEK_CUR) == at for n, at in position_of.items())
        first_of: dict[int, int] = {}
        for number, group in position_of.items():
            if group not in first_of:
                first_of[group] = number
                os.lseek(number, 1000 + group, os.SEEK_SET)
        moved = all(
            os.lseek(number, 0, os.SEEK_CUR) == 1000 + group
            for number, group in position_of.items()
        )
        return right and moved

    assert cycle(hold, prove)
    assert len(cycle.table["descriptions"]) == 301


def test_what_must_be_kept_may_not_be_a_number_of_the_process() -> None:
    """A restorer that would overwrite its own channel is told so."""
    table = {
        "pid": 1,
        "descriptors": {"5": {"description": 0, "close_on_exec": False}},
        "descriptions": [],
    }
    assert free_number(table) == 6
    with pytest.raises(ValueError, match=r"\[5\]"):
        place_descriptors(table, {}, [5])
