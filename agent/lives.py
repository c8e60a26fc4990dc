"""The lives of sessions' processes: they are watched for their end, and what is true is written.

A life ends by an operation, by another's dump, or by itself; or we were not there to see it.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

from ..checkpoint.errors import LzyError
from ..checkpoint.linux.activity import exit_status
from ..checkpoint.store import Store
from . import operations
from .cgroups import Cgroup, least_memory_bytes
from .operations import DOZE, HIBERNATE, MIGRATE, ROUSE, WAKE, Order
from .processes import list_below
from .repair import find_out
from .session import Session
from .state import DOZING, HIBERNATED, LIVING, RUNNING

if TYPE_CHECKING:
    from .node import Agent

LEADS_TO: Final = {
    HIBERNATE: HIBERNATED,
    MIGRATE: HIBERNATED,
    DOZE: DOZING,
    ROUSE: RUNNING,
    WAKE: RUNNING,
}
"""The state that a session is in when an operation on it is done."""

_BACKOFF_S, _LONGEST_BACKOFF_S = 60.0, 3600.0
_SETTLES_S = 0.3  # from a process's end until a dump that ended it has said so


class Lives:
    """Of the sessions of one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def watch(self, session: Session) -> None:
        """Hear of the end of its process, which may have come already."""
        self.let_go(session)
        self._agent.children.exits.pop(session.record.pid, None)
        loop = asyncio.get_running_loop()
        if session.open_process():
            loop.add_reader(session.pidfd, self._hear_end, session)
            self._hold_to_share(session)
        else:
            loop.call_soon(self._hear_end, session)

    def let_go(self, session: Session) -> None:
        """Hear no more of its process."""
        if session.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(session.pidfd)
        session.close_process()

    def settle(self, session: Session, status: int | None = None) -> None:
        """Look whether the record is still true; for who holds the session's lock.

        Raises StoreUnavailable, and then the rounds try again.
        """
        session.ended_with = status if status is not None else session.ended_with
        with Store.open(self._agent.store, create=True) as store:
            self.repair(session, store, watched=True, status=session.ended_with)
        session.ended_with = None

    def repair(
        self,
        session: Session,
        store: Store,
        *,
        watched: bool,
        failure: LzyError | None = None,
        order: Order | None = None,
        status: int | None = None,
    ) -> None:
        """Write what is true of a session, after a failure, an end, or a time without us."""
        agent, record = self._agent, session.record
        with operations.hold(agent.lock_of(record)):
            found = find_out(store, record, watched=watched, status=status)
        changes = dict(found.changes)
        kind, words = found.kind, found.words
        if failure and order and changes.get("state", record.state) != LEADS_TO.get(order.verb):
            failures = record.failures + 1
            backoff_s = min(_BACKOFF_S * 2.0 ** min(failures - 1, 30), _LONGEST_BACKOFF_S)
            changes |= {
                "failure": str(failure),
                "failures": failures,
                "protected_until_unix_s": agent.state.clock.now_s() + backoff_s,
            }
            kind, words = "failure", f"cannot {order.verb} it: {failure}"
        elif order and failure is None and kind == "repaired":
            kind = ""  # it is tried again, as often as it takes
        if changes or kind:
            agent.update(session, kind, words, **changes)
        if session.record.state not in LIVING:
            self.let_go(session)
        elif session.pidfd < 0 or session.record.pid != record.pid:
            self.watch(session)

    def _hold_to_share(self, session: Session) -> None:
        """Have it in a cgroup with what it asked for: its weight, and its bound of memory."""
        asked, session.memory_limit_bytes = session.record.requests, 0
        if not (asked.get("cpu") or asked.get("memory_bytes")):
            return
        group = Cgroup.inside(self._agent.home, session.record.name)
        memory_bytes = int(asked.get("memory_bytes") or 0)
        if memory_bytes:  # it may have grown since it asked
            memory_bytes = max(memory_bytes, least_memory_bytes(session.held_bytes))
        if group.limit(memory_bytes=memory_bytes):
            session.memory_limit_bytes = memory_bytes
        if asked.get("cpu"):
            group.share(float(asked["cpu"]))
        for pid in (session.record.pid, *list_below(session.record.pid)):
            group.add(pid)

    def _hear_end(self, session: Session) -> None:
        pidfd = -1
        if session.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(session.pidfd)
            pidfd = os.dup(session.pidfd)
        self._agent.spawn(self._note_end(session, session.record.epoch, pidfd))

    async def _note_end(self, session: Session, epoch: int, pidfd: int) -> None:
        """A life of the session has ended: by an operation, by another's dump, or by itself."""
        try:
            await asyncio.sleep(_SETTLES_S)
            status = exit_status(pidfd) if pidfd >= 0 else None
        finally:
            if pidfd >= 0:
                os.close(pidfd)
        async with session.lock:
            record = session.record
            if record.state not in LIVING or record.epoch != epoch:
                return  # an operation ended it, and has said so
            if status is None:  # an older kernel: then of our own children only
                status = self._agent.children.exits.get(record.pid)
            if self._agent.sessions.get(record.name) is session:
                try:
                    self.settle(session, status)
                except LzyError:
                    self.let_go(session)  # by which the rounds know that it is not settled
                    raise
