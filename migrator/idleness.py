"""Idleness: whether one session is idle, what is done about it next and when, and why in words.

A session is idle while every probe says so at every look; a probe that fails says active. What
follows is a ladder: give the GPU back, doze, hibernate. Each rung has a window (`windows`) counted
from the last activity, and nothing is done before `looks` looks in a row have agreed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .facts import (
    DOZING,
    NEVER_S,
    RUNNING,
    UNSETTLED,
    WOKE,
    SessionFacts,
    Settings,
    Slack,
    Verdict,
    settings_of,
)
from .windows import LARGEST_SLACK, REMEMBERED_GAPS, choose_window, settle_gap

GIVE_GPU_BACK, DOZE, HIBERNATE = "give-gpu-back", "doze", "hibernate"


class Look(NamedTuple):
    """What all probes of a session said at one moment."""

    at_s: float
    verdicts: tuple[Verdict, ...]


class Step(NamedTuple):
    """What is done with a session next, if nothing happens before."""

    action: str
    """GIVE_GPU_BACK, DOZE, HIBERNATE, or "" for nothing."""
    due_s: float
    """Not before then; infinite when something has to change first."""
    why: str
    window_s: float = 0.0
    break_even_s: float = 0.0


def measure_idleness(looks: Sequence[Look], now_s: float, settings: Settings) -> float:
    """For how long every look has found the session idle, in seconds.

    `looks` are in order of time. A time without looks counts as activity (nobody watched), and so
    does a look without verdicts. Counted from the first look of the idle row, so one look is 0 s.
    """
    since_s: float | None = None
    before_s = now_s
    for look in reversed(looks):
        watched = before_s - look.at_s <= 2 * settings.sample_s
        if not watched or not look.verdicts or any(verdict.active for verdict in look.verdicts):
            break
        since_s = before_s = look.at_s
    return 0.0 if since_s is None else now_s - since_s


def is_idle(session: SessionFacts, settings: Settings) -> bool:
    """Whether all probes say idle now, and did at `looks` looks in a row."""
    if not session.verdicts or any(verdict.active for verdict in session.verdicts):
        return False
    return session.idle_for_s >= settings.sample_s * (settings.looks - 1)


def back_off(failures: int, settings: Settings) -> float:
    """How long a session is left alone after its `failures`-th failure in a row, in seconds."""
    return min(settings.backoff_s * 2.0 ** min(failures - 1, 30), settings.longest_backoff_s)


def break_even(action: str, session: SessionFacts, settings: Settings) -> float:
    """Seconds of holding that a step and the way back are taken to be worth.

    The figure that was set; of a doze, and of a GPU given back, in proportion less where nobody
    would wait for long (not where windows do not adapt). But never less than the work itself
    takes, so that a session whose checkpoint and wake would cost more than they save is left alone
    for longer.
    """
    own = settings_of(session, settings)
    set_s, share = _set_s(action, own), 1.0
    if action == DOZE:
        share = first_reply(session.memory_bytes, own, dozing=True) / own.long_wait_s
        work_s = doze_time(session, own) + session.memory_bytes / own.rouse_bytes_per_s
    elif action == GIVE_GPU_BACK:
        move_s = session.memory_bytes / own.dump_bytes_per_s + own.wake_s
        share = (move_s + own.gpu_attach_s) / own.long_gpu_wait_s
        work_s = 2 * move_s + own.gpu_attach_s
    else:
        unwritten_bytes = max(session.memory_bytes - session.image_bytes, 0)
        work_s = unwritten_bytes / own.dump_bytes_per_s + own.wake_s
    if own.adaptive and set_s < NEVER_S:
        set_s *= min(share, 1.0)
    return max(set_s, work_s, own.sample_s * own.looks)


def first_reply(memory_bytes: float, settings: Settings, *, dozing: bool = False) -> float:
    """Seconds until a sleeping session of so much memory has answered who uses it again."""
    reply_s = settings.doze_reply_s if dozing else settings.wake_s
    return reply_s + settings.touched_share * memory_bytes / settings.rouse_bytes_per_s


def _set_s(action: str, own: Settings) -> float:
    if action == DOZE:
        return own.doze_after_s
    return own.gpu_back_after_s if action == GIVE_GPU_BACK else own.hibernate_after_s


def doze_time(session: SessionFacts, settings: Settings) -> float:
    """Seconds until `session` dozes: what its image has already need only be dropped."""
    known_bytes = min(session.image_bytes, session.memory_bytes)
    new_s = (session.memory_bytes - known_bytes) / settings.doze_bytes_per_s
    return new_s + known_bytes / settings.doze_again_bytes_per_s


def window_of(action: str, session: SessionFacts, settings: Settings) -> float:
    """How long a gap of `session` must last until `action`, in seconds.

    Nobody hibernates before they would doze, unless less than that was set.
    """
    own = settings_of(session, settings)
    window_s = _window(action, session, own, break_even(action, session, own))
    if action != HIBERNATE:
        return window_s
    doze_s = _window(DOZE, session, own, break_even(DOZE, session, own))
    return max(window_s, min(doze_s, break_even(HIBERNATE, session, own)))


def _window(action: str, session: SessionFacts, own: Settings, price_s: float) -> float:
    """The window of one step by itself."""
    if not own.adaptive or price_s == NEVER_S:
        return price_s
    if action == GIVE_GPU_BACK:
        window_s = choose_window(session.gpu_gaps_s, session.slack.gpu_s, price_s)
    elif action == DOZE:
        window_s = choose_window(session.idle_gaps_s, session.slack.doze_s, price_s)
    else:
        window_s = choose_window(session.idle_gaps_s, session.slack.hibernate_s, price_s)
    return max(window_s, own.sample_s * own.looks)


def remember_gap(
    session: SessionFacts, gap_s: float, settings: Settings, *, gpu: bool = False
) -> SessionFacts:
    """`session` after a gap of `gap_s` seconds (of its GPU's, with `gpu`) has ended.

    To be called with the facts of before the gap: the windows that held for it follow from them.
    Gaps that are too short to be acted upon only count as what they cost everybody.
    """
    own = settings_of(session, settings)
    slack, long_enough = session.slack, gap_s >= own.sample_s * own.looks
    if gpu:
        price_s = break_even(GIVE_GPU_BACK, session, own)
        window_s = window_of(GIVE_GPU_BACK, session, own) if long_enough else gap_s
        slack = slack._replace(gpu_s=settle_gap(slack.gpu_s, gap_s, window_s, price_s))
        if not long_enough:
            return session._replace(slack=slack)
        gaps_s = (*session.gpu_gaps_s[1 - REMEMBERED_GAPS :], gap_s)
        return session._replace(slack=slack, gpu_gaps_s=gaps_s)
    price_s = break_even(DOZE, session, own)
    hibernate_price_s = break_even(HIBERNATE, session, own)
    if (
        not long_enough
        and slack.doze_s >= LARGEST_SLACK * price_s
        and slack.hibernate_s >= LARGEST_SLACK * hibernate_price_s
    ):
        return session  # nothing can be added
    window_s = _window(DOZE, session, own, price_s) if long_enough else gap_s
    hibernate_s = gap_s  # what ends before it would doze does not hibernate
    if gap_s > window_s or gap_s > hibernate_price_s:
        hibernate_s = window_of(HIBERNATE, session, own)
    slack = Slack(
        slack.gpu_s,
        settle_gap(slack.doze_s, gap_s, window_s, price_s),
        settle_gap(slack.hibernate_s, gap_s, hibernate_s, hibernate_price_s),
    )
    if not long_enough:
        return session._replace(slack=slack)
    gaps_s = (*session.idle_gaps_s[1 - REMEMBERED_GAPS :], gap_s)
    return session._replace(slack=slack, idle_gaps_s=gaps_s)


def next_step(session: SessionFacts, settings: Settings, now_s: float) -> Step:
    """What is done with `session` next, when, and why; the same facts give the same step."""
    own = settings_of(session, settings)
    if session.state in UNSETTLED:
        return Step("", NEVER_S, f"it is {session.state} just now")
    if session.state not in (RUNNING, DOZING):
        return Step("", NEVER_S, f"it is {session.state}; nothing of it is on a node")
    step = _next_rung(session, own, now_s)
    if not step.action:
        return step
    # A protection ends by itself; until then the step is put off, not dropped.
    spared = step.action == DOZE and session.protected_why == WOKE
    for until_s, words in (
        (session.hold_until_s, "it is held"),
        (None if spared else session.protected_until_s, session.protected_why),
    ):
        if until_s is not None and until_s > max(now_s, step.due_s):
            step = step._replace(due_s=until_s, why=f"{words}; then: {step.why}")
    return step


def is_protected(session: SessionFacts, now_s: float) -> bool:
    """Whether nothing may be taken from it now: it is held, or protected."""
    return any(
        until_s is not None and until_s > now_s
        for until_s in (session.hold_until_s, session.protected_until_s)
    )


def explain(session: SessionFacts, settings: Settings, now_s: float) -> list[str]:
    """Lines for `lzy why`: every probe and its verdict, then the next step."""
    lines = [
        f"{'active' if verdict.active else 'idle':6}  {verdict.probe}: {verdict.reason}"
        for verdict in session.verdicts
    ]
    if not session.verdicts:
        lines.append("active  no probe has looked yet")
    if session.idle_for_s:
        lines.append(f"idle for {_span(session.idle_for_s)}")
    if session.hold_until_s is not None and session.hold_until_s > now_s:
        lines.append(f"held for another {_span(session.hold_until_s - now_s)}")
    step = next_step(session, settings, now_s)
    if not step.action:
        return [*lines, f"next: nothing; {step.why}"]
    if step.due_s <= now_s:
        return [*lines, f"next: {step.action}, now; {step.why}"]
    return [*lines, f"next: {step.action} in {_span(step.due_s - now_s)}; {step.why}"]


def _next_rung(session: SessionFacts, own: Settings, now_s: float) -> Step:
    """The lowest rung that `session` has not taken, by its windows alone."""
    gpu = session.gpu_count > 0 and session.state == RUNNING
    if gpu and session.gpu_share <= 0 and session.gpu_idle_for_s > 0:
        # A GPU's memory held at 0 % is a reason to give it back, whatever the CPU does.
        return _rung(GIVE_GPU_BACK, session, own, now_s, session.gpu_idle_for_s, "its GPU idle")
    if not is_idle(session, own):
        return Step("", NEVER_S, _why_active(session, own))
    if gpu:
        return Step("", NEVER_S, "its GPU computes")
    if session.state == DOZING:
        return _rung(HIBERNATE, session, own, now_s, session.idle_for_s, "idle")
    lower = DOZE if own.doze_after_s <= own.hibernate_after_s else HIBERNATE
    return _rung(lower, session, own, now_s, session.idle_for_s, "idle")


def _rung(
    action: str, session: SessionFacts, own: Settings, now_s: float, idle_s: float, words: str
) -> Step:
    window_s = window_of(action, session, own)
    price_s = break_even(action, session, own)
    if window_s == NEVER_S:
        return Step(action, NEVER_S, f"{action} is switched off", window_s, price_s)
    gaps = session.gpu_gaps_s if action == GIVE_GPU_BACK else session.idle_gaps_s
    if own.adaptive and gaps:
        whose = f"the window of its last {len(gaps)} pauses"
    elif window_s > _set_s(action, own):
        whose = "the time that it and the way back take"
    elif window_s < _set_s(action, own):
        whose = f"of {_span(_set_s(action, own))} that are set, for its wake is quick"
    else:
        whose = "the window that is set"
    why = f"{words} for {_span(idle_s)}, {action} after {_span(window_s)} ({whose})"
    return Step(action, now_s - idle_s + window_s, why, window_s, price_s)


def _why_active(session: SessionFacts, own: Settings) -> str:
    active = [verdict for verdict in session.verdicts if verdict.active]
    if active:
        return f"it is active: {active[0].probe}: {active[0].reason}"
    if not session.verdicts:
        return "no probe has looked yet"
    return f"{own.looks} looks must agree that it is idle"


def _span(time_s: float) -> str:
    """`90` as `1 min 30 s`; whole seconds, so that equal facts give equal words."""
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return (
        f"{minutes} min {seconds} s"
        if minutes and seconds
        else (f"{minutes} min" if minutes else f"{seconds} s")
    )
