"""`lzy log`: the checkpoints of a session, newest first."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from .arguments import complete_image, json_option, store_option
from .layout import age, count, paint, say, say_json, size, table
from .stores import load_image, open_store

if TYPE_CHECKING:
    from ..checkpoint.log import Checkpoint


@click.command(
    epilog="""\b
    Examples:
      lzy log                               of the latest image's session
      lzy log analysis                      all its checkpoints
      lzy log analysis@7                    the 7th and those that it grew from
      lzy log analysis --json | jq -r '.checkpoints[].name'
    """
)
@click.argument("name", required=False, shell_complete=complete_image)
@store_option
@json_option
def log(name: str | None, store: str | None, as_json: bool) -> None:
    """List the checkpoints of the session NAME (the latest without it), newest first.

    Each dump of a process that runs on, or was restored, is the next checkpoint of its session.
    `new` is what a checkpoint added to the store, `from` the one that it grew from: one of long
    ago after a restore of that. NAME@NUMBER lists only that checkpoint and its ancestors.
    """
    from ..checkpoint.history import has_number, require_image, split_name
    from ..checkpoint.lineage import list_lineages
    from ..checkpoint.log import ancestors, read_log

    opened = open_store(store)
    if name is None:
        with load_image(store, None) as latest:
            name = split_name(latest.name)[0]
    session, number = split_name(name)
    if has_number(name):
        require_image(opened, name)
    found = read_log(opened, session)
    if has_number(name):
        found = ancestors(found, number)
    living: dict[str, list[int]] = {}
    for lineage in list_lineages(opened):
        living.setdefault(lineage.image, []).append(lineage.pid)
    if as_json:
        say_json(
            {
                "session": session,
                "checkpoints": [as_document(entry, living.get(entry.image, [])) for entry in found],
            }
        )
    else:
        say(describe(session, found, living))


def as_document(entry: Checkpoint, pids: list[int]) -> dict[str, Any]:
    """One checkpoint as docs/cli.md specifies it."""
    from ..checkpoint.history import spell

    return {
        "name": entry.name,
        "number": entry.number,
        "image": entry.image,
        "taken_unix_s": entry.taken_unix_s,
        "why": entry.why or None,
        "parent": spell(entry.parent) if entry.parent else None,
        "new_bytes": entry.stored_bytes,
        "raw_bytes": entry.raw_bytes,
        "pids": pids,
        "damage": entry.damage or None,
    }


def describe(session: str, found: list[Checkpoint], living: dict[str, list[int]]) -> list[str]:
    """The log for people."""
    present = {entry.image for entry in found}
    now_s = time.time()
    lines = table(
        ["checkpoint", "taken", "", "why", "new", "memory", "from", ""],
        [_row(entry, session, present, living.get(entry.image, []), now_s) for entry in found],
        right=(4, 5),
    )
    new = size(sum(entry.stored_bytes for entry in found))
    return [*lines, paint(f"{count(len(found), 'checkpoint')}, {new} newly stored", "dim")]


def _row(
    entry: Checkpoint, session: str, present: set[str], pids: list[int], now_s: float
) -> tuple[str, ...]:
    name = paint(entry.name, "bold")
    if entry.damage:
        return name, paint("damaged", "red"), "", "", "?", "?", "", ""
    runs = f"pid {', '.join(map(str, pids))} runs from here" if pids else ""
    return (
        name,
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.taken_unix_s)),
        age(now_s - entry.taken_unix_s),
        entry.why or "–",
        size(entry.stored_bytes),
        size(entry.raw_bytes),
        _parent(entry, session, present),
        paint(runs, "green"),
    )


def _parent(entry: Checkpoint, session: str, present: set[str]) -> str:
    """`@4`; another session's by its full name; what is a branch stands out."""
    from ..checkpoint.history import spell, split_name

    if entry.parent is None:
        return "–"
    owner, number = split_name(entry.parent)
    text = f"@{number}" if owner == session else spell(entry.parent)
    if owner == session and entry.parent not in present:
        text += " (removed)"
    return text if owner == session and number == entry.number - 1 else paint(text, "yellow")
