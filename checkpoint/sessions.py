"""Processes of a session that is not their parent's: their parent has ended, and another took them.

A process inherits its session, and nobody can join one. So such a process is forked, as a sibling
(CLONE_PARENT), by who leads that session, or by a stand-in for a leader that has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .errors import Unsupported


class Place(NamedTuple):
    """Where a process of a tree stands; numbers as the tree's."""

    number: int
    parent: int
    session: int


def find_apart(places: Sequence[Place]) -> list[Place]:
    """Those whose session is neither their parent's nor their own. The first is the root."""
    sessions = {place.number: place.session for place in places}
    return [
        place for place in places[1:] if place.session not in (place.number, sessions[place.parent])
    ]


def refuse_lost(places: Sequence[Place], ended: Iterable[int]) -> None:
    """Raise Unsupported for a process whose session could not be made again."""
    parents = {place.number: place.parent for place in places}
    zombies = set(ended)
    taken_in: dict[int, int] = {}
    for place in find_apart(places):
        by = taken_in.setdefault(place.session, place.parent)
        led_elsewhere = parents.get(place.session, by) != place.parent
        if by != place.parent or led_elsewhere or place.session in zombies:
            raise Unsupported(
                f"process {place.number} is of session {place.session}, whose leader is neither "
                "its parent nor a sibling",
                remedy="let it end, or let it lead a session of its own (setsid)",
                pid=place.number,
            )
