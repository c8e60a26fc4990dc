"""What is done with a fleet: each rule by an example, and what must hold for every fleet."""

from __future__ import annotations

import random

from fleets import BUSY, GIB, NOW_S, briefly, carry_out, fleets, idle, node, session
from hypothesis import given, settings
from hypothesis import strategies as st

from lzy.migrator.facts import (
    DOZING,
    HIBERNATED,
    RUNNING,
    UNSETTLED,
    WOKE,
    Fleet,
    NodeFacts,
    Requests,
    SessionFacts,
    Settings,
)
from lzy.migrator.idleness import DOZE, GIVE_GPU_BACK, HIBERNATE
from lzy.migrator.placement import summarise
from lzy.migrator.policy import EVICTIONS, MIGRATE, WAIT, WAKE, Decision, decide

S = Settings()


def _fleet(nodes: list[NodeFacts], sessions: list[SessionFacts], rules: Settings = S) -> Fleet:
    fleet = summarise(tuple(nodes), tuple(sessions), rules)
    used = tuple(
        one._replace(
            used_memory_bytes=sum(
                s.memory_bytes for s in sessions if s.node == one.name and s.state == RUNNING
            )
        )
        for one in fleet.nodes
    )
    return fleet._replace(nodes=used)


def _decide(
    nodes: list[NodeFacts], sessions: list[SessionFacts], rules: Settings = S
) -> list[Decision]:
    return decide(_fleet(nodes, sessions, rules), rules, NOW_S)


def _what(decisions: list[Decision]) -> list[tuple[str, str, str]]:
    return [(one.action, one.session, one.to) for one in decisions]


def waiting(name: str = "s", **more: object) -> SessionFacts:
    return session(name, **{"state": HIBERNATED, "on": "", "waiting_since_s": NOW_S - 1, **more})


# -- relief ---------------------------------------------------------------------------------------


def test_pressure_has_the_idle_doze_before_their_window() -> None:
    """A node at 95 % of its memory: who has been idle for a minute dozes now."""
    found = _decide(
        [node(gib=10)],
        [idle("i", for_s=60.0, gib=3), session("a", gib=6.5, verdicts=BUSY)],
    )
    assert _what(found) == [(DOZE, "i", "n")]
    assert "95% full" in found[0].reason


def test_what_relief_has_done_is_not_done_again() -> None:
    """A session that dozes for its node's sake is past its window as well: it dozes once."""
    found = _decide([node(gib=10)], [idle("i", gib=9.5)])
    assert _what(found) == [(DOZE, "i", "n")]


def test_who_is_told_first_is_no_matter() -> None:
    """Of several that may go, one goes by its name, not by its place in a list."""
    sessions = [idle(name, for_s=60.0) for name in ("c", "a", "b")]
    found = _decide([node(draining=True)], sessions, S._replace(moves_a_node=1))
    assert _what(found) == [(HIBERNATE, "a", "")]


def test_who_is_held_or_protected_is_not_put_to_sleep_for_others() -> None:
    """Neither for a full node nor for who waits; to be moved before the kernel kills is no harm."""
    for more in ({"hold_until_s": NOW_S + 9}, {"protected_until_s": NOW_S + 9}):
        kept = idle("i", for_s=60.0, gib=9.5, **more)
        assert _what(_decide([node(gib=10)], [kept])) == []
        assert _what(_decide([node(gib=10), node("x", gib=32)], [kept])) == [(MIGRATE, "i", "x")]
        found = _decide([node(gib=12)], [kept._replace(memory_bytes=8 * GIB), waiting("w", gib=2)])
        assert _what(found) == [(WAIT, "w", "")]


def test_pressure_moves_the_active_before_the_kernel_kills() -> None:
    """With nobody idle, a session moves to a node that can take it; with none, nothing is done."""
    busy = [session("a", gib=6, verdicts=BUSY), session("b", gib=3.5, verdicts=BUSY)]
    found = _decide([node(gib=10), node("roomy", gib=32)], busy)
    assert _what(found) == [(MIGRATE, "a", "roomy")]
    assert _what(_decide([node(gib=10)], busy)) == []


def test_who_nears_its_own_limit_moves_to_twice_the_room() -> None:
    """The kernel would kill a session at its cgroup's limit, however empty the node is."""
    near = session("a", gib=3.8, verdicts=BUSY, memory_limit_bytes=4 * GIB)
    nodes = [node(gib=16), node("seven", gib=7), node("large", gib=32)]
    found = _decide(nodes, [near])
    assert _what(found) == [(MIGRATE, "a", "large")]
    assert "95% of its limit" in found[0].reason


