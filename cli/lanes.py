"""A session's past as a picture needs it: spans of states on lanes, marks, and memory over time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

STORE = "in the store"
"""The lane of what hibernates: it is on no node."""
COMPUTING, IDLE, DOZING, HIBERNATED, MOVING = "computing", "idle", "dozing", "hibernated", "moving"
STATES = (COMPUTING, IDLE, DOZING, HIBERNATED, MOVING)

_LEADS_TO = {
    "attached": IDLE,
    "woken": IDLE,
    "roused": IDLE,
    "dozed": DOZING,
    "hibernated": HIBERNATED,
    "ended": "",
    "failed": "",
    "detached": "",
}
_TOLD = frozenset(_LEADS_TO) | {
    "notice", "called_off", "called", "migrated", "held", "released", "failure", "refused",
    "repaired", "signalled",
}  # fmt: skip
_DWARFS = 600


class Span(NamedTuple):
    """It was in `state` from `began_s` to `ended_s`; `lane` is a node, or STORE."""

    lane: str
    state: str
    began_s: float
    ended_s: float


class Mark(NamedTuple):
    """Something happened, in words that say why."""

    at_s: float
    kind: str
    words: str
    node: str = ""


class Past(NamedTuple):
    """What became of one session; `memory` are (at_s, bytes held from then on)."""

    session: str
    spans: list[Span]
    marks: list[Mark]
    memory: list[tuple[float, int]]

    @property
    def lanes(self) -> list[str]:
        """Its nodes in the order in which it came to them, the store last."""
        found = list(dict.fromkeys(span.lane for span in self.spans))
        return [lane for lane in found if lane != STORE] + [STORE] * (STORE in found)


def read_past(
    session: str,
    events: Sequence[dict[str, Any]],
    readings: Sequence[dict[str, Any]],
    since_s: float,
    now_s: float,
) -> Past:
    """The past of `session` from `since_s` to `now_s` (unix seconds), out of what nodes tell.

    Both are in order of time, each with its `node`; what they tell of other sessions is left out.
    """
    events = [event for event in events if event["session"] == session]
    readings = [reading for reading in readings if reading["session"] == session]
    spans, memory = [], [(r["unix_s"], int(r["memory_bytes"])) for r in readings]
    state, lane, _node, began_s = "", "", "", 0.0
    for event in events:
        kind, at_s = event["kind"], event["unix_s"]
        if kind == "arrived":  # from here on it is that node's; a move goes on
            event["node"]
            continue
        if kind not in _LEADS_TO:
            continue
        if state:
            spans.append(Span(lane, state, began_s, at_s))
        state, began_s = _LEADS_TO[kind], at_s
        lane = event["node"]
        if state == HIBERNATED:
            if "(migrate" in event["words"]:
                state = MOVING
            else:
                lane = STORE
        if state in ("", HIBERNATED, MOVING):
            memory.append((at_s, 0))
    if state:
        spans.append(Span(lane, state, began_s, now_s))
    shown = [
        span._replace(began_s=max(span.began_s, since_s))
        for whole in spans
        for span in _split(whole, readings)
        if span.ended_s >= since_s
    ]
    marks = [
        Mark(e["unix_s"], e["kind"], " ".join(e["words"].split()), e["node"])
        for e in events
        if e["unix_s"] >= since_s and e["kind"] in _TOLD
    ]
    return Past(session, shown, marks, _clip(sorted(memory), since_s))


def _split(span: Span, readings: Iterable[dict[str, Any]]) -> list[Span]:
    """A span of running as spans of computing and of idleness."""
    if span.state != IDLE:
        return [span]
    found, at_s, state = [], span.began_s, IDLE
    for reading in readings:
        if reading.get("node", span.lane) != span.lane:
            continue
        if not span.began_s <= reading["unix_s"] < span.ended_s:
            continue
        now = COMPUTING if reading["is_active"] else IDLE
        if now != state:
            if reading["unix_s"] > at_s:
                found.append(Span(span.lane, state, at_s, reading["unix_s"]))
            at_s, state = reading["unix_s"], now
    return [*found, Span(span.lane, state, at_s, span.ended_s)]


def _clip(memory: list[tuple[float, int]], since_s: float) -> list[tuple[float, int]]:
    before = [held for at_s, held in memory if at_s <= since_s][-1:]
    return [*((since_s, held) for held in before), *(m for m in memory if m[0] > since_s)]


def choose_marks(marks: Sequence[Mark], most: int) -> list[Mark]:
    """At most so many: the newest of those that tell most."""
    dull = ("repaired", "signalled", "released", "held", "roused", "dozed", "notice")
    left = list(marks)
    for kind in dull:
        if len(left) <= most:
            break
        left = [mark for mark in left if mark.kind != kind]
    return left[-most:]


def spread(places: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """`places`, ascending, moved as little as need be to lie `apart`, between low and high."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + apart if found else low))
    limit = high
    for at in range(len(found) - 1, -1, -1):
        found[at] = min(found[at], limit)
        limit = found[at] - apart
    return found


def ticks(span_s: float, most: int = 8) -> float:
    """A round number of seconds, of which at most so many fit into `span_s`."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200)
    return next((float(step) for step in steps if span_s / step <= most), 86400.0 * max(
        1, -(-span_s // (86400 * most))))  # fmt: skip


def spell_time(at_s: float, since_s: float, span_s: float) -> str:
    """A moment: counted from the begin of a short picture, else by the clock."""
    if span_s <= _DWARFS:
        seconds = max(at_s - since_s, 0.0)
        return f"{int(seconds // 60)}:{int(seconds % 60):02}"
    if span_s <= 2 * 86400:
        return time.strftime("%H:%M", time.localtime(at_s))
    return time.strftime("%m-%d %H:%M", time.localtime(at_s))
