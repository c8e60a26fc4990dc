"""`lzy limit`: how much memory a session may hold, from now on, wherever it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from .arguments import json_option
from .layout import age, count, facts, paint, say, say_json, size
from .sessions import choose, complete_name
from .sizes import Size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


_LEAST_BYTES, _MOST_BYTES = 1 << 20, 1 << 50


class Limit(Size):
    """A size, or `none`, which is 0."""

    name = "SIZE|none"
    spelling = "500M or 2G, or none"

    def convert(
        self, value: object, parameter: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if value == "none":
            return 0
        size_bytes = super().convert(value, parameter, ctx)
        if not _LEAST_BYTES <= size_bytes <= _MOST_BYTES:
            self.fail(f"{value} is no limit; at least 1M must be left to it", parameter, ctx)
        return size_bytes

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in ("none",) if word.startswith(incomplete)]


@click.command(
    epilog="""\b
    Examples:
      lzy limit analysis 500M               what is cold goes whenever there is more of it
      lzy limit analysis                    how that is kept
      lzy limit analysis none               no longer
    """
)
@click.argument("name", required=False, shell_complete=complete_name)
@click.argument("limit", type=Limit(), required=False)
@json_option
def limit(name: str | None, limit: int | None, as_json: bool) -> None:
    """Hold a session to so much anonymous memory in RAM, until another limit is set, or none.

    The agent looks each second: of one that has more, what is cold is written to the store and
    goes; it comes back as it is touched. That holds on when the session has slept or moved, and
    rests while it is held (lzy hold).
    """
    from ..agent.client import Client

    client = Client()
    chosen = choose(client, name)
    session = (
        client.get(client.session(chosen)) if limit is None else set_limit(chosen, limit or None)
    )
    if as_json:
        say_json(describe_limit(session))
    elif limit == 0:
        words = f"{paint(chosen, 'bold')} has no limit any more"
        say([f"{words}; what is away comes as it is touched, all of it by lzy rouse {chosen}"])
    else:
        say(_tell(session))


def set_limit(name: str, limit_bytes: int | None) -> dict[str, Any]:
    """Have the agent hold a session to a limit, or to none; the session then."""
    from ..agent.client import Client

    client = Client()
    settings = {"settings": {"limit_bytes": limit_bytes}}
    session: dict[str, Any] = client.post(client.session(name, "settings"), settings)["session"]
    return session


def describe_limit(session: dict[str, Any]) -> dict[str, Any]:
    """The document of docs/cli.md."""
    nothing = {"limit_bytes": None, "resident_bytes": None, "away_bytes": None, "rounds": 0}
    nothing |= {"last_unix_s": None, "obstacle": None}
    return {"name": session["name"], "pid": session["pid"], **(session["limit"] or nothing)}


def spell_limit(limit: dict[str, Any]) -> str:
    """`500 MiB: 420 MiB there, 1.2 GiB away`, of a session that runs."""
    words = f"{size(limit['limit_bytes'])}: {size(limit['resident_bytes'])} there"
    if limit["away_bytes"]:
        words += f", {size(limit['away_bytes'])} away"
    return words


def _tell(session: dict[str, Any]) -> list[str]:
    name, limit = paint(session["name"], "bold"), session["limit"]
    if limit is None:
        return [f"{name} has no limit; it may have as much memory as it likes"]
    if session["pid"] is None:
        below = size(limit["limit_bytes"])
        return [f"{name} is {session['state']}; awake it is kept below {below}"]
    pairs = [("session", name), ("limit", spell_limit(limit))]
    if limit["rounds"]:
        ago = age(time.time() - limit["last_unix_s"])
        pairs.append(("so far", f"{count(limit['rounds'], 'round')}, the last one {ago}"))
    if limit["obstacle"]:
        pairs.append(("not kept", paint(limit["obstacle"], "yellow")))
    return facts(pairs)
