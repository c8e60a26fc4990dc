"""`lzy enter`: a command, or a shell, on a node that is namespaces of this machine."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

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
    from .relay import is_possible, relay

    words = command or (os.environ.get("SHELL", "/bin/sh"),)
    if is_possible():
        sys.exit(relay(way_into(node, "setsid", "--ctty", "--wait", *words)))
    into = way_into(node, "setsid", "--wait", *words)
    os.execvp(into[0], into)


def run_on(node: str, *arguments: str) -> NoReturn:
    """Become `lzy ARGUMENTS` there, on this terminal. Raises NotFound."""
    into = way_to_run(node, *arguments)
    os.execvp(into[0], into)


def way_to_run(node: str, *arguments: str) -> list[str]:
    """The command that is `lzy ARGUMENTS` there. Raises NotFound."""
    code = "from lzy.cli import main; main()"
    return way_into(node, sys.executable, "-P", "-c", code, *arguments)


def way_into(node: str, *words: str) -> list[str]:
    """The command that runs `words` on that node of this machine, in this directory.

    Raises NotFound.
    """
    from ..agent.network import read_holder
    from ..agent.trial import holder_path, node_home
    from ..checkpoint.errors import NotFound
    from ..checkpoint.home import home

    first = read_holder(holder_path(home(), node))
    if not first:
        raise NotFound(
            f"{node} is no node of this machine that is up",
            remedy="see lzy nodes, and lzy up --nodes",
        )
    own = f"LZY_HOME={node_home(home(), node)}"
    into = ["nsenter", "-t", str(first), "-n", "-p", "-m", "--"]
    return [*into, "env", f"--chdir={os.getcwd()}", own, *words]
