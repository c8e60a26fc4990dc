"""Whether a session is idle, what happens to it next, and the words for it."""

from __future__ import annotations

import pytest
from fleets import BUSY, GIB, IDLE, NOW_S, idle, session

from lzy.migrator.facts import DOZING, HIBERNATED, NEVER_S, RUNNING, Settings, Verdict
from lzy.migrator.idleness import (
    DOZE,
    GIVE_GPU_BACK,
    HIBERNATE,
    Look,
    back_off,
    explain,
    is_idle,
    measure_idleness,
    next_step,
)

S = Settings(long_wait_s=1e-9, long_gpu_wait_s=1e-9)
"""Every wait is a long one: each step is worth what was set."""


def _looks(*verdicts: tuple[Verdict, ...], step_s: float = 15.0) -> list[Look]:
    begin_s = NOW_S - step_s * (len(verdicts) - 1)
    return [Look(begin_s + step_s * number, found) for number, found in enumerate(verdicts)]


def test_idle_counts_from_the_first_idle_look() -> None:
    """Three idle looks in a row, 15 s apart, are 30 s of idleness; what was before is no matter."""
    assert measure_idleness(_looks(BUSY, IDLE, IDLE, IDLE), NOW_S, S) == 30
    assert measure_idleness(_looks(IDLE, IDLE, BUSY), NOW_S, S) == 0
    assert measure_idleness([], NOW_S, S) == 0


def test_one_probe_that_fails_says_active() -> None:
    """All probes must say idle; one that could not look makes the whole look an active one."""
    failed = (*IDLE, Verdict("gpu", True, "NVML did not answer within 2 s"))
    assert measure_idleness(_looks(IDLE, failed, IDLE), NOW_S, S) == 0
    assert not is_idle(idle(verdicts=failed), S)


def test_time_in_which_nobody_looked_is_not_idle() -> None:
    """An agent that was away for a minute knows nothing of that minute."""
    looks = [Look(NOW_S - 90, IDLE), Look(NOW_S - 15, IDLE), Look(NOW_S, IDLE)]
    assert measure_idleness(looks, NOW_S, S) == 15
    assert measure_idleness(looks, NOW_S + 31, S) == 0
    assert measure_idleness(_looks(IDLE, (), IDLE), NOW_S, S) == 0


def test_two_looks_must_agree() -> None:
    """One idle look is not enough for anything; without verdicts nothing ever is."""
    assert not is_idle(idle(for_s=0.0), S)
    assert is_idle(idle(for_s=15.0), S)
    assert not is_idle(idle(verdicts=()), S)


@pytest.mark.parametrize(
    ("for_s", "state", "action", "due_in_s"),
    [
        (100.0, RUNNING, DOZE, 200.0),
        (301.0, RUNNING, DOZE, -1.0),
        (301.0, DOZING, HIBERNATE, 1499.0),
        (1801.0, DOZING, HIBERNATE, -1.0),
    ],
)
def test_the_ladder(for_s: float, state: str, action: str, due_in_s: float) -> None:
    """Five minutes: doze. Half an hour: hibernate. Counted from the last activity."""
    step = next_step(idle(for_s=for_s, state=state), S, NOW_S)
    assert step.action == action
    assert step.due_s == pytest.approx(NOW_S + due_in_s)


def test_who_has_no_use_for_dozing_hibernates() -> None:
    """With dozing switched off, a running session goes straight to the image."""
    settings = S._replace(doze_after_s=NEVER_S)
    assert next_step(idle(), settings, NOW_S).action == HIBERNATE


def test_the_gpu_goes_first_and_does_not_wait_for_the_cpu() -> None:
    """A GPU at 0 % for ten minutes is given back, even while the CPU computes."""
    working = session(verdicts=BUSY, gpu_count=1, gpu_idle_for_s=700)
    assert next_step(working, S, NOW_S).action == GIVE_GPU_BACK
    assert next_step(working, S, NOW_S).due_s <= NOW_S
    training = idle(gpu_count=1, gpu_share=0.7, for_s=9000.0)
    assert next_step(training, S, NOW_S).action == ""
    resting = idle(gpu_count=1, gpu_idle_for_s=400, for_s=400.0)
    assert next_step(resting, S, NOW_S).action == GIVE_GPU_BACK
    assert next_step(resting, S, NOW_S).due_s == NOW_S + 200


