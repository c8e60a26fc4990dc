"""Where lzy keeps its things: `$LZY_HOME`, else the platform's state directory."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$LZY_HOME`, else `$XDG_STATE_HOME/lzy`, else `~/.local/state/lzy` (XDG base directories)."""
    if given := os.environ.get("LZY_HOME"):
        return Path(given).absolute()  # a pager leaves the folder it was started in
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "lzy"


def default_store() -> Path:
    """The store used when none is named: `home()/store`."""
    return home() / "store"


def run_directory() -> Path:
    """Where living pagers keep their journals and logs: `home()/run`."""
    return home() / "run"