# -- requests and waiting -------------------------------------------------------------------------


def test_a_request_for_a_gpu_moves_and_says_why_not_elsewhere() -> None:
    """`lzy migrate --gpu`: the cheapest node with a free GPU, and of the others the reason."""
    nodes = [
        node(),
        node("taken", gpus=1, reserved_gpus=1),
        node("dear", gpus=1, price_per_hour=9.0),
        node("cheap", gpus=1, price_per_hour=1.0),
    ]
    asks = session("a", verdicts=BUSY, requests=Requests(gpu=1))
    other = session("b", on="taken", gpu_count=1, gpu_share=1.0, verdicts=BUSY)
    found = _decide(nodes, [asks, other])
    assert _what(found) == [(MIGRATE, "a", "cheap")]
    assert ("taken", "0 of its 1 GPU free") in [(r.node, r.reason) for r in found[0].refusals]


def test_without_a_free_gpu_it_waits_and_is_told() -> None:
    """Nothing is taken from who computes; the one who asked learns which node is in the way."""
    other = session(
        "b", on="g", gpu_count=1, gpu_share=1.0, verdicts=BUSY, requests=Requests(gpu=1)
    )
    asks = session("a", verdicts=BUSY, requests=Requests(gpu=1))
    found = _decide([node(), node("g", gpus=1)], [asks, other])
    assert _what(found) == [(WAIT, "a", "")]
    assert found[0].refusals[0].busy


def test_an_idle_gpu_is_given_back_early_to_who_waits() -> None:
    """Waiting work takes a GPU that nobody has used for a minute, not only after ten."""
    resting = idle("b", for_s=60.0, on="g", gpu_count=1, gpu_idle_for_s=60.0)
    asks = session("a", verdicts=BUSY, requests=Requests(gpu=1))
    found = _decide([node(), node("g", gpus=1)], [asks, resting])
    assert (GIVE_GPU_BACK, "b", "n") in _what(found)
    assert (WAIT, "a", "") in _what(found)


def test_a_doze_ends_where_it_began_if_there_is_room() -> None:
    """No move for who is already there, though another node is cheaper."""
    nodes = [node(price_per_hour=1.0), node("cheap", price_per_hour=0.1)]
    assert _what(_decide(nodes, [waiting(state=DOZING, on="n")])) == [(WAKE, "s", "n")]
    full = [session("x", gib=11, verdicts=BUSY)]
    found = _decide(nodes, [waiting(state=DOZING, on="n", gib=2), *full])
    assert _what(found) == [(WAKE, "s", "cheap")]


def test_waiting_work_makes_the_idle_doze_early() -> None:
    """The only node is full of idle sessions: as few as suffice doze, the longest idle first."""
    sessions = [idle(f"i{n}", for_s=100.0 + n, gib=3.5) for n in range(3)]
    found = _decide([node(gib=16)], [*sessions, waiting("w", gib=3)])
    assert _what(found) == [(DOZE, "i2", "n"), (WAIT, "w", "")]
    after = carry_out(_fleet([node(gib=16)], [*sessions, waiting("w", gib=3)]), found, S, NOW_S)
    assert (WAKE, "w", "n") in _what(decide(after, S, NOW_S + 15))


def test_who_holds_least_goes_first() -> None:
    """Room for one: not for the user who has two running, though they asked earlier."""
    mine = [session(f"m{n}", verdicts=BUSY) for n in range(2)]
    early = waiting("early", waiting_since_s=NOW_S - 500)
    late = waiting("late", owner_uid=2)
    found = _decide([node(cpus=3)], [*mine, early, late])
    assert _what(found)[:2] == [(WAKE, "late", "n"), (WAIT, "early", "")]


def test_among_equals_who_waits_longest_goes_first() -> None:
    """And after one has got room, their user holds more than the others."""
    found = _decide(
        [node(cpus=2)],
        [
            waiting("a", waiting_since_s=NOW_S - 9),
            waiting("b", waiting_since_s=NOW_S - 8),
            waiting("c", waiting_since_s=NOW_S - 7, owner_uid=2),
        ],
    )
    woken = [one.session for one in found if one.action == WAKE]
    assert woken == ["a", "c"]