@pytest.mark.parametrize("state", [HIBERNATED, "waking", "hibernating", "migrating", "ended"])
def test_nothing_is_done_to_what_is_not_settled(state: str) -> None:
    """An operation under way is never overtaken by another."""
    assert next_step(idle(state=state), S, NOW_S).action == ""


def test_holds_and_protections_put_off() -> None:
    """A held session keeps its place until the hold ends, and the words say so."""
    held = idle(hold_until_s=NOW_S + 900)
    step = next_step(held, S, NOW_S)
    assert (step.action, step.due_s) == (DOZE, NOW_S + 900)
    assert "it is held" in step.why
    failed = idle(protected_until_s=NOW_S + 60, protected_why="its last operation failed")
    assert next_step(failed, S, NOW_S).due_s == NOW_S + 60
    woken = idle(for_s=1900.0, protected_until_s=NOW_S + 60)
    assert next_step(woken, S, NOW_S).due_s == NOW_S - 1600  # dozing is no eviction
    dozing = woken._replace(state=DOZING)
    assert next_step(dozing, S, NOW_S).due_s == NOW_S + 60
    expired = idle(hold_until_s=NOW_S - 1, protected_until_s=NOW_S - 1)
    assert next_step(expired, S, NOW_S).due_s < NOW_S


def test_failures_back_off() -> None:
    """A minute after the first failure, doubled by each, an hour at most."""
    assert [back_off(failures, S) for failures in (1, 2, 3, 50)] == [60, 120, 240, 3600]


def test_figures_of_a_session_win_over_those_of_its_user() -> None:
    """Globally, per user, per session: the narrower figure holds."""
    settings = S._replace(
        per_user={1000: {"doze_after_s": 60.0, "adaptive": False}},
        per_session={"mine": {"doze_after_s": 900.0}},
    )
    assert next_step(idle("other", for_s=61.0), settings, NOW_S).due_s < NOW_S
    assert next_step(idle("mine", for_s=61.0), settings, NOW_S).due_s == NOW_S + 839
    assert next_step(idle("x", for_s=61.0, owner_uid=7), settings, NOW_S).due_s == NOW_S + 239
    with pytest.raises(ValueError, match="doze_afterwards"):
        next_step(idle(), S._replace(per_user={1000: {"doze_afterwards": 1}}), NOW_S)


def test_why_names_every_probe_and_the_next_step() -> None:
    """`lzy why` has a line for each probe, and says what comes when, by which window."""
    lines = explain(idle(for_s=100.0), S, NOW_S)
    assert lines[0] == "idle    cpu: 0.0 % of a core"
    assert lines[-1] == (
        "next: doze in 3 min 20 s; idle for 1 min 40 s, doze after 5 min (the window that is set)"
    )
    lines = explain(idle(for_s=40.0), Settings(), NOW_S)
    assert lines[-1] == (
        "next: doze in 13 s; idle for 40 s, doze after 53 s"
        " (of 5 min that are set, for its wake is quick)"
    )
    lines = explain(session(verdicts=BUSY), S, NOW_S)
    assert lines[0] == "active  cpu: 98 % of a core"
    assert lines[-1] == "next: nothing; it is active: cpu: 98 % of a core"
    assert "held for another 2 h 0 min" in explain(idle(hold_until_s=NOW_S + 7200), S, NOW_S)
    assert explain(session(), S, NOW_S)[0] == "active  no probe has looked yet"


def test_a_larger_session_waits_for_what_its_wake_costs() -> None:
    """110 GiB that no image has take minutes to write and to bring back."""
    large = idle(for_s=310.0, memory_bytes=110 * GIB)
    assert next_step(large, S, NOW_S).due_s > NOW_S
    known = large._replace(image_bytes=110 * GIB)
    assert next_step(known, S, NOW_S).due_s < next_step(large, S, NOW_S).due_s
