"""What a simulation has told, for people and for programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .layout import count, duration, paint, table

if TYPE_CHECKING:
    from ..migrator.tally import Tally
    from ..migrator.world import World

_COLOURS = ("green", "yellow", "red")


def as_document(tally: Tally) -> dict[str, Any]:
    """One policy's outcome as docs/cli.md specifies it."""
    return {
        "name": tally.name,
        "utilisation": tally.utilisation(),
        "computing_share": tally.computing_share(),
        "gpu_utilisation": tally.gpu_utilisation(),
        "held_s": tally.held_s,
        "running_s": tally.running_s,
        "computing_s": tally.computing_s,
        "gpu_held_s": tally.gpu_held_s,
        "share_cost": tally.share_cost,
        "node_cost": tally.node_cost,
        "nodes": [
            {"kind": kind, "on_s": hours * 3600, "most_at_once": tally.most_nodes[kind]}
            for kind, hours in tally.node_hours.items()
        ],
        "sessions": tally.sessions,
        "bursts": tally.bursts,
        "waited": len(tally.waits_s),
        "wait_p50_s": tally.wait_s(0.5),
        "wait_p99_s": tally.wait_s(0.99),
        "wait_longest_s": tally.waits_s[-1] if tally.waits_s else 0.0,
        "wait_of_all_p50_s": tally.wait_s(0.5, of_all=True),
        "wait_of_all_p99_s": tally.wait_s(0.99, of_all=True),
        "actions": dict(sorted(tally.actions.items())),
        "killed": tally.killed,
        "computed_again_s": tally.rerun_s,
        "refused": tally.refused,
        "utilisation_by_hour": tally.by_hour(),
    }


def describe(title: str, tallies: list[Tally], world: World) -> list[str]:
    """A table with a column for each policy, and a picture of a week."""
    rows: list[tuple[str, Callable[[Tally], str]]] = [
        ("utilisation", lambda t: paint(_percent(t.utilisation()), "bold")),
        ("… a cell ran", lambda t: _percent(t.computing_share())),
        (
            "GPUs computed, of held",
            lambda t: _percent(t.gpu_utilisation()) if t.gpu_held_s else "–",
        ),
        ("shares held, hours", lambda t: _thousands(t.held_s / 3600)),
        ("shares cost", lambda t: _thousands(t.share_cost)),
        ("nodes cost", lambda t: _thousands(t.node_cost)),
        ("most nodes at once", lambda t: _thousands(sum(t.most_nodes.values()))),
        ("cells that waited", lambda t: _percent(len(t.waits_s) / t.bursts if t.bursts else 0)),
        ("… they, p50", lambda t: _wait(t, 0.5)),
        ("… they, p99", lambda t: _wait(t, 0.99)),
        ("all cells, p99", lambda t: _wait(t, 0.99, of_all=True)),
        ("dozed", lambda t: _done(t, "doze")),
        ("gave a GPU back", lambda t: _done(t, "give-gpu-back")),
        ("hibernated", lambda t: _thousands(t.actions.get("hibernate", 0) - t.killed)),
        ("moved", lambda t: _done(t, "migrate")),
        ("killed, state lost", lambda t: _red(t.killed)),
        ("computed again, hours", lambda t: _thousands(t.rerun_s / 3600)),
    ]
    if any(tally.refused for tally in tallies):
        rows.append(("no node could ever take", lambda t: _red(t.refused)))
    heads = ["", *(tally.name for tally in tallies)]
    cells = [[words, *(show(tally) for tally in tallies)] for words, show in rows]
    first = tallies[0]
    lines = [
        f"{title}, {count(first.sessions, 'session')}, {count(first.bursts, 'burst')} of cells",
        "",
        *table(heads, cells, right=(1, 2, 3)),
        "",
        f"Utilisation over a week, by the hour (UTC; · nothing held). Somebody is at work while a "
        f"cell runs or pauses for at most {duration(world.pause_s)}.",
    ]
    from .plot import draw_week

    for tally, colour in zip(tallies, _COLOURS, strict=True):
        lines += draw_week(tally.name, tally.by_hour(), colour)
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0 < share < 0.9995 else f"{100 * share:.0f} %"


def _thousands(number: float) -> str:
    return f"{number:,.0f}".replace(",", "\u202f")


def _done(tally: Tally, action: str) -> str:
    return _thousands(tally.actions.get(action, 0))


def _wait(tally: Tally, quantile: float, *, of_all: bool = False) -> str:
    wait_s = tally.wait_s(quantile, of_all=of_all)
    return duration(wait_s) if wait_s else "–"


def _red(number: int) -> str:
    return paint(_thousands(number), "red") if number else "0"
