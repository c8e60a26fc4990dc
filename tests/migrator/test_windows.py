"""Windows: never twice as dear as hindsight, and learnt from a session's own gaps."""

from __future__ import annotations

import pytest
from fleets import GIB, briefly, idle
from hypothesis import example, given
from hypothesis import strategies as st

from lzy.migrator.facts import NEVER_S, Settings
from lzy.migrator.idleness import (
    DOZE,
    GIVE_GPU_BACK,
    HIBERNATE,
    break_even,
    first_reply,
    remember_gap,
    window_of,
)
from lzy.migrator.windows import REMEMBERED_GAPS, choose_window, settle_gap

PATIENT = Settings(long_wait_s=1e-9, long_gpu_wait_s=1e-9)
"""Every wait is a long one: each step is worth what was set."""
GAPS = st.lists(
    st.one_of(st.floats(0.1, 40), st.floats(30, 400), st.floats(200, 4000), st.floats(1e3, 1e6)),
    max_size=120,
)


@briefly
@given(GAPS, st.sampled_from([30.0, 60.0, 300.0, 1800.0]), st.floats(0.1, 30))
@example([1000.0] * 40 + [299.0] * 40 + [301.0] * 40, 300.0, 1.0)
def test_never_twice_as_dear_as_hindsight(gaps: list[float], set_s: float, gib: float) -> None:
    """After every gap, what a session's windows cost is at most twice what was best in hindsight.

    A gap g costs g if it ends within the window, else window + break-even; best is the cheaper of
    g and break-even. The rules themselves choose and remember; this only adds up.
    """
    settings = Settings(doze_after_s=set_s)
    session = idle(memory_bytes=int(gib * GIB))
    paid = {DOZE: 0.0, HIBERNATE: 0.0}
    best = {DOZE: 0.0, HIBERNATE: 0.0}
    for gap_s in gaps:
        for action in paid:
            price_s = break_even(action, session, settings)
            window_s = window_of(action, session, settings)
            assert window_s <= price_s
            paid[action] += gap_s if gap_s <= window_s else window_s + price_s
            best[action] += min(gap_s, price_s)
            assert paid[action] <= 2 * best[action] * (1 + 1e-9)
        session = remember_gap(session, gap_s, settings)


@briefly
@given(GAPS)
def test_a_gpus_windows_keep_the_bound_too(gaps: list[float]) -> None:
    """Giving a GPU back is a game of its own, over the gaps of the GPU."""
    settings = Settings()
    session = idle(gpu_count=1)
    paid_s = best_s = 0.0
    for gap_s in gaps:
        price_s = break_even(GIVE_GPU_BACK, session, settings)
        window_s = window_of(GIVE_GPU_BACK, session, settings)
        paid_s += gap_s if gap_s <= window_s else window_s + price_s
        best_s += min(gap_s, price_s)
        assert paid_s <= 2 * best_s * (1 + 1e-9)
        session = remember_gap(session, gap_s, settings, gpu=True)


@briefly
@given(
    st.lists(st.floats(30, 3000), min_size=1, max_size=REMEMBERED_GAPS),
    st.floats(0, 1200),
    st.sampled_from([60.0, 300.0]),
)
def test_the_window_is_the_cheapest_within_the_bound(
    gaps: list[float], slack_s: float, price_s: float
) -> None:
    """No window between break-even - slack and break-even would have cost less over those gaps."""

    def cost(window_s: float) -> float:
        return sum(gap if gap <= window_s else window_s + price_s for gap in gaps)

    chosen_s = choose_window(tuple(gaps), slack_s, price_s)
    lowest_s = max(price_s - slack_s, 0.0)
    assert lowest_s <= chosen_s <= price_s
    for tenth in range(11):
        other_s = lowest_s + (price_s - lowest_s) * tenth / 10
        assert cost(chosen_s) <= cost(other_s) + 1e-6


def test_without_a_past_the_window_is_what_was_set() -> None:
    """A new session hibernates after half an hour, and dozes after five minutes at most."""
    assert window_of(DOZE, idle(), PATIENT) == window_of(DOZE, idle(gib=9.2), Settings()) == 300
    assert window_of(HIBERNATE, idle(), Settings()) == 1800
    assert window_of(GIVE_GPU_BACK, idle(gpu_count=1), PATIENT) == 600


def test_who_comes_back_sooner_dozes_sooner() -> None:
    """A doze is worth what was set where its wake takes long, and in proportion less before."""
    gibs = (0.5, 1, 2, 4)
    waits_s = [first_reply(gib * GIB, Settings(), dozing=True) for gib in gibs]
    windows_s = [window_of(DOZE, idle(gib=gib), Settings()) for gib in gibs]
    assert windows_s == pytest.approx([max(300 * wait_s / 1.5, 30) for wait_s in waits_s])
    twice = window_of(DOZE, idle(gib=4), Settings(doze_after_s=600))
    assert twice == pytest.approx(2 * windows_s[-1])


def test_long_pauses_shorten_the_window_and_short_ones_lengthen_it() -> None:
    """Who is either back at once or away for hours dozes sooner; who then changes habits, later."""
    session, settings = idle(), PATIENT
    for _ in range(REMEMBERED_GAPS // 2):
        session = remember_gap(remember_gap(session, 45, settings), 7200, settings)
    shorter_s = window_of(DOZE, session, settings)
    assert 30 <= shorter_s <= 60
    for _ in range(REMEMBERED_GAPS):
        session = remember_gap(session, 250, settings)
    assert window_of(DOZE, session, settings) == 250
    assert len(session.idle_gaps_s) == REMEMBERED_GAPS


def test_without_adapting_the_window_is_what_was_set() -> None:
    """`adaptive` off: every session waits for the figure itself."""
    settings = Settings(adaptive=False)
    session = idle(idle_gaps_s=(7200.0,) * 20)
    session = session._replace(slack=session.slack._replace(doze_s=1000))
    assert window_of(DOZE, session, settings) == 300
    assert window_of(DOZE, session, Settings()) < 300


def test_a_window_is_never_shorter_than_the_looks_that_must_agree() -> None:
    """Two looks 15 s apart cannot agree in less than 30 s."""
    assert window_of(DOZE, idle(), Settings(doze_after_s=1)) == 30


def test_what_costs_more_than_it_saves_is_put_off() -> None:
    """A session whose checkpoint and wake take ten minutes waits at least those."""
    huge = idle(gib=400)
    assert break_even(DOZE, huge, Settings()) > 600
    assert window_of(DOZE, huge, Settings()) > 600


def test_never_means_never() -> None:
    """A step that is switched off has no window, whatever the gaps were."""
    session = idle(idle_gaps_s=(7200.0,) * 20)
    assert window_of(DOZE, session, Settings(doze_after_s=NEVER_S)) == NEVER_S


@pytest.mark.parametrize(("gap_s", "slack_s"), [(100, 100), (300, 300), (1000, 0)])
def test_slack_is_what_is_left_of_twice_the_best(gap_s: float, slack_s: float) -> None:
    """After a gap within the window it grows by the gap, after a long one by nothing."""
    assert settle_gap(0.0, gap_s, 300, 300) == slack_s
