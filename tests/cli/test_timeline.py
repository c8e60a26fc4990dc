"""Timelines: what nodes tell of a session's past, as spans and marks, and what is drawn of it."""

from __future__ import annotations

import itertools
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lzy.cli.lanes import (
    COMPUTING,
    DOZING,
    HIBERNATED,
    IDLE,
    MOVING,
    STORE,
    Mark,
    Span,
    choose_marks,
    read_past,
    spread,
    ticks,
)
from lzy.cli.timeline import as_document, describe
from lzy.cli.timeline_svg import write_svg

NOW_S = 1_000_100.0


def event(at_s: float, kind: str, node: str = "small", words: str = "") -> dict[str, Any]:
    return {"unix_s": 1e6 + at_s, "session": "nb", "kind": kind, "node": node, "words": words}


def reading(at_s: float, mib: int, active: bool, node: str = "small") -> dict[str, Any]:
    return {"unix_s": 1e6 + at_s, "session": "nb", "node": node, "memory_bytes": mib << 20,
            "is_active": active}  # fmt: skip


EVENTS = [
    event(0, "attached", words="process 7"),
    event(1, "checkpointed"),
    event(30, "dozed", words="idle for 10 s"),
    event(40, "hibernated", words="nb@3 (idle)"),
    event(60, "woken", words="from nb@3"),
    event(70, "hibernated", words="nb@4 (migrate to large)"),
    event(71, "arrived", "large", "from small"),
    event(72, "woken", "large", "from nb@4"),
    event(73, "migrated", words="lives on large now"),
]
READINGS = [
    reading(5, 100, True),
    reading(20, 200, False),
    reading(31, 4, False),
    reading(62, 150, True),
    reading(74, 160, True, "large"),
]


def spans(since_s: float = 0.0) -> list[tuple[str, str, float, float]]:
    past = read_past("nb", EVENTS, READINGS, 1e6 + since_s, NOW_S)
    return [(s.lane, s.state, s.began_s - 1e6, s.ended_s - 1e6) for s in past.spans]


def test_states_follow_each_other_without_a_gap() -> None:
    """Running is split by what was seen; a move is none of the store's, and ends on its node."""
    assert spans() == [
        ("small", IDLE, 0, 5),
        ("small", COMPUTING, 5, 20),
        ("small", IDLE, 20, 30),
        ("small", DOZING, 30, 40),
        (STORE, HIBERNATED, 40, 60),
        ("small", IDLE, 60, 62),
        ("small", COMPUTING, 62, 70),
        ("small", MOVING, 70, 72),
        ("large", IDLE, 72, 74),
        ("large", COMPUTING, 74, 100),
    ]


def test_memory_is_nothing_where_there_is_no_process() -> None:
    """It follows readings, and falls to nothing when the session hibernates or moves."""
    past = read_past("nb", EVENTS, READINGS, 1e6, NOW_S)
    held = [(at_s - 1e6, length >> 20) for at_s, length in past.memory]
    assert held == [(5, 100), (20, 200), (31, 4), (40, 0), (62, 150), (70, 0), (74, 160)]
    assert past.lanes == ["small", "large", STORE]


def test_a_later_begin_cuts_off_what_was_before() -> None:
    """What was going on at that moment is still there, from then on."""
    assert spans(35.0)[0] == ("small", DOZING, 35, 40)
    past = read_past("nb", EVENTS, READINGS, 1e6 + 35, NOW_S)
    assert past.memory[0] == (1e6 + 35, 4 << 20)
    assert next(mark.kind for mark in past.marks) == "hibernated"


def test_another_sessions_past_is_its_own() -> None:
    """Nothing of `nb` is drawn for a session of another name."""
    past = read_past("other", EVENTS, READINGS, 1e6, NOW_S)
    assert (past.spans, past.marks, past.memory) == ([], [], [])


def test_ended_sessions_have_no_span_after_their_end() -> None:
    """A session whose process has ended is nowhere."""
    ended = [*EVENTS[:1], event(10, "ended", words="exit status 0")]
    past = read_past("nb", ended, [], 1e6, NOW_S)
    assert past.spans == [Span("small", IDLE, 1e6, 1e6 + 10)]


def test_what_is_drawn_names_lanes_states_and_reasons() -> None:
    """Terminal and picture: each lane, each mark with its words; the picture is well-formed."""
    past = read_past("nb", EVENTS, READINGS, 1e6, NOW_S)
    lines = describe([past], 1e6, NOW_S, 90)
    told = "\n".join(lines)
    for words in ("small", "large", STORE, "attached", "idle for 10 s", "nb@4 (migrate to large)"):
        assert words in told
    assert all(len(line) <= 96 for line in lines), max(map(len, lines))
    picture = ElementTree.fromstring(write_svg("<a & b>", [past], 1e6, NOW_S))
    words = "".join(picture.itertext())
    assert "<a & b>" in words
    assert "lives on large now" in words
    document = as_document([past], 1e6, NOW_S)["sessions"][0]
    assert document["spans"][4]["node"] is None
    assert len(document["marks"]) == len(EVENTS) - 2


@given(
    st.lists(st.floats(0, 100), max_size=12).map(sorted),
    st.floats(0.1, 8),
)
def test_marks_are_spread_without_overlap(places: list[float], apart: float) -> None:
    """They keep their order and their distance, and stay inside as long as there is room."""
    found = spread(places, apart, 0.0, 100.0)
    assert len(found) == len(places)
    assert all(b - a >= apart - 1e-9 for a, b in itertools.pairwise(found))
    if found:
        assert found[-1] <= 100.0
        assert found[0] >= -1e-9


def test_only_the_dull_marks_are_left_out() -> None:
    """Of too many marks those stay that tell most: failures and moves, the newest first."""
    marks = [Mark(float(n), "dozed" if n % 2 else "woken", "") for n in range(40)]
    chosen = choose_marks([*marks, Mark(50.0, "failure", "x")], 10)
    assert len(chosen) == 10
    assert {mark.kind for mark in chosen} == {"woken", "failure"}
    assert chosen[-1].kind == "failure"


@pytest.mark.parametrize("span_s", [0.5, 7, 59, 600, 4000, 90_000, 2e6])
def test_ticks_are_few_and_round(span_s: float) -> None:
    """At most eight in a picture, whatever its length."""
    assert span_s / ticks(span_s) <= 8
