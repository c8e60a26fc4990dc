"""One line in a window tells how its session is while that is not there, and goes when it is."""

from __future__ import annotations

from ..agent.terminal.frames import REPAINT, pack
from .link import Link
from .raw import window_size, write


class Notice:
    """The line in the window of a session that `link` tells of."""

    def __init__(self, session: str, link: Link) -> None:
        self._session, self._link = session, link
        self._place = ""

    def update(self) -> None:
        """Show what there is to say now, or nothing. Raises Gone."""
        failure, self._link.news = self._link.news, None
        words = self._words(failure or "")
        self.clear()
        if words:
            self._show(words)

    def clear(self) -> None:
        """Take it away. Raises Gone."""
        if self._place == "bottom":
            self._link.send(pack(REPAINT))
        elif self._place:
            write(b"\x1b7\n\r\x1b[K\x1b8")
        self._place = ""

    def _words(self, failure: str) -> str:
        session, state = self._session, self._link.state
        if failure:
            return f"{session} cannot be woken: {failure}"
        if state == "hibernated":
            return f"{session} is asleep since {self._link.since}; any key wakes it"
        return {"waking": f"{session} wakes", "moving": f"{session} moves"}.get(state, "")

    def _show(self, words: str) -> None:
        """Below the cursor, which stays; at the bottom of a screen that will be painted anew."""
        shown = words[: max(window_size()[1] - 4, 10)].encode()
        is_alternate = self._link.look().get("is_alternate")
        write(self._link.take_output())
        if is_alternate:
            self._place = "bottom"
            write(b"\x1b7\x1b[999;1H\x1b[0;7m " + shown + b" \x1b[0m\x1b[K\x1b8")
        else:
            self._place = "below"
            write(b"\n\x1b[A\x1b7\n\r\x1b[0;7m " + shown + b" \x1b[0m\x1b[K\x1b8")
