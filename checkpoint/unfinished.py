"""Descriptors of lzy's own that were left in a process: noted at once, closed by a later dump.

Of a doze that was killed before a pager knew of it, or of a pager that could not close them in
time. They do nothing, but nobody could tell them from the program's own, and a process that has a
userfaultfd of its own cannot be dumped.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from . import proc
from .errors import LzyError
from .home import run_directory
from .inject import close_descriptor
from .journal import journal_path

_KINDS = ("anon_inode:[userfaultfd]", "socket:")


def note_descriptor(pid: int, number: int) -> None:
    """Say that what is at `number` in process `pid`, or comes to be there, is ours.

    Of what is there already the inode is noted, so that nothing else is taken for it; of what is
    to come only that it is to be a userfaultfd.
    """
    path = _path(pid)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    note = _read(pid) or {"start_time": proc.start_time(pid), "numbers": {}}
    note["numbers"][str(number)] = _inode(pid, number)
    draft = path.with_suffix(f".{os.getpid()}.new")
    draft.write_text(json.dumps(note))
    os.rename(draft, path)


def forget_descriptor(pid: int) -> None:
    """Its pager knows of it now."""
    _path(pid).unlink(missing_ok=True)


def close_unfinished(pid: int) -> None:
    """Close what was left in process `pid` and its descendants, if anything."""
    found: list[int] = []
    with contextlib.suppress(OSError, LzyError):  # another user's folder: then nothing is noted
        if any(run_directory().glob("*.unfinished")):
            found = [pid, *_descendants(pid)]
    for each in found:
        with contextlib.suppress(OSError, ValueError, KeyError, LzyError):
            _close(each)


def _close(pid: int) -> None:
    note = _read(pid)
    if note and not journal_path(run_directory(), pid).exists():
        for number, inode in note["numbers"].items():
            with contextlib.suppress(FileNotFoundError):
                kind = os.readlink(f"/proc/{proc.witness(pid)}/fd/{number}")
                known = _inode(pid, int(number)) == inode and kind.startswith(_KINDS)
                if known or (not inode and kind == _KINDS[0]):
                    close_descriptor(pid, int(number))
    _path(pid).unlink(missing_ok=True)


def _read(pid: int) -> dict[str, Any] | None:
    """The note about a process, if it is about this one."""
    with contextlib.suppress(OSError, ValueError, KeyError, LzyError):
        note: dict[str, Any] = json.loads(_path(pid).read_text())
        if note["start_time"] == proc.start_time(pid) and "numbers" in note:
            return note
    return None


def _inode(pid: int, number: int) -> int:
    """0 where there is none."""
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{proc.witness(pid)}/fd/{number}").st_ino
    return 0


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for child in proc.children(pid):
        found += [child, *_descendants(child)]
    return found


def _path(pid: int) -> Path:
    return run_directory() / f"{pid}.unfinished"
