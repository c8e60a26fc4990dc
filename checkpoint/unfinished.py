"""The userfaultfd of a doze that was killed before a pager knew of it: noted first, closed later.

Such a descriptor does nothing, but nobody could tell it from one of the program's own, and the
process could not be dumped any more.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from . import proc
from .errors import LzyError
from .home import run_directory
from .inject import close_descriptor
from .journal import journal_path


def note_descriptor(pid: int, number: int) -> None:
    """Say that a userfaultfd at `number` in process `pid`, if one comes to be there, is ours."""
    path = _path(pid)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_text(json.dumps({"start_time": proc.start_time(pid), "number": number}))


def forget_descriptor(pid: int) -> None:
    """Its pager knows of it now."""
    _path(pid).unlink(missing_ok=True)


def close_unfinished(pid: int) -> None:
    """Close what a killed doze has left in process `pid`, if anything."""
    path = _path(pid)
    with contextlib.suppress(OSError, ValueError, KeyError, LzyError):
        note = json.loads(path.read_text())
        if (
            note["start_time"] == proc.start_time(pid)
            and not journal_path(run_directory(), pid).exists()
        ):
            number = int(note["number"])
            if os.readlink(f"/proc/{proc.witness(pid)}/fd/{number}") == "anon_inode:[userfaultfd]":
                close_descriptor(pid, number)
        path.unlink()


def _path(pid: int) -> Path:
    return run_directory() / f"{pid}.unfinished"
