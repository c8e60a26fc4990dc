"""Terminals that lzy keeps: which session's, where, and the screen that they last showed.

A terminal's keeper (`lzy.agent.terminal`) writes `LZY_HOME/terminals/SESSION.json` and holds a lock
on it as long as it lives, so that a file which outlives its keeper is known as stale. Beside it,
in `SESSION.screen`, lies what the terminal shows, as bytes that paint it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import NamedTuple

from .home import home

_SUFFIX = ".json"
MOST_SCREEN_BYTES = 1 << 20


class Kept(NamedTuple):
    """A terminal whose keeper lives: the session's name, `/dev/pts/N`, the keeper's pid."""

    session: str
    device: str
    keeper_pid: int


def kept_folder(folder: Path | None = None) -> Path:
    """Where the files of a home's terminals lie."""
    return (folder or home()) / "terminals"


def kept_path(session: str, folder: Path | None = None) -> Path:
    """The file that a session's keeper holds."""
    return kept_folder(folder) / f"{session}{_SUFFIX}"


def screen_path(session: str, folder: Path | None = None) -> Path:
    """What a session's terminal last showed."""
    return kept_folder(folder) / f"{session}.screen"


def find_kept(session: str, folder: Path | None = None) -> Kept | None:
    """The terminal of a session, if its keeper lives."""
    try:
        with open(kept_path(session, folder), "rb") as file:
            if not _is_held(file.fileno()):
                return None
            told = json.loads(file.read())
        return Kept(session, str(told["device"]), int(told["keeper_pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_by_device(device: str, folder: Path | None = None) -> Kept | None:
    """The kept terminal that is `device` (`/dev/pts/N`), if there is one."""
    with contextlib.suppress(OSError):
        for name in os.listdir(kept_folder(folder)):
            if name.endswith(_SUFFIX):
                kept = find_kept(name.removesuffix(_SUFFIX), folder)
                if kept and kept.device == device:
                    return kept
    return None


def read_screen(session: str, folder: Path | None = None) -> bytes:
    """What the session's terminal last showed; empty if that is not known."""
    try:
        with open(screen_path(session, folder), "rb") as file:
            return file.read(MOST_SCREEN_BYTES)
    except OSError:
        return b""


def _is_held(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
