"""What is asked of a session is done when it is its turn: intent, operation, what came of it.

*Guarantee*: of one session at most one operation is under way, and it was written down before it
began. Lock order: a session's lock, then the slots of heavy operations.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..checkpoint import proc
from ..checkpoint.errors import Busy, LzyError, NotFound
from ..checkpoint.stages import reach
from ..checkpoint.store import Store
from .children import report_of
from .limits import describe_round
from .lives import LEADS_TO
from .moving import ASKED, BACK
from .operations import CHECKPOINT, DOZE, HIBERNATE, LIMIT, MIGRATE, ROUSE, WAKE, Order
from .session import Session
from .state import (
    ASLEEP,
    DOZING,
    HIBERNATED,
    HIBERNATING,
    LIVING,
    MIGRATING,
    RUNNING,
    WAKING,
    Record,
)

if TYPE_CHECKING:
    from .node import Agent

_BEGINS: Final = {HIBERNATE: HIBERNATING, MIGRATE: MIGRATING, WAKE: WAKING}
_HEAVY: Final = frozenset({CHECKPOINT, HIBERNATE, DOZE, LIMIT})
_MOST_WAITING = 8

Progress = Callable[[dict[str, Any]], None]


class Turns:
    """Of the sessions of one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._heavy = asyncio.Semaphore(int(agent.settings.operations))

    async def operate(
        self,
        session: Session,
        verb: str,
        *,
        why: str = "asked",
        actor_uid: int | None = None,
        image: str = "",
        terminal: str = "",
        more: dict[str, Any] | None = None,
        progress: Progress | None = None,
        still_wanted: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Do it when it is its turn; what the operation reports, empty if there was nothing to do.

        `more`: what else the order says. `still_wanted` is called just before it begins, and raises
        if it is not. Raises what the operation raised.
        """
        if session.waiting >= _MOST_WAITING:
            raise Busy(f"too many wait for session {session.record.name}", remedy="try later")
        session.waiting += 1
        try:
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(session.lock)
                if not self._is_needed(session, verb, image):
                    return {}
                if verb in _HEAVY:
                    await stack.enter_async_context(self._heavy)
                if still_wanted:
                    still_wanted()
                order = self.order(session.record, verb, why, image, terminal)
                if verb == WAKE and more is None:
                    source = order.image or session.record.image
                    more = self._agent.arrivals.source_of(source)
                order = order._replace(**(more or {}))
                return await self.carry_out(session, order, actor_uid, progress)
        finally:
            session.waiting -= 1

    def order(
        self, record: Record, verb: str, why: str, image: str = "", terminal: str = ""
    ) -> Order:
        """What an operation is told; the session need not be one of ours yet."""
        agent = self._agent
        return Order(
            verb,
            record,
            agent.store,
            agent.lock_of(record),
            why,
            image,
            terminal,
            str(self._output(record)) if verb == WAKE else "",
            listeners=agent.ports.descriptors(record.name) if verb == WAKE else {},
            limit_bytes=agent.limit_of(record),
            heat=agent.limits.heat_path(record.name),
        )

    def _output(self, record: Record) -> Path:
        """The file for what a woken session prints where nobody hears it any more."""
        path = self._agent.home / "logs" / f"{record.name}.log"
        path.touch(mode=0o600)
        return path

    def _is_needed(self, session: Session, verb: str, image: str) -> bool:
        """Whether there is something to do. Raises Busy, NotFound if it cannot be done."""
        agent, record = self._agent, session.record
        if agent.sessions.get(record.name) is not session:
            raise NotFound(
                f"session {record.name} was detached", remedy="lzy attach PID has it back"
            )
        if agent.is_stopping:
            raise Busy("the agent is about to stop", remedy="start it again: lzy up")
        if verb == WAKE:
            if record.moving and record.moving["step"] != BACK:
                raise Busy(
                    f"session {record.name} is on its way to {record.moving['node']}",
                    remedy=record.failure or "see lzy ps",
                )
            if agent.is_draining and record.state in ASLEEP and not record.moving:
                raise Busy(
                    f"{agent.identity.name} is being drained",
                    remedy=f"lzy migrate {record.name}, or lzy drain --undo {agent.identity.name}",
                )
            if record.state in LIVING and image:
                raise Busy(
                    f"session {record.name} is {record.state}",
                    remedy=f"hibernate it first: lzy hibernate {record.name}",
                )
            return record.state in ASLEEP
        if verb == HIBERNATE and record.state == HIBERNATED:
            return False
        if record.state not in LIVING:
            raise Busy(
                f"session {record.name} is {record.state}; it has no process",
                remedy=f"wake it first: lzy wake {record.name}",
            )
        if verb == DOZE:
            return record.state == RUNNING
        return verb != ROUSE or record.state == DOZING

    async def carry_out(
        self, session: Session, order: Order, actor_uid: int | None, progress: Progress | None
    ) -> dict[str, Any]:
        """Write the intent, fork, listen, and write what came of it; for who holds its lock."""
        verb = order.verb
        self._agent.update(session, intent=verb, state=_BEGINS.get(verb, session.record.state))
        order = order._replace(record=session.record)
        reach("operation.intended")
        session.progress = {"verb": verb, "began_unix_s": time.time(), "stage": "begins"}
        session.progress |= {"done_bytes": 0, "total_bytes": 0}

        def listen(told: dict[str, Any]) -> None:
            if session.progress is not None:
                session.progress |= told
            if progress:
                progress(told)

        work = asyncio.ensure_future(self._agent.children.run(order, listen))
        try:
            outcome = await asyncio.shield(work)
        except asyncio.CancelledError:  # who asked has gone, or the agent stops: it goes on to
            outcome = await work  #       its end, as the lock that we hold must see it
            self._finish(session, order, outcome, actor_uid)
            raise
        finally:
            session.progress = None
            if verb != LIMIT:  # which is done to who is at work
                session.forgive()
        return self._finish(session, order, outcome, actor_uid)

    def _finish(
        self, session: Session, order: Order, outcome: dict[str, Any], actor_uid: int | None
    ) -> dict[str, Any]:
        """Write what came of an operation; its report, or the error that it raised."""
        reach("operation.heard")
        try:
            report = report_of(outcome)
        except LzyError as error:
            passes = order.verb == LIMIT and isinstance(error, Busy)
            failure = None if passes else error
            with Store.open(self._agent.store) as store:
                self._agent.lives.repair(session, store, watched=True, failure=failure, order=order)
            if session.record.state == LEADS_TO.get(order.verb):
                return {}  # it was killed so late that it was done
            raise
        self._write_done(session, order, report, actor_uid)
        reach("operation.recorded")
        return report

    def _write_done(
        self, session: Session, order: Order, report: dict[str, Any], actor_uid: int | None
    ) -> None:
        agent, verb, record = self._agent, order.verb, session.record
        changes: dict[str, Any] = {"intent": "", "failure": "", "failures": 0}
        for name in ("image", "image_bytes", "number"):
            if name in report:
                changes[name] = report[name]
        changes["memory_bytes"] = session.memory_bytes
        changes["peak_memory_bytes"] = session.peak_memory_bytes
        kind, words = f"{verb}d", order.why
        if verb == CHECKPOINT:
            kind, words = "checkpointed", f"{report['image']} ({order.why})"
        elif verb in (HIBERNATE, MIGRATE):
            kind = "hibernated"
            changes["state"] = HIBERNATED
            if verb == MIGRATE:  # on disk at once, for whoever waits for it stands still
                changes["moving"] = {**record.moving, "step": ASKED}
            words = f"{report['image']} ({order.why})"
        elif verb == DOZE:
            changes["state"] = DOZING
        elif verb == ROUSE:
            changes["state"] = RUNNING
        elif verb == LIMIT:
            kind = "limited" if order.why else ""
            words = describe_round(report, order.limit_bytes)
        else:
            kind, words = "woken", f"from {report.get('image') or record.image}"
            changes |= {
                "state": RUNNING,
                "pid": report["pid"],
                "start_time": report["start_time"],
                "boot_id": proc.boot_id(),
                "epoch": record.epoch + 1,
                "woken_unix_s": time.time(),
                "exit_status": None,
                "moving": {},
                "protected_until_unix_s": agent.state.clock.now_s()
                + agent.settings_of(session).after_wake_s,
            }
        agent.update(session, kind, words, actor_uid, **changes)
        if verb in (HIBERNATE, MIGRATE):
            agent.lives.let_go(session)
        elif verb == WAKE:
            agent.lives.watch(session)
