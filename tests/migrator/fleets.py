"""Fleets for tests: random ones that are consistent, and what they are after decisions."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings as limits
from hypothesis import strategies as st

from lzy.migrator.facts import (
    DOZING,
    HIBERNATED,
    RUNNING,
    Fleet,
    NodeFacts,
    Requests,
    SessionFacts,
    Settings,
    Verdict,
    is_holding,
)
from lzy.migrator.idleness import DOZE, GIVE_GPU_BACK, HIBERNATE
from lzy.migrator.placement import need_of, place, reserve, summarise
from lzy.migrator.policy import MIGRATE, WAIT, WAKE, Decision

GIB = 2**30
IDLE = (Verdict("cpu", False, "0.0 % of a core"), Verdict("input", False, "none"))
BUSY = (Verdict("cpu", True, "98 % of a core"), Verdict("input", False, "none"))
NOW_S = 1_000_000.0

briefly = limits(max_examples=50, deadline=None)
"""For properties of whole fleets: a busy machine must not make them fail."""


def node(name: str = "n", cpus: float = 4, gib: float = 16, gpus: int = 0, **more: object):
    return NodeFacts(name, cpus, int(gib * GIB), gpus, **more)  # type: ignore[arg-type]  # whatever a test names


def session(name: str = "s", state: str = RUNNING, on: str = "n", gib: float = 1, **more: object):
    memory_bytes = int(gib * GIB)
    facts = SessionFacts(name, 1000, state, on, memory_bytes=memory_bytes,
                         peak_memory_bytes=memory_bytes)  # fmt: skip
    return facts._replace(**more)


def idle(name: str = "s", for_s: float = 3600.0, **more: object):
    return session(name, **{"idle_for_s": for_s, "verdicts": IDLE, **more})


@st.composite
def nodes(draw: st.DrawFn) -> tuple[NodeFacts, ...]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        found.append(
            NodeFacts(
                f"n{number}",
                draw(st.sampled_from([1.0, 2.0, 8.0])),
                draw(st.sampled_from([4, 8, 32])) * GIB,
                draw(st.sampled_from([0, 0, 1, 2])),
                draw(st.sampled_from([0.0, 0.08, 0.1, 1.0])),
                frozenset(draw(st.sets(st.sampled_from(["avx2", "avx512f"])))),
                draw(st.sampled_from([None, frozenset({"libc-1"}), frozenset({"libc-2"})])),
                draining=draw(st.booleans()) and draw(st.booleans()),
                reachable=draw(st.integers(0, 9)) > 0,
                moves=draw(st.sampled_from([0, 0, 1, 2])),
            )
        )
    return tuple(found)


@st.composite
def fleets(draw: st.DrawFn, settings: Settings | None = None) -> Fleet:
    """Nodes with sessions on them, none beyond what it has, as `summarise` counts it."""
    settings = settings or Settings()
    there = draw(nodes())
    room = {one.name: one for one in there}
    found = []
    until = st.sampled_from([None, None, NOW_S - 1, NOW_S + 100])
    for number in range(draw(st.integers(0, 8))):
        state = draw(
            st.sampled_from([RUNNING, RUNNING, RUNNING, DOZING, HIBERNATED, "migrating", "failed"])
        )
        quiet_s = draw(st.sampled_from([0.0, 20.0, 400.0, 5000.0]))
        gib = draw(st.sampled_from([0.5, 2, 6, 20]))
        facts = SessionFacts(
            f"s{number}",
            draw(st.sampled_from([1000, 1001])),
            state,
            "",
            NOW_S - draw(st.sampled_from([5.0, 700.0, 9000.0])),
            int(gib * GIB),
            int(gib * GIB),
            gpu_count=0,
            idle_for_s=quiet_s,
            verdicts=IDLE if quiet_s else BUSY,
            hold_until_s=draw(until),
            protected_until_s=draw(until),
            requests=Requests(
                draw(st.sampled_from([0.0, 2.0])), 0, draw(st.sampled_from([0, 0, 0, 1]))
            ),
            cpu_features=frozenset(draw(st.sets(st.sampled_from(["avx2"])))),
            files=frozenset(draw(st.sets(st.sampled_from(["libc-1"])))),
            idle_gaps_s=tuple(draw(st.lists(st.floats(30, 5000), max_size=4))),
        )
        if state == HIBERNATED or (state == DOZING and draw(st.booleans())):
            waiting = draw(st.booleans())
            facts = facts._replace(waiting_since_s=NOW_S - 3 if waiting else None)
        if state != HIBERNATED:
            need = need_of(facts, settings)._replace(gpu=0)
            found_node = place(need, room.values(), settings).node
            if found_node is None:
                continue
            gpus = min(found_node.gpus - found_node.reserved_gpus, draw(st.sampled_from([0, 1])))
            gpus = gpus if state == RUNNING else 0
            facts = facts._replace(
                node=found_node.name, gpu_count=gpus, gpu_idle_for_s=quiet_s if gpus else 0.0
            )
            if is_holding(facts):
                room[found_node.name] = reserve(need, found_node, gpus)
        found.append(facts)
    full = summarise(there, tuple(found), settings)
    others = {
        one.name: draw(st.sampled_from([0.0, 0.0, 0.3, 0.7])) * one.memory_bytes for one in there
    }
    return _count_used(full, others)


def _count_used(fleet: Fleet, others_bytes: dict[str, float]) -> Fleet:
    """With what sessions and others use on each node, as its kernel would tell it."""
    return fleet._replace(
        nodes=tuple(
            one._replace(
                used_memory_bytes=_used_bytes(fleet, one.name) + int(others_bytes[one.name])
            )
            for one in fleet.nodes
        )
    )


def _used_bytes(fleet: Fleet, name: str) -> int:
    return sum(s.memory_bytes for s in fleet.sessions if s.node == name and is_holding(s))


def carry_out(
    fleet: Fleet, decisions: Iterable[Decision], settings: Settings, now_s: float
) -> Fleet:
    """The fleet when every decision has been done at once."""
    by_name = {one.name: one for one in fleet.sessions}
    for decision in decisions:
        one = by_name[decision.session]
        if decision.action == WAIT:
            continue
        if decision.action == DOZE:
            one = one._replace(state=DOZING, since_s=now_s)
        elif decision.action == HIBERNATE:
            one = one._replace(state=HIBERNATED, node="", since_s=now_s, gpu_count=0)
        else:
            gpus = 0 if decision.action == GIVE_GPU_BACK else one.requests.gpu
            one = one._replace(
                state=RUNNING, node=decision.to, since_s=now_s, gpu_count=gpus,
                waiting_since_s=None, protected_until_s=now_s + settings.protect_after_wake_s,
            )  # fmt: skip
            if decision.action == GIVE_GPU_BACK:
                one = one._replace(requests=one.requests._replace(gpu=0))
            if decision.action in (WAKE, MIGRATE):
                one = one._replace(idle_for_s=0.0)
        by_name[decision.session] = one
    sessions = tuple(by_name.values())
    full = summarise(fleet.nodes, sessions, settings)
    others = {one.name: one.used_memory_bytes - _used_bytes(fleet, one.name) for one in fleet.nodes}
    idle_nodes = tuple(one._replace(moves=0) for one in full.nodes)
    return _count_used(full._replace(nodes=idle_nodes), others)
