"""timerfd, signalfd, inotify, memfd, pidfd."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from lzy.checkpoint.errors import Incompatible, Unsupported
from lzy.checkpoint.linux import descriptors as kernel

SECOND_NS = 1_000_000_000


def _ticks(fd: int) -> int:
    return int(struct.unpack("=Q", os.read(fd, 8))[0])


@pytest.mark.shows("survives", "timerfd: time left, interval, unread expiries")
def test_timer_keeps_what_is_left_its_interval_and_its_ticks(cycle: Any) -> None:
    """No time passes while the process is not there; unread expiries stay unread."""

    def hold() -> list[int]:
        running, ticked, unarmed = (kernel.make_timerfd(time.CLOCK_MONOTONIC) for _ in range(3))
        kernel.set_timerfd(running, 0, 1000 * SECOND_NS, 7 * SECOND_NS)
        kernel.set_timerfd(ticked, 0, 1, 1000 * SECOND_NS)
        once = kernel.make_timerfd(time.CLOCK_BOOTTIME)
        kernel.set_timerfd(once, 0, 1, 0)
        for fd in (ticked, once):
            while "ticks: 0" in Path(f"/proc/self/fdinfo/{fd}").read_text():
                time.sleep(0.001)
        return [running, ticked, once, unarmed]

    def prove(state: list[int]) -> Any:
        running, ticked, once, unarmed = state
        return (
            kernel.get_timerfd(running),
            _ticks(ticked),
            kernel.get_timerfd(ticked),
            _ticks(once),
            kernel.get_timerfd(once),
            kernel.get_timerfd(unarmed),
        )

    running, ticks, ticked, once_ticks, once, unarmed = cycle(hold, prove)
    assert 990 * SECOND_NS < running[0] <= 1000 * SECOND_NS
    assert running[1] == 7 * SECOND_NS
    assert ticks == once_ticks == 1
    assert ticked[1] == 1000 * SECOND_NS
    assert 990 * SECOND_NS < ticked[0] <= 1000 * SECOND_NS
    assert once == unarmed == (0, 0)


def test_timer_at_a_time_of_the_wall_clock_keeps_that_time(cycle: Any) -> None:
    """An absolute time that came while the process was away has expired."""

    def hold() -> list[int]:
        soon, late = (kernel.make_timerfd(time.CLOCK_REALTIME) for _ in range(2))
        now = time.time_ns()
        kernel.set_timerfd(soon, kernel.TFD_ABSTIME, now + 300_000_000, 0)
        kernel.set_timerfd(late, kernel.TFD_ABSTIME, now + 1000 * SECOND_NS, 0)
        return [soon, late]

    soon, late = cycle.describe(hold)
    expires = [e["expires_ns"] for e in cycle.table["descriptions"] if "expires_ns" in e]
    while time.time_ns() <= min(expires):
        time.sleep(0.01)
    ticks, left = cycle.restore(lambda: (_ticks(soon), kernel.get_timerfd(late)[0]))
    assert ticks == 1
    assert 990 * SECOND_NS < left < 1000 * SECOND_NS


@pytest.mark.shows("survives", "signalfd")
def test_signals_are_read_and_reported_by_epoll(cycle: Any) -> None:
    """A signalfd keeps its set, and an epoll that watches it sees the new process's signals."""
    import select

    def hold() -> list[int]:
        fd = kernel.make_signalfd(1 << (signal.SIGUSR2 - 1))
        epoll = select.epoll()
        epoll.register(fd, select.EPOLLIN)
        return [fd, os.dup(epoll.fileno())]

    def prove(state: list[int]) -> Any:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        epoll = select.epoll.fromfd(state[1])
        before = epoll.poll(0)
        os.kill(os.getpid(), signal.SIGUSR2)
        after = epoll.poll(5)
        return before, len(after), struct.unpack_from("=I", os.read(state[0], 128))[0]

    assert cycle(hold, prove) == ([], 1, signal.SIGUSR2)


