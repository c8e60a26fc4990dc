"""Which node, and of every other why not."""

from __future__ import annotations

import pytest
from fleets import GIB, briefly, fleets, node, nodes, session
from hypothesis import given
from hypothesis import strategies as st

from lzy.migrator.facts import Fleet, Requests, Settings, share_of
from lzy.migrator.placement import Need, examine, need_of, place, share_price, summarise

S = Settings()
NEED = Need(1.0, 2 * GIB)


@pytest.mark.parametrize(
    ("need", "more", "words"),
    [
        (NEED._replace(node="other"), {}, "other was asked for"),
        (NEED, {"reachable": False}, "its agent does not answer"),
        (NEED, {"draining": True}, "it is being drained"),
        (NEED._replace(gpu=1), {}, "it has no GPUs, 1 asked for"),
        (NEED._replace(gpu=2), {"gpus": 1}, "it has 1 GPU, 2 asked for"),
        (NEED._replace(cpu=5), {}, "it has 4 CPUs, 5 needed"),
        (NEED._replace(memory_bytes=14 * GIB), {}, "it has 12.8 GiB for sessions, 14 GiB needed"),
        (NEED._replace(cpu_features=frozenset({"avx2"})), {}, "its CPU lacks avx2"),
        (
            NEED._replace(files=frozenset({"libc-1", "libm-1"})),
            {"files": frozenset({"libm-1"})},
            "it has not the same libc-1",
        ),
    ],
)
def test_who_can_never_take_it_says_why(need: Need, more: dict[str, object], words: str) -> None:
    """Each refusal names what is missing; waiting would not help, so it is not `busy`."""
    refusal = examine(need, node(**more), S)
    assert refusal is not None
    assert (refusal.reason, refusal.busy) == (words, False)


@pytest.mark.parametrize(
    ("need", "more", "words"),
    [
        (NEED._replace(gpu=1), {"gpus": 2, "reserved_gpus": 2}, "0 of its 2 GPUs free"),
        (NEED, {"reserved_cpu": 3.5}, "0.5 of its 4 CPUs free"),
        (NEED, {"reserved_memory_bytes": 11 * GIB}, "1.8 GiB free, 2 GiB needed"),
        (NEED, {"used_memory_bytes": 15 * GIB}, "0 MiB free, 2 GiB needed"),
    ],
)
def test_who_could_take_it_were_others_not_there_is_busy(
    need: Need, more: dict[str, object], words: str
) -> None:
    """What others hold is told apart from what is not there at all."""
    refusal = examine(need, node(**more), S)
    assert refusal is not None
    assert (refusal.reason, refusal.busy) == (words, True)


def test_the_cheapest_for_its_share_wins() -> None:
    """Not the cheapest node: a small part of a large node may cost less than all of a small one."""
    small = node("small", 1, 4, price_per_hour=0.05)
    large = node("large", 16, 64, price_per_hour=0.4)
    found = place(NEED, (small, large), S)
    assert found.node == large
    assert share_price(NEED, large) < share_price(NEED, small)


def test_of_equals_the_warm_and_then_the_fullest_wins() -> None:
    """Nothing is switched on for nothing, and what is empty stays so."""
    cold = node("a", warm=False)
    empty = node("b")
    fuller = node("c", reserved_memory_bytes=4 * GIB)
    assert place(NEED, (cold, empty, fuller), S).node == fuller
    assert place(NEED, (cold, empty), S).node == empty


def test_a_gpu_that_nobody_asks_for_is_left_free() -> None:
    """Of equals one without; who asks for a GPU has it."""
    there = (node("gpu", gpus=1, price_per_hour=0.0), node("plain", price_per_hour=0.0))
    for need, expected in ((Need(1, GIB), "plain"), (Need(1, GIB, 1), "gpu")):
        found = place(need, there, S).node
        assert found
        assert found.name == expected


def test_a_session_needs_what_it_asks_for_and_what_it_has_been_seen_to_use() -> None:
    """The larger of request and observed peak, with room to grow; a core if it asks for none."""
    quiet = session(gib=1, peak_memory_bytes=10 * GIB)
    assert need_of(quiet, S).memory_bytes == pytest.approx(11 * GIB)
    assert need_of(quiet, S).cpu == 1
    asks = quiet._replace(requests=Requests(4, 32 * GIB, 1))
    assert need_of(asks, S)[:3] == (4, 32 * GIB, 1)


def test_features_and_files_that_are_there_do_not_refuse() -> None:
    """More than what is needed is enough; a node of one common installation has every file."""
    need = NEED._replace(cpu_features=frozenset({"avx2"}), files=frozenset({"libc-1"}))
    features = frozenset({"avx2", "avx512f"})
    assert examine(need, node(cpu_features=features), S) is None
    assert examine(need, node(cpu_features=features, files=frozenset({"libc-1"})), S) is None


@briefly
@given(
    nodes(),
    st.builds(
        Need,
        st.sampled_from([0.5, 2.0, 9.0]),
        st.sampled_from([1, 5, 20]).map(lambda gib: gib * GIB),
        st.sampled_from([0, 1]),
    ),
)
def test_the_choice_is_the_best_of_those_who_can(there: tuple, need: Need) -> None:
    """Against a naive oracle: every node is chosen or refused, and none that can is cheaper."""
    found = place(need, there, S)
    able = [one for one in there if examine(need, one, S) is None]
    assert (found.node is None) == (not able)
    assert {refusal.node for refusal in found.refusals} == {
        one.name for one in there if one not in able
    }
    if found.node is not None:
        assert share_price(need, found.node) == min(share_price(need, one) for one in able)
    assert place(need, there, S, explain=False).node == found.node


@briefly
@given(fleets())
def test_summing_up_counts_every_session_once(fleet: Fleet) -> None:
    """What is reserved on nodes, and what users hold, are two sums over the same sessions."""
    counted = summarise(fleet.nodes, fleet.sessions, S)
    for what in ("cpu", "memory_bytes", "gpus"):
        on_nodes = sum(getattr(one, f"reserved_{what}") for one in counted.nodes)
        assert on_nodes == sum(getattr(usage, what) for usage in counted.users.values())


def test_a_share_is_the_largest_of_its_parts() -> None:
    """Who takes all of a node's memory takes the node."""
    assert share_of(node(), 1, 16 * GIB, 0) == 1
    assert share_of(node(), 2, 1 * GIB, 0) == 0.5
    assert share_of(node(gpus=4), 1, 1 * GIB, 3) == 0.75
