"""What a terminal shows: the bytes a program prints, as rows of cells, and as bytes to paint them.

It understands what programs send to an xterm, as ECMA-48 and xterm's ctlseqs.html describe it, as
far as it changes what is seen: text, cursor, erasing, scrolling, colours, both screens, modes.
Other sequences are taken out whole and mean nothing. Rows that scroll off are kept as painted text.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Final

from .cells import Row, Style, widths
from .tokens import Tokens

MOST_HISTORY: Final = 2000
"""Rows that scrolled off and are kept."""
_KEPT_MODES: Final = frozenset(
    {1, 7, 12, 66, 1000, 1002, 1003, 1004, 1005, 1006, 1007, 1015, 1016, 2004}
)
"""Private modes that a console is put into again: keys, mouse, focus, pasting, wrapping."""
_LINE_DRAWING: Final = str.maketrans(
    "`afgjklmnopqrstuvwxyz{|}~", "◆▒°±┘┐┌└┼⎺⎻─⎼⎽├┤┴┬│≤≥π≠£·"
)  # fmt: skip


class _Page:
    """One of the two screens: its rows, where the cursor is, what scrolls."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = [Row(columns) for _ in range(rows)]
        self.x = self.y = 0
        self.top, self.bottom = 0, rows - 1
        self.saved: tuple[int, int, Style, bool] = (0, 0, Style(), False)


