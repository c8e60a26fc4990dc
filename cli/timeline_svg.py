"""Timelines as a picture: lanes with spans, numbered marks, and under them the memory held."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import svg
from .lanes import (
    COMPUTING,
    DOZING,
    HIBERNATED,
    IDLE,
    MOVING,
    STATES,
    STORE,
    Mark,
    Past,
    choose_marks,
    spell_time,
    spread,
    ticks,
)
from .layout import size

COLOURS = {
    COMPUTING: "#1b7f5c",
    IDLE: "#a8d5c2",
    DOZING: "#f0cf7a",
    HIBERNATED: "#cdd6e4",
    MOVING: "#c9611b",
}
_WIDTH, _LEFT, _RIGHT = 960, 120, 930
_LANE, _MEMORY, _ROW = 30, 72, 19
_MOST_MARKS, _MOST_LETTERS = 20, 118
_INK, _GREY, _FAINT, _LOUD = "#222", "#666", "#e3e3e3", "#a33b3b"
_FAILURES = ("failed", "failure", "refused")


def write_svg(title: str, pasts: Sequence[Past], since_s: float, now_s: float) -> str:
    """An SVG of sessions' pasts, one under the other, over the same time."""
    parts = [svg.text(24, 32, title, font_size=17, fill=_INK)]
    x = 24.0
    for state in STATES:
        parts.append(svg.rect(x, 47, 14, 14, fill=COLOURS[state], rx=2))
        words = f"{state}, in the store" if state == HIBERNATED else state
        parts.append(svg.text(x + 20, 58, words, fill=_GREY))
        x += 42 + 6.6 * len(words)
    top = 84.0
    for past in pasts:
        drawn, top = _draw(past, since_s, now_s, top)
        parts += drawn
    return svg.document(_WIDTH, top, parts)


def _draw(past: Past, since_s: float, now_s: float, top: float) -> tuple[list[str], float]:
    """One session's lanes, memory and list of marks from `top` on; where they end."""
    span_s = max(now_s - since_s, 1e-3)

    def place(at_s: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * min(max((at_s - since_s) / span_s, 0.0), 1.0)

    marks = choose_marks(past.marks, _MOST_MARKS)
    numbers = spread([place(mark.at_s) for mark in marks], 21, _LEFT, _RIGHT)
    lanes = past.lanes
    first = top + 42
    memory_top = first + len(lanes) * _LANE + 14
    bottom = memory_top + _MEMORY
    parts = [svg.text(24, top + 12, past.session, font_size=14, font_weight="bold", fill=_INK)]
    parts += _draw_axis(since_s, now_s, place, first, bottom)
    for number, lane in enumerate(lanes):
        y = first + number * _LANE
        parts.append(svg.text(_LEFT - 12, y + 18, lane, text_anchor="end", fill=_INK))
        parts.append(svg.line([(_LEFT, y + _LANE), (_RIGHT, y + _LANE)], stroke=_FAINT))
        for span in (s for s in past.spans if s.lane == lane):
            x, end = place(span.began_s), place(span.ended_s)
            fill = COLOURS[span.state]
            thin = 8 if lane == STORE else 0
            parts.append(svg.rect(x, y + 4 + thin, end - x, _LANE - 8 - 2 * thin, fill=fill, rx=1))
    parts += _draw_memory(past, now_s, place, memory_top, bottom)
    for number, (mark, x) in enumerate(zip(marks, numbers, strict=True), 1):
        colour = _LOUD if mark.kind in _FAILURES else _INK
        true = place(mark.at_s)
        points = [(x, top + 30.0), (true, first), (true, bottom)]
        parts.append(svg.line(points, stroke=colour, stroke_width=0.7, stroke_dasharray="2 3"))
        parts.append(f'<circle cx="{x:.1f}" cy="{top + 20:g}" r="9" fill="{colour}"/>')
        parts.append(
            svg.text(x, top + 24, str(number), text_anchor="middle", font_size=11, fill="white")
        )
    y = bottom + 44
    for number, mark in enumerate(marks, 1):
        parts += _tell(number, mark, y, since_s, span_s)
        y += _ROW
    return parts, y + 14


def _draw_axis(
    since_s: float, now_s: float, place: Callable[[float], float], first: float, bottom: float
) -> list[str]:
    """Lines of equal time, and what time that is."""
    parts, step_s = [], ticks(now_s - since_s)
    short = now_s - since_s <= 600
    at_s = since_s if short else -(-since_s // step_s) * step_s
    while at_s <= now_s:
        x = place(at_s)
        parts.append(svg.line([(x, first), (x, bottom)], stroke=_FAINT))
        words = spell_time(at_s, since_s, now_s - since_s)
        parts.append(svg.text(x, bottom + 16, words, text_anchor="middle", fill=_GREY))
        at_s += step_s
    return parts


def _draw_memory(
    past: Past, now_s: float, place: Callable[[float], float], top: float, bottom: float
) -> list[str]:
    """The memory that its processes held, in steps."""
    most = max((held for _, held in past.memory), default=0)
    parts = [
        svg.text(_LEFT - 12, bottom, "0", text_anchor="end", fill=_GREY),
        svg.line([(_LEFT, bottom), (_RIGHT, bottom)], stroke="#bbb"),
    ]
    if not most:
        return parts
    scale, points, before = (bottom - top - 4) / most, [], 0
    for at_s, held in past.memory:
        points += [(place(at_s), bottom - scale * before), (place(at_s), bottom - scale * held)]
        before = held
    points.append((place(now_s), bottom - scale * before))
    return [
        *parts,
        svg.text(_LEFT - 12, top + 8, size(most), text_anchor="end", fill=_GREY),
        svg.text(_LEFT - 12, (top + bottom) / 2 + 6, "memory held", text_anchor="end", fill=_INK),
        svg.area(points, bottom, fill="#3b62a3", fill_opacity=0.18),
        svg.line(points, stroke="#3b62a3", stroke_width=1.2),
    ]


def _tell(number: int, mark: Mark, y: float, since_s: float, span_s: float) -> list[str]:
    words = f"{mark.kind.replace('_', ' ')}: {mark.words}"
    words = words if len(words) <= _MOST_LETTERS else words[: _MOST_LETTERS - 1] + "…"
    loud = _LOUD if mark.kind in _FAILURES else _INK
    when = spell_time(mark.at_s, since_s, span_s)
    return [
        svg.text(44, y, str(number), text_anchor="end", fill=_GREY),
        svg.text(_LEFT - 12, y, when, text_anchor="end", fill=_GREY),
        svg.text(_LEFT, y, words, fill=loud),
    ]
