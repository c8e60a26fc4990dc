"""The simulator: exact where it can be worked out by hand, conserving where it cannot."""

from __future__ import annotations

import pytest

from lzy.migrator.facts import NEVER_S, Settings
from lzy.migrator.idleness import first_reply
from lzy.migrator.placement import summarise
from lzy.migrator.simulate import Simulation
from lzy.migrator.stock import DEFAULT_FLEET, parse_fleet
from lzy.migrator.tally import Tally
from lzy.migrator.traces import BUSY, END, START, Event, make_trace
from lzy.migrator.world import Policy, World, always_on, fixed_timeout

GIB = 2**30
PLAIN = Settings(adaptive=False)
QUICK = World(node_start_s=0.0, spare_nodes=0, pause_s=300.0)
KINDS = parse_fleet("small:2cpu:8G:x10:1.0/h,gpu:2cpu:8G:1gpu:x2:10/h")


def _run(policy: Policy, events: list[Event], world: World = QUICK, days: float = 1) -> Tally:
    simulation = Simulation(policy, KINDS, world, days)
    simulation.feed(events)
    return simulation.finish(days * 86400)


def _bursts(*begins_s: float, lasts_s: float = 60.0, gpu: int = 0) -> list[Event]:
    events = [Event(begins_s[0], START, "a", 1)]
    events += [Event(at_s, BUSY, "a", 1, lasts_s, GIB, gpu) for at_s in begins_s]
    return events


def test_always_on_holds_from_start_to_end() -> None:
    """Ten hours held, two minutes computed, the pause of one minute between them worked."""
    events = [*_bursts(3600, 3720), Event(39600, END, "a", 1)]
    tally = _run(always_on(), events)
    assert tally.held_s == 36000
    assert tally.computing_s == pytest.approx(120, abs=3)  # from when the kernel has started
    assert tally.running_s == pytest.approx(180, abs=3)
    assert tally.share_cost == pytest.approx(10 * 0.5)  # a core of two, at 1.0 an hour
    assert tally.node_cost == pytest.approx(10 + 600 / 3600)
    assert tally.by_hour()[1] == pytest.approx(180 / 3600, abs=0.001)
    assert tally.by_hour()[12] is None


def test_a_long_pause_is_held_until_it_dozes() -> None:
    """Five minutes, to the next look, and the time to write a GiB; nothing of it was work."""
    tally = _run(Policy("x", PLAIN), _bursts(3600, 20000))
    doze_s = GIB / PLAIN.doze_bytes_per_s
    kernel_s = QUICK.kernel_start_s
    first_s = 60 + kernel_s + 300 + doze_s  # from its start to its first doze
    second_s = first_reply(GIB, PLAIN) + 60 + 300 + GIB / PLAIN.doze_again_bytes_per_s
    assert tally.held_s == pytest.approx(first_s + second_s, abs=2 * PLAIN.sample_s)
    assert tally.running_s == tally.computing_s == 120
    assert tally.actions == {"wake": 2, "doze": 2, "hibernate": 2}
    assert tally.waits_s == pytest.approx([first_reply(GIB, PLAIN), kernel_s])


def test_a_culler_kills_and_the_user_computes_again() -> None:
    """An hour idle: the kernel is gone, and a quarter of what it had computed is computed again."""
    tally = _run(fixed_timeout(), _bursts(3600, 20000, lasts_s=400.0))
    assert tally.killed == 2  # the second time, nobody came back
    assert tally.rerun_s == pytest.approx(100)
    assert max(tally.waits_s) == pytest.approx(100 + QUICK.kernel_start_s)
    assert tally.held_s == pytest.approx(2 * (400 + 3600) + 100, abs=60)


def test_a_gpu_is_held_while_it_is_used_and_ten_minutes_longer() -> None:
    """Then its session moves to a node without; the share costs a tenth from there on."""
    never = PLAIN._replace(doze_after_s=NEVER_S, hibernate_after_s=NEVER_S)
    tally = _run(Policy("x", never), _bursts(3600, lasts_s=1000.0, gpu=1))
    assert tally.gpu_computing_s == 1000
    assert tally.gpu_held_s == pytest.approx(1600, abs=60)
    assert tally.actions["give-gpu-back"] == 1
    assert tally.most_nodes == {"small": 1, "gpu": 1}


def test_who_finds_no_room_waits_until_somebody_leaves() -> None:
    """Two sessions, one core: the second waits for the first to doze, which it does early."""
    kinds = parse_fleet("only:1cpu:8G:x1")
    events = [
        Event(0, START, "a", 1), Event(0, BUSY, "a", 1, 100, GIB),
        Event(50, START, "b", 2), Event(50, BUSY, "b", 2, 10, GIB),
    ]  # fmt: skip
    simulation = Simulation(Policy("x", PLAIN), kinds, QUICK, 0.5)
    simulation.feed(events)
    tally = simulation.finish(43200)
    assert tally.computing_s == 110
    # At the first look at which both looks agree, or when the window ends at the latest.
    assert 50 < tally.waits_s[-1] <= 100 + 300 + 60


