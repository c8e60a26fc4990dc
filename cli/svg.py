"""The few shapes that pictures are made of, as SVG: light background, one typeface."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Point = tuple[float, float]


def document(width: float, height: float, parts: Iterable[str]) -> str:
    """A whole picture."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def text(x: float, y: float, words: str, **attributes: str | float) -> str:
    """Words whose baseline begins (or ends, by `text_anchor`) at a point."""
    return f'<text x="{x:g}" y="{y:g}"{_spell(attributes)}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, **attributes: str | float) -> str:
    """A filled rectangle."""
    size = f'width="{max(width, 0.5):.2f}" height="{height:g}"'
    return f'<rect x="{x:.2f}" y="{y:g}" {size}{_spell(attributes)}/>'


def line(points: Sequence[Point | None], **attributes: str | float) -> str:
    """A path through `points`, interrupted at None."""
    path, down = [], False
    for point in points:
        if point is not None:
            path.append(f"{'L' if down else 'M'}{point[0]:.1f} {point[1]:.1f}")
        down = point is not None
    return f'<path d="{"".join(path)}" fill="none"{_spell(attributes)}/>'


def area(points: Sequence[Point], base: float, **attributes: str | float) -> str:
    """What lies between a line and the height `base`."""
    if not points:
        return ""
    path = "".join(f"L{x:.1f} {y:.1f}" for x, y in points)
    first, last = points[0][0], points[-1][0]
    return f'<path d="M{first:.1f} {base:g}{path}L{last:.1f} {base:g}Z"{_spell(attributes)}/>'


def escape(words: str) -> str:
    """Words as they stand in a document."""
    return words.replace("&", "&amp;").replace("<", "&lt;")


def _spell(attributes: dict[str, str | float]) -> str:
    return "".join(
        f' {name.replace("_", "-")}="{value:g}"'
        if isinstance(value, (int, float))
        else f' {name.replace("_", "-")}="{value}"'
        for name, value in attributes.items()
    )
