"""Who is wanted while it hibernates is woken, once, and where there is room for it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final

from ..checkpoint.errors import StoreUnavailable
from .operations import WAKE
from .session import Session
from .state import HIBERNATED

if TYPE_CHECKING:
    from .node import Agent

CALLED: Final = "called"
"""The event of which a migrator makes a wake, where there is room for it."""

_MIGRATOR_ANSWERS_S, _LOOKS_EVERY_S = 8.0, 0.1


class Calls:
    """For the sessions of one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._called: set[str] = set()
        self.listening_migrators = 0
        """How many hear of our events as they come: one, or none."""

    def call(self, session: Session, why: str) -> None:
        """Somebody uses a session that hibernates: have it woken, once, where there is room."""
        name = session.record.name
        if name in self._called:
            return
        self._called.add(name)
        with contextlib.suppress(StoreUnavailable):
            self._agent.update(session, CALLED, why)
        self._agent.spawn(self._wake_where_there_is_room(session, why))

    def call_to_port(self, name: str, port: int) -> None:
        """Somebody has connected to a port of a session that hibernates."""
        self.call(self._agent.sessions[name], f"a connection to port {port}")

    async def _wake_where_there_is_room(self, session: Session, why: str) -> None:
        """Have the migrator say on which node, if it has heard of the call; else wake it here."""
        agent, name = self._agent, session.record.name

        def sleeps() -> bool:
            known = agent.sessions.get(session.record.name) is session
            return known and session.record.state == HIBERNATED and not session.lock.locked()

        deadline = time.monotonic() + (_MIGRATOR_ANSWERS_S if self.listening_migrators else 0)
        try:
            while sleeps() and (agent.departures.is_leaving(name) or time.monotonic() < deadline):
                await agent.await_event(_LOOKS_EVERY_S)
            if sleeps():
                await agent.turns.operate(session, WAKE, why=why)
        finally:
            self._called.discard(name)
