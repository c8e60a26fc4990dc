"""The agent's rounds: it looks at all sessions, evicts those that may go, and mends what is broken.

*Guarantee*: an idle session is looked at once more right before it is evicted, after its notice
has passed; whatever it has begun meanwhile, or whoever calls it off, keeps it running.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import traceback
from functools import partial
from typing import Any

from ..checkpoint.doze import is_dozing
from ..checkpoint.errors import Busy, LzyError, StoreUnavailable
from ..checkpoint.home import run_directory
from ..checkpoint.lineage import list_lineages
from ..checkpoint.pager import resume_pager
from ..checkpoint.store import Store
from ..checkpoint.waiting import list_pagers
from .node import Agent
from .operations import DOZE, HIBERNATE, ROUSE
from .readings import look_around
from .session import MOST_GAPS, SHORTEST_GAP_S, Session
from .state import ASLEEP, DOZING, LIVING, RUNNING

_LOOK_AGAIN_S = 0.5


class Watcher:
    """Goes its rounds as long as the agent lives."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._runs_changed_ns = -1
        self._changed = asyncio.Event()

    async def go_rounds(self) -> None:
        """Look at everything every `sample_s`, until cancelled."""
        while True:
            began = time.monotonic()
            try:
                self.look()
                self._adopt_restored()
                self._mend_pagers()
                self._mend_sessions()
                self._agent.arrivals.conclude_all()
            except Exception:  # a full disk, say: the next round may fare better
                traceback.print_exc()
            passed_s = time.monotonic() - began
            pause_s = max(self._agent.settings.sample_s - passed_s, 0.01)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
                self._changed.clear()

    def hurry(self) -> None:
        """Begin the next round now: the settings have changed."""
        self._changed.set()

    def look(self, only: Session | None = None) -> None:
        """Take a reading of all sessions, or of one, that no operation works on."""
        chosen = [only] if only else list(self._agent.sessions.values())
        chosen = [s for s in chosen if s.is_living and s.pidfd >= 0 and not s.lock.locked()]
        if not chosen:
            return
        node = look_around()
        for session in chosen:
            settings = self._agent.settings_of(session)
            gap_s = session.look(node, settings, closely=only is not None)
            if gap_s >= SHORTEST_GAP_S:
                gaps = (*session.record.idle_gaps, round(gap_s, 1))[-MOST_GAPS:]
                with contextlib.suppress(StoreUnavailable):  # it is one of many
                    self._agent.update(session, idle_gaps=gaps)
            if session.record.state == DOZING and not only:
                self._follow_doze(session)
        self._agent.chronicle.note(chosen)

    async def look_first(self, session: Session) -> None:
        """Look twice, so that somebody who asks about a new session gets an answer."""
        if not session.is_known:
            self.look(session)
        if not session.is_known:
            await asyncio.sleep(_LOOK_AGAIN_S)
            self.look(session)

    def _follow_doze(self, session: Session) -> None:
        """A session that is used again gets all of its memory back; it may have it already."""
        if not is_dozing(session.record.pid):
            self._agent.update(session, "roused", "all of its memory is back", state=RUNNING)
        elif session.is_known and session.is_active:
            why = next(verdict for verdict in session.verdicts if verdict.active)
            words = f"{why.probe}: {why.reason}"
            if not self._agent.limits.has_room(session):
                words += "; what it touches comes back"
            self._agent.spawn(self._agent.turns.operate(session, ROUSE, why=words))

    # -- evictions

    async def evict(
        self, session: Session, verb: str, why: str, actor_uid: int | None, progress: Any = None
    ) -> dict[str, Any]:
        """Doze or hibernate a session if it stays idle. Raises Busy when it does not."""
        leaving = self._agent.departures.is_leaving(session.record.name)
        if session.lock.locked() or session.called_off is not None or leaving:
            raise Busy(
                f"something is done to session {session.record.name} already", remedy="see lzy ps"
            )
        session.called_off = asyncio.Event()
        began_s = time.monotonic()
        try:
            if verb == HIBERNATE:
                await self._give_notice(session, why)
            await self._see_that_it_is_idle(session, began_s)
            called_off = session.called_off

            def still_wanted() -> None:
                if called_off.is_set():
                    raise Busy(
                        f"the eviction of {session.record.name} was called off",
                        remedy=f"see lzy why {session.record.name}",
                    )
                self._refuse_held(session)

            return await self._agent.turns.operate(
                session,
                verb,
                why="idle" if verb == HIBERNATE else why,
                actor_uid=actor_uid,
                progress=progress,
                still_wanted=still_wanted,
            )
        finally:
            session.called_off = None

    async def _give_notice(self, session: Session, why: str) -> None:
        """Tell that it will be hibernated, and wait whether somebody minds."""
        self._refuse_held(session)
        notice_s = self._agent.settings_of(session).notice_s
        name = session.record.name
        words = f"hibernates in {notice_s:.3g} s: {why}; `lzy hold {name}` calls it off"
        self._agent.update(session, "notice", words)
        assert session.called_off
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(notice_s):
                await session.called_off.wait()
            self._agent.update(session, "called_off", "somebody asked for something else")
            raise Busy(f"the eviction of {name} was called off", remedy=f"see lzy why {name}")

    async def _see_that_it_is_idle(self, session: Session, since_s: float) -> None:
        """Look over a moment of its own; every look since `since_s` must have found it idle."""
        self.look(session)
        await asyncio.sleep(_LOOK_AGAIN_S)
        self.look(session)
        if session.lock.locked() or session.record.state not in LIVING or session.pidfd < 0:
            raise Busy(
                f"something is done to session {session.record.name} already", remedy="see lzy ps"
            )
        if session.is_active or session.idle_for_s < time.monotonic() - since_s:
            words = "; ".join(f"{v.probe}: {v.reason}" for v in session.verdicts if v.active)
            words = words or "it was a moment ago"
            self._agent.update(session, "called_off", f"it is in use again: {words}")
            raise Busy(
                f"session {session.record.name} is in use again: {words}",
                remedy=f"lzy hibernate {session.record.name} asks no probe",
            )

    def _refuse_held(self, session: Session) -> None:
        until, now_s = session.record.hold_until_unix_s, self._agent.state.clock.now_s()
        if until is not None and until > now_s:
            raise Busy(
                f"session {session.record.name} is held for another {until - now_s:.0f} s",
                remedy=f"see lzy why {session.record.name}",
            )

    # -- what others did

    def _adopt_restored(self) -> None:
        """Sessions that somebody has brought back by hand (`lzy restore`) are awake."""
        with contextlib.suppress(OSError):
            changed_ns = os.stat(run_directory()).st_mtime_ns
            if changed_ns == self._runs_changed_ns:
                return
            self._runs_changed_ns = changed_ns
        asleep = {
            name: session
            for name, session in self._agent.sessions.items()
            if session.record.state in ASLEEP and not session.lock.locked()
        }
        if not asleep:
            return
        with contextlib.suppress(LzyError), Store.open(self._agent.store) as store:
            for lineage in list_lineages(store):
                if session := asleep.get(lineage.session):
                    self._agent.spawn(self._settle(session))

    async def _settle(self, session: Session) -> None:
        async with session.lock:
            if session.record.state in ASLEEP or _is_open(session):
                self._agent.lives.settle(session)

    def _mend_sessions(self) -> None:
        """Find out about those of which something was left open: the store was away, say."""
        departures = self._agent.departures
        for session in self._agent.sessions.values():
            if session.lock.locked():
                continue
            if _is_open(session):
                self._agent.spawn(self._settle(session))
            elif session.record.moving and not departures.is_leaving(session.record.name):
                self._agent.spawn(departures.keep_asking(session))

    def _mend_pagers(self) -> None:
        """Start pagers anew where they were killed: their processes stall until then."""
        with contextlib.suppress(OSError, LzyError):
            for report in list_pagers():
                if not report.alive:
                    self._agent.spawn(self._agent.children.run_aside(partial(_resume, report.pid)))


def _is_open(session: Session) -> bool:
    """Whether an operation, or an end, is not accounted for."""
    return bool(session.record.intent) or (session.is_living and session.pidfd < 0)


def _resume(pid: int) -> None:
    """In a child of its own: take over from a dead pager."""
    with contextlib.suppress(LzyError):
        resume_pager(pid)


__all__ = ["DOZE", "HIBERNATE", "Watcher"]