def test_what_no_node_can_take_is_refused_and_does_without() -> None:
    """A GPU that no node has: counted, and the session computes without it."""
    kinds = parse_fleet("only:1cpu:8G:x1")
    simulation = Simulation(Policy("x", PLAIN), kinds, QUICK, 1)
    simulation.feed(_bursts(0, 200, gpu=1))
    tally = simulation.finish(86400)
    assert tally.refused == 2
    assert tally.computing_s == 120
    assert tally.gpu_held_s == 0


@pytest.fixture(scope="module")
def week() -> list[Event]:
    return list(make_trace(12, 5, 4))


@pytest.mark.parametrize("policy", [Policy("lzy", Settings()), fixed_timeout(), always_on()])
def test_nothing_gets_lost(week: list[Event], policy: Policy) -> None:
    """All that was asked is computed, held ≥ running ≥ computing, and at last nothing reserved."""
    simulation = Simulation(policy, parse_fleet(DEFAULT_FLEET), World(), 30)
    middle = len(week) // 2
    simulation.feed(week[:middle])
    _compare_reservations(simulation, week[middle].at_s)
    simulation.feed(week[middle:])
    tally = simulation.finish(30 * 86400)
    asked_s = sum(event.duration_s for event in week)
    # A session that is ended while it still computes, because it had to wait, loses the rest.
    assert asked_s - 1800 <= tally.computing_s <= asked_s + 1e-6
    assert tally.held_s >= tally.running_s >= tally.computing_s
    assert tally.bursts == sum(event.kind == BUSY for event in week)
    assert sum(tally.held_by_hour) == pytest.approx(tally.held_s)
    assert sum(tally.running_by_hour) == pytest.approx(tally.running_s)
    assert tally.node_cost >= tally.share_cost * 0.9
    for rented in simulation.stock.on.values():
        assert rented.held == 0
        assert rented.facts.reserved_gpus == 0
        assert rented.facts.reserved_memory_bytes == 0
        assert rented.facts.reserved_cpu == pytest.approx(0)


def _compare_reservations(simulation: Simulation, now_s: float) -> None:
    """What the simulation keeps step by step is what `summarise` counts afresh."""
    facts = simulation.facts(now_s)
    nodes = simulation.stock.nodes(now_s)
    assert any(one.reserved_memory_bytes for one in nodes)
    for kept, counted in zip(
        nodes, summarise(nodes, facts, simulation.settings).nodes, strict=True
    ):
        assert kept.reserved_cpu == pytest.approx(counted.reserved_cpu)
        assert kept.reserved_memory_bytes == counted.reserved_memory_bytes
        assert kept.reserved_gpus == counted.reserved_gpus


def test_the_same_trace_gives_the_same_tally(week: list[Event]) -> None:
    """Weeks can be compared, because nothing is left to chance."""
    kinds = parse_fleet(DEFAULT_FLEET)
    tallies = []
    for _ in range(2):
        simulation = Simulation(Policy("lzy", Settings()), kinds, World(), 5)
        simulation.feed(week)
        tallies.append(vars(simulation.finish(5 * 86400)))
    assert tallies[0] == tallies[1]


def test_lzy_uses_what_it_holds(week: list[Event]) -> None:
    """More than 90 % of what it holds is used, of always on less than 40 %, and it kills nobody."""
    lzy = _run_all(Policy("lzy", Settings()), week)
    culler, on = _run_all(fixed_timeout(), week), _run_all(always_on(), week)
    assert lzy.utilisation() > 0.85
    assert on.utilisation() < 0.4
    assert on.utilisation() < culler.utilisation() < lzy.utilisation()
    assert lzy.share_cost < culler.share_cost < on.share_cost
    assert lzy.killed == 0 < culler.killed


def _run_all(policy: Policy, week: list[Event]) -> Tally:
    simulation = Simulation(policy, parse_fleet(DEFAULT_FLEET), World(), 5)
    simulation.feed(week)
    return simulation.finish(5 * 86400)


def test_quantiles_of_waits() -> None:
    """Of those who waited, and of all: who did not wait has waited 0 s."""
    tally = Tally("x", 1)
    for wait_s in [0.0] * 90 + [1.0] * 9 + [50.0]:
        tally.add_wait(wait_s)
    tally.waits_s.sort()
    assert tally.wait_s(0.5) == 1
    assert tally.wait_s(0.99) == 50
    assert tally.wait_s(0.5, of_all=True) == 0
    assert tally.wait_s(0.95, of_all=True) == 1
    assert tally.wait_s(0.999, of_all=True) == 50
    assert Tally("y", 1).wait_s(0.5) == 0


def test_a_session_that_starts_twice_is_refused() -> None:
    """A trace of another form must not become figures."""
    with pytest.raises(ValueError, match="starts twice"):
        _run(always_on(), [Event(0, START, "a"), Event(1, START, "a")])
