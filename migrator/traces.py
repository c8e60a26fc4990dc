"""Traces: when sessions begin, compute and end, as JSON lines, read or made by a seeded generator.

A trace says what people did, not what a policy made of it: the same trace is given to each. Times
are seconds from its begin, which is a Monday, 00:00 UTC. docs/policy.md has the format and where
the generator's figures come from.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

START, BUSY, END = "start", "busy", "end"
VERSION = 1
DAY_S = 86400.0
MERGED_GAP_S = 15.0
"""Pauses that no look every 15 s can tell from activity; a burst is cells less than that apart."""


class Event(NamedTuple):
    """One line of a trace."""

    at_s: float
    kind: str
    session: str
    user: int = 0
    duration_s: float = 0.0
    """Of a BUSY: for how long it computes."""
    memory_bytes: int = 0
    """Of a BUSY: resident memory while and after it computes."""
    gpu: int = 0
    """Of a BUSY: GPUs that it computes on."""
    cpu: float = 0.0
    """Of a START: cores that it asks for; 0: nothing in particular."""


class Habits(NamedTuple):
    """The generator's figures. `M`: measured (docs/policy.md says by whom); `A`: assumed."""

    zones_h: tuple[tuple[float, float], ...] = ((1.0, 0.5), (-5.0, 0.35), (5.5, 0.15))
    """A: hours ahead of UTC, and the share of users who live there."""
    begin_h: float = 9.0  # A
    end_h: float = 17.5  # A
    lunch_h: float = 12.3  # A
    lunch_lasts_s: float = 2700.0  # A
    works_a_day: float = 0.75  # A: chance that somebody opens their notebook on a working day
    works_a_weekend_day: float = 0.06  # A
    think_median_s: float = 35.0  # A: 39 s from one execution to the next were measured (M)
    think_sigma: float = 1.0  # A
    distracted: float = 0.1  # A: share of pauses from the heavy tail
    distracted_least_s: float = 180.0  # A
    distracted_tail: float = 1.5  # A: exponent; that pauses are heavy-tailed is measured (M)
    distracted_most_s: float = 3 * 3600.0  # A
    meetings_an_hour: float = 0.12  # A
    meeting_median_s: float = 2700.0  # A
    burst_median_s: float = 8.0  # A
    burst_sigma: float = 1.6  # A
    gpu_users: float = 0.2  # A
    gpu_phase: float = 0.5  # A: share of such a user's working time
    gpu_burst_median_s: float = 120.0  # M
    gpu_burst_sigma: float = 1.36  # M: so that three quarters end within 300 s
    gpu_think_median_s: float = 150.0  # M: 300 s from task to task in the median, tasks included
    overnight: float = 0.04  # A: evenings on which something long is left computing
    overnight_median_s: float = 3 * 3600.0  # A
    tidy: float = 0.65  # A: evenings on which a session is ended
    resumed: float = 0.9  # A: mornings on which yesterday's session is used again
    forgotten_days: float = 1.5  # A: mean until a session that is not used again is ended
    memory_median_bytes: float = 2.0 * 2**30  # A: of what a session grows to
    memory_sigma: float = 1.0  # A
    memory_most_bytes: float = 40.0 * 2**30  # A
    memory_first_bytes: float = 0.25 * 2**30  # M: an idle kernel with pandas


def make_trace(users: int, days: int, seed: int, habits: Habits | None = None) -> Iterator[Event]:
    """Events of `users` people over `days` days, in order; equal seeds give equal traces."""
    habits = habits or Habits()
    return heapq.merge(*(_live(user, days, seed, habits) for user in range(users)))


def write_trace(path: Path, events: Iterable[Event]) -> int:
    """Write a trace; return how many lines. `path` is replaced."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"trace": "lzy", "version": VERSION}) + "\n")
        for event in events:
            file.write(_spell(event))
            count += 1
    return count


def read_trace(file: TextIO, name: str) -> Iterator[Event]:
    """Events of a file. Raises ValueError with the line's number where it is not a trace."""
    before_s = -math.inf
    for number, line in enumerate(file, 1):
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object")
        if number == 1:
            if row.get("trace") != "lzy":
                raise ValueError(f'{where} is not the head of a trace, {{"trace": "lzy", …}}')
            if row.get("version") != VERSION:
                raise ValueError(f"{where}: version {row.get('version')}, this lzy reads {VERSION}")
            continue
        event = _parse(row, where)
        if event.at_s < before_s:
            raise ValueError(f"{where} is earlier than the one before it; a trace is in order")
        before_s = event.at_s
        yield event
    if before_s == -math.inf:
        raise ValueError(f"{name} has no events")


def _spell(event: Event) -> str:
    row: dict[str, object] = {"at_s": round(event.at_s, 3), "event": event.kind}
    row["session"], row["user"] = event.session, event.user
    if event.kind == BUSY:
        row["duration_s"] = round(event.duration_s, 3)
        row["memory_bytes"] = event.memory_bytes
        if event.gpu:
            row["gpu"] = event.gpu
    if event.kind == START and event.cpu:
        row["cpu"] = event.cpu
    return json.dumps(row) + "\n"