class Screen:
    """A terminal of so many rows and columns."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = max(rows, 1), max(columns, 1)
        self.history: deque[str] = deque(maxlen=MOST_HISTORY)
        self.title = ""
        self.answers: list[bytes] = []
        """What a terminal would have answered to what was asked since this was emptied."""
        self._tokens = Tokens()
        self._reset()

    def _reset(self) -> None:
        self._pages = (_Page(self.rows, self.columns), _Page(self.rows, self.columns))
        self._page = self._pages[0]
        self._style = Style()
        self._wraps = False  # the cursor stands behind the last column
        self._inserts = False
        self._is_origin = False
        self._drawing = [False, False]
        self._shift = 0
        self.modes: set[int] = {7}
        self.shows_cursor = True
        self._cursor_shape = ""
        self._keys = ""  # xterm's modifyOtherKeys, as it was set
        self._keypad = False
        self._last = ""
        self._stops = set(range(8, 1000, 8))

    # -- what it shows

    @property
    def is_alternate(self) -> bool:
        """Whether the second screen is shown, as editors have it."""
        return self._page is self._pages[1]

    @property
    def cursor(self) -> tuple[int, int]:
        """Row and column, from 0."""
        return self._page.y, self._page.x

    def text(self) -> list[str]:
        """The rows as text, without blanks at their ends."""
        return [row.text() for row in self._page.rows]

    def paint(self) -> bytes:
        """What makes another terminal of this size show the same, and behave as this does."""
        parts = ["\x1b[!p\x1b[0m\x1b[?25l\x1b[r"]
        first, second = self._pages
        parts.append(self._paint_page(first))
        if self.is_alternate:
            parts.append(f"\x1b[{first.y + 1};{first.x + 1}H\x1b[?1049h")
            parts.append(self._paint_page(second))
        page = self._page
        if (page.top, page.bottom) != (0, self.rows - 1):
            parts.append(f"\x1b[{page.top + 1};{page.bottom + 1}r")
        for mode in sorted(self.modes & _KEPT_MODES - {7}):
            parts.append(f"\x1b[?{mode}h")
        if 7 not in self.modes:
            parts.append("\x1b[?7l")
        parts += ["\x1b=" if self._keypad else "\x1b>", self._keys, self._cursor_shape]
        parts.append(f"\x1b[{page.y + 1};{page.x + 1}H{self._style.sequence()}")
        if self._is_origin:
            parts.append("\x1b[?6h")
        if self._inserts:
            parts.append("\x1b[4h")
        if self.shows_cursor:
            parts.append("\x1b[?25h")
        return "".join(parts).encode()

    def unfinished(self) -> bytes:
        """The beginning of a sequence or character whose end has not come yet."""
        return self._tokens.unfinished

    def unpaint(self) -> bytes:
        """What gives a terminal that showed this back to a shell.

        That is plain modes, the first screen, and the cursor below what is shown there.
        """
        first = self._pages[0]
        last = max([first.y, *(y for y, row in enumerate(first.rows) if not row.is_blank)])
        step = "" if first.rows[last].is_blank else "\r\n"
        below = f"\x1b[?6l\x1b[{last + 1};1H{step}\x1b[J"
        return self.leave_modes() + below.encode()

    def leave_modes(self) -> bytes:
        """What takes a terminal back to plain modes and the first screen; the cursor stays."""
        modes = "".join(f"\x1b[?{mode}l" for mode in sorted(self.modes & _KEPT_MODES - {7, 12}))
        keys = "\x1b[>4m" if self._keys else ""
        shape = "\x1b[0 q" if self._cursor_shape else ""
        leave = "\x1b[?1049l" if self.is_alternate else ""
        plain = "\x1b[?7h\x1b>\x1b[4l\x1b7\x1b[r\x1b8\x1b[0m"
        return f"{modes}{keys}{shape}{plain}{leave}\x1b[?25h".encode()

    def _paint_page(self, page: _Page) -> str:
        rows = [row.paint() for row in page.rows]
        lines = (f"\x1b[{y + 1};1H{row}" for y, row in enumerate(rows) if row)
        return "\x1b[H\x1b[2J" + "".join(lines)

    def save(self) -> bytes:
        """All of it, for `load`."""
        kept = list(self.history)[-500:]
        head = f"{self.rows} {self.columns} {len(kept)}\n"
        return head.encode() + "".join(f"{row}\n" for row in kept).encode() + self.paint()

    @classmethod
    def load(cls, saved: bytes) -> Screen:
        """The screen that was saved. Raises ValueError."""
        head, _, rest = saved.partition(b"\n")
        rows, columns, kept = map(int, head.split())
        made = cls(min(rows, 1000), min(columns, 1000))
        *lines, painted = rest.split(b"\n", kept)
        made.history.extend(line.decode(errors="replace") for line in lines)
        made.feed(painted)
        return made

    def resize(self, rows: int, columns: int) -> None:
        """Another size: rows are cut or lengthened, what no longer fits above scrolls off."""
        rows, columns = max(rows, 1), max(columns, 1)
        for page in self._pages:
            while len(page.rows) > rows:
                if page.y < len(page.rows) - 1 and page.rows[-1].is_blank:
                    page.rows.pop()
                else:
                    gone = page.rows.pop(0)
                    page.y = max(page.y - 1, 0)
                    if page is self._pages[0]:
                        self.history.append(gone.paint())
            page.rows += [Row(columns) for _ in range(rows - len(page.rows))]
            for row in page.rows:
                row.resize(columns)
            page.top, page.bottom = 0, rows - 1
            page.x, page.y = min(page.x, columns - 1), min(page.y, rows - 1)
        self.rows, self.columns, self._wraps = rows, columns, False

    # -- what comes

    def feed(self, output: bytes) -> None:
        """Take in what a program has printed."""
        for found in self._tokens.feed(output):
            self._take(found)

    def _take(self, found: re.Match[str]) -> None:
        kind = found.lastgroup
        if kind == "text":
            self._write(found["text"])
        elif kind == "control":
            if act := _CONTROLS.get(found["control"]):
                act(self)
        elif kind == "final":
            self._take_csi(found["parameters"], found["between"], found["final"])
        elif kind == "osc":
            number, _, rest = found["osc"].partition(";")
            if number in ("0", "2"):
                self.title = rest[:200]
        elif kind == "which":
            if found["set"] in ("(", ")"):
                self._drawing[found["set"] == ")"] = found["which"] == "0"
            elif found["set"] == "#" and found["which"] == "8":
                for row in self._page.rows:
                    row.put(0, "E" * self.columns, "")
        elif kind == "escape" and (act := _ESCAPES.get(found["escape"])):
            act(self)

    def _take_csi(self, parameters: str, between: str, final: str) -> None:
        marked = parameters[:1] if parameters[:1] in ("?", ">", "=", "<") else ""
        body = parameters[len(marked) :]
        if between:
            if between == " " and final == "q":
                self._cursor_shape = f"\x1b[{body} q"
            elif between == "!" and final == "p":
                self._soften()
            return
        if marked == ">" and final == "m" and body.startswith("4"):
            self._keys = f"\x1b[>{body}m" if body.partition(";")[2] not in ("", "0") else ""
            return
        if marked == "?":
            if final in "hl":
                for number in _numbers(body):
                    self._set_private(number, final == "h")
            elif final in "JK":
                _CSI[final](self, _numbers(body))
            return
        if marked:
            return
        if final == "m":
            self._style = self._style.change(body)
        elif final in "hl":
            if 4 in _numbers(body):
                self._inserts = final == "h"
        elif act := _CSI.get(final):
            act(self, _numbers(body))

    def _soften(self) -> None:
        """Soft reset (DECSTR)."""
        self._style, self._inserts, self._is_origin = Style(), False, False
        self.shows_cursor, self._keypad = True, False
        self.modes.discard(1)
        self.modes.add(7)
        self._page.top, self._page.bottom = 0, self.rows - 1
        self._drawing, self._shift = [False, False], 0

    def _set_private(self, mode: int, on: bool) -> None:
        if mode in (47, 1047, 1049):
            self._switch(on, keeps_cursor=mode == 1049)
        elif mode == 1048:
            self.save_cursor() if on else self.restore_cursor()
        elif mode == 25:
            self.shows_cursor = on
        elif mode == 6:
            self._is_origin = on
            self._move(0, 0)
        elif on:
            self.modes.add(mode)
        else:
            self.modes.discard(mode)

    def _switch(self, alternate: bool, *, keeps_cursor: bool) -> None:
        if alternate == self.is_alternate:
            return
        if alternate:
            if keeps_cursor:
                self.save_cursor()
            before = self._page
            self._page = self._pages[1]
            self._page.rows = [Row(self.columns) for _ in range(self.rows)]
            self._page.top, self._page.bottom = 0, self.rows - 1
            self._page.x, self._page.y = before.x, before.y
        else:
            self._page = self._pages[0]
            if keeps_cursor:
                self.restore_cursor()
        self._wraps = False

    # -- text

    def _write(self, text: str) -> None:
        if self._drawing[self._shift]:
            text = text.translate(_LINE_DRAWING)
        self._last = text[-1]
        if text.isascii() and not self._inserts:
            at = 0
            while at < len(text):
                self._wrap()
                page = self._page
                piece = text[at : at + self.columns - page.x]
                page.rows[page.y].put(page.x, piece, self._style.text)
                at += len(piece)
                self._step(len(piece))
                if self._wraps and 7 not in self.modes and at < len(text):
                    page.rows[page.y].put(self.columns - 1, text[-1], self._style.text)
                    return
            return
        for character, width in widths(text):
            if width == 0:
                page = self._page
                page.rows[page.y].combine(page.x - (not self._wraps), character)
                continue
            width = min(width, self.columns)
            if width == 2 and self._page.x == self.columns - 1 and 7 in self.modes:
                self._wraps = True
            self._wrap()
            page = self._page
            if self._inserts:
                page.rows[page.y].insert(page.x, width, "")
            page.rows[page.y].put(page.x, character, self._style.text, width)
            self._step(width)

    def _wrap(self) -> None:
        if self._wraps and 7 in self.modes:
            self._page.x = 0
            self.feed_line()
        self._wraps = False

    def _step(self, width: int) -> None:
        page = self._page
        page.x += width
        if page.x >= self.columns:
            page.x, self._wraps = self.columns - 1, True

    def repeat(self, count: int) -> None:
        """REP: the last character again."""
        if self._last:
            self._write(self._last * min(count, self.columns * self.rows))

    # -- cursor and scrolling

    def _move(self, y: int, x: int) -> None:
        page = self._page
        low, high = (page.top, page.bottom) if self._is_origin else (0, self.rows - 1)
        page.y = min(max(y + (page.top if self._is_origin else 0), low), high)
        page.x = min(max(x, 0), self.columns - 1)
        self._wraps = False

    def _shift_by(self, down: int, right: int) -> None:
        page = self._page
        low = page.top if page.y >= page.top else 0
        high = page.bottom if page.y <= page.bottom else self.rows - 1
        page.y = min(max(page.y + down, low), high)
        page.x = min(max(page.x + right, 0), self.columns - 1)
        self._wraps = False

    def feed_line(self) -> None:
        """One down; at the bottom what is above scrolls."""
        page = self._page
        self._wraps = False
        if page.y == page.bottom:
            self._scroll(1)
        elif page.y < self.rows - 1:
            page.y += 1

    def _feed_back(self) -> None:
        page = self._page
        self._wraps = False
        if page.y == page.top:
            self._scroll(-1)
        elif page.y > 0:
            page.y -= 1

    def _scroll(self, count: int, start: int | None = None) -> None:
        """Rows of the margins up (or down, below 0); those that leave the top are kept."""
        page = self._page
        top = page.top if start is None else start
        count = max(min(count, page.bottom - top + 1), -(page.bottom - top + 1))
        keeps = page is self._pages[0] and top == 0 and start is None
        for _ in range(abs(count)):
            if count > 0:
                gone = page.rows.pop(top)
                if keeps:
                    self.history.append(gone.paint())
                page.rows.insert(page.bottom, self._blank())
            else:
                page.rows.pop(page.bottom)
                page.rows.insert(top, self._blank())

    def _blank(self) -> Row:
        return Row(self.columns, self._style.background)

    def save_cursor(self) -> None:
        """DECSC."""
        page = self._page
        page.saved = (page.y, page.x, self._style, self._is_origin)

    def restore_cursor(self) -> None:
        """DECRC."""
        y, x, self._style, self._is_origin = self._page.saved
        self._page.y, self._page.x = min(y, self.rows - 1), min(x, self.columns - 1)
        self._wraps = False

    # -- what the tables below call

    def _tab(self, count: int) -> None:
        page = self._page
        for _ in range(min(abs(count), self.columns)):
            if count > 0:
                page.x = min((s for s in self._stops if s > page.x), default=self.columns - 1)
            else:
                page.x = max((s for s in self._stops if s < page.x), default=0)
        page.x = min(page.x, self.columns - 1)
        self._wraps = False

    def _erase_row(self, how: int) -> None:
        page = self._page
        start = 0 if how else page.x
        end = page.x + 1 if how == 1 else self.columns
        page.rows[page.y].erase(start, end, self._style.background)

    def _erase_display(self, how: int) -> None:
        page = self._page
        if how == 3:
            self.history.clear()
            return
        if how in (0, 1):
            self._erase_row(how)
        first, last = {0: (page.y + 1, self.rows), 1: (0, page.y)}.get(how, (0, self.rows))
        for y in range(first, last):
            page.rows[y].erase(0, self.columns, self._style.background)

    def _shift_rows(self, count: int) -> None:
        """IL and DL: rows from the cursor's on, down or (below 0) up."""
        page = self._page
        if page.top <= page.y <= page.bottom:
            self._scroll(-count, start=page.y)
            page.x = 0

    def _set_margins(self, numbers: list[int]) -> None:
        top = _number(numbers, 0, 1) - 1
        bottom = min(_number(numbers, 1, self.rows), self.rows) - 1
        if 0 <= top < bottom:
            self._page.top, self._page.bottom = top, bottom
            self._move(0, 0)

    def _report(self, number: int) -> None:
        if number == 6:
            self.answers.append(f"\x1b[{self._page.y + 1};{self._page.x + 1}R".encode())
        elif number == 5:
            self.answers.append(b"\x1b[0n")

    def _carriage_return(self) -> None:
        self._page.x, self._wraps = 0, False

    def _use(self, shift: int) -> None:
        self._shift = shift

    def _use_keypad(self, on: bool) -> None:
        self._keypad = on

    def _next_line(self) -> None:
        self._carriage_return()
        self.feed_line()


