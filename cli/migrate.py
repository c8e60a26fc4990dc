"""`lzy migrate`: a session goes on on another node."""

from __future__ import annotations

from typing import Any

import click

from .arguments import json_option
from .edge import Interrupted
from .layout import duration, facts, paint, say, say_json, size, table
from .nodes import complete_node, fleet_client
from .sessions import choose, name_argument, note_lines, spell_requests
from .sizes import Size


@click.command(
    epilog="""\b
    Examples:
      lzy migrate analysis --gpu            to a node with a free GPU
      lzy migrate analysis --gpu --wait     when there is one
      lzy migrate analysis --cancel         wait for it no longer
      lzy migrate analysis --cpu 16 --memory 64G
      lzy migrate analysis --node large --dry-run
      lzy migrate analysis --bandwidth 50M  at 50 MiB a second
    """
)
@name_argument
@click.option(
    "--gpu", is_flag=False, flag_value=1, type=click.IntRange(0, 64), metavar="[N]",
    help="It needs a GPU, or N; 0: none any more.",
)  # fmt: skip
@click.option("--cpu", type=click.FloatRange(0, 4096), help="It needs so many cores.")
@click.option("--memory", type=Size(), help="It needs so much memory.")
@click.option("--node", shell_complete=complete_node, help="To that node.")
@click.option("--bandwidth", type=Size(), metavar="SIZE", help="Fetch no more in a second.")
@click.option("--dry-run", is_flag=True, help="Only tell where it would go, and why.")
@click.option("--wait", is_flag=True, help="If no node can take it now, go when one can.")
@click.option("--cancel", is_flag=True, help="Wait no longer; it asks for nothing any more.")
@json_option
def migrate(
    name: str | None,
    gpu: int | None,
    cpu: float | None,
    memory: int | None,
    node: str | None,
    bandwidth: int | None,
    dry_run: bool,
    wait: bool,
    cancel: bool,
    as_json: bool,
) -> None:
    """Move a session to another node, where it goes on.

    Its memory is sent ahead while it runs; it stands still while what has changed since follows.
    If anything fails before the other node has it, it runs on where it was.
    """
    from .progress import ProgressLine

    client = fleet_client()
    chosen = choose(client, name)
    given = {"gpu": gpu, "cpu": cpu, "memory_bytes": memory, "node": node}
    given |= {"bytes_per_s": bandwidth}
    body: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    path = client.session(chosen, "migrate")
    if cancel:
        if body or dry_run or wait:
            raise click.UsageError("--cancel goes alone.")
        answer = client.post(path, {"cancel": True})
        say_json(answer) if as_json else say([f"{paint(chosen, 'bold')} waits for nothing"])
        return
    body |= {"dry_run": dry_run, "wait": wait}
    try:
        with ProgressLine() as line:
            answer = client.post(path, body) if dry_run else client.work(path, body, line.update)
    except KeyboardInterrupt:
        raise Interrupted(f"{chosen} is still being moved; see lzy ps") from None
    if as_json:
        say_json(answer)
        return
    _say(chosen, answer, dry_run)


def _say(name: str, answer: dict[str, Any], dry_run: bool) -> None:
    session, choice = answer["session"], answer["choice"]
    refused = table(["not", "because"], [(r["node"], r["reason"]) for r in choice["refusals"]])
    if answer.get("queued"):
        words = spell_requests(session["requests"])
        say([
            f"{paint(name, 'bold')} waits for {words}: {choice['why']}",
            f"lzy ps shows it; lzy migrate {name} --cancel ends it",
        ])  # fmt: skip
        return
    if dry_run:
        if choice["node"]:
            say([f"{paint(name, 'bold')} would go to {choice['node']}: {choice['why']}",
                 *(refused if choice["refusals"] else [])])  # fmt: skip
        else:
            say([f"{paint(name, 'bold')} would stay on {session['node']}: {choice['why']}"])
        return
    report = answer["report"]
    declared = " (a declared GPU: there is none)" if session["declared_gpu"] else ""
    pairs = [
        ("session", paint(session["name"], "bold")),
        ("node", f"{session['node']}: {choice['why']}{declared}"),
    ]
    if session["pid"]:
        pairs.append(("process", str(session["pid"])))
    pairs += [
        (
            "sent",
            f"{size(report['sent_bytes'])} ahead; {size(report.get('last_bytes', 0))} at last",
        ),
        *([("follows", size(report["follows_bytes"]))] if report.get("follows_bytes") else []),
        ("stood still", duration(report["stopped_s"])),
        ("took", duration(report["took_s"])),
    ]
    say([*facts(pairs), *note_lines(report.get("notes", []))])
