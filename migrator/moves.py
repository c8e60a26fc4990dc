"""Moves that somebody asks for: which node, why not the others, and having it done."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..checkpoint.errors import Busy, LzyError, NotFound
from .facts import Fleet as Facts
from .facts import SessionFacts, Settings
from .fleet import Look
from .placement import Placement, examine, need_of, place
from .reading import read_fleet, read_settings


class Choice(NamedTuple):
    """Where a session would go: `node` is empty if nowhere; in words, why, and why not others."""

    node: str
    address: str
    why: str
    refusals: list[dict[str, Any]]
    can_come: bool
    """Whether waiting may help: a node could take it, were others not there."""


class Wish(NamedTuple):
    """What somebody wants for a session; zeros and "" want nothing in particular."""

    cpu: float = 0.0
    memory_bytes: int = 0
    gpu: int | None = None
    node: str = ""

    def on_top_of(self, requests: dict[str, Any]) -> dict[str, Any]:
        """What the session asks for from now on; `node` is for this move only."""
        wanted = {
            "cpu": self.cpu or requests.get("cpu", 0.0),
            "memory_bytes": self.memory_bytes or requests.get("memory_bytes", 0),
            "gpu": requests.get("gpu", 0) if self.gpu is None else self.gpu,
        }
        return {name: value for name, value in wanted.items() if value}


def find_session(looks: list[Look], name: str) -> tuple[Look, dict[str, Any]]:
    """The session and the node that has it. Raises NotFound."""
    for look in looks:
        for session in look.sessions:
            if session["name"] == name:
                return look, session
    silent = [look.member.name for look in looks if look.failure]
    raise NotFound(
        f"there is no session {name[:200]}",
        remedy=f"{', '.join(silent)} does not answer" if silent else "see lzy ps",
    )


def choose(looks: list[Look], session: dict[str, Any], wish: Wish) -> Choice:
    """The node for a session, by the rules of `placement`; never the one that it is on."""
    facts: Facts = read_fleet(looks)
    settings: Settings = read_settings(looks)
    own = next(s for s in facts.sessions if s.name == session["name"])
    here = session["node"]
    if wish.node == here:
        raise Busy(f"session {own.name} is on {here} already", remedy="see lzy nodes")
    requests = own.requests._replace(
        node=wish.node,
        gpu=own.requests.gpu if wish.gpu is None else wish.gpu,
        cpu=wish.cpu or own.requests.cpu,
        memory_bytes=wish.memory_bytes or own.requests.memory_bytes,
    )
    moved: SessionFacts = own._replace(requests=requests)
    need = need_of(moved, settings)
    others = [node for node in facts.nodes if node.name != here]
    found: Placement = place(need, others, settings)
    refusals = [refusal._asdict() for refusal in found.refusals]
    if found.node is None:
        if not others:
            words = "there is no other node"
        else:
            words = "; ".join(f"{r['node']}: {r['reason']}" for r in refusals)
        return Choice("", "", words, refusals, any(r["busy"] for r in refusals))
    name = found.node.name
    address = next(look.member.address for look in looks if look.member.name == name)
    words = "it was asked for" if wish.node else _praise(found, need.gpu, others)
    return Choice(name, address, words, refusals, True)


def choose_for_wake(looks: list[Look], look: Look, session: dict[str, Any]) -> Choice | None:
    """Where a session that sleeps on the node of `look` wakes, if not there.

    That node is drained, or has no room for it now and another has.
    """
    if look.node.get("draining"):
        return choose(looks, session, Wish())
    if session["state"] != "hibernated":
        return None
    facts, settings = read_fleet(looks), read_settings(looks)
    own = next(s for s in facts.sessions if s.name == session["name"])
    here = next(node for node in facts.nodes if node.name == session["node"])
    refusal = examine(need_of(own, settings), here, settings)
    if refusal is None or not (choice := choose(looks, session, Wish())).node:
        return None
    words = f"{here.name} has no room for it: {refusal.reason}"
    return choice._replace(why=words, refusals=[refusal._asdict(), *choice.refusals])


def _praise(found: Placement, gpus: int, others: list[Any]) -> str:
    assert found.node is not None
    what = f"has {'a' if gpus == 1 else gpus} free GPU{'s' * (gpus > 1)}" if gpus else "has room"
    if len(others) - len(found.refusals) == 1:
        return f"it is the only other node that {what}"
    return f"it is the cheapest that {what}"


def refuse(choice: Choice, name: str, wish: Wish) -> LzyError:
    """The error for a session that can go nowhere now."""
    if wish.gpu:
        what = "no other node has a free GPU" if wish.gpu == 1 else f"none has {wish.gpu} free GPUs"
        words = f"{what} for session {name}: {choice.why}"
    else:
        words = f"no other node can take session {name}: {choice.why}"
    remedy = f"lzy migrate {name} --wait moves it when there is room" if choice.can_come else ""
    return Busy(words, remedy=remedy or "see lzy nodes")


def migrate_body(choice: Choice, session: dict[str, Any], wish: Wish) -> dict[str, Any]:
    """What the agent that has the session is told."""
    return {
        "node": choice.node,
        "address": choice.address,
        "requests": wish.on_top_of(session["requests"]),
        "reason": f"{choice.node}: {choice.why}"[:1000],
    }
