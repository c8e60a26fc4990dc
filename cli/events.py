"""`lzy events` and `lzy logs`: what happened to sessions, and what they print."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from .arguments import json_option
from .layout import paint, say, say_json
from .sessions import choose, complete_name, name_argument

if TYPE_CHECKING:
    from pathlib import Path

_MOST_TEXT_BYTES = 1 << 20
_LOUD = {"failed": "red", "failure": "red", "refused": "red", "notice": "yellow"}


@click.command(
    epilog="""\b
    Examples:
      lzy events                            the last twenty
      lzy events -f                         go on as they come
      lzy events analysis -n 100            of one session
      lzy events -f --json | jq .kind       a document a line
    """
)
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("-f", "--follow", is_flag=True, help="Go on as they come, until Ctrl-C.")
@click.option("-n", "--last", type=click.IntRange(0, 20000), default=20, show_default=True)
@json_option
def events(name: str | None, follow: bool, last: int, as_json: bool) -> None:
    """Tell what happened to sessions, and who asked for it; oldest first.

    With --json one array of objects; with --follow an object a line.
    """
    from ..agent.client import Client

    client = Client()
    path = f"/v1/events?last={last}" + (f"&session={quote(name)}" if name else "")
    if not follow:
        found = client.get(path)["events"]
        if as_json:
            print(json.dumps(found, indent=2))
        else:
            say(map(describe, found))
        return
    try:
        for event in client.follow(f"{path}&follow=1"):
            print(json.dumps(event) if as_json else describe(event), flush=True)
    except KeyboardInterrupt:
        return  # it was asked to go on until then


def describe(event: dict[str, Any]) -> str:
    """An event as one line."""
    moment = time.strftime("%m-%d %H:%M:%S", time.localtime(event["unix_s"]))
    kind = event["kind"].replace("_", " ")
    shown = paint(kind.ljust(12), _LOUD.get(event["kind"], "cyan"))
    session = paint(event["session"], "bold") + " " if event["session"] else ""
    words = " ".join(event["words"].split())
    return f"{paint(moment, 'dim')}  {shown}  {session}{words}"


@click.command(
    epilog="""\b
    Examples:
      lzy logs analysis                     what it has printed since it was woken
      lzy logs analysis -f
    """
)
@name_argument
@click.option("-f", "--follow", is_flag=True, help="Go on as it prints, until Ctrl-C.")
@json_option
def logs(name: str | None, follow: bool, as_json: bool) -> None:
    """Show what a woken session prints, where its own terminal or pipe is gone.

    What is printed before the first wake, or to a file of its own, is not here.
    """
    from ..agent.client import Client
    from ..checkpoint.errors import NotFound
    from ..checkpoint.home import home

    client = Client()
    chosen = choose(client, name)
    client.get(client.session(chosen))  # raises if there is none, or it is another's
    path = home() / "logs" / f"{chosen}.log"
    if not path.exists():
        raise NotFound(
            f"{chosen} has printed nothing that lzy keeps",
            remedy="only what a session prints after a wake, to no file of its own, is kept",
        )
    if as_json:
        content = path.read_bytes()
        text = content[-_MOST_TEXT_BYTES:].decode(errors="replace")
        say_json({"name": chosen, "file": str(path), "length_bytes": len(content), "text": text})
        return
    try:
        _copy(path, follow)
    except KeyboardInterrupt:
        return


def _copy(path: Path, follow: bool) -> None:
    with open(path, "rb") as file:
        while True:
            while piece := file.read(65536):
                sys.stdout.buffer.write(piece)
            sys.stdout.flush()
            if not follow:
                return
            time.sleep(0.2)
