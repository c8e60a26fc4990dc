"""`lzy dump`: a running process into an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .arguments import complete_pid, json_option, store_option
from .edge import Interrupted
from .layout import count, duration, facts, paint, say, say_json, share, size
from .stores import open_store

if TYPE_CHECKING:
    from ..checkpoint.dump import DumpReport

_WINDOW_PAGES = {"64K": 16, "128K": 32, "256K": 64}


@click.command(
    epilog="""\b
    Examples:
      lzy dump 4121                         write the image, then end the process
      lzy dump 4121 --leave-running         a checkpoint: the process goes on
      lzy dump 4121 --leave-running         the next one of its session (see lzy log)
      lzy dump 4121 --dry-run               what would be lost, and how much there is
      lzy dump 4121 --trim                  have Python give back free memory first
      lzy dump 4121 --carry-files --carry data.csv   for a node that lacks them
      lzy dump 4121 --name before-training --store /data/images
    """
)
@click.argument("pid", type=click.IntRange(min=1), shell_complete=complete_pid)
@store_option
@click.option(
    "--name",
    metavar="NAME",
    help="The session it is a checkpoint of.  [default: that of the process, or a new one]",
)
@click.option("--leave-running", is_flag=True, help="Let the process go on after the image.")
@click.option(
    "--track/--no-track",
    default=True,
    show_default=True,
    help="With --leave-running: have the kernel keep account of writes, for the next checkpoint.",
)
@click.option(
    "--trim",
    is_flag=True,
    help="Have an idle Python collect garbage and release free memory first.",
)
@click.option(
    "--window-size",
    type=click.Choice(list(_WINDOW_PAGES)),
    default="256K",
    show_default=True,
    help="Memory in one chunk: small ones answer faults sooner, large ones dump faster.",
)
@click.option(
    "--carry-files",
    is_flag=True,
    help="Put mapped libraries and the executable into the image, for a node that lacks them.",
)
@click.option(
    "--carry",
    metavar="PATH",
    multiple=True,
    type=click.Path(),
    help="Put this file or folder into the image; it is put back where it is missing.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only tell what would be refused, cut or changed, and how large the image would be.",
)
@json_option
@click.pass_context
def dump(
    context: click.Context,
    pid: int,
    store: str | None,
    name: str | None,
    leave_running: bool,
    track: bool,
    trim: bool,
    window_size: str,
    carry_files: bool,
    carry: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the process PID into an image and end it once the image is verified.

    All its threads, memory and descriptors are in the image, and so are its descendants, all of
    one instant. However a dump fails, they run on as if nothing had happened.
    """
    import gc

    gc.disable()  # a dump makes no cycles to speak of, and looking for them took 10 ms of 70
    from ..checkpoint import dump as engine
    from ..checkpoint.copies import enter_copy
    from .progress import ProgressLine

    began = _start_time(pid)
    enter_copy(pid)
    if dry_run:
        from .foresight import tell

        context.exit(tell(pid, as_json))
    try:
        with ProgressLine() as line:
            report = engine.dump(
                pid,
                open_store(store, create=True),
                name=name,
                leave_running=leave_running,
                window_pages=_WINDOW_PAGES[window_size],
                track=track,
                trim=trim,
                carry_files=carry_files,
                carry=carry,
                progress=line.update,
            )
    except KeyboardInterrupt:
        if began is not None and _start_time(pid) == began:
            raise Interrupted(f"interrupted; process {pid} runs on") from None
        raise Interrupted(f"interrupted after process {pid} had ended; see `lzy images`") from None
    if as_json:
        say_json(as_document(report))
    else:
        say(describe(report))


def as_document(report: DumpReport) -> dict[str, object]:
    """The report as docs/cli.md specifies it."""
    return {
        "image": report.image,
        "pid": report.pid,
        "processes": report.processes,
        "threads": report.threads,
        "raw_bytes": report.raw_bytes,
        "stored_bytes": report.stored_bytes,
        "base": report.base,
        "written_bytes": report.written_bytes,
        "freeze_s": report.freeze_s,
        "total_s": report.total_s,
        "left_running": report.left_running,
        "snapshot": report.snapshot,
        "notes": list(report.notes),
    }


def describe(report: DumpReport) -> list[str]:
    """The report for people."""
    took = duration(report.total_s)
    if report.left_running:
        took += f", frozen for {duration(report.freeze_s)} of it"
    rate = f"{size(report.raw_bytes / report.total_s)}/s" if report.total_s > 0 else ""
    stored = (
        f"{size(report.raw_bytes)} → {size(report.stored_bytes)} newly stored "
        f"({share(report.stored_bytes, report.raw_bytes)}), {rate}"
    )
    return [
        *facts(
            [
                ("image", paint(report.image, "bold")),
                ("process", f"{report.pid}{_below(report)}, {count(report.threads, 'thread')}"),
                ("memory", stored),
                *_since(report),
                ("took", took),
            ]
        ),
        *(f"{paint('note', 'yellow')}: {note}" for note in report.notes),
        f"process {report.pid} runs on"
        if report.left_running
        else f"process {report.pid} has ended; `lzy restore {report.image}` brings it back",
    ]


def _below(report: DumpReport) -> str:
    """Who was dumped with it."""
    others = report.processes - 1
    return f" and {others} below it" if others else ""


def _since(report: DumpReport) -> list[tuple[str, str]]:
    """What was written since the checkpoint before, if there is one to tell it by."""
    if report.base is None:
        return []
    return [("written", f"{size(report.written_bytes)} since {report.base}")]


def _start_time(pid: int) -> bytes | None:
    """When the living process `pid` started, in clock ticks as the kernel writes it; proc(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    ended = fields[0] == b"X" or (fields[0] == b"Z" and int(fields[17]) < 2)  # not others, either
    return None if ended else fields[19]
