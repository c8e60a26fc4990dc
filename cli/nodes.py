"""`lzy nodes` and `lzy drain`: the machines (or namespaces) that sessions live on."""

from __future__ import annotations

from typing import Any

import click

from .arguments import json_option
from .layout import count, paint, say, say_json, size, table


@click.command(
    epilog="""\b
    Examples:
      lzy nodes
      lzy nodes --invite                    what another machine needs to join
    """
)
@click.option("--invite", is_flag=True, help="Print what another machine needs to join.")
@json_option
def nodes(invite: bool, as_json: bool) -> None:
    """List the nodes: what they have, what is used, whether they answer.

    With --json one array of objects; docs/nodes.md tells their keys.
    """
    if invite:
        _invite(as_json)
        return
    found = fleet_client().get("/v1/nodes", timeout_s=30)["nodes"]
    if as_json:
        say_json(found)
        return
    heads = ["node", "state", "cpus", "in use", "memory", "of sessions", "gpus", "sessions", ""]
    say(table(heads, [row(node) for node in found], right=(2, 3, 4, 5, 6, 7)))


def fleet_client() -> Any:
    """The migrator of this home, which answers for all nodes."""
    from ..agent.client import Client

    client = Client()
    client.path = client.path.with_name("migrator.sock")
    client.where = f"the migrator at {client.path}"
    return client


def row(node: dict[str, Any]) -> tuple[str, ...]:
    """A node as a line of the table."""
    if not node["reachable"]:
        return (paint(node["name"], "bold"), paint("silent", "red"), *["–"] * 6,
                str(node["failure"])[:60])  # fmt: skip
    state = paint("draining", "yellow") if node["draining"] else paint("ready", "green")
    return (
        paint(node["name"], "bold"),
        state,
        f"{node['cpus']:g}",
        f"{node['cpu_share']:.2f}",
        size(node["memory_bytes"]),
        size(node["session_memory_bytes"]),
        describe_gpus(node),
        str(node["sessions"]),
        " ".join(f"{key}={value}" for key, value in node["labels"].items()),
    )


def describe_gpus(node: dict[str, Any]) -> str:
    """`1 of 2 free`; that they are only declared is told wherever they are."""
    if not node["gpus"]:
        return "–"
    declared = " (declared)" if node["declared_gpus"] else ""
    return f"{node['free_gpus']} of {node['gpus']} free{declared}"


def _invite(as_json: bool) -> None:
    from ..checkpoint.errors import Unsupported
    from ..checkpoint.home import home
    from ..migrator.join import invite
    from ..migrator.service import migrator_address

    address = migrator_address(home())
    if not address:
        raise Unsupported(
            "the migrator of this home listens for no other machines",
            remedy="lzy down && lzy up --listen HOST:PORT",
        )
    url = invite(home(), address)
    if as_json:
        say_json({"invitation": url})
        return
    say(["On the other machine, within an hour:", f"lzy agent --join {url}"])


def complete_node(_: click.Context, __: click.Parameter, typed: str) -> list[str]:
    """Names of nodes that begin with what was typed."""
    from ..checkpoint.errors import LzyError

    try:
        found = fleet_client().get("/v1/nodes", timeout_s=3)["nodes"]
    except (LzyError, OSError):
        return []
    return [node["name"] for node in found if node["name"].startswith(typed)]


@click.command(
    epilog="""\b
    Examples:
      lzy drain small                       its sessions move, or hibernate if they are idle
      lzy drain --undo small                it takes sessions again
    """
)
@click.argument("node", shell_complete=complete_node)
@click.option("--undo", is_flag=True, help="Have it take sessions again.")
@json_option
def drain(node: str, undo: bool, as_json: bool) -> None:
    """Have a node's sessions leave it, and take no others.

    Idle ones hibernate, the others move to nodes that have room; it takes a few rounds of the
    migrator. What hibernates wakes on another node.
    """
    from urllib.parse import quote

    client = fleet_client()
    document = client.post(f"/v1/nodes/{quote(node)}/drain", {"draining": not undo})
    if as_json:
        say_json(document)
        return
    if undo:
        say([f"{paint(node, 'bold')} takes sessions again"])
        return
    there = client.get("/v1/sessions")["sessions"]
    left = sum(s["node"] == node and s["pid"] is not None for s in there)
    what = f"{count(left, 'session')} will leave it; see lzy ps" if left else "nothing runs there"
    say([f"{paint(node, 'bold')} takes no sessions any more; {what}"])
