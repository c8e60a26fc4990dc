"""Which processes wait for memory of which image, and how their pagers do: by their journals."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from . import proc
from .errors import Damaged, NotFound
from .home import run_directory
from .journal import Status, is_held, read_status


class PagerReport(NamedTuple):
    """One journal: which process it is for, whether a pager serves it, and how that one does."""

    pid: int
    store: str
    image: str
    alive: bool
    status: Status


def list_pagers() -> list[PagerReport]:
    """Every journal there is, oldest pid first."""
    reports = []
    for path in run_directory().glob("*.pager"):
        with contextlib.suppress(NotFound, Damaged):
            facts, status = read_status(path)
            alive = is_held(path)
            reports.append(PagerReport(facts["pid"], facts["store"], facts["image"], alive, status))
    return sorted(reports)


def who_waits(store: Path, image: str) -> list[int]:
    """Processes whose memory still comes from that image, whether their pagers live or not."""
    found = []
    for path in run_directory().glob("*.pager"):
        with contextlib.suppress(NotFound, Damaged):
            facts, _ = read_status(path)
            own = facts["image"].partition("#")[0]  # NAME#PID: one process of its tree
            same = own == image and os.path.realpath(facts["store"]) == str(store.resolve())
            if same and is_alive(facts):
                found.append(int(facts["pid"]))
    return sorted(found)


def is_alive(facts: dict[str, Any]) -> bool:
    """Whether the journal's process still is the one it was written for."""
    try:
        alive = proc.start_time(facts["pid"]) == facts["start_time"]
    except NotFound:
        return False
    return alive and proc.boot_id() == facts["boot_id"] and not proc.has_ended(facts["pid"])
