"""`lzy restore`: a process from its image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .arguments import image_argument, json_option, open_store, store_option
from .edge import Interrupted
from .layout import duration, facts, paint, say, say_json

if TYPE_CHECKING:
    from ..checkpoint.restore import RestoreReport


@click.command(
    epilog="""\b
    Examples:
      lzy restore                           the latest image, memory as it is touched
      lzy restore before-training --eager   all memory first
      lzy restore --pid-namespace new       when its pid is taken
      lzy restore --stdin /dev/null --stdout run.log --stderr run.log
    """
)
@image_argument
@store_option
@click.option("--eager", is_flag=True, help="Load all memory before the process runs.")
@click.option(
    "--pid-namespace",
    type=click.Choice(["host", "new", "auto"]),
    default="auto",
    show_default=True,
    help="Where its pids live: here, in a namespace of its own, or here if they are free.",
)
@click.option("--stdin", metavar="FILE", type=click.Path(), help="Read standard input from FILE.")
@click.option("--stdout", metavar="FILE", type=click.Path(), help="Write standard output to FILE.")
@click.option("--stderr", metavar="FILE", type=click.Path(), help="Write standard error to FILE.")
@json_option
def restore(
    image: str | None,
    store: str | None,
    eager: bool,
    pid_namespace: str,
    stdin: str | None,
    stdout: str | None,
    stderr: str | None,
    as_json: bool,
) -> None:
    """Make the process in IMAGE (the latest without it) again; return when it runs, detached.

    It has its pids, threads, memory and descriptors as before. Its memory comes lazily, by a
    pager that leaves when the last page is in, or at once with --eager. A standard descriptor
    that was a terminal is the caller's terminal, or /dev/null where there is none.
    """
    from ..checkpoint import restore as engine

    try:
        if eager:
            from .progress import ProgressLine

            with ProgressLine() as line:
                report = engine.restore(
                    open_store(store).load(image),
                    eager=True,
                    pid_namespace=pid_namespace,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    progress=line.update,
                )
        else:
            report = engine.restore(
                open_store(store).load(image),
                eager=False,
                pid_namespace=pid_namespace,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; no process was left behind") from None
    if as_json:
        say_json(as_document(report))
    else:
        say(describe(report))


def as_document(report: RestoreReport) -> dict[str, object]:
    """The report as docs/cli.md specifies it."""
    return {
        "image": report.image,
        "pid": report.pid,
        "pid_in_namespace": report.pid_in_namespace,
        "namespace": report.namespace,
        "lazy": report.lazy,
        "first_instruction_s": report.first_instruction_s,
        "total_s": report.total_s,
        "pager_pid": report.pager_pid,
        "notes": list(report.notes),
    }


def describe(report: RestoreReport) -> list[str]:
    """The report for people."""
    pid = paint(str(report.pid), "bold")
    if report.pid_in_namespace != report.pid:
        pid += f", which is {report.pid_in_namespace} in its own pid namespace"
    lazily = f"follows as it is touched (pager {report.pager_pid})"
    return [
        *facts(
            [
                ("image", report.image),
                ("process", pid),
                ("runs", f"after {duration(report.first_instruction_s)}"),
                ("memory", lazily if report.lazy else "all loaded"),
            ]
        ),
        *(f"{paint('note', 'yellow')}: {note}" for note in report.notes),
    ]
