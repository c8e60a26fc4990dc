"""File locks of every form, and who is signalled by a descriptor."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lzy.checkpoint.errors import Busy
from lzy.checkpoint.linux import descriptors as kernel


def _locks_of_file(path: Path) -> list[tuple[str, ...]]:
    """(form, access, start, end) of every lock on the file, from /proc/locks."""
    inode = path.stat().st_ino
    found = []
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[5].endswith(f":{inode}"):
            found.append((words[1], words[3], words[6], words[7]))
    return sorted(found)


@pytest.mark.shows("survives", "file locks: POSIX, open-file-description, flock")
def test_posix_open_file_and_flock_locks_are_held_again(cycle: Any, tmp_path: Path) -> None:
    """Exactly the locks of before, held by the new process and its descriptions."""
    paths = [tmp_path / name for name in ("posix", "ofd", "flock")]

    def hold() -> list[int]:
        posix, ofd, flock = (os.open(path, os.O_RDWR | os.O_CREAT) for path in paths)
        fcntl.lockf(posix, fcntl.LOCK_EX, 10, 5)
        fcntl.lockf(posix, fcntl.LOCK_SH, 0, 1 << 33)
        fcntl.fcntl(ofd, kernel.F_OFD_SETLK, kernel.pack_lock(fcntl.F_WRLCK, 0, 7))
        fcntl.flock(flock, fcntl.LOCK_SH)
        return [posix, ofd, flock]

    def prove(state: list[int]) -> Any:
        locks = [_locks_of_file(path) for path in paths]
        os.close(state[0])
        return locks, _locks_of_file(paths[0])

    locks, after_close = cycle(hold, prove)
    assert locks == [
        [("POSIX", "READ", str(1 << 33), "EOF"), ("POSIX", "WRITE", "5", "14")],
        [("OFDLCK", "WRITE", "0", "6")],
        [("FLOCK", "READ", "0", "EOF")],
    ]
    assert after_close == []


@pytest.mark.shows("refused", "a file lock that somebody else has taken since")
def test_a_lock_somebody_took_meanwhile_is_busy(cycle: Any, tmp_path: Path) -> None:
    """The file is named; the restore is given up before the process runs."""
    path = tmp_path / "locked"

    def hold() -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    cycle.describe(hold)
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="locked"):
            cycle.restore(lambda: None)
    cycle.restore(lambda: None)


def test_a_posix_lock_somebody_took_meanwhile_is_busy(cycle: Any, tmp_path: Path) -> None:
    """Though the process itself must take it, the refusal names file and holder beforehand."""
    path = tmp_path / "locked"

    def hold() -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
        return fd

    cycle.describe(hold)
    take = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 14)"
    take += "; print(flush=True); input()"
    words = [sys.executable, "-c", take, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout
            assert other.stdout.readline() == b"\n"
            with pytest.raises(Busy, match=f"process {other.pid} has locked"):
                cycle.restore(lambda: None)
        finally:
            other.kill()
    cycle.restore(lambda: None)


@pytest.mark.shows("survives", "O_ASYNC, its owner and signal")
def test_owner_and_signal_of_a_descriptor(cycle: Any) -> None:
    """O_ASYNC with F_SETSIG: the new process gets the chosen signal, with the right number."""

    def hold() -> tuple[int, int]:
        reader, writer = os.pipe()
        kernel.set_signal_owner(reader, kernel.OWNER_PID, os.getpid())
        fcntl.fcntl(reader, kernel.F_SETSIG, signal.SIGRTMIN + 3)
        fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
        return reader, writer

    def prove(state: tuple[int, int]) -> Any:
        reader, writer = state
        wanted = signal.SIGRTMIN + 3
        signal.pthread_sigmask(signal.SIG_BLOCK, {wanted})
        os.write(writer, b"x")
        information = signal.sigtimedwait({wanted}, 5)
        assert information is not None
        owner = kernel.signal_owner(reader)
        return information.si_signo == wanted, owner == (kernel.OWNER_PID, os.getpid())

    assert cycle(hold, prove) == (True, True)
