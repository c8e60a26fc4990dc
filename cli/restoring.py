"""What `lzy restore` does, without what parses its options: the way that has to be short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .edge import Interrupted
from .stores import load_image

if TYPE_CHECKING:
    from ..checkpoint.restore import Progress, RestoreReport

PID_NAMESPACES = ("host", "new", "auto")


def restore_image(
    image: str | None,
    store: str | None = None,
    eager: bool = False,
    pid_namespace: str = "auto",
    stdin: str | None = None,
    stdout: str | None = None,
    stderr: str | None = None,
    accept_changed_files: bool = False,
    copy: bool = False,
    reseed: bool = False,
    as_json: bool = False,
) -> None:
    """Restore `image` (None: the latest) and tell how it went; the arguments are the options'."""
    if copy or reseed:
        _restore_copy(
            image, store, eager, pid_namespace, stdin, stdout, stderr, accept_changed_files, copy,
            reseed, as_json,
        )  # fmt: skip
        return
    from ..checkpoint import restore as engine

    try:
        with _progress(eager) as update:
            report = engine.restore(
                load_image(store, image),
                eager=eager,
                pid_namespace=pid_namespace,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                accept_changed_files=accept_changed_files,
                progress=update,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; no process was left behind") from None

    from .layout import say, say_json  # the process runs; now there is time

    if as_json:
        say_json(as_document(report))
    else:
        say(describe(report))


def _restore_copy(
    image: str | None,
    store: str | None,
    eager: bool,
    pid_namespace: str,
    stdin: str | None,
    stdout: str | None,
    stderr: str | None,
    accept_changed_files: bool,
    copy: bool,
    reseed: bool,
    as_json: bool,
) -> None:
    """As `lzy fork --network new`, which says how; a mistake unless the options go together."""
    import click

    from .fork import bring_copy

    if not copy:
        raise click.UsageError("--reseed goes with --copy: who comes back alone goes on as it was")
    if pid_namespace == "host":
        raise click.UsageError("--copy has a PID namespace of its own: not --pid-namespace host")
    bring_copy(
        image, store, None, True, reseed, eager, stdin, stdout, stderr, accept_changed_files,
        as_json,
    )  # fmt: skip


@contextmanager
def _progress(eager: bool) -> Iterator[Progress | None]:
    """What shows progress, where there will be any: a lazy restore is over before a line is."""
    if not eager:
        yield None
        return
    from .progress import ProgressLine

    with ProgressLine() as line:
        yield line.update


def as_document(report: RestoreReport) -> dict[str, object]:
    """The report as docs/cli.md specifies it."""
    return {
        "image": report.image,
        "pid": report.pid,
        "pid_in_namespace": report.pid_in_namespace,
        "processes": report.processes,
        "namespace": report.namespace,
        "lazy": report.lazy,
        "first_instruction_s": report.first_instruction_s,
        "total_s": report.total_s,
        "pager_pid": report.pager_pid,
        "notes": list(report.notes),
    }


def describe(report: RestoreReport) -> list[str]:
    """The report for people."""
    from .layout import duration, facts, paint

    pid = paint(str(report.pid), "bold")
    if report.pid_in_namespace != report.pid:
        pid += f", which is {report.pid_in_namespace} in its own pid namespace"
    if report.processes > 1:
        pid += f", and {report.processes - 1} below it"
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
