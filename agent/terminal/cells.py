"""The cells of a screen: rows of characters, each with the style it was printed in."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Final, NamedTuple

_MOST_COMBINED = 8
_OFF: Final = {
    22: ("bold", "dim"), 23: ("italic",), 24: ("underline",), 25: ("blink",), 27: ("inverse",),
    28: ("hidden",), 29: ("strike",), 39: ("foreground",), 49: ("background",), 55: ("overline",),
    59: ("line",),
}  # fmt: skip
_ON: Final = {
    1: "bold", 2: "dim", 3: "italic", 4: "underline", 5: "blink", 6: "blink", 7: "inverse",
    8: "hidden", 9: "strike", 21: "underline", 53: "overline",
}  # fmt: skip
_COLOURS: Final = {38: "foreground", 48: "background", 58: "line"}


class Style(NamedTuple):
    """Colours and attributes, as parameters of SGR by what they set; unchanging."""

    parts: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The parameters that set it, empty for the plain one."""
        return ";".join(value for _, value in self.parts)

    @property
    def background(self) -> str:
        """The parameters of what is erased in it: its background alone."""
        return next((value for name, value in self.parts if name == "background"), "")

    def sequence(self) -> str:
        """The escape sequence that sets exactly this."""
        return f"\x1b[0;{self.text}m" if self.parts else "\x1b[0m"

    def change(self, parameters: str) -> Style:
        """The style after `CSI parameters m`."""
        return _change(self, parameters[:200])


@cache
def _change(style: Style, parameters: str) -> Style:
    parts = dict(style.parts)
    words = iter(parameters.split(";"))
    for word in words:
        head = word.partition(":")[0]
        number = int(head) if head.isdecimal() else 0
        if number in _COLOURS:
            parts[_COLOURS[number]] = word if ":" in word else _read_colour(number, words)
        elif number == 0:
            parts.clear()
        elif number in _OFF or word == "4:0":
            for name in _OFF.get(number, ("underline",)):
                parts.pop(name, None)
        elif number in _ON:
            parts[_ON[number]] = word
        elif 30 <= number <= 37 or 90 <= number <= 97:
            parts["foreground"] = word
        elif 40 <= number <= 47 or 100 <= number <= 107:
            parts["background"] = word
    return Style(tuple(sorted((name, value) for name, value in parts.items() if value)))


def _read_colour(number: int, words: Iterator[str]) -> str:
    kind = next(words, "")
    taken = [next(words, "0") or "0" for _ in range({"5": 1, "2": 3}.get(kind, 0))]
    return ";".join([str(number), kind, *taken]) if taken else ""


def widths(text: str) -> Iterator[tuple[str, int]]:
    """Each character with the columns it takes: 2 for wide ones, 0 for what combines."""
    for character in text:
        if character < "\u0300":
            yield character, 1
        elif unicodedata.combining(character) or character in "\u200b\u200d\ufe0f\ufe0e":
            yield character, 0
        else:
            yield character, 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Row:
    """One row: a character and a style for each column; behind a wide character stands ''."""

    __slots__ = ("_characters", "_styles")

    def __init__(self, columns: int, style: str = "") -> None:
        self._characters = [" "] * columns
        self._styles = [style] * columns

    @property
    def is_blank(self) -> bool:
        """Whether nothing is to be seen."""
        return not any(self._styles) and all(c == " " for c in self._characters)

    def text(self) -> str:
        """What it says."""
        return "".join(self._characters).rstrip()

    def paint(self) -> str:
        """What prints it in its colours; nothing for blanks at its end."""
        end = len(self._characters)
        while end and self._characters[end - 1] == " " and not self._styles[end - 1]:
            end -= 1
        parts, style = [], ""
        for character, wanted in zip(self._characters[:end], self._styles[:end], strict=True):
            if wanted != style:
                parts.append(f"\x1b[0;{wanted}m" if wanted else "\x1b[0m")
                style = wanted
            parts.append(character)
        return "".join(parts) + ("\x1b[0m" if style else "")

    def put(self, x: int, text: str, style: str, width: int = 0) -> None:
        """Write over columns from `x` on: each character takes one, or the only one `width`."""
        count = width or len(text)
        self._part(x)
        self._part(x + count)
        end = min(x + count, len(self._characters))
        filled = [text] + [""] * (width - 1) if width else list(text)
        self._characters[x:end] = filled[: end - x]
        self._styles[x:end] = [style] * (end - x)

    def combine(self, x: int, mark: str) -> None:
        """Put an accent on the character that ends at column `x`."""
        x = max(x, 0)
        if x and not self._characters[x]:
            x -= 1
        if len(self._characters[x]) < _MOST_COMBINED:
            self._characters[x] = (self._characters[x] or " ") + mark

    def erase(self, start: int, end: int, style: str) -> None:
        """Blank columns from `start` to before `end`."""
        end = min(end, len(self._characters))
        self._part(start)
        self._part(end)
        self._characters[start:end] = [" "] * (end - start)
        self._styles[start:end] = [style] * (end - start)

    def insert(self, x: int, count: int, style: str) -> None:
        """Blanks at `x`; what leaves the row at its end is gone."""
        columns = len(self._characters)
        count = min(count, columns - x)
        self._part(x)
        self._part(columns - count)
        self._characters[x:x] = [" "] * count
        self._styles[x:x] = [style] * count
        del self._characters[columns:], self._styles[columns:]

    def delete(self, x: int, count: int, style: str) -> None:
        """Take columns out; blanks follow at the end."""
        count = min(count, len(self._characters) - x)
        self._part(x)
        self._part(x + count)
        del self._characters[x : x + count], self._styles[x : x + count]
        self._characters += [" "] * count
        self._styles += [style] * count

    def resize(self, columns: int) -> None:
        """Cut it, or lengthen it with blanks."""
        self._part(columns)
        del self._characters[columns:], self._styles[columns:]
        self._characters += [" "] * (columns - len(self._characters))
        self._styles += [""] * (columns - len(self._styles))

    def _part(self, x: int) -> None:
        """If a wide character stands across the border before column `x`, it is gone."""
        if 0 < x < len(self._characters) and not self._characters[x]:
            self._characters[x - 1] = self._characters[x] = " "
