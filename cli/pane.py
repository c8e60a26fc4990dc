"""What a pane of tmux(1) shows: the screen that a program drew before lzy kept its terminal."""

from __future__ import annotations

import contextlib
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..checkpoint.takeover import Place

_ANSWERS_WITHIN_S = 2.0
_FORMAT = "#{pane_tty} #{cursor_y} #{cursor_x} #{alternate_on}"


def read_pane(pid: int, place: Place) -> bytes | None:
    """The screen of the pane that the process runs in, as `Screen.save` has it; None elsewhere."""
    from ..agent.terminal.screen import Screen
    from ..checkpoint import proc
    from ..checkpoint.errors import LzyError

    try:
        environment = proc.read_bytes(pid, "environ").decode(errors="replace").split("\0")
    except LzyError:
        return None
    facts = dict(line.split("=", 1) for line in environment if "=" in line)
    server, pane = facts.get("TMUX", "").split(",")[0], facts.get("TMUX_PANE", "")
    if not server or not pane:
        return None
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        device, row, column, alternate = _ask(server, "display-message", pane, _FORMAT).split()
        if device != place.device:
            return None
        shown = _ask(server, "capture-pane", pane, "-e").rstrip("\n").split("\n")
        screen = Screen(place.rows, place.columns)
        if alternate == "1":
            screen.feed(b"\x1b[?1049h")
        screen.feed("\r\n".join(shown).encode())
        screen.feed(f"\x1b[0m\x1b[{int(row) + 1};{int(column) + 1}H".encode())
        return screen.save()
    return None


def _ask(server: str, command: str, pane: str, *words: str) -> str:
    return subprocess.run(
        ["tmux", "-S", server, command, "-p", "-t", pane, *words],
        capture_output=True, text=True, check=True, timeout=_ANSWERS_WITHIN_S,
    ).stdout  # fmt: skip
