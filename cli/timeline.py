"""`lzy timeline`: what became of sessions over time: where they were, what they held, and why."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .arguments import json_option
from .durations import Duration
from .lanes import (
    COMPUTING,
    DOZING,
    HIBERNATED,
    IDLE,
    MOVING,
    STATES,
    Mark,
    Past,
    choose_marks,
    read_past,
    spell_time,
    spread,
    ticks,
)
from .layout import paint, say, say_json, size
from .sessions import choose, complete_name

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ..agent.client import Client

_GLYPHS = {COMPUTING: "█", IDLE: "▒", DOZING: "░", HIBERNATED: "·", MOVING: "»"}
_PAINTS = {COMPUTING: "green", IDLE: "green", DOZING: "yellow", HIBERNATED: "dim", MOVING: "red"}
_RANKS = {MOVING: 3, COMPUTING: 2, DOZING: 1, HIBERNATED: 1, IDLE: 0}
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_MOST_MARKS = 20
_LEFT = 16


def _complete_file(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(typed, type="file")]


@click.command(
    epilog="""\b
    Examples:
      lzy timeline                          of the only session, since it was attached
      lzy timeline analysis train --since 2h
      lzy timeline analysis --svg analysis.svg
      lzy timeline analysis --json | jq '.sessions[].spans[] | select(.state == "computing")'
    """
)
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=complete_name)
@click.option("--since", type=Duration(), help="So long ago.  [default: when they were attached]")
@click.option("--svg", metavar="FILE", shell_complete=_complete_file, help="Write a picture too.")
@json_option
def timeline(names: tuple[str, ...], since: float | None, svg: str | None, as_json: bool) -> None:
    """Draw what became of sessions: on which node, in which state, with how much memory, and why.

    What is known are the node's events (the newest 20,000), and for two weeks what each session
    held and when it was in use, by the looks that the agent takes.
    """
    from ..agent.client import Client

    client = Client()
    chosen = names or (choose(client, None),)
    now_s = time.time()
    pasts, since_s = gather(client, chosen, now_s, since)
    if svg is not None:
        from pathlib import Path

        from .timeline_svg import write_svg

        Path(svg).write_text(write_svg(_title(since_s, now_s), pasts, since_s, now_s))
    if as_json:
        say_json(as_document(pasts, since_s, now_s))
        return
    say(describe(pasts, since_s, now_s, shutil.get_terminal_size().columns))


def gather(
    client: Client, names: Sequence[str], now_s: float, since: float | None
) -> tuple[list[Past], float]:
    """The pasts of sessions, and when their picture begins. Raises NotFound for a strange name."""
    from ..checkpoint.errors import NotFound

    events = client.get("/v1/events?last=20000")["events"]
    begun_s = [e["unix_s"] for e in events if e["session"] in names and e["kind"] == "attached"]
    since_s = now_s - since if since is not None else min(begun_s, default=now_s - 3600)
    readings = client.get("/v1/readings")["readings"]
    node = "" if not events or "node" in events[0] else client.get("/v1/node")["name"]
    events = [{"node": node, **event} for event in events]
    readings = [{"node": node, **reading} for reading in readings]
    for name in names:
        if not any(event["session"] == name for event in events):
            raise NotFound(f"nothing is known of a session {name[:200]}", remedy="see lzy ps")
    return [read_past(name, events, readings, since_s, now_s) for name in names], since_s


def as_document(pasts: Sequence[Past], since_s: float, now_s: float) -> dict[str, Any]:
    """The pasts as docs/cli.md specifies them."""
    return {
        "began_unix_s": since_s,
        "ended_unix_s": now_s,
        "sessions": [
            {
                "name": past.session,
                "spans": [
                    {
                        "node": None if span.state == HIBERNATED else span.lane,
                        "state": span.state,
                        "began_unix_s": span.began_s,
                        "ended_unix_s": span.ended_s,
                    }
                    for span in past.spans
                ],
                "marks": [
                    {"unix_s": m.at_s, "kind": m.kind, "words": m.words, "node": m.node}
                    for m in past.marks
                ],
                "memory": [{"unix_s": at_s, "memory_bytes": held} for at_s, held in past.memory],
            }
            for past in pasts
        ],
    }


def describe(pasts: Sequence[Past], since_s: float, now_s: float, columns: int) -> list[str]:
    """Lines for a terminal that is `columns` wide."""
    width = min(max(columns, 60), 120) - _LEFT - 2
    legend = "  ".join(f"{paint(_GLYPHS[s], _PAINTS[s])} {s}" for s in STATES)
    lines = [_title(since_s, now_s), legend]
    for past in pasts:
        lines += ["", paint(past.session, "bold"), *_draw(past, since_s, now_s, width)]
    return lines


def _draw(past: Past, since_s: float, now_s: float, width: int) -> list[str]:
    span_s = max(now_s - since_s, 1e-3)

    def column(at_s: float) -> int:
        return min(max(int((at_s - since_s) / span_s * width), 0), width - 1)

    marks = choose_marks(past.marks, min(_MOST_MARKS, width // 4))
    numbers = [""] * (width + 3)
    places = spread([float(column(mark.at_s)) for mark in marks], 3, 0, width - 1)
    for number, place in enumerate(places, 1):
        for at, letter in enumerate(str(number)):
            numbers[round(place) + at] = letter
    lines = [f"{'':{_LEFT}}{''.join(letter or ' ' for letter in numbers).rstrip()}"]
    for lane in past.lanes:
        cells: list[str] = [""] * width
        for span in (s for s in past.spans if s.lane == lane):
            for at in range(column(span.began_s), column(span.ended_s - 1e-9) + 1):
                if not cells[at] or _RANKS[span.state] > _RANKS[cells[at]]:
                    cells[at] = span.state
        drawn = "".join(paint(_GLYPHS[s], _PAINTS[s]) if s else " " for s in cells)
        lines.append(f"{lane[: _LEFT - 2]:>{_LEFT - 1}} {drawn.rstrip()}")
    lines += [_draw_memory(past, since_s, now_s, width), _draw_axis(since_s, now_s, width)]
    when = [spell_time(mark.at_s, since_s, span_s) for mark in marks]
    told = zip(range(1, len(marks) + 1), marks, when, strict=True)
    return [*lines, *(line for each in told for line in _tell(*each, most=width))]


def _draw_memory(past: Past, since_s: float, now_s: float, width: int) -> str:
    """The most that was held in each column's time, as a row of bars."""
    most = max((held for _, held in past.memory), default=0)
    cells, at, held = [], 0, 0
    for number in range(width):
        until_s = since_s + (now_s - since_s) * (number + 1) / width
        top = held
        while at < len(past.memory) and past.memory[at][0] < until_s:
            held = past.memory[at][1]
            top, at = max(top, held), at + 1
        cells.append(_EIGHTHS[max(round(8 * top / most), 1 if top else 0)] if most else " ")
    words = f"to {size(most)}" if most else ""
    return f"{words:>{_LEFT - 1}} {paint(''.join(cells).rstrip(), 'cyan')}"


