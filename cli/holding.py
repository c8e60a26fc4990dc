"""`lzy hold`, `lzy release`, `lzy signal`: what a person wants done, or not done, to a session."""

from __future__ import annotations

import signal as signals
import time

import click

from .arguments import json_option
from .durations import Duration, spell
from .layout import paint, say, say_json
from .sessions import choose, complete_name, name_argument


@click.command(
    epilog="""\b
    Examples:
      lzy hold analysis --for 2h            not evicted for two hours, idle or not
      lzy hold                              the only session, for an hour
    """
)
@name_argument
@click.option(
    "--for",
    "for_s",
    type=Duration(least_s=1, most_s=30 * 86400),
    default="1h",
    show_default=True,
    help="At most 30 days.",
)
@json_option
def hold(name: str | None, for_s: float, as_json: bool) -> None:
    """Do not doze or hibernate a session for a while; it always expires."""
    from ..agent.client import Client

    client = Client()
    path = client.session(choose(client, name), "hold")
    session = client.post(path, {"for_s": for_s})["session"]
    if as_json:
        say_json(session)
        return
    until = time.strftime("%H:%M", time.localtime(session["hold_until_unix_s"]))
    say([f"{paint(session['name'], 'bold')} is held for {spell(for_s)}, until {until}"])


@click.command(
    epilog="""\b
    Examples:
      lzy release analysis                  it may be evicted again
    """
)
@name_argument
@json_option
def release(name: str | None, as_json: bool) -> None:
    """Hold a session no longer."""
    from ..agent.client import Client

    client = Client()
    session = client.post(client.session(choose(client, name), "release"))["session"]
    if as_json:
        say_json(session)
    else:
        say([f"{paint(session['name'], 'bold')} is held no longer"])


class SignalName(click.ParamType[int]):
    """A signal by its name, with or without SIG, or its number."""

    name = "SIGNAL"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        text = str(value).upper()
        if text.isdecimal() and 1 <= int(text) <= 64:
            return int(text)
        try:
            return signals.Signals[text if text.startswith("SIG") else f"SIG{text}"]
        except KeyError:
            self.fail(f"{value!r} is no signal; write INT, TERM or a number", param, ctx)


@click.command(
    epilog="""\b
    Examples:
      lzy signal analysis INT               interrupt what it computes
      lzy signal analysis USR1              wakes it first if it hibernates
    """
)
@click.argument("name", shell_complete=complete_name)
@click.argument("signal", type=SignalName(), metavar="SIGNAL")
@json_option
def signal(name: str, signal: int, as_json: bool) -> None:
    """Send a session's process a signal. One that hibernates is woken for it."""
    from ..agent.client import Client

    client = Client()
    session = client.post(client.session(name, "signal"), {"signal": int(signal)})["session"]
    if as_json:
        say_json(session)
    else:
        say([f"signal {int(signal)} was sent to process {session['pid']} of {session['name']}"])
