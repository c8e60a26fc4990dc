"""A session leaves this node for another: it goes ahead, stops, and is the target's, or wakes here.

The protocol, and what it guarantees, are in `moving`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from ..checkpoint.errors import Busy, LzyError, NotFound
from ..checkpoint.stages import reach
from ..checkpoint.store import Store
from .children import report_of
from .moving import (
    ASKED,
    BACK,
    CARRIED,
    LONGEST_PAUSE_S,
    PAUSE_S,
    STOPPING,
    OtherNode,
)
from .operations import CHECKPOINT, MIGRATE, VERIFY, WAKE
from .session import Session
from .state import ACCEPTED, DOZING, HIBERNATED, REFUSED, RUNNING
from .terminal.afar import take_terminal
from .turns import Progress

if TYPE_CHECKING:
    from ..checkpoint.image import Image
    from .node import Agent

_SMALL_BYTES = 16 << 20
_MOST_ROUNDS = 4
_ASKS_AGAIN = 5
_SWITCH_TIMEOUT_S = 120.0


class Departures:
    """The moves of one agent's sessions from here, and what other nodes still read here."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._leaving: set[str] = set()
        self._asking: set[str] = set()
        self._followed: dict[str, Image] = {}

    def is_leaving(self, name: str) -> bool:
        """Whether a move of that session is under way now."""
        return name in self._leaving

    async def migrate(
        self,
        session: Session,
        node: str,
        address: str,
        requests: dict[str, Any],
        *,
        why: str,
        wake: bool = True,
        bytes_per_s: float = 0.0,
        actor_uid: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Move a session to `node`; what that took. Whatever fails, it is in one place after it.

        `wake`: also one that hibernates runs there. `bytes_per_s`: its memory is fetched no faster
        than that, unless 0.
        """
        record = session.record
        if node == self._agent.identity.name:
            raise Busy(f"session {record.name} is on {node} already", remedy="see lzy nodes")
        if record.name in self._leaving or record.moving:
            raise Busy(f"session {record.name} is on its way already", remedy="see lzy ps")
        if record.state not in (RUNNING, DOZING, HIBERNATED):
            raise Busy(
                f"session {record.name} is {record.state}; it cannot move now",
                remedy=f"wake it first: lzy wake {record.name}",
            )
        self._leaving.add(record.name)
        target = OtherNode(self._agent, record.name, node, address, record.epoch + 1)
        try:
            return await self._lead(
                session, target, requests, why, wake, bytes_per_s, actor_uid, progress
            )
        finally:
            self._leaving.discard(record.name)

    async def _lead(
        self,
        session: Session,
        target: OtherNode,
        requests: dict[str, Any],
        why: str,
        wake: bool,
        bytes_per_s: float,
        actor_uid: int | None,
        progress: Progress | None,
    ) -> dict[str, Any]:
        agent, began_s = self._agent, time.monotonic()
        report: dict[str, Any] = {"node": target.node, "rounds": 0, "sent_bytes": 0}
        living = session.is_living
        with Store.open(agent.store, create=True) as store:
            identity = store.identity.hex()
        answer = await target.ask("offer", {
            "bytes_per_s": bytes_per_s,
            "requests": requests, "store": identity, "address": agent.identity.address,
            "owner_uid": session.record.owner_uid, "memory_bytes": session.memory_bytes,
        })  # fmt: skip
        reach("move.offered")
        try:
            if living:
                await self._go_ahead(session, target, report, actor_uid, progress)
            else:
                await target.prepare(session.record.image, report)
            reach("move.prepared")
            async with session.lock:
                self._check_unchanged(session, target)
                stopped_s = time.monotonic()
                moving = {"node": target.node, "address": target.address, "epoch": target.epoch,
                          "apart": not answer["shared"], "why": why[:500],
                          "was_living": living, "wake": living or wake}  # fmt: skip
                if session.is_living:
                    stopped_s = await self._stop(
                        session, target, moving, actor_uid, progress, report
                    )
                if session.record.moving.get("step") != ASKED:
                    agent.update(session, moving={**moving, "step": ASKED})
        except BaseException:
            with contextlib.suppress(LzyError):
                await target.ask("forget", {})
            raise
        reach("move.asked")
        document = {name: getattr(session.record, name) for name in CARRIED}
        document |= {"requests": requests, "gpu_count": int(requests.get("gpu") or 0)}
        until_s = session.record.hold_until_unix_s  # of our clock, which is not the target's
        document["hold_for_s"] = until_s and max(until_s - agent.state.clock.now_s(), 0.0)
        document["terminal"] = await take_terminal(target.name, agent.home)
        answer = {}
        try:
            answer = await target.ask(
                "accept", {"record": document, "wake": living or wake}, _SWITCH_TIMEOUT_S
            )
        except LzyError as error:
            answer = {"error": error.message}
        reach("move.answered")
        answer |= await self._settle_until_known(session, answer)
        if answer.get("state") != ACCEPTED:
            said = answer.get("error") or "it refused"
            where = "it runs on here" if session.is_living else f"it is {session.record.state} here"
            raise LzyError(
                f"{target.node} did not take session {target.name}: {said}",
                remedy=f"{where}; see lzy why {target.name}",
            )
        report |= {
            "took_s": time.monotonic() - began_s,
            "stopped_s": time.monotonic() - stopped_s,
            "pid": answer.get("pid"),
            "follows_bytes": answer.get("follows_bytes", 0),
            "notes": answer.get("notes", []),
            "why": why,
        }
        return report

    async def _go_ahead(
        self,
        session: Session,
        target: OtherNode,
        report: dict[str, Any],
        actor_uid: int | None,
        progress: Progress | None,
    ) -> None:
        """While it runs: checkpoint it and have the target fetch that, until little is left."""
        before = 0
        while report["rounds"] < _MOST_ROUNDS:
            done = await self._agent.turns.operate(
                session, CHECKPOINT, why="ahead of a move", actor_uid=actor_uid, progress=progress
            )
            ahead = target.prepare(done["image"], report)
            report["rounds"] += 1
            stored = int(done["stored_bytes"])
            if not target.verified:  # what it writes until that is done goes ahead as well
                await asyncio.gather(ahead, self._verify(session, target, done["image"]))
                before = stored
                continue
            await ahead
            if stored <= _SMALL_BYTES or (before and stored > before / 2):
                return
            before = stored

    async def _verify(self, session: Session, target: OtherNode, image: str) -> None:
        """Read all of an image that the last dump will build upon, so that it need not."""
        order = self._agent.turns.order(session.record, VERIFY, "ahead of a move", image)
        order = order._replace(lock=order.lock.with_suffix(".verify"))  # nothing is done to it
        report_of(await self._agent.children.run(order, lambda _: None))
        target.verified = image

    def _check_unchanged(self, session: Session, target: OtherNode) -> None:
        record = session.record
        if self._agent.sessions.get(record.name) is not session:
            raise NotFound(f"session {record.name} was detached")
        if record.epoch + 1 != target.epoch or record.state not in (RUNNING, DOZING, HIBERNATED):
            raise Busy(f"session {record.name} has become {record.state} meanwhile")
        if self._agent.is_stopping:
            raise Busy("the agent is about to stop", remedy="start it again: lzy up")

    async def _stop(
        self,
        session: Session,
        target: OtherNode,
        moving: dict[str, Any],
        actor_uid: int | None,
        progress: Progress | None,
        report: dict[str, Any],
    ) -> float:
        """Dump it to its end; if that fails, it runs on and is not on its way any more.

        Answers since when it stands still (CLOCK_MONOTONIC).
        """
        agent = self._agent
        agent.update(session, moving={**moving, "step": STOPPING})
        reach("move.stopping")
        try:
            order = agent.turns.order(session.record, MIGRATE, f"migrate to {moving['node']}")
            order = order._replace(verified=target.verified)
            done = await agent.turns.carry_out(session, order, actor_uid, progress)
        except BaseException:
            if session.is_living:
                agent.update(session, moving={})
            raise
        if session.record.state != HIBERNATED:
            raise LzyError(f"session {session.record.name} did not stop")
        report["last_bytes"] = done.get("stored_bytes", 0)
        reach("move.stopped")
        return float(done["frozen_at_s"])

    # -- what came of it ---------------------------------------------------------------------

    async def _settle_until_known(self, session: Session, answer: dict[str, Any]) -> dict[str, Any]:
        """Act on the target's answer; if there was none, ask for a while what became of it."""
        told = str(answer.get("state", ""))
        for _ in range(_ASKS_AGAIN):
            try:
                return {"state": await self.settle(session, told)}
            except Busy as error:  # it makes it just now
                answer = {"error": error.message}
            except LzyError as error:
                answer = {"error": error.message}
            await asyncio.sleep(PAUSE_S)
        self._agent.spawn(self.keep_asking(session))
        return answer

    async def keep_asking(self, session: Session) -> None:
        """Until it is known where the session is, however long that takes; one at a time."""
        name, pause_s = session.record.name, PAUSE_S
        if name in self._asking:
            return
        self._asking.add(name)
        try:
            while session.record.moving and not self._agent.is_stopping:
                try:
                    await self.settle(session)
                    return
                except LzyError:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            self._asking.discard(name)

    async def settle(self, session: Session, told: str = "") -> str:
        """Find out whether the target has a session that is on its way, and act on it.

        Raises what kept the target from being asked; the session then stays hibernated.
        """
        agent = self._agent
        async with session.lock:
            record = session.record
            moving = record.moving
            if not moving or agent.sessions.get(record.name) is not session:
                return ACCEPTED if agent.state.departed_to(record.name) else REFUSED
            if session.is_living:  # it never stopped
                agent.update(session, moving={})
                return REFUSED
            where = moving["node"], moving["address"], moving["epoch"]
            target = OtherNode(agent, record.name, *where)
            if moving["step"] == ASKED:
                if told not in (ACCEPTED, REFUSED):
                    told = await self._ask_what_became(session, target)
                if told == ACCEPTED:
                    why = str(moving.get("why") or "asked").removeprefix(f"{target.node}: ")
                    words = f"lives on {target.node} now ({why})"
                    followed = bool(moving.get("apart"))
                    agent.depart(session, target, words, followed=followed)
                    reach("move.departed")
                    return ACCEPTED
                # Its next life has another number: this one was refused for ever.
                agent.update(
                    session, moving={**moving, "step": BACK}, epoch=target.epoch, failure=""
                )
            elif moving["step"] == STOPPING:
                agent.update(session, moving={**moving, "step": BACK})
            reach("move.back")
        if moving["was_living"] and session.record.state == HIBERNATED:
            try:
                await agent.turns.operate(session, WAKE, why="it did not move")
            finally:
                if session.record.moving:
                    agent.update(session, moving={})
        else:
            agent.update(session, moving={})
        return REFUSED

    async def _ask_what_became(self, session: Session, target: OtherNode) -> str:
        """The target's answer, for which it decides now if it had not before."""
        try:
            return str((await target.ask("cancel", {}))["state"])
        except LzyError as error:
            words = (
                f"whether {target.node} has it is not known, so it is not woken here:"
                f" {error.message}"
            )
            if session.record.failure != words:
                self._agent.update(session, "failure", words, failure=words)
            raise

    # -- what is still read here -------------------------------------------------------------

    def keep_followed(self) -> None:
        """Hold the images that other nodes read here, and no others: nobody can remove them."""
        wanted = self._agent.state.followed()
        for name in self._followed.keys() - wanted:
            self._followed.pop(name).close()
        for name in wanted - self._followed.keys():
            with contextlib.suppress(LzyError), Store.open(self._agent.store) as store:
                self._followed[name] = store.load_unchecked(name)

    def complete(self, name: str, epoch: int, node: str) -> dict[str, Any]:
        """The node that the session went to has all of it.

        Raises Busy where its answer that it lives there was not heard yet, or is not acted on: what
        it reads here would be noted after that, and kept for ever.
        """
        session = self._agent.sessions.get(name)
        moving = session.record.moving if session else {}
        asked = moving.get("step"), moving.get("node"), moving.get("epoch")
        if asked == (ASKED, node, epoch):
            raise Busy(f"session {name} is still on its way to {node}", remedy="ask again")
        self._agent.state.end_following(name, epoch, node)
        self.keep_followed()
        return {}
