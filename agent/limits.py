"""Sessions that are to hold no more memory than was said: looked at each second, held to it.

How much is a setting of theirs (`limit_bytes`), which outlives the agent, goes along when they
move, and holds again after a wake. What is done to one that has more is an operation like others:
`checkpoint.limit` tells what goes. *Guarantee*: while a session is held, on its way, about to be
evicted, or worked on, it is left alone; so it is for a while where that failed, or has not helped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.doze import resident_bytes
from ..checkpoint.errors import Busy, LzyError, NotFound, StoreUnavailable
from ..checkpoint.garbage import collect_garbage
from ..checkpoint.limit import LOOKS_UNTIL_SETTLED, Heat
from ..checkpoint.store import Store
from .operations import LIMIT, away_bytes
from .processes import look_at
from .session import Session
from .settings import limit_of
from .state import DOZING, RUNNING

if TYPE_CHECKING:
    from .node import Agent

_LOOKS_EVERY_S = 1.0
_LOOKED_LATELY_S = 5.0  # what was touched in a longer time says little of what is warm
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 4.0, 300.0
_TELLS_EVERY_S = 600.0
_COLLECTS_AFTER_BYTES = 1 << 30


class _Life:
    """What has been done to one life of a session so that it keeps to its limit."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.is_at_work = False
        self.looked_s = self.told_s = float("-inf")
        self.due_s = 0.0
        self.unsettled = 0
        self.in_vain = 0
        self.obstacle = ""
        self.rounds = 0
        self.last_unix_s: float | None = None

    def pause(self, *, passes: bool = False) -> None:
        """The next round is not worth while, or would fail; for longer and longer.

        Unless that `passes`: it has nothing to do with how often it was tried.
        """
        self.in_vain = 1 if passes else self.in_vain + 1
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(self.in_vain - 1, 30), _LONGEST_PAUSE_S)
        self.due_s = time.monotonic() + pause_s