def _numbers(body: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in body.split(";")[:32]]


def _number(numbers: list[int], index: int, default: int = 1) -> int:
    """A parameter; 0 and a missing one mean the default."""
    return min((numbers[index] if index < len(numbers) else 0) or default, 9999)


_CONTROLS: Final[dict[str, Callable[[Screen], None]]] = {
    "\b": lambda s: s._shift_by(0, -1),
    "\t": lambda s: s._tab(1),
    "\n": Screen.feed_line,
    "\v": Screen.feed_line,
    "\f": Screen.feed_line,
    "\r": Screen._carriage_return,
    "\x0e": lambda s: s._use(1),
    "\x0f": lambda s: s._use(0),
}
_ESCAPES: Final[dict[str, Callable[[Screen], None]]] = {
    "7": Screen.save_cursor,
    "8": Screen.restore_cursor,
    "D": Screen.feed_line,
    "E": Screen._next_line,
    "M": Screen._feed_back,
    "H": lambda s: s._stops.add(s._page.x),
    "c": Screen._reset,
    "=": lambda s: s._use_keypad(True),
    ">": lambda s: s._use_keypad(False),
}
_CSI: Final[dict[str, Callable[[Screen, list[int]], None]]] = {
    "A": lambda s, n: s._shift_by(-_number(n, 0), 0),
    "B": lambda s, n: s._shift_by(_number(n, 0), 0),
    "e": lambda s, n: s._shift_by(_number(n, 0), 0),
    "C": lambda s, n: s._shift_by(0, _number(n, 0)),
    "a": lambda s, n: s._shift_by(0, _number(n, 0)),
    "D": lambda s, n: s._shift_by(0, -_number(n, 0)),
    "E": lambda s, n: s._shift_by(_number(n, 0), -s.columns),
    "F": lambda s, n: s._shift_by(-_number(n, 0), -s.columns),
    "G": lambda s, n: s._shift_by(0, _number(n, 0) - 1 - s._page.x),
    "`": lambda s, n: s._shift_by(0, _number(n, 0) - 1 - s._page.x),
    "d": lambda s, n: s._move(_number(n, 0) - 1, s._page.x),
    "H": lambda s, n: s._move(_number(n, 0) - 1, _number(n, 1) - 1),
    "f": lambda s, n: s._move(_number(n, 0) - 1, _number(n, 1) - 1),
    "I": lambda s, n: s._tab(_number(n, 0)),
    "Z": lambda s, n: s._tab(-_number(n, 0)),
    "J": lambda s, n: s._erase_display(n[0]),
    "K": lambda s, n: s._erase_row(n[0]),
    "L": lambda s, n: s._shift_rows(_number(n, 0)),
    "M": lambda s, n: s._shift_rows(-_number(n, 0)),
    "S": lambda s, n: s._scroll(_number(n, 0)),
    "T": lambda s, n: s._scroll(-_number(n, 0)) if len(n) == 1 else None,
    "@": lambda s, n: s._page.rows[s._page.y].insert(s._page.x, _number(n, 0), s._style.background),
    "P": lambda s, n: s._page.rows[s._page.y].delete(s._page.x, _number(n, 0), s._style.background),
    "X": lambda s, n: s._page.rows[s._page.y].erase(
        s._page.x, s._page.x + _number(n, 0), s._style.background
    ),
    "b": lambda s, n: s.repeat(_number(n, 0)),
    "g": lambda s, n: s._stops.clear() if n[0] == 3 else s._stops.discard(s._page.x),
    "r": lambda s, n: s._set_margins(n),
    "s": lambda s, n: s.save_cursor(),
    "u": lambda s, n: s.restore_cursor(),
    "n": lambda s, n: s._report(n[0]),
    "c": lambda s, n: s.answers.append(b"\x1b[?62;22c"),
}
