"""A session moves from this node to another, or comes from there; never are there two of it.

The source leads. While the session runs it is checkpointed, and the target fetches that and looks
whether it fits; then it is dumped to its end (only what has changed since), the target is asked to
take it, and wakes it. What is true is decided in one place, the target's database:

    source    moving: stopping ───► asked ────────────────► departed
                        (dump)        │ asks                   ▲ "accepted"
    target    offered ───────────► accepting ──► accepted ─────┘
                                       └───────► refused ──► source wakes it again

*Guarantees*: `asked` is on the source's disk before the target is asked, and from then on only the
target's answer lets the source wake it. `accepted` and `refused` are final and on the target's disk
before they are told; a life that was refused is never made there, however late it is asked for. So
whoever is killed, and whichever message is lost, at most one node makes the session's next life; a
source that cannot ask leaves it hibernated, says why, and asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.errors import Busy, Incompatible, LzyError, NotFound
from ..checkpoint.stages import reach
from ..checkpoint.store import Store
from .authority import node_subject
from .operations import CHECKPOINT, MIGRATE, PREPARE, VERIFY, WAKE, Order
from .session import Session
from .state import (
    ACCEPTED,
    ACCEPTING,
    DOZING,
    HIBERNATED,
    OFFERED,
    REFUSED,
    RUNNING,
    Arrival,
    Record,
)

if TYPE_CHECKING:
    from ..checkpoint.image import Image
    from .node import Agent

STOPPING, ASKED, BACK = "stopping", "asked", "back"
"""Steps of `Record.moving`: its process is being ended; the target was asked; it wakes here."""

_SMALL_BYTES = 16 << 20
_AT_ONCE_BYTES = int(os.environ.get("LZY_TEST_AT_ONCE_BYTES", 2 << 20))
"""So much is fetched before it wakes; more follows it."""
_FETCHES_AFTER_S = float(os.environ.get("LZY_TEST_FETCHES_AFTER_S", "0"))
_PEER = ("peer_address", "peer_subject", "fleet")
_MOST_ROUNDS = 4
_ASKS_AGAIN = 5
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 15.0
_SWITCH_TIMEOUT_S = 120.0
_CARRIED = (
    "name", "owner_uid", "attached_unix_s", "command", "image", "image_bytes", "number",
    "memory_bytes", "peak_memory_bytes", "idle_gaps", "settings",
)  # fmt: skip

Progress = Callable[[dict[str, Any]], None]


class Mover:
    """The moves of one agent's sessions, from here and to here."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._leaving: set[str] = set()
        self._asking: set[str] = set()
        self._making: dict[tuple[str, int], asyncio.Task[dict[str, Any]]] = {}
        self._followed: dict[str, Image] = {}
        self._fetching: set[tuple[str, int]] = set()
        self._prepared: dict[tuple[str, int], str] = {}

    def is_leaving(self, name: str) -> bool:
        """Whether a move of that session is under way now."""
        return name in self._leaving

    # -- from here ---------------------------------------------------------------------------

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
            raise Busy(f"session {record.name} is on {node} already")
        if record.name in self._leaving or record.moving:
            raise Busy(f"session {record.name} is on its way already", remedy="see lzy ps")
        if record.state not in (RUNNING, DOZING, HIBERNATED):
            raise Busy(f"session {record.name} is {record.state}; it cannot move now")
        self._leaving.add(record.name)
        target = _Target(self._agent, record.name, node, address, record.epoch + 1)
        try:
            return await self._lead(
                session, target, requests, why, wake, bytes_per_s, actor_uid, progress
            )
        finally:
            self._leaving.discard(record.name)

    async def _lead(
        self,
        session: Session,
        target: _Target,
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
                    await self._stop(session, target, moving, actor_uid, progress, report)
                if session.record.moving.get("step") != ASKED:
                    agent.update(session, moving={**moving, "step": ASKED})
        except BaseException:
            with contextlib.suppress(LzyError):
                await target.ask("forget", {})
            raise
        reach("move.asked")
        document = {name: getattr(session.record, name) for name in _CARRIED}
        document |= {"requests": requests, "gpu_count": int(requests.get("gpu") or 0)}
        until_s = session.record.hold_until_unix_s  # of our clock, which is not the target's
        document["hold_for_s"] = until_s and max(until_s - agent.state.clock.now_s(), 0.0)
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
        target: _Target,
        report: dict[str, Any],
        actor_uid: int | None,
        progress: Progress | None,
    ) -> None:
        """While it runs: checkpoint it and have the target fetch that, until little is left."""
        before = 0
        while report["rounds"] < _MOST_ROUNDS:
            done = await self._agent.operate(
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

    async def _verify(self, session: Session, target: _Target, image: str) -> None:
        """Read all of an image that the last dump will build upon, so that it need not."""
        order = self._agent.order_of(session.record, VERIFY, "ahead of a move", image)
        order = order._replace(lock=order.lock.with_suffix(".verify"))  # nothing is done to it
        self._agent.unpack(await self._agent.children.run(order, lambda _: None))
        target.verified = image

    def _check_unchanged(self, session: Session, target: _Target) -> None:
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
        target: _Target,
        moving: dict[str, Any],
        actor_uid: int | None,
        progress: Progress | None,
        report: dict[str, Any],
    ) -> None:
        """Dump it to its end; if that fails, it runs on and is not on its way any more."""
        agent = self._agent
        agent.update(session, moving={**moving, "step": STOPPING})
        reach("move.stopping")
        try:
            order = agent.order(session, MIGRATE, f"migrate to {moving['node']}")
            order = order._replace(verified=target.verified)
            done = await agent.carry_out(session, order, actor_uid, progress)
        except BaseException:
            if session.is_living:
                agent.update(session, moving={})
            raise
        if session.record.state != HIBERNATED:
            raise LzyError(f"session {session.record.name} did not stop")
        report["last_bytes"] = done.get("stored_bytes", 0)
        reach("move.stopped")

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
            await asyncio.sleep(_PAUSE_S)
        self._agent.spawn(self.keep_asking(session))
        return answer

    async def keep_asking(self, session: Session) -> None:
        """Until it is known where the session is, however long that takes; one at a time."""
        name, pause_s = session.record.name, _PAUSE_S
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
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
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
            target = _Target(agent, record.name, moving["node"], moving["address"], moving["epoch"])
            if moving["step"] == ASKED:
                if told not in (ACCEPTED, REFUSED):
                    told = await self._ask_what_became(session, target)
                if told == ACCEPTED:
                    why = str(moving.get("why") or "asked").removeprefix(f"{target.node}: ")
                    words = f"lives on {target.node} now ({why})"
                    followed = bool(moving.get("apart"))
                    agent.depart(session, target.epoch, target.node, words, followed=followed)
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
                await agent.operate(session, WAKE, why="it did not move")
            finally:
                if session.record.moving:
                    agent.update(session, moving={})
        else:
            agent.update(session, moving={})
        return REFUSED

    async def _ask_what_became(self, session: Session, target: _Target) -> str:
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

    # -- to here -----------------------------------------------------------------------------

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
        done = self._agent.unpack(outcome)
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
        order = agent.order_of(record, verb, "arrives", image)
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
        found = {name: asked["record"][name] for name in (*_CARRIED, "requests", "gpu_count")}
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
        report: dict[str, Any] = {}
        failure, follows_bytes = "", 0
        try:
            more: dict[str, Any] = {
                "prepared": self._prepared.get((arrival.name, arrival.epoch), "")
            }
            if not arrival.document["shared"]:
                order = self._order(PREPARE, arrival, record.image)
                most_bytes = _AT_ONCE_BYTES if asked["wake"] else None
                order = order._replace(most_bytes=most_bytes)
                done = agent.unpack(await agent.children.run(order, lambda _: None))
                arrival.document["follows"] = record.image
                follows_bytes = done["left_bytes"]
                agent.state.note_arrival(arrival)  # before anything can need what has not come
                if follows_bytes:
                    more |= self.source_of(record.image)
            if asked["wake"]:
                report = await agent.operate(
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
        agent.forget(session)
        arrival.document.pop("follows", None)
        agent.state.note_arrival(
            arrival._replace(state=REFUSED, unix_s=time.time()),
            remove=session.record,
            words=f"it could not come: {failure}",
        )
        agent.ring()
        return REFUSED

    async def cancel(self, name: str, epoch: int, source: str) -> dict[str, Any]:
        """What became of that life: accepted or refused, for ever. Raises Busy while it is made."""
        if making := self._making.get((name, epoch)):
            with contextlib.suppress(LzyError, TimeoutError):
                await asyncio.wait_for(asyncio.shield(making), 20)
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

    def keep_followed(self) -> None:
        """Hold the images that other nodes read here, and no others: nobody can remove them."""
        wanted = self._agent.state.followed()
        for name in self._followed.keys() - wanted:
            self._followed.pop(name).close()
        for name in wanted - self._followed.keys():
            with contextlib.suppress(LzyError), Store.open(self._agent.store) as store:
                self._followed[name] = store.load_unchecked(name)

    def source_of(self, image: str) -> dict[str, Any]:
        """What an order says of where the rest of an image is; nothing if all of it is here."""
        for arrival in self._agent.state.following():
            if arrival.document["follows"] == image:
                order = self._order(PREPARE, arrival, image)
                return {**{name: getattr(order, name) for name in _PEER}, "follows": True}
        return {}

    def complete(self, name: str, epoch: int, node: str) -> dict[str, Any]:
        """The node that the session went to has all of it."""
        self._agent.state.end_following(name, epoch, node)
        self.keep_followed()
        return {}

    def _begin_to_fetch(self, arrival: Arrival) -> None:
        place = (arrival.name, arrival.epoch)
        if place in self._fetching or not arrival.document.get("follows"):
            return
        self._fetching.add(place)
        self._agent.spawn(self._fetch_rest(arrival))

    async def _fetch_rest(self, arrival: Arrival) -> None:
        """Have here what is still there, however long that takes; then tell the node it is from."""
        agent, pause_s = self._agent, _PAUSE_S
        source, image = _Target.of(agent, arrival), arrival.document["follows"]
        order = self._order(PREPARE, arrival, image)
        order = order._replace(lock=order.lock.with_suffix(".fetch"))
        try:
            await asyncio.sleep(_FETCHES_AFTER_S)
            while not agent.is_stopping:
                try:
                    agent.unpack(await agent.children.run(order, lambda _: None))
                    reach("move.fetched")
                    await source.tell_complete()
                    break
                except NotFound:
                    break  # it knows nothing of that image any more, nor do we need it
                except LzyError:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
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


class _Target:
    """The agent of another node, asked about one life of one session."""

    def __init__(self, agent: Agent, name: str, node: str, address: str, epoch: int) -> None:
        self._agent, self.name, self.node, self.address, self.epoch = (
            agent, name, node, address, epoch,
        )  # fmt: skip
        self.verified = ""
        """The image of which all was read ahead of the move."""

    async def ask(self, verb: str, body: dict[str, Any], timeout_s: float = 60) -> dict[str, Any]:
        path = f"/v1/arrivals/{self.name}/{self.epoch}/{verb}"
        subject = node_subject(self.node)
        return await self._agent.contacts.ask(self.address, subject, "POST", path, body, timeout_s)

    @classmethod
    def of(cls, agent: Agent, arrival: Arrival) -> _Target:
        """The node that a session came from, by the same number of its life."""
        address = arrival.document["address"]
        return cls(agent, arrival.name, arrival.source, address, arrival.epoch)

    async def tell_complete(self) -> None:
        """Nothing is read there any more."""
        path = f"/v1/departures/{self.name}/{self.epoch}/complete"
        subject = node_subject(self.node)
        await self._agent.contacts.ask(self.address, subject, "POST", path, {}, 60)

    async def prepare(self, image: str, report: dict[str, Any]) -> None:
        done = await self.ask("prepare", {"image": image}, 3600)
        report["sent_bytes"] += done["fetched_bytes"]
