"""Which node may call a session by a name: one at a time, and none while another has it."""

from __future__ import annotations

import time
from typing import NamedTuple

from .fleet import Fleet

_HOLDS_S = 60.0
"""From when a name is given until its session must be there."""


class _Given(NamedTuple):
    node: str
    until_s: float


class Names:
    """The names that were asked for of late; for one thread."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._given: dict[str, _Given] = {}

    def claim(self, name: str, node: str) -> bool:
        """Whether that node may have a session of that name; no other may for a minute then.

        What a node that does not answer said last counts.
        """
        now_s = time.monotonic()
        self._given = {n: given for n, given in self._given.items() if given.until_s > now_s}
        given = self._given.get(name)
        if given and given.node != node:
            return False
        if name in self._fleet.names_besides(node):
            return False
        self._given[name] = _Given(node, time.monotonic() + _HOLDS_S)
        return True
