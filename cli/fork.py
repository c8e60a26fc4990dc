"""`lzy fork`: a second life of an image's process, beside the first."""

from __future__ import annotations

from contextlib import nullcontext

import click

from .arguments import complete_image, json_option, store_option
from .edge import Interrupted
from .layout import paint, say, say_json
from .stores import load_image, open_store


@click.command(
    epilog="""\b
    Examples:
      lzy fork analysis                     its newest checkpoint lives a second time
      lzy fork analysis@3 --name what-if    the third, as the session what-if
      lzy fork notebook --network new       when the original listens on ports
      lzy fork job --stdin /dev/null --stdout copy.log --stderr copy.log
    """
)
@click.argument("image", metavar="NAME[@NUMBER]", shell_complete=complete_image)
@store_option
@click.option("--name", metavar="NEW", help="The copy's session.  [default: NAME-fork]")
@click.option(
    "--network",
    type=click.Choice(["host", "new"]),
    default="host",
    show_default=True,
    help="Where it listens and connects: here, or in an empty network of its own.",
)
@click.option("--reseed", is_flag=True, help="Have its Python draw other random numbers.")
@click.option("--eager", is_flag=True, help="Load all memory before the process runs.")
@click.option("--stdin", metavar="FILE", type=click.Path(), help="Read standard input from FILE.")
@click.option("--stdout", metavar="FILE", type=click.Path(), help="Write standard output to FILE.")
@click.option("--stderr", metavar="FILE", type=click.Path(), help="Write standard error to FILE.")
@click.option(
    "--accept-changed-files",
    is_flag=True,
    help="Go on though a file is not what it was when the image was taken.",
)
@json_option
def fork(
    image: str,
    store: str | None,
    name: str | None,
    network: str,
    reseed: bool,
    eager: bool,
    stdin: str | None,
    stdout: str | None,
    stderr: str | None,
    accept_changed_files: bool,
    as_json: bool,
) -> None:
    """Bring back a checkpoint as a second process, beside the original if that still runs.

    The copy has the pids it knows in a PID namespace of its own, and begins a session of its own:
    its next dump is checkpoint 1 of NEW. Nothing is done to the original. Both share the files
    they write and the random numbers to come; what only one can have (a port that it listens on)
    is refused.
    """
    bring_copy(
        image, store, name, network == "new", reseed, eager, stdin, stdout, stderr,
        accept_changed_files, as_json,
    )  # fmt: skip


def bring_copy(
    image: str | None,
    store: str | None = None,
    name: str | None = None,
    apart: bool = False,
    reseed: bool = False,
    eager: bool = False,
    stdin: str | None = None,
    stdout: str | None = None,
    stderr: str | None = None,
    accept_changed_files: bool = False,
    as_json: bool = False,
) -> None:
    """A second life of `image` (None: the latest), and how it went; `apart`: in its own network."""
    from ..checkpoint.fork import fork as fork_image
    from .progress import ProgressLine
    from .restoring import as_document, describe

    try:
        with ProgressLine() if eager else nullcontext() as line:
            session, report = fork_image(
                open_store(store),
                load_image(store, image),
                name=name,
                eager=eager,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                accept_changed_files=accept_changed_files,
                apart=apart,
                reseed=reseed,
                progress=line.update if line else None,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; no process was left behind") from None
    if apart:
        report.notes.append(f"reached with: nsenter --net --target {report.pid} COMMAND")
    if as_json:
        network = "new" if apart else "host"
        say_json({"session": session, "network": network, **as_document(report)})
    else:
        say([*describe(report), f"its session is {paint(session, 'bold')}"])
