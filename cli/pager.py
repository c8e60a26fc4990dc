"""`lzy pager`: who still gets memory after a lazy restore, and taking over from a dead pager."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .arguments import json_option
from .layout import bar, count, paint, say, say_json, share, size, table

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ..checkpoint.waiting import PagerReport

_EVERY = "every"


def _complete_paged(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    """Pids of the processes whose pager has died."""
    from click.shell_completion import CompletionItem

    from ..checkpoint.waiting import list_pagers

    return [
        CompletionItem(str(report.pid), help=report.image)
        for report in list_pagers()
        if not report.alive and str(report.pid).startswith(typed)
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
    from ..checkpoint.pager import resume_pager

    if resumed != _EVERY and not resumed.isdecimal():
        raise click.BadParameter(f"{resumed!r} is not a pid.", param_hint="--resume")
    started = resume_pager(None if resumed == _EVERY else int(resumed))
    if as_json:
        say_json({"resumed": [{"pid": pid, "pager_pid": new} for pid, new in started.items()]})
    elif not started:
        say(["no process waits for a pager that has died"])
    else:
        say(f"process {pid} has a new pager, {new}" for pid, new in started.items())


def _show_status(as_json: bool) -> None:
    from ..checkpoint.waiting import list_pagers

    found = list_pagers()
    if as_json:
        say_json({"pagers": [_as_document(report) for report in found]})
        return
    if not found:
        say(["no process waits for memory"])
        return
    lines = table(
        ["pid", "image", "pager", "loaded", "", "missing", "faults"],
        [_row(report) for report in found],
        right=(0, 2, 3, 5, 6),
    )
    lines += [f"{report.pid}: {text}" for report in found if (text := report.status.message)]
    dead = sum(not report.alive for report in found)
    if dead:
        lines.append(f"{count(dead, 'pager')} died; `lzy pager --resume` starts anew")
    say(lines)


def _row(report: PagerReport) -> tuple[str, ...]:
    loaded, missing = report.status.installed_bytes, report.status.missing_bytes
    return (
        str(report.pid),
        report.image,
        str(report.status.pager_pid) if report.alive else paint("died", "red"),
        share(loaded, loaded + missing),
        paint(bar(loaded, loaded + missing, 12), "cyan"),
        size(missing),
        str(report.status.faults),
    )


def _as_document(report: PagerReport) -> dict[str, object]:
    """One pager as docs/cli.md specifies it."""
    return {
        "pid": report.pid,
        "image": report.image,
        "store": report.store,
        "pager_pid": report.status.pager_pid,
        "alive": report.alive,
        "installed_bytes": report.status.installed_bytes,
        "missing_bytes": report.status.missing_bytes,
        "faults": report.status.faults,
        "stalled_faults": report.status.stalled_faults,
        "message": report.status.message or None,
    }
