"""`lzy run`: starts a program as a session, on a terminal that lzy keeps."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from .arguments import json_option
from .console import connect, detach_key_option, leave_word, name_key
from .layout import facts, paint, say, say_json
from .nodes import complete_node
from .sessions import note_lines

if TYPE_CHECKING:
    from pathlib import Path

    from ..agent.client import Client


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
    Examples:
      lzy run -- python                     a REPL; Ctrl-] d leaves it, lzy console goes back
      lzy run --name train -- python train.py --epochs 90
      lzy run --detach -- python train.py   in the background from the start
      lzy run -- bash                       a shell, and what is started in it
      lzy run --node small -- python        on that node (see lzy up --nodes)

    \b
    Exit status: that of the program (128 and the signal's number if one ended it); 0 when its
    console was left, or with --detach.
    """,
)
@click.argument("command", nargs=-1, required=True, metavar="-- CMD [ARGUMENT]...")
@click.option("--name", metavar="NAME", help="The session's name.  [default: chosen by lzy]")
@click.option("--detach", "-d", is_flag=True, help="Do not connect to it.")
@click.option("--node", shell_complete=complete_node, help="Where; of nodes of this machine.")
@click.option("--awaited", is_flag=True, hidden=True)
@detach_key_option
@json_option
def run(
    command: tuple[str, ...],
    name: str | None,
    detach: bool,
    node: str | None,
    awaited: bool,
    detach_key: bytes,
    as_json: bool,
) -> None:
    """Start a program as a session, with this environment and directory, and connect to it.

    Its terminal is lzy's: it goes on when this one is closed, is hibernated and comes back with
    the program, and `lzy console` reaches it. With --json the session is printed, not connected to.
    """
    from ..agent.client import Client, is_trial
    from ..agent.terminal.starting import start_keeper
    from ..checkpoint.errors import LzyError, NotFound
    from ..checkpoint.home import home

    if is_trial(home()):
        place = _run_there(Client(), node, name, command, detach, as_json)
        _connect(place.name, detach_key, place.home)
    client = Client(fleet=False)
    if node and node != client.get("/v1/node")["name"]:
        raise LzyError(f"{node} is not this machine", remedy=f"ssh -t {node} lzy run -- …")
    chosen = _choose_name(client, command, name)
    rows, columns = _window()
    started = start_keeper(
        chosen,
        rows=rows,
        columns=columns,
        settings=_settings(),
        command=list(command),
        is_awaited=awaited or not (detach or as_json),
    )
    body = {"pid": started.pid, "name": chosen, "checkpoint": False}
    notes: list[str] = []
    session: dict[str, Any] = {"name": chosen, "pid": None, "state": "ended"}
    try:
        answer = client.post("/v1/sessions", body, timeout_s=60)
        session, notes = answer["session"], answer["notes"]
    except NotFound:
        pass  # it has ended already; its console tells what it said
    except LzyError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(started.pid, signal.SIGKILL)
        raise
    if as_json:
        say_json({**session, "terminal": started.device, "notes": notes})
        return
    if detach:
        pairs = [("session", paint(chosen, "bold")), ("process", str(started.pid))]
        say([*facts(pairs), *note_lines(notes), f"lzy console {chosen} connects to it"])
        return
    _connect(chosen, detach_key)


def _connect(session: str, detach_key: bytes, place: Path | None = None) -> NoReturn:
    """Be its console until it is left."""
    if os.isatty(0) and os.isatty(1) and detach_key:
        click.echo(f"{session}: {name_key(detach_key)} d leaves it running", err=True)
    sys.exit(leave_word(session, connect(session, detach_key, place)))


class _Place(NamedTuple):
    """A session that was started, and the home of its node."""

    name: str
    home: Path


def _run_there(
    fleet: Client,
    node: str | None,
    name: str | None,
    command: tuple[str, ...],
    detach: bool,
    as_json: bool,
) -> _Place:
    """Start it on a node of this machine: on `node`, or where most memory is free.

    Its console is not there: it would die with the node, and leave this terminal as it was then.
    """
    from ..agent.client import Client
    from ..agent.trial import node_home
    from ..checkpoint.errors import Busy
    from ..checkpoint.home import home
    from .enter import run_on, way_to_run

    nodes = fleet.get("/v1/nodes")["nodes"]
    fit = [n for n in nodes if n["reachable"] and not n["draining"]]
    if node is None:
        if not fit:
            raise Busy("no node takes a session now", remedy="see lzy nodes")
        node = max(fit, key=lambda n: n["memory_bytes"] - n["session_memory_bytes"])["name"]
    known = [n["name"] for n in nodes]
    if node not in known:
        raise click.BadParameter(f"there is no node {node}, only {', '.join(known)}.")
    there = node_home(home(), node)
    chosen = _choose_name(Client(there), command, name)
    words = ["--name", chosen, "--", *command]
    if detach or as_json:
        run_on(node, "run", "--detach", *["--json"] * as_json, *words)
    way = way_to_run(node, "run", "--detach", "--awaited", *words)
    if status := subprocess.run(way, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit(status)  # it has said why
    return _Place(chosen, there)


def _choose_name(agent: Client, command: tuple[str, ...], wished: str | None) -> str:
    """One that is free on the agent's node and on all others. Raises Busy."""
    asked: dict[str, Any] = {"command": " ".join(command)[:1000]}
    asked |= {"name": wished} if wished else {}
    return str(agent.post("/v1/names", asked, timeout_s=30)["name"])


def _window() -> tuple[int, int]:
    """Rows and columns of our terminal, or what terminals had once."""
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(number)
            if size.lines and size.columns:
                return size.lines, size.columns
    return 24, 80


def _settings() -> bytes:
    """The settings of our terminal, struct termios2; empty where there is none."""
    from ..checkpoint.linux.descriptors import TCGETS2, TERMIOS2_BYTES

    with contextlib.suppress(OSError):
        return fcntl.ioctl(0, TCGETS2, bytes(TERMIOS2_BYTES))
    return b""
