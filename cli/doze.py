"""`lzy doze` and `lzy rouse`: a process gives its memory back, stays, and takes it again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from .arguments import complete_image, complete_pid, json_option, store_option
from .edge import Interrupted
from .layout import duration, facts, paint, say, say_json, size
from .stores import open_store

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ..checkpoint.doze import DozeReport
    from ..checkpoint.store import Store


def _complete_process(
    ctx: click.Context, parameter: click.Parameter, typed: str
) -> list[CompletionItem]:
    return [*complete_pid(ctx, parameter, typed), *complete_image(ctx, parameter, typed)]


def find_process(store: Store, asked: str) -> int:
    """The pid that was meant: itself, or that of the living process of a session."""
    if asked.isdecimal():
        return int(asked)
    from ..checkpoint.errors import LzyError, NotFound
    from ..checkpoint.lineage import list_lineages

    pids = [lineage.pid for lineage in list_lineages(store) if lineage.session == asked]
    if not pids:
        raise NotFound(
            f"no process of session {asked} runs here",
            remedy=f"bring it back with: lzy restore {asked}",
            session=asked,
        )
    if len(pids) > 1:
        raise LzyError(
            f"session {asked} has several processes here: {', '.join(map(str, pids))}",
            remedy="name one by its pid",
            session=asked,
        )
    return pids[0]


@click.command(
    epilog="""\b
    Examples:
      lzy doze 4121                         its memory goes to the store, it stays
      lzy doze analysis                     the same by its session's name
    """
)
@click.argument("process", metavar="PID|NAME", shell_complete=_complete_process)
@store_option
@click.option("--name", metavar="NAME", help="The session's name.  [default: chosen by lzy]")
@json_option
def doze(process: str, store: str | None, name: str | None, as_json: bool) -> None:
    """Have a process give its memory back, without going away.

    A checkpoint is taken; then what the image has is dropped from memory and comes back as it is
    touched. The process keeps its pid, threads, descriptors and terminal, and notices nothing but
    that what it has not touched for a while takes a moment.
    """
    from ..checkpoint import doze as engine
    from .progress import ProgressLine

    opened = open_store(store, create=True)
    pid = find_process(opened, process)
    try:
        with ProgressLine() as line:
            report = engine.doze(pid, opened, name=name, progress=line.update)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; process {pid} runs on") from None
    if as_json:
        say_json(as_document(report))
    else:
        say(describe(report))


@click.command(
    epilog="""\b
    Examples:
      lzy rouse 4121                        bring all of its memory back now
      lzy rouse analysis --no-wait          the same, without waiting for it
    """
)
@click.argument("process", metavar="PID|NAME", shell_complete=_complete_process)
@store_option
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until all of it is there.")
@json_option
def rouse(process: str, store: str | None, wait: bool, as_json: bool) -> None:
    """Bring all of a dozing process's memory back.

    It runs meanwhile: what it touches comes first.
    """
    from ..checkpoint import doze as engine
    from .progress import ProgressLine

    pid = find_process(open_store(store, create=True), process)
    began = time.monotonic()
    before_bytes = engine.resident_bytes(pid)
    try:
        with ProgressLine() as line:
            engine.begin_to_rouse(pid)
            while wait and (missing_bytes := engine.missing_bytes(pid)):
                present_bytes = engine.resident_bytes(pid)
                line.update("rousing", present_bytes, present_bytes + missing_bytes)
                time.sleep(0.01)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the memory of process {pid} still comes in") from None
    document = {
        "pid": pid,
        "resident_before_bytes": before_bytes,
        "resident_after_bytes": engine.resident_bytes(pid),
        "missing_bytes": engine.missing_bytes(pid),
        "total_s": time.monotonic() - began,
    }
    if as_json:
        say_json(document)
        return
    after_bytes = engine.resident_bytes(pid)
    say(
        facts(
            [
                ("process", paint(str(pid), "bold")),
                ("resident", f"{size(before_bytes)} → {size(after_bytes)}"),
                ("took", duration(time.monotonic() - began)),
            ]
        )
    )


def as_document(report: DozeReport) -> dict[str, object]:
    """The report as docs/cli.md specifies it."""
    return {**report._asdict(), "notes": list(report.notes)}


def describe(report: DozeReport) -> list[str]:
    """The report for people."""
    resident = f"{size(report.resident_before_bytes)} → {size(report.resident_after_bytes)}"
    return [
        *facts(
            [
                ("image", paint(report.image, "bold")),
                ("process", f"{report.pid}, which runs on"),
                ("resident", f"{resident}; {size(report.stored_bytes)} newly stored"),
                (
                    "took",
                    f"{duration(report.total_s)}, never frozen longer than"
                    f" {duration(report.freeze_s)}",
                ),
            ]
        ),
        *(f"{paint('note', 'yellow')}: {note}" for note in report.notes),
    ]