def test_quotas_are_kept_and_named() -> None:
    """A user at their quota waits, whatever room there is; others do not."""
    rules = S._replace(user_sessions=1, per_user={7: {"user_sessions": 2}})
    running = [session("r", verdicts=BUSY), session("q", owner_uid=7, verdicts=BUSY)]
    found = _decide([node()], [*running, waiting("a"), waiting("b", owner_uid=7)], rules)
    assert set(_what(found)) == {(WAIT, "a", ""), (WAKE, "b", "n")}
    assert "1 of 1 sessions running" in next(one.reason for one in found if one.action == WAIT)


def test_what_no_node_can_ever_take_is_told_apart() -> None:
    """Nobody is evicted for a session that fits nowhere."""
    found = _decide([node(gib=4)], [idle("i"), waiting("huge", gib=100)])
    assert (WAIT, "huge", "") in _what(found)
    assert "ever" in next(one.reason for one in found if one.action == WAIT)
    assert not any(one.session == "i" and "huge" in one.reason for one in found)


# -- leaving and stepping down --------------------------------------------------------------------


def test_a_drained_node_empties() -> None:
    """The idle hibernate, the dozing too, the active move; two at once."""
    sessions = [
        idle("a", for_s=60.0),
        session("b", state=DOZING),
        session("c", verdicts=BUSY),
    ]
    nodes = [node(draining=True), node("other")]
    found = _decide(nodes, sessions, S._replace(moves_a_node=9))
    assert set(_what(found)) == {
        (HIBERNATE, "a", ""),
        (HIBERNATE, "b", ""),
        (MIGRATE, "c", "other"),
    }
    assert len(_decide(nodes, sessions)) == 2


def test_gpu_first_then_memory_then_the_process() -> None:
    """Three sessions past their windows, each on its rung."""
    nodes = [node(), node("g", gpus=1)]
    sessions = [
        idle("a", for_s=1900.0, state=DOZING),
        idle("b", for_s=400.0),
        idle("c", for_s=700.0, on="g", gpu_count=1, gpu_idle_for_s=700.0),
    ]
    found = _decide(nodes, sessions, S._replace(moves_a_node=9))
    assert _what(found) == [(GIVE_GPU_BACK, "c", "n"), (DOZE, "b", "n"), (HIBERNATE, "a", "")]


def test_a_gpu_without_a_node_to_leave_it_for_is_given_back_by_hibernating() -> None:
    """If it is idle; a session that computes on the CPU stays."""
    on = node("g", gpus=1)
    resting = idle("c", for_s=700.0, on="g", gpu_count=1, gpu_idle_for_s=700.0)
    assert _what(_decide([on], [resting])) == [(HIBERNATE, "c", "")]
    working = resting._replace(verdicts=BUSY, idle_for_s=0.0)
    assert _what(_decide([on], [working])) == []


def test_size_goes_before_memory_where_that_saves() -> None:
    """An idle session on a dear node moves to a cheap one; for less than 30 % it dozes."""
    sessions = [idle("a", since_s=NOW_S - 9000)]
    cheap = node("cheap", price_per_hour=0.2)
    found = _decide([node(price_per_hour=1.0), cheap], sessions)
    assert _what(found) == [(MIGRATE, "a", "cheap")]
    assert "80% cheaper" in found[0].reason
    assert _what(_decide([node(price_per_hour=0.25), cheap], sessions)) == [(DOZE, "a", "n")]
    free = [node(), node("other")]
    assert _what(_decide(free, [idle("a", gib=8, since_s=NOW_S - 9000)])) == [(DOZE, "a", "n")]
    fresh = [idle("a", since_s=NOW_S - 60)]
    assert _what(_decide([node(price_per_hour=1.0), cheap], fresh)) == [(DOZE, "a", "n")]


def test_what_merely_saves_is_bounded() -> None:
    """Ten sessions past their window: two at once on a node, and so many in the fleet."""
    sessions = [idle(f"s{n}", gib=0.1) for n in range(10)]
    roomy = node(cpus=64, gib=64)
    assert len(_decide([roomy], sessions)) == S.moves_a_node
    assert len(_decide([roomy._replace(moves=1)], sessions)) == 1
    rules = S._replace(moves_a_node=9, moves_at_once=3)
    assert len(_decide([roomy], sessions, rules)) == 3


def test_nothing_is_begun_on_a_node_that_does_not_answer() -> None:
    """Its sessions may be anywhere in whatever they were doing."""
    assert _decide([node(reachable=False)], [idle()]) == []


