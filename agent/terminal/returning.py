"""On which terminal a session comes back: the one that is kept for it, or a new one like it."""

from __future__ import annotations

import base64
import contextlib
import struct
import zlib
from typing import Any

from ...checkpoint.errors import Busy
from ...checkpoint.kept import MOST_SCREEN_BYTES, find_kept, screen_path
from .starting import start_keeper


def find_terminal(
    session: str, owner_uid: int, document: dict[str, Any], *, state: str = "waking"
) -> str | None:
    """The device of the terminal for the process of an image, made if nobody keeps one.

    None for a process that was on no terminal. A new one has the settings, the window, and the
    screen of the one that there was, for a session in that `state`.
    """
    entry = outside_terminal(document)
    if entry is None:
        return None
    if kept := find_kept(session):
        return kept.device
    rows, columns = 24, 80
    if window := base64.b64decode(entry.get("window", "")):
        rows, columns = struct.unpack_from("=HH", window)
    screen = None
    if "screen" in entry and not screen_path(session).exists():
        with contextlib.suppress(zlib.error):
            screen = zlib.decompressobj().decompress(
                base64.b64decode(entry["screen"]), MOST_SCREEN_BYTES
            )
    with contextlib.suppress(Busy):  # somebody made one just now
        return start_keeper(
            session,
            rows=rows or 24,
            columns=columns or 80,
            settings=base64.b64decode(entry.get("settings", "")),
            state=state,
            screen=screen,
            owner_uid=owner_uid,
        ).device
    found = find_kept(session)
    return found.device if found else None


def outside_terminal(document: dict[str, Any]) -> dict[str, Any] | None:
    """What the image says of the terminal that the process was started on."""
    table: dict[str, Any] = document["descriptors"]
    entries = table["descriptions"]
    for number in ("0", "1", "2"):
        if place := table["descriptors"].get(number):
            entry: dict[str, Any] = entries[place["description"]]
            if entry["kind"] == "terminal" and entry["form"] == "outside":
                return entry
    return None
