"""Which session a command means, how sessions are shown, and `lzy ps` and `lzy why`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .arguments import json_option
from .durations import spell
from .layout import duration, facts, paint, say, say_json, size, table

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ..agent.client import Client

F = TypeVar("F", bound=Callable[..., Any])
_OVER = ("ended", "failed")
_COLOURS = {
    "running": "green",
    "dozing": "cyan",
    "hibernated": "dim",
    "failed": "red",
    "ended": "dim",
}


def complete_name(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    """Names of the agent's sessions that begin with what was typed."""
    from click.shell_completion import CompletionItem

    from ..agent.client import Client
    from ..checkpoint.errors import LzyError

    try:
        found = Client().get("/v1/sessions", timeout_s=2)["sessions"]
    except (LzyError, OSError):
        return []
    return [
        CompletionItem(session["name"], help=session["state"])
        for session in found
        if session["name"].startswith(typed)
    ]


def name_argument(function: F) -> F:
    """A NAME that may be left out; the command gets it, or None, as `name`."""
    return click.argument("name", required=False, shell_complete=complete_name)(function)


def choose(client: Client, name: str | None) -> str:
    """The session that is meant: NAME, else that of LZY_SESSION, else the only one."""
    if name or (name := os.environ.get("LZY_SESSION")):
        return name
    found = client.get("/v1/sessions")["sessions"]
    living = [session for session in found if session["state"] not in _OVER] or found
    if len(living) == 1:
        return str(living[0]["name"])
    if not living:
        raise click.UsageError("There is no session yet; lzy attach PID begins one.")
    names = ", ".join(sorted(session["name"] for session in living)[:12])
    raise click.UsageError(f"Which session? There are: {names}.")


def note_lines(notes: list[str]) -> list[str]:
    """Notes as lines for people."""
    return [f"{paint('note', 'yellow')}: {note}" for note in notes]


@click.command(
    epilog="""\b
    Examples:
      lzy ps                                every session of this machine
      lzy ps --json | jq -r '.[] | select(.state == "hibernated") | .name'
      watch lzy ps
    """
)
@click.option("--all", "everything", is_flag=True, help="Also those that ended a while ago.")
@json_option
def ps(everything: bool, as_json: bool) -> None:
    """List the sessions: where they are, what they do, what they hold.

    With --json one array of objects; docs/agent.md tells their keys.
    """
    from ..agent.client import Client

    found = Client().get("/v1/sessions")["sessions"]
    if as_json:
        say_json(found)
        return
    now = time.time()
    shown = [
        session
        for session in found
        if everything or session["state"] not in _OVER or now - session["since_unix_s"] < 86400
    ]
    if not shown:
        say(["no sessions; lzy attach PID looks after a running Python from now on"])
        return
    lines = table(
        ["name", "state", "pid", "node", "memory", "image", "idle for", "cpu", ""],
        [_row(session, now) for session in shown],
        right=(2, 4, 5, 6, 7),
    )
    hidden = len(found) - len(shown)
    say([*lines, *([f"{hidden} ended sessions more: lzy ps --all"] if hidden else [])])


def _row(session: dict[str, Any], now: float) -> tuple[str, ...]:
    state, living = session["state"], session["pid"] is not None
    shown = paint(state, _COLOURS.get(state, "yellow"))
    return (
        paint(session["name"], "bold"),
        shown,
        str(session["pid"] or "–"),
        session["node"],
        size(session["memory_bytes"]) if living else "–",
        size(session["image_bytes"]) if session["image"] else "–",
        spell(session["idle_for_s"]) if living and session["idle_for_s"] >= 1 else "–",
        f"{session['cpu_share']:.0%}" if living else "–",
        _remark(session, now),
    )


def spell_requests(requests: dict[str, Any]) -> str:
    """`a GPU, 4 CPUs, 8 GiB, node gpu`; empty for none."""
    gpu, cpu, memory = requests["gpu"], requests["cpu"], requests["memory_bytes"]
    parts = [
        "a GPU" if gpu == 1 else f"{gpu} GPUs" if gpu else "",
        f"{cpu:g} CPUs" if cpu else "",
        size(memory) if memory else "",
        f"node {requests['node']}" if requests["node"] else "",
    ]
    return ", ".join(filter(None, parts))


def _remark(session: dict[str, Any], now: float) -> str:
    """What else a person should know of it, in a few words."""
    if operation := session["operation"]:
        return f"{operation['verb']}: {operation['stage']}"
    if session["moving_to"]:
        return f"on its way to {session['moving_to']}"
    if session["waiting_since_unix_s"] and session["pid"]:
        return f"waits for {spell_requests(session['requests'])}"
    if session["failure"]:
        return paint(str(session["failure"])[:80], "red")
    if until := session["hold_until_unix_s"]:
        return f"held for {spell(max(until - now, 1))}"
    if session["state"] in ("hibernated", "ended"):
        return f"for {spell(max(now - session['since_unix_s'], 1))}"
    if limit := session.get("limit"):
        return f"limit {size(limit['limit_bytes'])}"
    return ""


@click.command(
    epilog="""\b
    Examples:
      lzy why                               the only session, or that of LZY_SESSION
      lzy why analysis
    """
)
@name_argument
@json_option
def why(name: str | None, as_json: bool) -> None:
    """Tell why a session is considered idle or not: each probe, its verdict, what comes next."""
    from ..agent.client import Client
    from ..migrator.fleet import Look, Member
    from ..migrator.idleness import next_step
    from ..migrator.reading import read_session, read_settings
    from .limit import spell_limit

    client = Client()
    document = client.get(f"{client.session(choose(client, name))}?look=1")
    node = client.get("/v1/node")
    settings = read_settings([Look(Member(node["name"], ""), node, [document])])
    session = read_session(document)
    step = next_step(session, settings, node["now_unix_s"])
    later_s = max(step.due_s - node["now_unix_s"], 0.0)
    if as_json:
        due = None if step.due_s == float("inf") else step.due_s
        next_ = {"action": step.action or None, "due_unix_s": due, "why": step.why}
        keys = ("name", "state", "idle_for_s", "verdicts", "hold_until_unix_s", "failure", "limit")
        say_json({**{key: document[key] for key in keys}, "next": next_})
        return
    lines = [f"{paint(document['name'], 'bold')} is {document['state']}"]
    rows = [
        (
            paint("active", "green") if verdict["active"] else "idle",
            verdict["probe"],
            verdict["reason"],
        )
        for verdict in document["verdicts"]
    ]
    if rows:
        lines += table(["", "probe", "what it saw"], rows)
    elif document["pid"]:
        lines.append("no probe has looked at it yet")
    pairs = []
    if document["pid"]:
        pairs.append(("idle for", spell(document["idle_for_s"])))
    if until := document["hold_until_unix_s"]:
        pairs.append(("held for", spell(max(until - time.time(), 1))))
    if document["pid"] and (limit := document.get("limit")):
        pairs.append(("limit", spell_limit(limit)))
        if limit["obstacle"]:
            pairs.append(("not kept", paint(limit["obstacle"], "yellow")))
    if step.action and step.due_s != float("inf"):
        pairs.append(("next", f"{step.action} in {duration(later_s) if later_s else 'a moment'}"))
    else:
        pairs.append(("next", "nothing"))
    pairs.append(("because", step.why))
    if document["pid"] is None and document["image"] and document["state"] != "waking":
        pairs.append(("to use it", f"lzy wake {document['name']}"))
    if document["failure"]:
        pairs.append(("failure", paint(document["failure"], "red")))
    say([*lines, *facts(pairs)])