def _parse(row: dict[str, object], where: str) -> Event:
    def number(key: str, default: float | None = None) -> float:
        value = row.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}: {key} is {value!r}, not a number")
        if not 0 <= value < 1e18:
            raise ValueError(f"{where}: {key} is {value!r}")
        return value

    kind, session = row.get("event"), row.get("session")
    if kind not in (START, BUSY, END):
        raise ValueError(f"{where}: event is {kind!r}, not {START}, {BUSY} or {END}")
    if not isinstance(session, str) or not session:
        raise ValueError(f"{where}: session is {session!r}, not a name")
    busy = kind == BUSY
    return Event(
        number("at_s"),
        str(kind),
        session,
        int(number("user", 0)),
        number("duration_s") if busy else 0.0,
        int(number("memory_bytes", 0)) if busy else 0,
        int(number("gpu", 0)) if busy else 0,
        number("cpu", 0) if kind == START else 0.0,
    )


def _live(user: int, days: int, seed: int, habits: Habits) -> Iterator[Event]:
    """One person's life with notebooks, in order of time."""
    dice = random.Random(f"{seed}/{user}")
    zone_h = dice.choices([z for z, _ in habits.zones_h], [w for _, w in habits.zones_h])[0]
    slower = math.exp(dice.gauss(0.0, 0.3))
    likes_gpu = dice.random() < habits.gpu_users
    session, count = "", 0
    ends: list[tuple[float, str]] = []
    memory_bytes = most_bytes = 0.0
    busy_until_s = 0.0
    for day in range(days):  # theirs, not those of UTC
        chance = habits.works_a_weekend_day if day % 7 > 4 else habits.works_a_day
        if dice.random() >= chance:
            continue
        midnight_s = (day - zone_h / 24) * DAY_S
        at_s = midnight_s + 3600 * dice.gauss(habits.begin_h, 0.75)
        leaves_s = midnight_s + 3600 * dice.gauss(habits.end_h, 1.0)
        lunch_s = midnight_s + 3600 * dice.gauss(habits.lunch_h, 0.4)
        at_s = max(at_s, busy_until_s + 60)
        today: list[Event] = []
        if session and dice.random() >= habits.resumed:
            away_s = dice.expovariate(1 / (habits.forgotten_days * DAY_S))
            heapq.heappush(ends, (at_s + away_s, session))
            session = ""
        if not session and leaves_s > at_s:
            session, count = f"u{user}-{count}", count + 1
            today.append(Event(at_s, START, session, user))
            memory_bytes = habits.memory_first_bytes
            grown = dice.lognormvariate(math.log(habits.memory_median_bytes), habits.memory_sigma)
            most_bytes = min(max(grown, memory_bytes), habits.memory_most_bytes)
        on_gpu, had_lunch = False, False
        next_hour_s = at_s
        while at_s < leaves_s:
            if at_s >= next_hour_s:
                next_hour_s = at_s + 3600
                on_gpu = likes_gpu and dice.random() < habits.gpu_phase
                if dice.random() < habits.meetings_an_hour:
                    at_s += dice.lognormvariate(math.log(habits.meeting_median_s), 0.4)
                    continue
            if not had_lunch and at_s > lunch_s:
                had_lunch = True
                at_s += habits.lunch_lasts_s * dice.uniform(0.5, 1.6)
                continue
            if dice.random() < 0.15:
                memory_bytes += (most_bytes - memory_bytes) * dice.random() * 0.3
            lasts_s = _lognormal(
                dice,
                habits.gpu_burst_median_s if on_gpu else habits.burst_median_s,
                habits.gpu_burst_sigma if on_gpu else habits.burst_sigma,
            )
            lasts_s = min(lasts_s, 4 * 3600.0)
            today.append(Event(at_s, BUSY, session, user, lasts_s, int(memory_bytes), int(on_gpu)))
            at_s += lasts_s + MERGED_GAP_S + _pause(dice, habits, on_gpu) * slower
            busy_until_s = at_s
        if session and today and dice.random() < habits.overnight:
            lasts_s = _lognormal(dice, habits.overnight_median_s, 0.8)
            today.append(Event(at_s, BUSY, session, user, lasts_s, int(memory_bytes), int(on_gpu)))
            busy_until_s = at_s + lasts_s
        elif session and dice.random() < habits.tidy:
            today.append(Event(at_s, END, session, user))
            session = ""
        while ends and ends[0][0] < at_s:
            end_s, name = heapq.heappop(ends)
            today.append(Event(end_s, END, name, user))
        today.sort(key=lambda event: event.at_s)
        yield from (event for event in today if event.at_s < days * DAY_S)
    yield from (
        Event(end_s, END, name, user) for end_s, name in sorted(ends) if end_s < days * DAY_S
    )


def _lognormal(dice: random.Random, median: float, sigma: float) -> float:
    return dice.lognormvariate(math.log(median), sigma)


def _pause(dice: random.Random, habits: Habits, on_gpu: bool) -> float:
    """Seconds between two bursts: a log-normal body and a Pareto tail."""
    if dice.random() < habits.distracted:
        pause_s = habits.distracted_least_s * dice.paretovariate(habits.distracted_tail)
        return min(pause_s, habits.distracted_most_s)
    median_s = habits.gpu_think_median_s if on_gpu else habits.think_median_s
    return _lognormal(dice, median_s, habits.think_sigma)
