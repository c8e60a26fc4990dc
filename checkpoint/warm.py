"""What a dozing process touches all the time, a heartbeat say, is learnt and left in memory.

What came back after both of the last two dozes stays at the next. A page that stays cannot be seen
to be touched: so now and then it goes again, and has to come back twice anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from . import proc
from .content import intersect, join_ranges, subtract
from .home import run_directory

Range = tuple[int, int]

MOST_BYTES = 16 << 20
"""More than this is no heartbeat: who uses so much between two dozes is working."""
_LASTS_DOZES = 8


def leave_warm(pid: int, ranges: list[Range]) -> list[Range]:
    """What of ascending `ranges`, all that could go, is to go; the record of `pid` is renewed."""
    path = _path(pid)
    before: dict[str, list[Range]] = {"kept": [], "back": []}
    dozes = 0
    began = proc.start_time(pid)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(path.read_text())
        if record["start_time"] == began:
            dozes = record["dozes"]
            before = {key: [(start, end) for start, end in record[key]] for key in before}
    kept = intersect(ranges, before["kept"]) if dozes % _LASTS_DOZES else []
    back = subtract(ranges, kept) if dozes else []  # at the first nothing had gone
    kept = join_ranges([*kept, *intersect(back, before["back"])])
    if _length(back) > MOST_BYTES:
        back = []
    if _length(kept) > MOST_BYTES:
        kept = []
    record = {"start_time": began, "dozes": dozes + 1, "kept": kept, "back": back}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_suffix(f".{os.getpid()}.new")
    draft.write_text(json.dumps(record))
    os.rename(draft, path)
    return subtract(ranges, kept)


def _length(ranges: list[Range]) -> int:
    return sum(end - start for start, end in ranges)


def _path(pid: int) -> Path:
    return run_directory() / f"{pid}.warm"
