"""A week in a picture: utilisation by the hour, for the terminal and as SVG."""

from __future__ import annotations

from collections.abc import Sequence

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
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 560" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="960" height="560" fill="white"/>',
        f'<text x="{left}" y="24" font-size="16">{_escape(title)}</text>',
        f'<text x="{left}" y="{top - 10}">utilisation: running ÷ held, by the hour (UTC)</text>',
        f'<text x="{left}" y="{low_top - 10}">sessions that hold a share of a node</text>',
    ]
    for begin, size, marks in (
        (top, high, [(0.0, "0 %"), (0.5, "50 %"), (1.0, "100 %")]),
        (low_top, low_high, [(0.0, "0"), (1.0, f"{most:.0f}")]),
    ):
        for share, words in marks:
            y = begin + size * (1 - share)
            parts.append(f'<path d="M{left} {y:g}H{left + width}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 8}" y="{y + 4:g}" text-anchor="end">{words}</text>')
        for number, day in enumerate(DAYS):
            x = left + width * number / 7
            parts.append(f'<path d="M{x:g} {begin}V{begin + size}" stroke="#ddd"/>')
            parts.append(f'<text x="{x + 6:g}" y="{begin + size + 16}" fill="#666">{day}</text>')
    for at, (name, values) in enumerate(utilisation):
        colour = _COLOURS[at % len(_COLOURS)]
        points = [
            None
            if value is None
            else (left + width * (hour + 0.5) / WEEK_H, top + high * (1 - value))
            for hour, value in enumerate(values)
        ]
        parts.append(_line(points, colour))
        x = left + width - 170 * (len(utilisation) - at)
        parts.append(f'<path d="M{x} 20h24" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 30}" y="24">{_escape(name)}</text>')
    for at, (_, counts) in enumerate(held):
        low: list[tuple[float, float] | None] = [
            (left + width * (hour + 0.5) / WEEK_H, low_top + low_high * (1 - count / most))
            for hour, count in enumerate(counts)
        ]
        parts.append(_line(low, _COLOURS[at % len(_COLOURS)]))
    return "\n".join([*parts, "</svg>", ""])


def _line(points: Sequence[tuple[float, float] | None], colour: str) -> str:
    """A path through `points`, interrupted at None."""
    path, down = [], False
    for point in points:
        if point is not None:
            path.append(f"{'L' if down else 'M'}{point[0]:.1f} {point[1]:.1f}")
        down = point is not None
    return f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
