"""Placement: which node a session goes to, and of every other why not.

A node must be able to carry a session (reachable, room, GPU, CPU features, the same mapped files);
of those the cheapest for its share wins, then one that is on, then one without a GPU that nobody
asks for, then the fullest.
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
    obstacle = _find_obstacle(need, node, settings)
    return _describe(obstacle, need, node, settings) if obstacle else None


def place(
    need: Need,
    nodes: Iterable[NodeFacts],
    settings: Settings,
    *,
    explain: bool = True,
) -> Placement:
    """The node for `need`. Without `explain`, refusals are only told when none was found."""
    best: NodeFacts | None = None
    best_rank: tuple[float, bool, bool, float, str] | None = None
    refused = []
    for node in nodes:
        obstacle = _find_obstacle(need, node, settings)
        if obstacle:
            refused.append((obstacle, node))
            continue
        free = 1 - node.reserved_memory_bytes / node.memory_bytes
        price = round(share_price(need, node), 9)
        spares_gpu = bool(node.gpus) and not need.gpu  # who needs it may come
        rank = (price, not node.warm, spares_gpu, free, node.name)
        if best_rank is None or rank < best_rank:
            best, best_rank = node, rank
    if best is not None and not explain:
        return Placement(best, ())
    refused.sort(key=lambda pair: pair[1].name)
    refusals = tuple(_describe(obstacle, need, node, settings) for obstacle, node in refused)
    return Placement(best, refusals)


def _find_obstacle(need: Need, node: NodeFacts, settings: Settings) -> str:
    """The first thing that keeps `need` off `node`; "" if nothing does."""
    if need.node and need.node != node.name:
        return "other"
    if not node.reachable:
        return "silent"
    if node.draining:
        return "draining"
    room_bytes = node.memory_bytes * settings.relief_share
    if need.gpu > node.gpus:
        return "gpus"
    if need.cpu > node.cpus:
        return "cpus"
    if need.memory_bytes > room_bytes:
        return "memory"
    if need.cpu_features and not need.cpu_features <= node.cpu_features:
        return "features"
    if need.files and node.files is not None and not need.files <= node.files:
        return "files"
    if need.gpu > node.gpus - node.reserved_gpus:
        return "busy gpus"
    if need.cpu > node.cpus - node.reserved_cpu + 1e-9:
        return "busy cpus"
    if need.memory_bytes > room_bytes - max(node.reserved_memory_bytes, node.used_memory_bytes):
        return "busy memory"
    return ""


def _describe(obstacle: str, need: Need, node: NodeFacts, settings: Settings) -> Refusal:
    """An obstacle in words."""
    room_bytes = node.memory_bytes * settings.relief_share
    if obstacle == "other":
        words = f"{need.node} was asked for"
    elif obstacle == "silent":
        words = "its agent does not answer"
    elif obstacle == "draining":
        words = "it is being drained"
    elif obstacle == "gpus":
        words = f"it has {_gpus(node.gpus)}, {need.gpu} asked for"
    elif obstacle == "cpus":
        words = f"it has {node.cpus:g} CPUs, {need.cpu:g} needed"
    elif obstacle == "memory":
        words = f"it has {_size(room_bytes)} for sessions, {_size(need.memory_bytes)} needed"
    elif obstacle == "features":
        missing = sorted(need.cpu_features - node.cpu_features)
        words = f"its CPU lacks {', '.join(missing[:3])}{_more(missing)}"
    elif obstacle == "files":
        missing = sorted(need.files - (node.files or frozenset()))
        words = f"it has not the same {missing[0]}{_more(missing, shown=1)}"
    elif obstacle == "busy gpus":
        words = f"{node.gpus - node.reserved_gpus} of its {_gpus(node.gpus)} free"
    elif obstacle == "busy cpus":
        words = f"{node.cpus - node.reserved_cpu:g} of its {node.cpus:g} CPUs free"
    else:
        free_bytes = room_bytes - max(node.reserved_memory_bytes, node.used_memory_bytes)
        words = f"{_size(max(free_bytes, 0))} free, {_size(need.memory_bytes)} needed"
    return Refusal(node.name, words, obstacle.startswith("busy"))


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


def _size(length_bytes: float) -> str:
    if length_bytes < 2**30:
        return f"{length_bytes / 2**20:.0f} MiB"
    return f"{length_bytes / 2**30:.3g} GiB"


def _gpus(number: int) -> str:
    return f"{number or 'no'} GPU{'' if number == 1 else 's'}"


def _more(names: list[str], shown: int = 3) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""
