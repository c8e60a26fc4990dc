"""What an interpreter holds, and what of it it can spare: asked of it through the door."""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

from . import door, proc
from .errors import Busy, LzyError, Unsupported
from .home import run_directory
from .journal import is_held, journal_path

RECORDED_ROWS: Final = 200  # of variables, in an image


class Variable(NamedTuple):
    """One name of `__main__`, or one of IPython's outputs, and what only it reaches.

    What several names reach counts for the first of them; a name for the very same object as an
    earlier one says so in `same_as`. `estimated`: a large container was judged by a sample of it.
    """

    name: str
    type: str
    what: str
    bytes: int
    device_bytes: int
    objects: int
    estimated: bool
    same_as: str | None


class Belongings(NamedTuple):
    """The largest variables of an interpreter, largest first; sizes in bytes.

    `names`, `bytes` and `device_bytes` (memory of GPUs) are of all variables, also those that are
    not among `variables`. Not `complete`: the time for looking was up, so that all is "at least".
    """

    python: str
    names: int
    bytes: int
    device_bytes: int
    complete: bool
    variables: list[Variable]


class Trimmed(NamedTuple):
    """What asking an interpreter to collect and release has brought."""

    freed_bytes: int
    collected: int
    took_s: float
    notes: list[str]
    belongings: Belongings


def list_belongings(pid: int, *, limit: int = RECORDED_ROWS) -> Belongings:
    """The `limit` largest variables of a living interpreter; errors as `door.ask`.

    Looking at its objects touches them. Busy if memory is missing that nobody would bring: it would
    wait for that, and keep the interpreter meanwhile.
    """
    journal = journal_path(run_directory(), pid)
    if journal.exists() and not is_held(journal):
        raise Busy(
            f"memory of pid {pid} is not all there, and its pager has died",
            remedy=f"run: lzy pager --resume {pid}",
            pid=pid,
        )
    return read_belongings(door.ask(pid, {"variables": limit}))


def trim(pid: int, *, limit: int = RECORDED_ROWS) -> Trimmed:
    """Have an interpreter collect its garbage and give back free memory; errors as `door.ask`.

    What it has when that is done is listed as well.
    """
    began = time.monotonic()
    before = _anonymous_bytes(pid)
    told = door.ask(pid, {"trim": 1, "variables": limit}, trim=True)
    freed = before - _anonymous_bytes(pid)
    outcome = told.get("trim")
    if not isinstance(outcome, dict):
        raise LzyError(f"the interpreter in pid {pid} did not say what it released", pid=pid)
    return Trimmed(
        max(freed, 0),
        int(outcome.get("collected", 0)),
        time.monotonic() - began,
        [_plain(note) for note in outcome.get("notes", [])],
        read_belongings(told),
    )


def trim_if_idle(pid: int, notes: list[str]) -> dict[str, Any]:
    """As `trim` for a dump, which goes on whatever comes of it; `notes` gets what came of it.

    What an image's document records as `variables`; nothing if the interpreter was not asked.
    """
    try:
        trimmed = trim(pid)
    except (Busy, Unsupported) as error:
        notes.append(f"not trimmed: {error.message}")
        return {}
    except LzyError as error:
        notes.append(f"not trimmed, or not known whether: {error.message}")
        return {}
    notes.append(f"trimmed: {trimmed.freed_bytes / 2**20:.1f} MiB given back first")
    notes.extend(trimmed.notes)
    return as_table(trimmed.belongings)


def as_table(belongings: Belongings) -> dict[str, Any]:
    """What `read_belongings` reads, as an image's document keeps it."""
    table = belongings._asdict()
    python, variables = table.pop("python"), table.pop("variables")
    return {"python": python, "variables": {**table, "rows": [v._asdict() for v in variables]}}


def read_belongings(told: dict[str, Any]) -> Belongings:
    """What an interpreter told, or an image recorded; others wrote it, so its shape is checked."""
    try:
        table = told["variables"]
        rows = [
            Variable(
                name=_plain(row["name"]),
                type=_plain(row["type"]),
                what=_plain(row["what"]),
                bytes=int(row["bytes"]),
                device_bytes=int(row["device_bytes"]),
                objects=int(row["objects"]),
                estimated=bool(row["estimated"]),
                same_as=_plain(row["same_as"]) if row.get("same_as") is not None else None,
            )
            for row in table["rows"]
        ]
        return Belongings(
            _plain(told["python"]),
            int(table["names"]),
            int(table["bytes"]),
            int(table["device_bytes"]),
            bool(table["complete"]),
            rows,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LzyError(f"the list of variables is not of the form it has: {error}") from error


def _plain(words: object) -> str:
    """A word from elsewhere, fit for a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(words))


def _anonymous_bytes(pid: int) -> int:
    """Resident anonymous memory, RssAnon of proc_pid_status(5)."""
    return int(proc.status(proc.witness(pid)).get("RssAnon", "0").split()[0]) << 10
