"""`lzy enter`: a command, or a shell, on a node that is namespaces of this machine."""

from __future__ import annotations

import os

import click

from .nodes import complete_node


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
    Examples:
      lzy enter small                       a shell there
      lzy enter small -- python -i          its pid there, in a session of its own
    """,
)
@click.argument("node", shell_complete=complete_node)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def enter(node: str, command: tuple[str, ...]) -> None:
    """Run a command on a node of this machine (see lzy up --nodes)."""
    from ..agent.network import read_holder
    from ..agent.trial import holder_path
    from ..checkpoint.errors import NotFound
    from ..checkpoint.home import home

    first = read_holder(holder_path(home(), node))
    if not first:
        raise NotFound(
            f"{node} is no node of this machine that is up",
            remedy="see lzy nodes, and lzy up --nodes",
        )
    own = str(home() / "nodes" / node)
    words = command or (os.environ.get("SHELL", "/bin/sh"),)
    os.execvpe(
        "nsenter",
        ["nsenter", "-t", str(first), "-n", "-p", "-m", "--", "setsid", "--ctty", "--wait", *words]
        if not command and os.isatty(0)
        else ["nsenter", "-t", str(first), "-n", "-p", "-m", "--", "setsid", "--wait", *words],
        {**os.environ, "LZY_HOME": own},
    )
