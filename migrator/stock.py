"""The stock of nodes that a simulation rents from: kinds, how many of each, and which are on.

A fleet is described as `small:2cpu:8G:x100:0.08/h,gpu:4cpu:16G:1gpu:x20:1.01/h`: for each kind a
name, CPUs, memory, GPUs, how many there are at most, and what one costs by the hour.
"""

from __future__ import annotations

import heapq
import re
from typing import NamedTuple

from .facts import NodeFacts

DEFAULT_FLEET = (
    "small:2cpu:8G:x2000:0.0816/h,large:8cpu:64G:x500:0.48/h,"
    "gpu:4cpu:16G:1gpu:x500:1.006/h,gpu-large:16cpu:64G:1gpu:x100:1.62/h"
)
"""Prices of `small` and `gpu` are those of m7g.large and g5.xlarge; see docs/policy.md."""

_PART = re.compile(
    r"(?:(?P<cpus>\d+(?:\.\d+)?)cpu"
    r"|(?P<memory>\d+(?:\.\d+)?)(?P<unit>[MGT])(?:i?B)?"
    r"|(?P<gpus>\d+)gpu"
    r"|x(?P<count>\d+)"
    r"|\$?(?P<price>\d+(?:\.\d+)?)(?:/h)?)",
    re.IGNORECASE,
)
_UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


class Kind(NamedTuple):
    """One kind of node."""

    name: str
    cpus: float
    memory_bytes: int
    gpus: int = 0
    how_many: int = 1
    price_per_hour: float = 0.0


def parse_fleet(text: str) -> list[Kind]:
    """The kinds in `text`. Raises ValueError that names the part which is wrong."""
    kinds: list[Kind] = []
    for described in text.split(","):
        name, *parts = (part.strip() for part in described.split(":"))
        found: dict[str, str] = {}
        for part in parts:
            match = _PART.fullmatch(part)
            if match is None:
                raise ValueError(f"{part!r} in {described.strip()!r} is none of 2cpu, 8G, 1gpu, "
                                 "x10 (how many), 0.08/h (price)")  # fmt: skip
            found.update({key: value for key, value in match.groupdict().items() if value})
        if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
            raise ValueError(f"{name!r} is no name for a kind of node")
        if name in (kind.name for kind in kinds):
            raise ValueError(f"{name!r} is described twice")
        if "cpus" not in found or "memory" not in found:
            raise ValueError(f"{described.strip()!r} says not how many CPUs and how much memory, "
                             "as in small:2cpu:8G")  # fmt: skip
        kind = Kind(
            name,
            float(found["cpus"]),
            int(float(found["memory"]) * _UNITS[found["unit"].upper()]),
            int(found.get("gpus", 0)),
            int(found.get("count", 1)),
            float(found.get("price", 0)),
        )
        if not (kind.cpus and kind.memory_bytes and kind.how_many):
            raise ValueError(f"{described.strip()!r} has nothing to give")
        kinds.append(kind)
    return kinds


class Rented:
    """One node that is, or was, on: what is reserved on it, and since when it is empty."""

    __slots__ = ("empty_since_s", "facts", "held", "on_since_s", "ready_s")

    def __init__(self, facts: NodeFacts, now_s: float, ready_s: float) -> None:
        self.facts = facts
        self.held = 0
        """Sessions that live there, dozing ones too: their processes keep it on."""
        self.on_since_s = now_s
        self.ready_s = ready_s
        self.empty_since_s: float | None = now_s


class Stock:
    """Nodes by name: those on, and one of each kind that could be switched on."""

    def __init__(self, kinds: list[Kind], linger_s: float, start_s: float, spare: int) -> None:
        self._start_s = start_s
        self._spare = {kind.name: 0 if kind.gpus else spare for kind in kinds}
        self._kinds = {kind.name: kind for kind in kinds}
        self._linger_s = linger_s
        self._free = {kind.name: list(range(1, kind.how_many + 1)) for kind in kinds}
        self._count = {kind.name: 0 for kind in kinds}
        self._offered: dict[str, NodeFacts] = {}
        self.on: dict[str, Rented] = {}
        self._empty: dict[str, list[str]] = {kind.name: [] for kind in kinds}
        self.hours: dict[str, float] = {kind.name: 0.0 for kind in kinds}
        self.most: dict[str, int] = {kind.name: 0 for kind in kinds}
        for kind in kinds:
            self._offer(kind.name)
            for _ in range(self._spare[kind.name]):
                self._switch_on(kind.name, 0.0, 0.0)

    def nodes(self, now_s: float) -> tuple[NodeFacts, ...]:
        """What can be placed on: every node that is on, and a cold one of each kind."""
        self._switch_off(now_s)
        return (*(rented.facts for rented in self.on.values()), *self._offered.values())

    def take(self, name: str, now_s: float) -> Rented:
        """The node `name` with one more session living on it, switched on if need be."""
        kind = name.rpartition("-")[0]
        if name not in self.on:
            self._switch_on(kind, now_s, now_s + self._start_s)
        rented = self.on[name]
        rented.held += 1
        if rented.held == 1:
            self._empty[kind].remove(name)
            rented.empty_since_s = None
            if len(self._empty[kind]) < self._spare[kind]:
                self._switch_on(kind, now_s, now_s + self._start_s)
        return rented

    def leave(self, name: str, now_s: float) -> None:
        """One session less lives on `name`."""
        rented = self.on[name]
        rented.held -= 1
        if not rented.held:
            rented.empty_since_s = now_s
            self._empty[name.rpartition("-")[0]].append(name)

    def settle(self, now_s: float) -> None:
        """Count the hours of what is still on."""
        self._switch_off(now_s)
        for name, rented in self.on.items():
            self.hours[name.rpartition("-")[0]] += (now_s - rented.on_since_s) / 3600
            rented.on_since_s = now_s

    def cost(self) -> float:
        """What all hours of all nodes cost."""
        return sum(hours * self._kinds[name].price_per_hour for name, hours in self.hours.items())

    def _switch_on(self, kind: str, now_s: float, ready_s: float) -> None:
        """Have the cold node of a kind that is offered, if one is left; it is empty at first."""
        facts = self._offered.pop(kind, None)
        if facts is None:
            return
        self.on[facts.name] = Rented(facts._replace(warm=True), now_s, ready_s)
        self._empty[kind].append(facts.name)
        self._count[kind] += 1
        self.most[kind] = max(self.most[kind], self._count[kind])
        self._offer(kind)

    def _switch_off(self, now_s: float) -> None:
        """Give back what has been empty for long, the longest first, but for the spare ones."""
        for kind, empty in self._empty.items():
            while len(empty) > self._spare[kind]:
                rented = self.on[empty[0]]
                assert rented.empty_since_s is not None
                off_s = rented.empty_since_s + self._linger_s
                if off_s > now_s:
                    break
                name = empty.pop(0)
                self.hours[kind] += (off_s - rented.on_since_s) / 3600
                del self.on[name]
                self._count[kind] -= 1
                heapq.heappush(self._free[kind], int(name.rpartition("-")[2]))
                self._offer(kind)

    def _offer(self, name: str) -> None:
        if name in self._offered or not self._free[name]:
            return
        kind = self._kinds[name]
        self._offered[name] = NodeFacts(
            f"{name}-{heapq.heappop(self._free[name])}",
            kind.cpus,
            kind.memory_bytes,
            kind.gpus,
            kind.price_per_hour,
            warm=False,
        )
