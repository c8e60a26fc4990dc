"""What a screen makes of what programs print; tmux shows the same, where these cases come from."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lzy.agent.terminal.screen import Screen
from lzy.agent.terminal.tokens import skim


def shown(output: bytes, rows: int = 4, columns: int = 10) -> Screen:
    screen = Screen(rows, columns)
    screen.feed(output)
    return screen


@pytest.mark.parametrize(
    ("output", "rows"),
    [
        (b"ab\r\ncd", ["ab", "cd", "", ""]),
        (b"0123456789x", ["0123456789", "x", "", ""]),
        (b"0123456789\rx", ["x123456789", "", "", ""]),
        (b" 10%\r 50%\r100%", ["100%", "", "", ""]),
        (b"abc\x1b[2D\x1b[K!", ["a!", "", "", ""]),
        (b"a\tb", ["a       b", "", "", ""]),
        (b"a\r\nb\r\nc\r\nd\r\ne", ["b", "c", "d", "e"]),
        (b"1\r\n2\r\n3\r\n4\x1b[2;3r\x1b[3;1H\nx", ["1", "3", "x", "4"]),
        (b"1\r\n2\r\n3\x1b[2;1H\x1b[L!", ["1", "!", "2", "3"]),
        (b"1\r\n2\r\n3\x1b[1;1H\x1b[M", ["2", "3", "", ""]),
        (b"abcdef\x1b[3G\x1b[2P", ["abef", "", "", ""]),
        (b"abcdef\x1b[3G\x1b[2@", ["ab  cdef", "", "", ""]),
        (b"x\x1b[4b", ["xxxxx", "", "", ""]),
        (b"\x1b(0lqk\x1b(B|", ["┌─┐|", "", "", ""]),
        ("中文x".encode(), ["中文x", "", "", ""]),
        ("中文\x1b[2Gx".encode(), [" x文", "", "", ""]),
        ("e\u0301a".encode(), ["e\u0301a", "", "", ""]),
        (b"\x1b]0;a title\x07a\x1bP+q54\x1b\\b\x1b[>4;2mc\x1b[?4md", ["abcd", "", "", ""]),
        (b"one\x1b[?1049htwo", ["   two", "", "", ""]),
        (b"one\x1b[?1049htwo\x1b[?1049l!", ["one!", "", "", ""]),
        (b"\x1b[38:2::1:2:3mA\x1b[4:3mB", ["AB", "", "", ""]),
    ],
)
def test_programs_output(output: bytes, rows: list[str]) -> None:
    """Each piece of output makes these rows, also when it comes byte by byte."""
    assert shown(output).text() == rows
    screen = Screen(4, 10)
    for number in output:
        screen.feed(bytes([number]))
    assert screen.text() == rows


def test_colours_and_modes_are_painted_again() -> None:
    """Colours, cursor, margins, both screens, pasting and mouse modes survive being painted."""
    output = b"\x1b[1;38;5;200mbold\x1b[0m\r\nplain\x1b[?2004h\x1b[?1000h\x1b[?1h\x1b[?25l"
    output += b"\x1b[?1049h\x1b[44mblue\x1b[K\x1b[2;3r\x1b[3;2H\x1b[7m"
    before = shown(output)
    after = shown(before.paint())
    assert after.paint() == before.paint()
    assert b"\x1b[0;1;38;5;200mbold" in after.paint() or b"38;5;200" in after.paint()
    assert {2004, 1000, 1} <= after.modes
    assert not after.shows_cursor
    assert after.is_alternate
    after.feed(b"\x1b[?1049l")
    assert after.text()[:2] == ["bold", "plain"]


def test_terminal_is_given_back_below_what_is_shown() -> None:
    """Modes are off, the second screen is left, and a shell's prompt comes under the last row."""
    for output in (b"one\r\ntwo", b"one\r\ntwo\r\n", b"one\r\ntwo\x1b[?1049h\x1b[?1000hedit"):
        screen = shown(output)
        given_back = shown(screen.paint() + screen.unpaint() + b"$")
        assert given_back.text() == ["one", "two", "$", ""]
        assert not given_back.is_alternate
        assert 1000 not in given_back.modes


def test_what_scrolls_off_is_kept_within_bounds() -> None:
    """The newest two thousand rows are there; the second screen adds none."""
    screen = shown(b"".join(b"row %d\r\n" % number for number in range(3000)))
    assert len(screen.history) == 2000
    assert screen.history[-1] == "row 2996"
    screen.feed(b"\x1b[?1049h" + b"x\r\n" * 50)
    assert screen.history[-1] == "row 2996"
    assert list(Screen.load(screen.save()).history)[-1] == "row 2996"


def test_resizing_keeps_what_is_above_the_cursor() -> None:
    """Fewer rows: the upper ones scroll off; more: they are empty."""
    screen = shown(b"1\r\n2\r\n3\r\n4")
    screen.resize(2, 10)
    assert screen.text() == ["3", "4"]
    assert list(screen.history) == ["1", "2"]
    screen.resize(3, 1)
    assert screen.text() == ["3", "4", ""]


def test_flood_keeps_modes() -> None:
    """Of output that is left out, what switches modes and screens still counts."""
    assert skim(b"text\x1b[?1049hmore\x1b[31m\x1b[?2004h\x1b=") == b"\x1b[?1049h\x1b[?2004h\x1b="


SEQUENCES = st.one_of(
    st.binary(max_size=8),
    st.text(alphabet="ab中e\u0301 ", max_size=12).map(str.encode),
    st.sampled_from([b"\r\n", b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b7", b"\x1b8", b"\x1bM", b"\t"]),
    st.builds(
        lambda n, m, final: b"\x1b[%d;%d%c" % (n, m, final),
        st.integers(0, 99),
        st.integers(0, 99),
        st.sampled_from(list(b"ABCDEFGHJKLMPSTX@`abdefghlmnrsu")),
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(SEQUENCES, max_size=40), st.integers(1, 6), st.integers(1, 12))
def test_anything_at_all(pieces: list[bytes], rows: int, columns: int) -> None:
    """No output breaks it, its size stays, and what it paints makes the same screen again."""
    screen = Screen(rows, columns)
    for piece in pieces:
        screen.feed(piece)
    assert len(screen.text()) == rows
    y, x = screen.cursor
    assert 0 <= y < rows
    assert 0 <= x < columns
    other = Screen(rows, columns)
    other.feed(screen.paint())
    assert other.text() == screen.text()
    assert other.cursor == screen.cursor
    screen.resize(columns, rows)
    assert len(screen.text()) == columns