@pytest.mark.shows("survives", "inotify watches")
def test_watches_report_under_their_numbers(cycle: Any, tmp_path: Path) -> None:
    """Directory and file watches keep number and mask; nothing of the restore is reported."""
    folder, file = tmp_path / "a folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    create, modify = 0x100, 0x2

    def hold() -> list[int]:
        fd = kernel.make_inotify()
        for _ in range(5):
            kernel.unwatch_inotify(fd, kernel.watch_inotify(fd, str(folder), create))
        numbers = [
            kernel.watch_inotify(fd, str(folder), create),
            kernel.watch_inotify(fd, str(file), modify),
        ]
        os.read(fd, 4096)
        return [fd, *numbers]

    def prove(state: list[int]) -> Any:
        fd = state[0]
        assert kernel.unread_bytes(fd) == 0
        (folder / "new").touch()
        file.write_bytes(b"x")
        events = os.read(fd, 4096)
        found = []
        while events:
            watch, mask, _, length = struct.unpack_from("=iIII", events)
            found.append((watch, mask))
            events = events[16 + length :]
        return found, kernel.watch_inotify(fd, "/", create)

    state = cycle.describe(hold)
    found, following = cycle.restore(lambda: prove(state))
    assert state[1:] == [6, 7]
    assert found == [(6, create), (7, modify)]
    assert following == 8


@pytest.mark.shows("refused", "unread inotify events")
def test_unread_events_are_a_reason_to_wait(cycle: Any, tmp_path: Path) -> None:
    """They cannot be copied, and to lose them silently would be wrong."""

    def hold() -> int:
        fd = kernel.make_inotify()
        kernel.watch_inotify(fd, str(tmp_path), 0x100)
        (tmp_path / "new").touch()
        return fd

    with pytest.raises(Unsupported, match="unread"):
        cycle.describe(hold)


@pytest.mark.shows("survives", "memfd with its seals")
def test_memory_file_keeps_content_name_position_and_seals(cycle: Any) -> None:
    """Two opens of one memfd share content, not position; a sealed one stays sealed."""

    def hold() -> list[int]:
        fd = os.memfd_create("a name", os.MFD_ALLOW_SEALING)
        os.write(fd, b"0123456789")
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        os.lseek(again, 3, os.SEEK_SET)
        sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        os.write(sealed, b"wax")
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
        return [fd, again, sealed]

    def prove(state: list[int]) -> Any:
        fd, again, sealed = state
        os.pwrite(fd, b"X", 3)
        heard = [os.read(again, 2), os.lseek(fd, 0, os.SEEK_CUR), os.pread(sealed, 9, 0)]
        try:
            os.pwrite(sealed, b"x", 0)
        except PermissionError:
            heard.append("refused")
        return heard, [fcntl.fcntl(n, fcntl.F_GET_SEALS) for n in state]

    assert cycle(hold, prove) == ([b"X4", 10, b"wax", "refused"], [0, 0, 9])
    names = {e["name"] for e in cycle.table["descriptions"] if e["kind"] == "memfd"}
    assert names == {"a name", "sealed"}


@pytest.mark.shows("survives", "pidfds, of itself, of the dead, of others")
def test_process_descriptors(cycle: Any) -> None:
    """One's own refers to the new process; that of a dead process stays dead; others are kept."""

    def hold() -> list[int]:
        child = os.fork()
        if child == 0:
            os._exit(0)
        dead = os.pidfd_open(child)
        os.waitpid(child, 0)
        return [os.pidfd_open(os.getpid()), dead, os.pidfd_open(os.getppid())]

    def prove(state: list[int]) -> Any:
        def target(fd: int) -> int:
            text = Path(f"/proc/self/fdinfo/{fd}").read_text()
            return int(text.split("Pid:")[1].split()[0])

        own, dead, other = map(target, state)
        try:
            signal.pidfd_send_signal(state[1], 0)
        except ProcessLookupError:
            dead = 0
        return own == os.getpid(), dead, other == os.getppid()

    assert cycle(hold, prove) == (True, 0, True)


def test_paths_of_watches_are_found_without_handles(
    cycle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may not open by handle still finds what lies around the process's own folder."""

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(kernel, "open_by_handle", refuse)
    (tmp_path / "file").touch()

    def hold() -> int:
        os.chdir(tmp_path)
        fd = kernel.make_inotify()
        kernel.watch_inotify(fd, str(tmp_path / "file"), 0x2)
        kernel.watch_inotify(fd, "/", 0x100)
        return fd

    cycle.describe(hold)
    watches = next(e["watches"] for e in cycle.table["descriptions"] if "watches" in e)
    assert [watch["path"] for watch in watches] == [str(tmp_path / "file"), "/"]


@pytest.mark.shows("refused", "an inotify watch of a file that is gone")
def test_a_watched_file_that_is_gone_is_refused_first(cycle: Any, tmp_path: Path) -> None:
    """Before anything is made, by path."""
    path = tmp_path / "watched"
    path.touch()

    def hold() -> int:
        fd = kernel.make_inotify()
        kernel.watch_inotify(fd, str(path), 0x2)
        return fd

    cycle.describe(hold)
    path.unlink()
    with pytest.raises(Incompatible, match="watched"):
        cycle.restore(lambda: None)
