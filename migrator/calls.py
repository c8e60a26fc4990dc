"""Sessions that somebody uses while they hibernate wake where there is room: it hears of each call.

An agent tells of a call (a connection to a port that it keeps) as an event. Here a thread for each
node of a fleet follows these as they come, and tells the agent what to do: wake it, or move it.
The agent wakes it by itself where it hears nothing for a while.
"""

from __future__ import annotations

import threading
import time

from ..agent.calls import CALLED
from ..checkpoint.errors import Busy, LzyError
from ..checkpoint.stages import reach
from .fleet import Fleet, Member
from .loop import UNREACHABLE_PAUSE_S, log
from .moves import Wish, choose_for_wake, find_session, migrate_body


class Calls:
    """Who listens to which node."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._heard: set[Member] = set()

    def listen(self) -> None:
        """Listen to every node of the fleet that nobody listens to yet."""
        for member in self._fleet.members:
            if member.address and member not in self._heard:
                self._heard.add(member)
                threading.Thread(target=self._follow, args=(member,), daemon=True).start()

    def _follow(self, member: Member) -> None:
        after = 0
        while member in self._fleet.members:
            try:
                client = self._fleet.client(member)
                if not after:
                    events = client.get("/v1/events?last=1")["events"]
                    after = events[-1]["number"] if events else 0
                for event in client.follow(f"/v1/events?follow=1&after={after}"):
                    after = event["number"]
                    if event["kind"] == CALLED:
                        self._answer(event["session"])
            except (LzyError, OSError, ValueError, KeyError):
                pass  # it is down, or the way to it is
            time.sleep(UNREACHABLE_PAUSE_S)
        self._heard.discard(member)

    def _answer(self, name: str) -> None:
        """Have the session wake, on the node that `lzy wake` would choose."""
        reach("migrator.heard")
        try:
            looks = self._fleet.look()
            look, session = find_session(looks, name)
            if session["state"] != "hibernated" or session["moving_to"]:
                return
            client = self._fleet.client(look.member)
            chosen = choose_for_wake(looks, look, session)
            reach("migrator.chosen")
            if chosen and chosen.node:
                body = {**migrate_body(chosen, session, Wish()), "wait": False}
                client.post(client.session(name, "migrate"), body, timeout_s=30)
            else:
                client.post(client.session(name, "wake"), {"wait": False}, timeout_s=30)
            reach("migrator.answered")
        except Busy:
            pass  # something is done to it already
        except LzyError as error:
            log(f"cannot wake {name}, which was called: {error}")
