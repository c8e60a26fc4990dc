"""The progress line."""

from __future__ import annotations

import io
import os

import pytest

from lzy.cli import progress


class Terminal(io.StringIO):
    """A stderr that says it is a terminal and remembers what was written."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, set by the test."""
    now_s = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
    monkeypatch.setenv("TERM", "xterm")
    return now_s


def test_short_work_shows_nothing(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the first second nothing is drawn, so quick commands do not flicker."""
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with progress.ProgressLine() as line:
        line.update("writing", 10, 100)
        clock[0] += 0.9
        line.update("writing", 90, 100)
    assert terminal.getvalue() == ""


def test_long_work_shows_rate_and_remaining_time(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a second there is a line with the rate and the time left; it is erased at the end."""
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with progress.ProgressLine() as line:
        line.update("writing", 0, 4 << 30)
        clock[0] += 2.0
        line.update("writing", 1 << 30, 4 << 30)
        drawn = terminal.getvalue()
    assert "25 %" in drawn
    assert "512 MiB/s" in progress.describe_progress("writing", 1 << 30, 4 << 30, 512 << 20)
    assert "6 s left" in progress.describe_progress("writing", 1 << 30, 4 << 30, 512 << 20)
    assert progress.describe_progress("waiting", 0, 0, 0.0).strip() == "waiting"
    assert len(drawn.removeprefix("\r").removesuffix("\033[K")) <= 79, "a line must not wrap"
    assert terminal.getvalue().endswith("\r\033[K")


def test_the_rate_is_of_the_stage_at_hand(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow first stage does not spoil the estimate of the second."""
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with progress.ProgressLine() as line:
        line.update("writing", 0, 100 << 20)
        clock[0] += 60.0
        line.update("verifying", 0, 100 << 20)
        clock[0] += 1.0
        terminal.seek(0)
        terminal.truncate()
        line.update("verifying", 50 << 20, 100 << 20)
        assert "50 MiB/s" in terminal.getvalue()


def test_no_line_where_stderr_is_no_terminal(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs are not filled with half-drawn lines."""
    log = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", log)
    with progress.ProgressLine() as line:
        line.update("writing", 0, 100)
        clock[0] += 10
        line.update("writing", 50, 100)
    assert log.getvalue() == ""
