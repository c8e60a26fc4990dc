"""What agents say (documents of their interface) as facts that decisions are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .facts import (
    DOZING,
    NEVER_S,
    RUNNING,
    Fleet,
    NodeFacts,
    Requests,
    SessionFacts,
    Settings,
    Slack,
    Verdict,
)
from .placement import summarise

if TYPE_CHECKING:
    from .fleet import Look

UNKNOWN_NODE = {
    "cpus": 1.0, "memory_bytes": 1, "gpus": 0, "available_memory_bytes": 0, "draining": False,
    "price_per_hour": 0.0, "operations": 0,
}  # fmt: skip
"""Of a node that has never answered."""


def read_session(
    document: Mapping[str, Any], slack: Slack | None = None, ahead_s: float = 0.0
) -> SessionFacts:
    """The facts in what an agent says of a session; its clock is `ahead_s` ahead of ours."""

    def ours(at_s: float | None) -> float | None:
        return None if at_s is None else at_s - ahead_s

    waiting = ours(document["waiting_since_unix_s"])
    return SessionFacts(
        name=document["name"],
        owner_uid=document["owner_uid"],
        state=document["state"],
        node=document["node"] if document["pid"] else "",
        since_s=document["since_unix_s"] - ahead_s,
        memory_bytes=document["memory_bytes"],
        peak_memory_bytes=document["peak_memory_bytes"],
        memory_limit_bytes=document["memory_limit_bytes"],
        image_bytes=document["image_bytes"],
        cpu_share=document["cpu_share"],
        gpu_count=document["gpu_count"],
        gpu_share=document["gpu_share"],
        gpu_idle_for_s=0.0
        if any(v["probe"] == "gpu" and v["active"] for v in document["verdicts"])
        else document["idle_for_s"],  # who has none open computes on none
        idle_for_s=document["idle_for_s"],
        verdicts=tuple(Verdict(**verdict) for verdict in document["verdicts"]),
        hold_until_s=ours(document["hold_until_unix_s"]),
        protected_until_s=ours(document["protected_until_unix_s"]),
        protected_why=document["protected_why"],
        waiting_since_s=waiting if document["state"] in (RUNNING, DOZING) else None,
        idle_gaps_s=tuple(document["idle_gaps_s"]),
        slack=slack or Slack(),
        requests=Requests(**document["requests"]),
    )


def read_node(document: Mapping[str, Any], *, reachable: bool = True) -> NodeFacts:
    """The facts in what an agent says of its node; what is reserved is counted elsewhere."""
    return NodeFacts(
        name=document["name"],
        cpus=float(document["cpus"]),
        memory_bytes=document["memory_bytes"],
        gpus=document["gpus"],
        price_per_hour=document["price_per_hour"],
        reachable=reachable,
        draining=document["draining"],
        used_memory_bytes=document["memory_bytes"] - document["available_memory_bytes"],
        moves=document["operations"],
    )


def read_fleet(
    looks: Iterable[Look], slacks: Mapping[str, Slack] | None = None, now_s: float = 0.0
) -> Fleet:
    """The whole fleet: nodes that are silent as they were last, and not to be reached.

    Each node tells times by its own wall clock, and what that says: they become times of the clock
    by which it is `now_s`.
    """
    nodes, sessions = [], []
    for look in looks:
        known = {**UNKNOWN_NODE, **look.node, "name": look.member.name}
        nodes.append(read_node(known, reachable=not look.failure))
        for document in look.sessions:
            slack = (slacks or {}).get(document["name"])
            sessions.append(read_session(document, slack, look.now_unix_s - now_s))
    settings = read_settings(list(looks))
    return summarise(tuple(nodes), tuple(sessions), settings)


def read_settings(looks: list[Look]) -> Settings:
    """The rules' figures as nodes and sessions have them; None of them is never."""

    def figures(found: Mapping[str, Any]) -> dict[str, float]:
        return {
            name: NEVER_S if found[name] is None else found[name]
            for name in ("doze_after_s", "hibernate_after_s")
        }

    nodes = [look.node["settings"] for look in looks if look.node]
    if not nodes:
        return Settings()
    return Settings(
        sample_s=min(node["sample_s"] for node in nodes),
        doze_after_s=figures(nodes[0])["doze_after_s"],
        hibernate_after_s=figures(nodes[0])["hibernate_after_s"],
        protect_after_wake_s=nodes[0]["after_wake_s"],
        moves_a_node=int(nodes[0]["operations"]),
        cpu_unasked=0.0,
        per_session={
            session["name"]: figures(session["settings"])
            for look in looks
            for session in look.sessions
        },
    )