class Limits:
    """Holds one agent's sessions to their limits."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lives: dict[str, _Life] = {}
        self._changed = asyncio.Event()
        self._stored_bytes = 0

    def hurry(self) -> None:
        """Look now: a limit is another, or a session is new."""
        self._changed.set()

    async def go_rounds(self) -> None:
        """Look at all that have a limit, again and again, until cancelled."""
        while True:
            has_any, pause_s = self._look(), self._agent.settings.sample_s
            if has_any:
                pause_s = min(pause_s, _LOOKS_EVERY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
                self._changed.clear()

    def has_room(self, session: Session) -> bool:
        """Whether a session may have all of its memory at once."""
        limit_bytes = self._agent.limit_of(session.record)
        if not limit_bytes:
            return True
        with contextlib.suppress(NotFound):
            record = session.record
            return resident_bytes(record.pid) + away_bytes(record) <= limit_bytes
        return True

    def describe(self, session: Session) -> dict[str, Any] | None:
        """How a session's limit is kept, as `/v1/sessions` shows it; None: it has none."""
        limit_bytes = self._agent.limit_of(session.record)
        if not limit_bytes:
            return None
        life = self._life_of(session)
        there = away = 0
        if session.is_living:
            with contextlib.suppress(NotFound):
                there = resident_bytes(session.record.pid)
                away = away_bytes(session.record)
        return {
            "limit_bytes": limit_bytes,
            "resident_bytes": there,
            "away_bytes": away,
            "rounds": life.rounds,
            "last_unix_s": life.last_unix_s,
            "obstacle": life.obstacle or None,
        }

    def forget(self, name: str) -> None:
        """A session is not looked after any more."""
        self._lives.pop(name, None)
        self.heat_path(name).unlink(missing_ok=True)

    def heat_path(self, name: str) -> Path:
        """Where it is kept what is known of how warm a session's memory is."""
        return self._agent.folder / "heat" / f"{name}.json"

    # -- one session

    def _life_of(self, session: Session) -> _Life:
        life = self._lives.get(session.record.name)
        if life is None or life.epoch != session.record.epoch:
            life = self._lives[session.record.name] = _Life(session.record.epoch)
        return life

    def _look(self) -> bool:
        """See who has too much; whether there is a limit at all."""
        has_any, node = False, self._agent.settings
        for session in self._agent.sessions.values():
            if not (limit_bytes := limit_of(node, session.record.settings)):
                continue
            has_any, life = True, self._life_of(session)
            if life.is_at_work or time.monotonic() < life.due_s or not self._may(session):
                continue
            with contextlib.suppress(NotFound):
                if resident_bytes(session.record.pid) > limit_bytes:
                    self._begin(life, self._release(session, life, limit_bytes))
                elif life.unsettled:
                    life.unsettled -= 1
                    self._begin(life, self._aside(partial(_settle, session.record.pid)))
                else:
                    life.obstacle, life.in_vain = "", 0
        return has_any

    def _may(self, session: Session) -> bool:
        record, now_s = session.record, self._agent.state.clock.now_s()
        is_held = record.hold_until_unix_s is not None and record.hold_until_unix_s > now_s
        has_failed = record.failures and (record.protected_until_unix_s or 0.0) > now_s
        is_busy = session.lock.locked() or session.called_off is not None
        leaves = record.moving or self._agent.departures.is_leaving(record.name)
        is_there = record.state in (RUNNING, DOZING) and session.pidfd >= 0
        return is_there and not (is_held or has_failed or is_busy or leaves)

    def _begin(self, life: _Life, work: Any) -> None:
        async def do() -> None:
            try:
                await work
            finally:
                life.is_at_work = False

        life.is_at_work = True
        self._agent.spawn(do())

    async def _aside(self, work: Any) -> None:
        await self._agent.children.run_aside(work)

    async def _release(self, session: Session, life: _Life, limit_bytes: int) -> None:
        """Have what is cold go; a look beforehand, where the last one is long ago."""
        record, began_s = session.record, time.monotonic()
        if began_s - life.looked_s > _LOOKED_LATELY_S:
            await self._aside(partial(_look, record.pid, self.heat_path(record.name)))
            life.looked_s = time.monotonic()
            return
        tells = began_s - life.told_s > _TELLS_EVERY_S

        def still_wanted() -> None:
            if self._agent.limit_of(record) != limit_bytes or not self._may_yet(session):
                raise Busy(f"session {record.name} is to be left alone")

        try:
            done = await self._agent.turns.operate(
                session,
                LIMIT,
                why="its limit" if tells else "",
                more={"has_room": self._fits_in(away_bytes(record))},
                still_wanted=still_wanted,
            )
        except LzyError as error:
            life.obstacle = error.message
            life.pause(passes=isinstance(error, Busy))
            return
        if not done:
            return
        life.looked_s = time.monotonic()
        life.told_s = began_s if tells else life.told_s
        self._note(session, life, done, limit_bytes)
        life.due_s = max(life.due_s, life.looked_s + 2 * (life.looked_s - began_s))
        await self._collect(done["stored_bytes"])

    def _fits_in(self, length_bytes: int) -> bool:
        """Whether the node has room for so much more, and as much again."""
        from .documents import describe_node

        return 2 * length_bytes < int(describe_node(self._agent)["available_memory_bytes"])

    def _may_yet(self, session: Session) -> bool:
        """The same as `_may` of a session of which we hold the lock."""
        record, now_s = session.record, self._agent.state.clock.now_s()
        is_held = record.hold_until_unix_s is not None and record.hold_until_unix_s > now_s
        return not (is_held or session.called_off or record.moving)

    def _note(self, session: Session, life: _Life, done: dict[str, Any], limit_bytes: int) -> None:
        life.rounds += 1
        life.last_unix_s = time.time()
        life.unsettled = LOOKS_UNTIL_SETTLED
        excess_bytes = done["resident_before_bytes"] - limit_bytes
        left_bytes = done["resident_after_bytes"] - limit_bytes
        if left_bytes > 0 and done["dropped_bytes"] < excess_bytes / 2:
            life.obstacle = "most of what is too much cannot go"
            life.pause()
        else:
            life.obstacle, life.in_vain = "", 0
        if process := look_at(session.record.pid):
            session.memory_bytes = process.resident_bytes

    async def _collect(self, stored_bytes: int) -> None:
        """What was stored for the limit alone is removed by the next round: give its space back."""
        self._stored_bytes += stored_bytes
        if self._stored_bytes > _COLLECTS_AFTER_BYTES and not self._agent.children.are_at_work:
            self._stored_bytes = 0
            await self._aside(partial(_collect_garbage, self._agent.store))


def describe_round(done: dict[str, Any], limit_bytes: int) -> str:
    """One round in words, for the events."""
    before, after, limit = (
        f"{size / (1 << 20):,.0f} MiB".replace(",", "\u202f")
        for size in (done["resident_before_bytes"], done["resident_after_bytes"], limit_bytes)
    )
    return f"{before} → {after} of anonymous memory in RAM; {limit} is its limit"


# -- in children of the agent's, which may crash


def _look(pid: int, path: Path) -> None:
    with contextlib.suppress(NotFound):
        heat = Heat.load(path, pid) or Heat(pid)
        heat.look()
        heat.save(path)


def _settle(pid: int) -> None:
    with contextlib.suppress(NotFound):
        Heat(pid).settle()


def _collect_garbage(store: Path) -> None:
    with contextlib.suppress(Busy, StoreUnavailable), Store.open(store) as opened:
        collect_garbage(opened)
