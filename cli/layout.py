"""How figures, tables and bars look: aligned, in human sizes, coloured only on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """`text` in `colour` where `stream` (default stdout) shows colours, else unchanged.

    NO_COLOR (https://no-color.org) and TERM=dumb turn colours off.
    """
    return f"\033[{_CODES[colour]}m{text}\033[0m" if _shows_colours(stream) else text


def _shows_colours(stream: TextIO | None) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return (stream or sys.stdout).isatty()


def size(length_bytes: float) -> str:
    """`1536` as `1.5 KiB`: three figures at most, binary units."""
    if length_bytes < 1024:
        return f"{length_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        length_bytes /= 1024
        if length_bytes < 1000 or unit == "TiB":
            return f"{_three_figures(length_bytes)} {unit}"
    raise AssertionError("unreachable")


def duration(time_s: float) -> str:
    """`0.0022` as `2.2 ms`, `75` as `1 min 15 s`."""
    if time_s < 1e-3:
        return f"{_three_figures(time_s * 1e6)} µs"
    if time_s < 0.9995:
        return f"{_three_figures(time_s * 1e3)} ms"
    if time_s < 60:
        return f"{_three_figures(time_s)} s"
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s"


def age(time_s: float) -> str:
    """How long ago, in its largest unit only: `3 min ago`, `2 days ago`."""
    for length_s, unit in ((86400, "day"), (3600, "h"), (60, "min")):
        if time_s >= length_s:
            count = int(time_s // length_s)
            return f"{count} {unit}{'s' if unit == 'day' and count > 1 else ''} ago"
    return "just now" if time_s < 5 else f"{int(time_s)} s ago"


def share(part: float, whole: float) -> str:
    """`part` of `whole` in percent; a trace is `<1 %`, nothing is `0 %`."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    return "<1 %" if 0 < percent < 1 else f"{percent:.0f} %"


def count(number: int, thing: str) -> str:
    """`1 thread`, `13 threads`, `1 234 threads`."""
    return f"{number:,} {thing}".replace(",", "\u202f") + ("" if number == 1 else "s")


def bar(part: float, whole: float, width: int = 24) -> str:
    """A horizontal bar of `width` cells, filled to `part` of `whole` in eighths of a cell."""
    eighths = round(8 * width * min(part / whole, 1)) if whole else 0
    if part and not eighths:
        eighths = 1
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()
) -> list[str]:
    """Lines of a table with aligned columns; those numbered in `right` are flush right.

    Cells may be painted: escape sequences take no room.
    """
    cells = [tuple(heads), *(tuple(row) for row in rows)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(heads))]
    lines = []
    for number, row in enumerate(cells):
        texts = []
        for i, cell in enumerate(row):
            gap = " " * (widths[i] - _width(cell))
            texts.append(gap + cell if i in right else cell + gap)
        line = "  ".join(texts).rstrip()
        lines.append(paint(line, "dim") if number == 0 else line)
    return lines


def facts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Lines `name  value`, the names aligned and dimmed."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{paint(name.ljust(width), 'dim')}  {value}" for name, value in pairs]


def say(lines: Iterable[str]) -> None:
    """Print `lines` on stdout."""
    for line in lines:
        print(line)


def say_json(document: dict[str, Any] | list[Any]) -> None:
    """Print one JSON document on stdout."""
    import json

    print(json.dumps(document, indent=2, default=str))


def _width(cell: str) -> int:
    """How many columns `cell` takes: escape sequences take none."""
    painted = cell.split("\033[")
    return len(painted[0]) + sum(len(part.partition("m")[2]) for part in painted[1:])


def _three_figures(number: float) -> str:
    if number >= 99.95:
        return f"{number:.0f}"
    text = f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
