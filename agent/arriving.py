"""A session comes to this node from another: offered, prepared, and made or refused for ever.

The protocol, and what it guarantees, are in `moving`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.errors import Busy, Incompatible, LzyError, NotFound
from ..checkpoint.stages import reach
from ..checkpoint.store import Store
from .authority import node_subject
from .children import report_of
from .moving import CARRIED, LONGEST_PAUSE_S, PAUSE_S, OtherNode
from .operations import FETCH, PREPARE, WAKE, Order
from .session import Session
from .state import ACCEPTED, ACCEPTING, HIBERNATED, OFFERED, REFUSED, Arrival, Record
from .terminal.afar import put_terminal

if TYPE_CHECKING:
    from .node import Agent

_PEER = ("peer_address", "peer_subject", "fleet")


class Arrivals:
    """The moves of other agents' sessions to here, and what still follows them."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._making: dict[tuple[str, int], asyncio.Task[dict[str, Any]]] = {}
        self._fetching: set[tuple[str, int]] = set()
        self._prepared: dict[tuple[str, int], str] = {}

    def offer(self, name: str, epoch: int, source: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Another node wants to bring a session. Raises Busy, Incompatible if it cannot come."""
        agent = self._agent
        if agent.is_draining:
            raise Busy(f"{agent.identity.name} is being drained", remedy="lzy drain --undo")
        if name in agent.sessions:
            raise Busy(f"{agent.identity.name} has a session {name} already")
        known = agent.state.arrival(name, epoch)
        if known and known.state != OFFERED:
            raise Busy(f"life {epoch} of session {name} was {known.state} here already")
        wanted = int(asked["requests"].get("gpu") or 0)
        if wanted > agent.free_gpus:
            raise Incompatible(
                f"{agent.free_gpus} of {agent.identity.gpus} GPUs of {agent.identity.name} are free"
            )
        with Store.open(agent.store, create=True) as store:
            shared = store.identity.hex() == asked["store"]
        arrival = Arrival(name, epoch, source, OFFERED, {**asked, "shared": shared}, time.time())
        agent.state.note_arrival(arrival)
        return {"shared": shared}

    async def prepare(self, name: str, epoch: int, image: str) -> dict[str, Any]:
        """Have that image here and see that it could be restored; the bytes that were fetched."""
        arrival = self._expect(name, epoch)
        order = self._order(PREPARE, arrival, image)
        outcome = await self._agent.children.run(order, lambda _: None)
        done = report_of(outcome)
        self._prepared[name, epoch] = image
        return done

    def _expect(self, name: str, epoch: int) -> Arrival:
        arrival = self._agent.state.arrival(name, epoch)
        if arrival is None or arrival.state != OFFERED:
            state = arrival.state if arrival else "never offered"
            raise Busy(f"life {epoch} of session {name} was {state} here")
        return arrival

    def _order(self, verb: str, arrival: Arrival, image: str) -> Order:
        agent = self._agent
        now = time.time()
        record = Record(
            arrival.name, arrival.document["owner_uid"], HIBERNATED, now, now, 0, 0, "", ""
        )
        order = agent.turns.order(record, verb, "arrives", image)
        if not arrival.document["shared"]:
            order = order._replace(
                peer_address=arrival.document["address"],
                peer_subject=node_subject(arrival.source),
                fleet=str(agent.contacts.place),
                bytes_per_s=float(arrival.document.get("bytes_per_s") or 0.0),
            )
        return order

    async def accept(self, name: str, epoch: int, asked: dict[str, Any]) -> dict[str, Any]:
        """Take a session and wake it; `state` is accepted or refused, and that is final."""
        arrival = self._agent.state.arrival(name, epoch)
        if arrival and arrival.state in (ACCEPTED, REFUSED):
            return {"state": arrival.state}
        if (name, epoch) in self._making:
            raise Busy(f"session {name} is being made already")
        arrival = self._expect(name, epoch)
        if name in self._agent.sessions:
            raise Busy(f"{self._agent.identity.name} has a session {name} already")
        making = asyncio.ensure_future(self._make(arrival, asked))
        self._making[name, epoch] = making
        making.add_done_callback(lambda _: self._making.pop((name, epoch), None))
        making.add_done_callback(lambda _: self._prepared.pop((name, epoch), None))
        making.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(making)

    async def _make(self, arrival: Arrival, asked: dict[str, Any]) -> dict[str, Any]:
        agent, now = self._agent, self._agent.state.clock.now_s()
        found = {name: asked["record"][name] for name in (*CARRIED, "requests", "gpu_count")}
        found["idle_gaps"] = tuple(found["idle_gaps"])
        record = Record(
            **found, state=HIBERNATED, since_unix_s=now, pid=0, start_time=0, boot_id="",
            epoch=arrival.epoch - 1,
            hold_until_unix_s=now + asked["record"]["hold_for_s"] if asked["record"]["hold_for_s"]
            else None,
        )  # fmt: skip
        arrival = arrival._replace(state=ACCEPTING, unix_s=time.time())
        agent.state.note_arrival(arrival, insert=record, words=f"from {arrival.source}")
        session = agent.sessions[record.name] = Session(record)
        reach("move.accepting")
        agent.passages.suspend(record.name)
        put_terminal(record.name, agent.home, asked["record"].get("terminal") or {})
        report: dict[str, Any] = {}
        failure, follows_bytes = "", 0
        try:
            more: dict[str, Any] = {
                "prepared": self._prepared.get((arrival.name, arrival.epoch), "")
            }
            if not arrival.document["shared"]:
                order = self._order(PREPARE, arrival, record.image)
                at_once = int(agent.settings.move_at_once_bytes)
                order = order._replace(most_bytes=at_once if asked["wake"] else None)
                done = report_of(await agent.children.run(order, lambda _: None))
                arrival.document["follows"] = record.image
                follows_bytes = done["left_bytes"]
                agent.state.note_arrival(arrival)  # before anything can need what has not come
                if follows_bytes:
                    more |= self.source_of(record.image)
            if asked["wake"]:
                report = await agent.turns.operate(
                    session,
                    WAKE,
                    why=f"comes from {arrival.source}",
                    more=more,
                )
        except LzyError as error:
            failure = error.message
        async with session.lock:
            state = self._conclude(arrival, session, failure)
        if state == ACCEPTED:
            self._begin_to_fetch(arrival)
        elif follows_bytes:
            await agent.children.run_aside(partial(_remove_image, agent.store, record.image))
        pid = session.record.pid if session.is_living else None
        return {"state": state, "pid": pid, "error": failure, "notes": report.get("notes", []),
                "follows_bytes": follows_bytes}  # fmt: skip

    def _conclude(self, arrival: Arrival, session: Session, failure: str) -> str:
        """Write down for ever whether it lives here; for who holds the session's lock."""
        agent = self._agent
        if session.is_living or not failure:
            agent.state.note_arrival(arrival._replace(state=ACCEPTED, unix_s=time.time()))
            reach("move.accepted")
            return ACCEPTED
        kept = agent.ports.hand_over(arrival.name)
        agent.forget(session)
        arrival.document.pop("follows", None)
        agent.state.note_arrival(
            arrival._replace(state=REFUSED, unix_s=time.time()),
            remove=session.record,
            words=f"it could not come: {failure}",
        )
        agent.passages.resume(arrival.name, kept)
        agent.ring()
        return REFUSED

    async def cancel(self, name: str, epoch: int, source: str) -> dict[str, Any]:
        """What became of that life: accepted or refused, for ever. Raises Busy while it is made."""
        if making := self._making.get((name, epoch)):
            with contextlib.suppress(LzyError, TimeoutError):
                async with asyncio.timeout(20):
                    await asyncio.shield(making)
        arrival = self._agent.state.arrival(name, epoch)
        if arrival and arrival.state in (ACCEPTED, REFUSED):
            return {"state": arrival.state}
        if arrival and arrival.state == ACCEPTING:
            raise Busy(f"session {name} is being made here")
        told = arrival or Arrival(name, epoch, source, REFUSED, {}, time.time())
        self._agent.state.note_arrival(told._replace(state=REFUSED, unix_s=time.time()))
        return {"state": REFUSED}

    def forget(self, name: str, epoch: int) -> dict[str, Any]:
        """An offer was withdrawn before its session stopped; the same may be offered again."""
        self._agent.state.forget_offer(name, epoch)
        self._prepared.pop((name, epoch), None)
        return {}

    def conclude_all(self) -> None:
        """After the agent's death: decide about those that were being made then."""
        for arrival in self._agent.state.open_arrivals():
            if (arrival.name, arrival.epoch) in self._making:
                continue
            session = self._agent.sessions.get(arrival.name)
            if session is None:
                note = arrival._replace(state=REFUSED, unix_s=time.time())
                self._agent.state.note_arrival(note)
            elif not session.record.intent:
                self._conclude(arrival, session, "the agent died over it")
        for arrival in self._agent.state.following():
            self._begin_to_fetch(arrival)

    # -- what comes after the switch -----------------------------------------------------------

    def source_of(self, image: str) -> dict[str, Any]:
        """What an order says of where the rest of an image is; nothing if all of it is here."""
        for arrival in self._agent.state.following():
            if arrival.document["follows"] == image:
                order = self._order(PREPARE, arrival, image)
                return {**{name: getattr(order, name) for name in _PEER}, "follows": True}
        return {}

    def _begin_to_fetch(self, arrival: Arrival) -> None:
        place = (arrival.name, arrival.epoch)
        if place in self._fetching or not arrival.document.get("follows"):
            return
        self._fetching.add(place)
        self._agent.spawn(self._fetch_rest(arrival))

    async def _fetch_rest(self, arrival: Arrival) -> None:
        """Have here what is still there, however long that takes; then tell the node it is from."""
        agent, pause_s = self._agent, PAUSE_S
        source, image = OtherNode.of(agent, arrival), arrival.document["follows"]
        order = self._order(FETCH, arrival, image)
        order = order._replace(lock=order.lock.with_suffix(".fetch"))
        try:
            while not agent.is_stopping:
                try:
                    report_of(await agent.children.run(order, lambda _: None))
                    reach("move.fetched")
                    await source.tell_complete()
                    break
                except NotFound:
                    break  # it knows nothing of that image any more, nor do we need it
                except LzyError:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                return
            there = agent.state.arrival(arrival.name, arrival.epoch) or arrival
            document = {key: value for key, value in there.document.items() if key != "follows"}
            agent.state.note_arrival(there._replace(document=document))
        finally:
            self._fetching.discard((arrival.name, arrival.epoch))


def _remove_image(store: Path, image: str) -> None:
    """Have no manifest without its packs: the session does not live here."""
    with contextlib.suppress(LzyError), Store.open(store) as opened:
        opened.remove(image)
