"""Which session a living process belongs to, and from which of its checkpoints it goes on.

One small file for each process, `LZY_HOME/run/PID.session`, written by whoever dumped the process
and let it go on, or restored it. It names the process by pid, start time and boot, so that one
which outlives its process is known as stale: it is then ignored, and removed. It is replaced by
rename(2), so a reader sees the one before or the one after. Losing it loses no memory: the next
dump begins a new session.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import proc
from .errors import NotFound
from .home import run_directory

if TYPE_CHECKING:
    from .store import Store

_SUFFIX = ".session"
_BESIDE = (".account", ".warm")  # what else is kept of a process, and is stale with it


class Lineage(NamedTuple):
    """What is kept of one living process.

    `number` is its last checkpoint's in `session`, 0 while there is none (it was forked); `image`
    the one that it goes on from, which is of another session then.
    """

    pid: int
    start_time: int
    boot_id: str
    store: str
    session: str
    number: int
    image: str


def lineage_path(pid: int) -> Path:
    """Where the record of process `pid` lies."""
    return run_directory() / f"{pid}{_SUFFIX}"


def write_lineage(pid: int, store: Path | str, session: str, number: int, image: str) -> None:
    """Keep what process `pid` goes on from. Raises OSError, NotFound (it has ended)."""
    lineage = Lineage(
        pid=pid,
        start_time=proc.start_time(pid),
        boot_id=proc.boot_id(),
        store=os.path.realpath(store),
        session=session,
        number=number,
        image=image,
    )
    path = lineage_path(pid)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    text = json.dumps(lineage._asdict()).encode()
    try:
        descriptor = _create(temporary)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = _create(temporary)
    try:
        os.write(descriptor, text)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)


def find_lineage(pid: int, store: Store) -> Lineage | None:
    """What process `pid` goes on from, if that is in `store`; a stale record is removed."""
    lineage = _read(lineage_path(pid))
    if lineage is None or lineage.store != os.path.realpath(store.path):
        return None
    return lineage


def list_lineages(store: Store) -> list[Lineage]:
    """Every living process that goes on from an image of `store`, by pid; stale ones go."""
    place = os.path.realpath(store.path)
    found = [
        lineage
        for path in run_directory().glob(f"*{_SUFFIX}")
        if (lineage := _read(path)) is not None and lineage.store == place
    ]
    return sorted(found)


def forget_lineage(pid: int) -> None:
    """Remove the record of a process that has ended, and what is kept of it beside."""
    for path in (lineage_path(pid), *map(lineage_path(pid).with_suffix, _BESIDE)):
        with contextlib.suppress(OSError):
            os.unlink(path)


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(path, flags, 0o600)


def _read(path: Path) -> Lineage | None:
    """The record in that file if its process lives; a stale one is removed on the way."""
    try:
        with open(path, "rb") as file:
            lineage = _parse(file.read())
            read = os.fstat(file.fileno()).st_ino
    except OSError:
        return None
    if lineage is not None and lineage.boot_id == proc.boot_id():
        with contextlib.suppress(NotFound):
            if proc.start_time(lineage.pid) == lineage.start_time:
                return lineage
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == read:  # and not one that was written meanwhile
            os.unlink(path)
            for other in map(path.with_suffix, _BESIDE):
                other.unlink(missing_ok=True)
    return None


def _parse(text: bytes) -> Lineage | None:
    """None for what is no record: it was cut short by a power failure."""
    try:
        found: dict[str, Any] = json.loads(text)
        lineage = Lineage(**found)
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = (int, int, str, str, str, int, str)
    return lineage if all(map(isinstance, lineage, kinds)) else None
