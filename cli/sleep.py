"""`lzy hibernate` and `lzy wake`: a session leaves the node's memory, and comes back."""

from __future__ import annotations

import time
from typing import Any

import click

from .arguments import json_option
from .edge import Interrupted
from .layout import duration, facts, paint, say, say_json, size
from .sessions import choose, complete_name, name_argument, note_lines


@click.command(
    epilog="""\b
    Examples:
      lzy hibernate analysis                its process ends; lzy wake brings it back
      lzy hibernate                         the only session
    """
)
@name_argument
@json_option
def hibernate(name: str | None, as_json: bool) -> None:
    """Write a session into the store and end its process, once that is verified."""
    from ..agent.client import Client
    from .progress import ProgressLine

    client = Client()
    chosen = choose(client, name)
    began = time.monotonic()
    try:
        with ProgressLine() as line:
            answer = client.work(client.session(chosen, "hibernate"), {}, line.update)
    except KeyboardInterrupt:
        raise Interrupted(f"{chosen} is still being hibernated; see lzy ps") from None
    session, report = answer["session"], answer["report"]
    if as_json:
        say_json({**session, "report": report})
        return
    if not report:
        say([f"{paint(session['name'], 'bold')} hibernates already"])
        return
    say(
        [
            *facts(
                [
                    ("session", paint(session["name"], "bold")),
                    ("image", session["image"]),
                    ("memory", _describe_memory(report)),
                    ("took", duration(time.monotonic() - began)),
                ]
            ),
            *note_lines(report.get("notes", [])),
            f"`lzy wake {session['name']}` brings it back",
        ]
    )


def _describe_memory(report: dict[str, Any]) -> str:
    raw, stored = report.get("raw_bytes", 0), report.get("stored_bytes", 0)
    return f"{size(raw)} given back; {size(stored)} newly stored"


@click.command(
    epilog="""\b
    Examples:
      lzy wake analysis                     it goes on where it was
      lzy wake analysis@3                   from an earlier checkpoint (see lzy log)
    """
)
@click.argument("name", required=False, shell_complete=complete_name)
@json_option
def wake(name: str | None, as_json: bool) -> None:
    """Have a session run again: from its image if it hibernates, or all its memory if it dozes.

    One that was on a terminal comes back on one that lzy keeps: `lzy console` connects to it.
    """
    from ..agent.client import Client
    from .progress import ProgressLine

    client = Client()
    chosen = choose(client, name)
    session_name, at, number = chosen.rpartition("@")
    body: dict[str, Any] = {}
    if at and number.isdecimal():
        body["image"] = session_name if number == "1" else chosen
        chosen = session_name
    began = time.monotonic()
    try:
        with ProgressLine() as line:
            answer = client.work(client.session(chosen, "wake"), body, line.update)
            if answer["session"]["state"] == "dozing":
                answer = client.work(client.session(chosen, "rouse"), {}, line.update)
    except KeyboardInterrupt:
        raise Interrupted(f"{chosen} is still being woken; see lzy ps") from None
    session, report, choice = answer["session"], answer["report"], answer.get("choice")
    if as_json:
        say_json({**session, "report": report, **({"choice": choice} if choice else {})})
        return
    if not report:
        say([f"{paint(session['name'], 'bold')} runs already, as process {session['pid']}"])
        return
    pairs = [
        ("session", paint(session["name"], "bold")),
        ("process", str(session["pid"])),
    ]
    if choice:
        pairs += [
            ("node", f"{session['node']}: {choice['why']}"),
            ("took", duration(time.monotonic() - began)),
            ("memory", "follows as it is touched"),
        ]
    elif "first_instruction_s" in report:
        pairs += [
            ("image", session["image"]),
            ("took", duration(time.monotonic() - began)),
            ("memory", "follows as it is touched" if report["lazy"] else "all loaded"),
        ]
    else:
        pairs.append(("memory", "comes back"))
    say([*facts(pairs), *note_lines(report.get("notes", []))])
