"""`lzy top`: nodes and sessions as they change, until q."""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from typing import Any

import click

from .arguments import json_option
from .durations import spell
from .layout import bar, paint, say_json, size

_CLEAR = "\033[H\033[J"
_STATES = {"running": "green", "dozing": "cyan", "hibernated": "dim", "failed": "red"}


@click.command(
    epilog="""\b
    Examples:
      lzy top                               q ends it
      lzy top --every 5
      lzy top --json                        once, as one document
    """
)
@click.option("--every", "every_s", default=1.0, type=click.FloatRange(0.2, 60), show_default=True)
@json_option
def top(every_s: float, as_json: bool) -> None:
    """Show nodes and sessions as they change. q, or Ctrl-C, ends it.

    Where the output is no terminal it is shown once.
    """
    from .nodes import fleet_client

    client = fleet_client()
    if as_json:
        nodes, sessions = _ask(client)
        say_json({"nodes": nodes, "sessions": sessions})
        return
    if not (os.isatty(0) and sys.stdout.isatty()):
        click.echo("\n".join(draw(*_ask(client), shutil.get_terminal_size().columns)))
        return
    _show(client, every_s)


def _ask(client: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    nodes = client.get("/v1/nodes", timeout_s=30)["nodes"]
    return nodes, client.get("/v1/sessions", timeout_s=30)["sessions"]


def _show(client: Any, every_s: float) -> None:
    """Draw it again and again, on the terminal's other screen."""
    import termios
    import tty

    before = termios.tcgetattr(0)
    sys.stdout.write("\033[?1049h\033[?25l")
    try:
        tty.setcbreak(0)
        while True:
            columns, rows = shutil.get_terminal_size()
            lines = draw(*_ask(client), columns)[: rows - 1]
            sys.stdout.write(_CLEAR + "\n".join(lines))
            sys.stdout.flush()
            if select.select([0], [], [], every_s)[0] and os.read(0, 64)[:1] in (b"q", b"Q", b""):
                return
    except KeyboardInterrupt:
        pass
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        sys.stdout.write("\033[?25h\033[?1049l")
        sys.stdout.flush()


def draw(nodes: list[dict[str, Any]], sessions: list[dict[str, Any]], columns: int) -> list[str]:
    """Everything as lines for people: a bar for each node's CPUs and memory, a line a session."""
    width = max(8, min(24, (columns - 56) // 2))
    states: dict[str, int] = {}
    for session in sessions:
        states[session["state"]] = states.get(session["state"], 0) + 1
    told = ", ".join(f"{number} {state}" for state, number in sorted(states.items())) or "none"
    lines = [f"{paint('lzy', 'bold')} {time.strftime('%H:%M:%S')}   sessions: {told}", ""]
    for node in nodes:
        if not node["reachable"]:
            lines.append(f"{node['name']:<12} {paint('does not answer', 'red')}")
            continue
        cpus, memory = node["cpus"], node["memory_bytes"]
        used = node["session_memory_bytes"]
        gpus = ""
        if node["gpus"]:
            declared = " declared" if node["declared_gpus"] else ""
            gpus = f"  gpu {node['gpus'] - node['free_gpus']}/{node['gpus']}{declared}"
        drained = paint("  draining", "yellow") if node["draining"] else ""
        lines.append(
            f"{node['name']:<12} cpu {bar(node['cpu_share'], cpus, width)}"
            f" {node['cpu_share']:.2f}/{cpus:g}"
            f"  mem {bar(used, memory, width)} {size(used)}/{size(memory)}{gpus}{drained}"
        )
    lines.append("")
    now = time.time()
    order = {"running": 0, "migrating": 0, "dozing": 1}
    for session in sorted(sessions, key=lambda s: (order.get(s["state"], 2), s["name"])):
        lines.append(_line(session, now, width))
    return lines


def _line(session: dict[str, Any], now: float, width: int) -> str:
    state, living = session["state"], session["pid"] is not None
    shown = paint(f"{state:<11}", _STATES.get(state, "yellow"))
    peak = max(session["peak_memory_bytes"], session["memory_bytes"], 1)
    words = ""
    if operation := session["operation"]:
        done, total = operation["done_bytes"], operation["total_bytes"]
        words = f"{operation['verb']} {bar(done, total, 10) if total else ''}"
    elif session["idle_for_s"] >= 1:
        words = f"idle {spell(session['idle_for_s'])}"
    elif not living:
        words = f"for {spell(max(now - session['since_unix_s'], 1))}"
    memory = session["memory_bytes"] if living else 0
    cpu = f"{session['cpu_share']:>5.0%}" if living else "    –"
    return (
        f"{session['name'][:20]:<20} {shown} {session['node'] or '–':<12} {cpu}"
        f"  {bar(memory, peak, width)} {size(memory) if living else '–':>9}  {words}"
    )
