"""A week in a picture: utilisation by the hour, for the terminal and as SVG."""

from __future__ import annotations

from collections.abc import Sequence

from . import svg
from .layout import paint

WEEK_H = 168
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_COLUMN_H = 2  # hours that share a column of the terminal's plot
_COLOURS = ("#1b7f5c", "#c77d11", "#a33b3b", "#3b62a3")


def draw_week(name: str, values: Sequence[float | None], colour: str, height: int = 4) -> list[str]:
    """Lines of one plot: `values` of 168 hours from 0 to 1, None where there was nothing."""
    columns = []
    for start in range(0, WEEK_H, _COLUMN_H):
        some = [value for value in values[start : start + _COLUMN_H] if value is not None]
        columns.append(sum(some) / len(some) if some else None)
    lines = [paint(name, "bold")]
    for row in range(height, 0, -1):
        label = "100 %" if row == height else "  0 %" if row == 1 else ""
        cells = "".join(_cell(value, row, height) for value in columns)
        lines.append(f"{label:>5} {paint(cells.rstrip(), colour)}")
    width = 24 // _COLUMN_H
    lines.append(paint("      " + "".join(f"│{day}".ljust(width) for day in DAYS), "dim"))
    return lines


def _cell(value: float | None, row: int, height: int) -> str:
    """One character: how much of `row` a column of `value` fills."""
    if value is None:
        return "·" if row == 1 else " "
    eighths = min(max(round(value * height * 8) - (row - 1) * 8, 0), 8)
    if row == 1 and value > 0:
        eighths = max(eighths, 1)
    return _EIGHTHS[eighths]


def write_svg(
    title: str,
    utilisation: Sequence[tuple[str, Sequence[float | None]]],
    held: Sequence[tuple[str, Sequence[float]]],
) -> str:
    """An SVG of two plots over one week: utilisation, and sessions that hold their share."""
    left, width, top, high, low_top, low_high = 70, 840, 60, 220, 340, 160
    most = max((max(values, default=0.0) for _, values in held), default=0.0) or 1.0
    parts = [
        svg.text(left, 24, title, font_size=16),
        svg.text(left, top - 10, "utilisation: running ÷ held, by the hour (UTC)"),
        svg.text(left, low_top - 10, "sessions that hold a share of a node"),
    ]
    for begin, size, marks in (
        (top, high, [(0.0, "0 %"), (0.5, "50 %"), (1.0, "100 %")]),
        (low_top, low_high, [(0.0, "0"), (1.0, f"{most:.0f}")]),
    ):
        for share, words in marks:
            y = begin + size * (1 - share)
            parts.append(svg.line([(left, y), (left + width, y)], stroke="#ddd"))
            parts.append(svg.text(left - 8, y + 4, words, text_anchor="end"))
        for number, day in enumerate(DAYS):
            x = left + width * number / 7
            parts.append(svg.line([(x, begin), (x, begin + size)], stroke="#ddd"))
            parts.append(svg.text(x + 6, begin + size + 16, day, fill="#666"))
    for at, (name, values) in enumerate(utilisation):
        colour = _COLOURS[at % len(_COLOURS)]
        points = [
            None
            if value is None
            else (left + width * (hour + 0.5) / WEEK_H, top + high * (1 - value))
            for hour, value in enumerate(values)
        ]
        parts.append(svg.line(points, stroke=colour, stroke_width=1.5))
        x = left + width - 170 * (len(utilisation) - at)
        parts.append(svg.line([(x, 20), (x + 24, 20)], stroke=colour, stroke_width=3))
        parts.append(svg.text(x + 30, 24, name))
    for at, (_, counts) in enumerate(held):
        low = [
            (left + width * (hour + 0.5) / WEEK_H, low_top + low_high * (1 - count / most))
            for hour, count in enumerate(counts)
        ]
        parts.append(svg.line(low, stroke=_COLOURS[at % len(_COLOURS)], stroke_width=1.5))
    return svg.document(960, 560, parts)