def test_who_is_waited_for_is_not_put_to_sleep() -> None:
    """Input that arrived while it was a candidate calls the eviction off."""
    assert _decide([node()], [idle(waiting_since_s=NOW_S - 1)]) == []


# -- for every fleet ------------------------------------------------------------------------------


@briefly
@given(fleets())
def test_nothing_is_placed_beyond_what_a_node_has(fleet: Fleet) -> None:
    """After all decisions no node has more reserved than it has, in CPUs, memory or GPUs."""
    after = carry_out(fleet, decide(fleet, S, NOW_S), S, NOW_S)
    for before, one in zip(fleet.nodes, after.nodes, strict=True):
        assert one.reserved_cpu <= max(one.cpus, before.reserved_cpu) + 1e-6
        assert one.reserved_memory_bytes <= max(one.memory_bytes, before.reserved_memory_bytes)
        assert one.reserved_gpus <= max(one.gpus, before.reserved_gpus)


@briefly
@given(fleets())
def test_no_session_is_decided_about_twice(fleet: Fleet) -> None:
    """One decision each, from where it is, to a node that exists; a wake only of who sleeps."""
    by_name = {one.name: one for one in fleet.sessions}
    names = {one.name for one in fleet.nodes}
    found = decide(fleet, S, NOW_S)
    assert len({one.session for one in found}) == len(found)
    for one in found:
        was = by_name[one.session]
        assert one.node == was.node
        assert one.to in names | {""}
        assert was.state not in UNSETTLED | {"failed"}
        if one.action == WAKE:
            assert was.state in (DOZING, HIBERNATED)
            assert was.waiting_since_s is not None
        if one.action in (MIGRATE, GIVE_GPU_BACK, DOZE):
            assert was.state == RUNNING
        if one.action in (MIGRATE, GIVE_GPU_BACK):
            assert one.to not in ("", one.node)


@briefly
@given(fleets())
def test_held_and_protected_sessions_keep_what_they_have(fleet: Fleet) -> None:
    """Nothing is evicted that is held, protected or active; a GPU goes only when unused."""
    by_name = {one.name: one for one in fleet.sessions}
    for one in decide(fleet, S, NOW_S):
        if one.action in EVICTIONS:
            was = by_name[one.session]
            assert not (was.hold_until_s or 0) > NOW_S
            if one.action != DOZE or was.protected_why != WOKE:
                assert not (was.protected_until_s or 0) > NOW_S
            assert was.gpu_share == 0
            if one.action != GIVE_GPU_BACK and was.state == RUNNING:
                assert not any(verdict.active for verdict in was.verdicts)


@briefly
@given(fleets(), st.randoms(use_true_random=False))
def test_equal_facts_give_equal_decisions(fleet: Fleet, dice: random.Random) -> None:
    """Again, and in whatever order nodes and sessions are told."""
    nodes, sessions = list(fleet.nodes), list(fleet.sessions)
    dice.shuffle(nodes)
    dice.shuffle(sessions)
    shuffled = fleet._replace(nodes=tuple(nodes), sessions=tuple(sessions))
    assert decide(fleet, S, NOW_S) == decide(fleet, S, NOW_S) == decide(shuffled, S, NOW_S)


@given(fleets())
@settings(max_examples=25, deadline=None)
def test_nothing_goes_to_and_fro(fleet: Fleet) -> None:
    """While needs stay as they are, a session moves at most twice, never back, and all rest then.

    Once to where what it asks for is, or away from pressure; once to where it is cheaper.
    """
    now_s = NOW_S
    been: dict[str, list[str]] = {one.name: [one.node] for one in fleet.sessions}
    last: list[Decision] = []
    for _ in range(90):
        last = [one for one in decide(fleet, S, now_s) if one.action != WAIT]
        for one in last:
            if one.action == MIGRATE:
                assert one.to not in been[one.session]
                been[one.session].append(one.to)
                assert len(been[one.session]) <= 3
        fleet = carry_out(fleet, last, S, now_s)
        now_s += 60
        fleet = fleet._replace(
            sessions=tuple(
                one._replace(idle_for_s=one.idle_for_s + 60, gpu_idle_for_s=one.gpu_idle_for_s + 60)
                if one.verdicts and not any(verdict.active for verdict in one.verdicts)
                else one
                for one in fleet.sessions
            )
        )
    assert last == []
