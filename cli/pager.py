"""`lzy pager`: who still gets memory after a lazy restore, and taking over from a dead pager."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .arguments import json_option
from .layout import bar, count, paint, say, say_json, share, size, table

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_EVERY = "every"


class Paging(NamedTuple):
    """A process that waits for memory, and its pager; sizes in bytes."""

    pid: int
    image: str
    pager_pid: int
    alive: bool
    missing_bytes: int
    installed_bytes: int
    faults: int
    stalled_faults: int
    message: str


def _complete_paged(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    """Pids of the processes whose pager has died."""
    from click.shell_completion import CompletionItem

    return [
        CompletionItem(str(paging.pid), help=paging.image)
        for paging in find_pagings()
        if not paging.alive and str(paging.pid).startswith(typed)
    ]


@click.command(
    epilog="""\b
    Examples:
      lzy pager --status                    who waits for how much
      lzy pager --resume 4121               its pager was killed: take over
      lzy pager --resume                    take over wherever a pager has died
    """
)
@click.option(
    "--resume",
    "resumed",
    metavar="[PID]",
    is_flag=False,
    flag_value=_EVERY,
    shell_complete=_complete_paged,
    help="Start a new pager for PID, or for every process whose pager has died.",
)
@click.option("--status", is_flag=True, help="Show the pagers and what is still to be loaded.")
@json_option
def pager(resumed: str | None, status: bool, as_json: bool) -> None:
    """See to the pagers of lazily restored processes.

    A pager brings a process's memory from its image as it is touched, and the rest behind that;
    then it leaves. While it is dead the process stalls at what it lacks; it loses nothing.
    """
    if (resumed is None) == (not status):
        raise click.UsageError("Give either --resume or --status.")
    if resumed is None:
        _show_status(as_json)
    else:
        _resume(resumed, as_json)


def _resume(resumed: str, as_json: bool) -> None:
    if resumed != _EVERY and not resumed.isdecimal():
        raise click.BadParameter(f"{resumed!r} is not a pid.", param_hint="--resume")
    from ..checkpoint.pager import resume_pager

    if resumed != _EVERY:
        pids = [int(resumed)]
    else:
        pids = [paging.pid for paging in find_pagings() if not paging.alive]
    started = {pid: resume_pager(pid) for pid in pids}
    if as_json:
        say_json({"resumed": [{"pid": pid, "pager_pid": new} for pid, new in started.items()]})
    elif not started:
        say(["no process waits for a pager that has died"])
    else:
        say(f"process {pid} has a new pager, {new}" for pid, new in started.items())


def _show_status(as_json: bool) -> None:
    found = find_pagings()
    if as_json:
        say_json({"pagers": [paging._asdict() for paging in found]})
        return
    if not found:
        say(["no process waits for memory"])
        return
    lines = table(
        ["pid", "image", "pager", "loaded", "", "missing", "faults"],
        [
            (
                str(paging.pid),
                paging.image,
                str(paging.pager_pid) if paging.alive else paint("died", "red"),
                share(paging.installed_bytes, paging.installed_bytes + paging.missing_bytes),
                paint(
                    bar(paging.installed_bytes, paging.installed_bytes + paging.missing_bytes, 12),
                    "cyan",
                ),
                size(paging.missing_bytes),
                str(paging.faults),
            )
            for paging in found
        ],
        right=(0, 2, 3, 5, 6),
    )
    for paging in found:
        if paging.message:
            lines.append(f"{paging.pid}: {paging.message}")
    dead = sum(not paging.alive for paging in found)
    if dead:
        lines.append(f"{count(dead, 'pager')} died; `lzy pager --resume` starts new ones")
    say(lines)


def find_pagings() -> list[Paging]:
    """The processes that still wait for memory, by the journals of their pagers."""
    from ..checkpoint.errors import LzyError
    from ..checkpoint.home import run_directory
    from ..checkpoint.journal import read_status

    found = []
    for path in sorted(run_directory().glob("*.pager")):
        try:
            facts, status = read_status(path)
        except LzyError:
            continue  # it has just left, or is no journal
        pid = int(path.stem)
        if not _is_alive(pid):
            continue  # nothing waits any more
        found.append(
            Paging(
                pid=pid,
                image=_image_of(facts),
                pager_pid=status.pager_pid,
                alive=_is_alive(status.pager_pid),
                missing_bytes=status.missing_bytes,
                installed_bytes=status.installed_bytes,
                faults=status.faults,
                stalled_faults=status.stalled_faults,
                message=status.message,
            )
        )
    return found


def _image_of(facts: dict[str, Any]) -> str:
    return str(facts.get("image_name") or facts.get("image") or "?")


def _is_alive(pid: int) -> bool:
    """Whether `pid` is a process that runs: a zombie's pager serves nobody."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
