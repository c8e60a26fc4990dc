"""Placement: which node a session goes to, and of every other why not.

A node must be able to carry a session (reachable, room, GPU, CPU features, the same mapped files);
of those the cheapest for its share wins, then one that is on, then the fullest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .facts import (
    Fleet,
    NodeFacts,
    SessionFacts,
    Settings,
    Usage,
    is_holding,
    settings_of,
    share_of,
)


class Need(NamedTuple):
    """What a node must have for a session."""

    cpu: float
    memory_bytes: int
    gpu: int = 0
    node: str = ""
    cpu_features: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()


class Refusal(NamedTuple):
    """Why a node cannot take a session; `busy`: it could, were others not there."""

    node: str
    reason: str
    busy: bool = False


class Placement(NamedTuple):
    """A node (None: nowhere), and why not the others."""

    node: NodeFacts | None
    refusals: tuple[Refusal, ...]


def need_of(session: SessionFacts, settings: Settings) -> Need:
    """What `session` needs: what it asks for, and the memory that it has been seen to use."""
    own = settings_of(session, settings)
    requests = session.requests
    seen_bytes = max(session.memory_bytes, session.peak_memory_bytes)
    return Need(
        requests.cpu or own.cpu_unasked,
        max(requests.memory_bytes, int(seen_bytes * own.growth)),
        requests.gpu,
        requests.node,
        session.cpu_features,
        session.files,
    )


def examine(need: Need, node: NodeFacts, settings: Settings) -> Refusal | None:
    """Why `node` cannot take one who needs `need`; None if it can."""
    name = node.name
    if need.node and need.node != name:
        return Refusal(name, f"{need.node} was asked for")
    if not node.reachable:
        return Refusal(name, "its agent does not answer")
    if node.draining:
        return Refusal(name, "it is being drained")
    if need.gpu > node.gpus:
        return Refusal(name, f"it has {_gpus(node.gpus)}, {need.gpu} asked for")
    if need.cpu > node.cpus:
        return Refusal(name, f"it has {node.cpus:g} CPUs, {need.cpu:g} needed")
    room_bytes = _room_bytes(node, settings)
    if need.memory_bytes > room_bytes:
        return Refusal(
            name, f"it has {_gib(room_bytes)} for sessions, {_gib(need.memory_bytes)} needed"
        )
    if not need.cpu_features <= node.cpu_features:
        missing = sorted(need.cpu_features - node.cpu_features)
        return Refusal(name, f"its CPU lacks {', '.join(missing[:3])}{_more(missing)}")
    if node.files is not None and not need.files <= node.files:
        missing = sorted(need.files - node.files)
        return Refusal(name, f"it has not the same {missing[0]}{_more(missing, shown=1)}")
    if need.gpu > node.gpus - node.reserved_gpus:
        return Refusal(name, f"{node.gpus - node.reserved_gpus} of its {node.gpus} GPUs free", True)
    if need.cpu > node.cpus - node.reserved_cpu + 1e-9:
        return Refusal(name, f"{node.cpus - node.reserved_cpu:g} of {node.cpus:g} CPUs free", True)
    free_bytes = room_bytes - max(node.reserved_memory_bytes, node.used_memory_bytes)
    if need.memory_bytes > free_bytes:
        return Refusal(
            name, f"{_gib(max(free_bytes, 0))} free, {_gib(need.memory_bytes)} needed", True
        )
    return None


def place(need: Need, nodes: Iterable[NodeFacts], settings: Settings, stay: str = "") -> Placement:
    """The node for `need`; `stay` names the one it is on, which wins if it is no dearer."""
    best: NodeFacts | None = None
    best_rank: tuple[float, bool, bool, float, str] | None = None
    refusals = []
    for node in nodes:
        refusal = examine(need, node, settings)
        if refusal is not None:
            refusals.append(refusal)
            continue
        free = 1 - node.reserved_memory_bytes / node.memory_bytes
        price = round(share_price(need, node), 9)
        rank = (price, node.name != stay, not node.warm, free, node.name)
        if best_rank is None or rank < best_rank:
            best, best_rank = node, rank
    return Placement(best, tuple(refusals))


def share_price(need: Need, node: NodeFacts) -> float:
    """What one who needs `need` costs on `node`, by the hour."""
    return node.price_per_hour * share_of(node, need.cpu, need.memory_bytes, need.gpu)


def reserve(need: Need, node: NodeFacts, gpus: int) -> NodeFacts:
    """`node` with one more on it."""
    return node._replace(
        reserved_cpu=node.reserved_cpu + need.cpu,
        reserved_memory_bytes=node.reserved_memory_bytes + need.memory_bytes,
        reserved_gpus=node.reserved_gpus + gpus,
        used_memory_bytes=node.used_memory_bytes + need.memory_bytes
        if node.used_memory_bytes
        else 0,
        warm=True,
    )


def release(need: Need, node: NodeFacts, session: SessionFacts) -> NodeFacts:
    """`node` without `session`, if that held room there."""
    if not is_holding(session):
        return node
    return node._replace(
        reserved_cpu=node.reserved_cpu - need.cpu,
        reserved_memory_bytes=node.reserved_memory_bytes - need.memory_bytes,
        reserved_gpus=node.reserved_gpus - session.gpu_count,
        used_memory_bytes=max(node.used_memory_bytes - session.memory_bytes, 0),
    )


def summarise(
    nodes: tuple[NodeFacts, ...], sessions: tuple[SessionFacts, ...], settings: Settings
) -> Fleet:
    """A `Fleet` of all `sessions`, with reservations and usage counted from them."""
    cpu: dict[str, float] = {}
    memory_bytes: dict[str, int] = {}
    gpus: dict[str, int] = {}
    users: dict[int, Usage] = {}
    for session in sessions:
        if not is_holding(session):
            continue
        need, node = need_of(session, settings), session.node
        cpu[node] = cpu.get(node, 0.0) + need.cpu
        memory_bytes[node] = memory_bytes.get(node, 0) + need.memory_bytes
        gpus[node] = gpus.get(node, 0) + session.gpu_count
        had = users.get(session.owner_uid, Usage())
        users[session.owner_uid] = Usage(
            had.sessions + 1,
            had.cpu + need.cpu,
            had.memory_bytes + need.memory_bytes,
            had.gpus + session.gpu_count,
        )
    counted = tuple(
        node._replace(
            reserved_cpu=cpu.get(node.name, 0.0),
            reserved_memory_bytes=memory_bytes.get(node.name, 0),
            reserved_gpus=gpus.get(node.name, 0),
        )
        for node in nodes
    )
    return Fleet(counted, sessions, users)


def _room_bytes(node: NodeFacts, settings: Settings) -> int:
    return int(node.memory_bytes * settings.relief_share)


def _gib(length_bytes: float) -> str:
    return f"{length_bytes / 2**30:.3g} GiB"


def _gpus(number: int) -> str:
    return f"{number or 'no'} GPU{'' if number == 1 else 's'}"


def _more(names: list[str], shown: int = 3) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""
