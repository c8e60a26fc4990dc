"""Figures, tables and bars."""

from __future__ import annotations

import io

import click
import pytest

from lzy.cli import layout


@pytest.mark.parametrize(
    ("length_bytes", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1023 * 1024, "1 MiB"),
        (512 << 20, "512 MiB"),
        (5 << 40, "5 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_have_three_figures(length_bytes: int, words: str) -> None:
    """A size is told in the unit in which it has at most three figures."""
    assert layout.size(length_bytes) == words


@pytest.mark.parametrize(
    ("time_s", "words"),
    [
        (0.0000421, "42.1 µs"),
        (0.0022, "2.2 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (1.307, "1.31 s"),
        (59.96, "60 s"),
        (75, "1 min 15 s"),
        (119.7, "2 min 0 s"),
        (3 * 3600 + 61, "3 h 1 min"),
    ],
)
def test_durations_are_told_in_their_unit(time_s: float, words: str) -> None:
    """No duration is shown with a unit that makes it hard to read."""
    assert layout.duration(time_s) == words


@pytest.mark.parametrize(
    ("time_s", "words"),
    [(0.4, "just now"), (59, "59 s ago"), (3599, "59 min ago"), (86400, "1 day ago"),
     (5 * 86400, "5 days ago")],
)  # fmt: skip
def test_ages_are_told_in_their_largest_unit(time_s: float, words: str) -> None:
    """An age is rounded down to one unit."""
    assert layout.age(time_s) == words


def test_shares_do_not_call_a_trace_nothing() -> None:
    """Something is never `0 %`, and a share of nothing is not a number."""
    assert layout.share(1, 1000) == "<1 %"
    assert layout.share(0, 1000) == "0 %"
    assert layout.share(999, 1000) == "100 %"
    assert layout.share(0, 0) == "–"


def test_a_bar_has_its_width_whatever_it_shows() -> None:
    """Bars line up: the same width empty, with a trace, half and full."""
    bars = [layout.bar(part, 1000, 10) for part in (0, 1, 500, 1000, 2000)]
    assert [len(drawn) for drawn in bars] == [10] * 5
    assert bars[0].strip() == ""
    assert bars[1].strip() != ""
    assert bars[2] == "█████     "
    assert bars[3] == bars[4] == "█" * 10


def test_painted_cells_take_no_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours do not disturb a table's columns."""
    monkeypatch.setattr(layout, "_shows_colours", lambda _: True)
    lines = layout.table(["a", "b"], [(layout.paint("x", "red"), "1"), ("yyy", "22")], right=(1,))
    assert [click.unstyle(line) for line in lines] == ["a     b", "x     1", "yyy  22"]
    assert "\033[31m" in lines[1]


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe, NO_COLOR and a dumb terminal get plain text."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert layout.paint("x", "red", io.StringIO()) == "x"
    assert layout.paint("x", "red", Terminal()) == "\033[31mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert layout.paint("x", "red", Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert layout.paint("x", "red", Terminal()) == "x"
