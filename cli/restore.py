"""`lzy restore` for click: its options, its help, and what tab completes."""

from __future__ import annotations

import click

from .arguments import image_argument, json_option, store_option
from .restoring import PID_NAMESPACES, restore_image


@click.command(
    epilog="""\b
    Examples:
      lzy restore                           the latest image, memory as it is touched
      lzy restore before-training --eager   all memory first
      lzy restore before-training@3         its third checkpoint, not the newest
      lzy restore --pid-namespace new       when its pid is taken
      lzy restore before-training --copy    once more, whoever runs from that image already
      lzy restore --stdin /dev/null --stdout run.log --stderr run.log
    """
)
@image_argument
@store_option
@click.option("--eager", is_flag=True, help="Load all memory before the process runs.")
@click.option(
    "--pid-namespace",
    type=click.Choice(PID_NAMESPACES),
    default="auto",
    show_default=True,
    help="Where its pids live: here, in a namespace of its own, or here if they are free.",
)
@click.option("--stdin", metavar="FILE", type=click.Path(), help="Read standard input from FILE.")
@click.option("--stdout", metavar="FILE", type=click.Path(), help="Write standard output to FILE.")
@click.option("--stderr", metavar="FILE", type=click.Path(), help="Write standard error to FILE.")
@click.option(
    "--accept-changed-files",
    is_flag=True,
    help="Go on though a file is not what it was when the image was taken.",
)
@click.option(
    "--copy",
    is_flag=True,
    help="A second life, apart: with pids, network and session of its own.",
)
@click.option("--reseed", is_flag=True, help="With --copy: have it draw other random numbers.")
@json_option
def restore(
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
    """Make the process in IMAGE (the latest without it) again; return when it runs, detached.

    It has its pids, threads, memory and descriptors as before. Its memory comes lazily, by a
    pager that leaves when the last page is in, or at once with --eager. A standard descriptor
    that was a terminal is the caller's terminal, or /dev/null where there is none.
    """
    restore_image(
        image,
        store,
        eager,
        pid_namespace,
        stdin,
        stdout,
        stderr,
        accept_changed_files,
        copy,
        reseed,
        as_json,
    )