def _draw_axis(since_s: float, now_s: float, width: int) -> str:
    span_s, cells = now_s - since_s, [" "] * (width + 12)
    step_s = ticks(span_s, max(width // 12, 2))
    at_s = since_s if span_s <= 600 else -(-since_s // step_s) * step_s
    while at_s < now_s:
        place = int((at_s - since_s) / span_s * width)
        for at, letter in enumerate(f"│{spell_time(at_s, since_s, span_s)}"):
            cells[place + at] = letter
        at_s += step_s
    return paint(f"{'':{_LEFT}}{''.join(cells).rstrip()}", "dim")


def _tell(number: int, mark: Mark, when: str, most: int) -> list[str]:
    """A mark's number, time, kind and words, those on two lines at most."""
    from textwrap import wrap

    loud = "red" if mark.kind in ("failed", "failure", "refused") else "cyan"
    kind = mark.kind.replace("_", " ").ljust(11)
    first, *more = wrap(
        mark.words, max(most - len(kind) - 1, 20), max_lines=2, placeholder=" …"
    ) or [""]
    head = f"{number:4}  {paint(when.rjust(_LEFT - 7), 'dim')} {paint(kind, loud)} "
    return [head + first, *(" " * (_LEFT + len(kind) + 1) + words for words in more)]


def _title(since_s: float, now_s: float) -> str:
    from .durations import spell

    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since_s))
    return f"{begun}, {spell(round(now_s - since_s, 1))}"
