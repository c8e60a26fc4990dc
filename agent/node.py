"""The agent: it keeps the sessions of a node, and is their parent once it has woken them.

One thread does everything, on an event loop, so that it can fork at any time; what takes long is
done by `operations`. *Guarantee*: of one session at most one operation is under way, and it was
written down before it began. Lock order: a session's lock, then the slots of heavy operations.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ..checkpoint import proc
from ..checkpoint.errors import Busy, LzyError, NotFound, StoreUnavailable
from ..checkpoint.image import Image
from ..checkpoint.linux.activity import exit_status
from ..checkpoint.linux.process import PR_SET_CHILD_SUBREAPER, prctl
from ..checkpoint.stages import reach
from ..checkpoint.store import Store
from . import errors, operations
from .arriving import Arrivals
from .authority import agent_place
from .cgroups import Cgroup, least_memory_bytes
from .children import Children
from .chronicle import Chronicle
from .departing import Departures
from .identity import read_identity
from .limits import Limits, describe_round
from .moving import ASKED, BACK, OtherNode
from .operations import CHECKPOINT, DOZE, HIBERNATE, LIMIT, MIGRATE, ROUSE, WAKE, Order
from .passages import Passages, Place
from .peers import Contacts, split_address
from .ports import Ports
from .processes import list_below
from .repair import find_out
from .session import Session
from .settings import Settings, combine, limit_of
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
    State,
)
from .terminal.starting import tell_state

_BEGINS: Final = {HIBERNATE: HIBERNATING, MIGRATE: MIGRATING, WAKE: WAKING}
_LEADS_TO: Final = {
    HIBERNATE: HIBERNATED,
    MIGRATE: HIBERNATED,
    DOZE: DOZING,
    ROUSE: RUNNING,
    WAKE: RUNNING,
}
_HEAVY: Final = frozenset({CHECKPOINT, HIBERNATE, DOZE, LIMIT})
_MOST_WAITING = 8
_BACKOFF_S, _LONGEST_BACKOFF_S = 60.0, 3600.0
CALLED: Final = "called"
"""The event of which a migrator makes a wake, where there is room for it."""
_MIGRATOR_ANSWERS_S, _LOOKS_EVERY_S = 8.0, 0.1
_PROMISED_S = 30.0  # from when a name is given until the program that it is for has begun
_SETTLES_S = 0.3  # from a process's end until a dump that ended it has said so

Progress = Callable[[dict[str, Any]], None]


class Agent:
    """The sessions of one home, and what is done to them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "agent"
        self.store = home / "store"
        for folder in (self.folder, self.folder / "locks", home / "logs", home / "run"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.state = State(self.folder / "state.db")
        self.chronicle = Chronicle(self.folder / "readings.db")
        self.identity = read_identity(home)
        self.contacts = Contacts(agent_place(home))
        self.departures = Departures(self)
        self.arrivals = Arrivals(self)
        self.ports = Ports(self._open_image, self._wake_for)
        self.passages = Passages(self)
        self.limits = Limits(self)
        self.listening_migrators = 0
        """How many hear of our events as they come: one, or none."""
        self.sessions: dict[str, Session] = {}
        self._called: set[str] = set()
        self._promised: dict[str, float] = {}
        self.began_unix_s = time.time()
        self.counters: dict[str, int] = {}
        self.children = Children(self.folder / "agent.log")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._told = asyncio.Event()
        self._heavy = asyncio.Semaphore(int(self.settings.operations))
        self.is_stopping = False

    @property
    def settings(self) -> Settings:
        """The node's settings as they are now."""
        return combine(self.state.settings())

    @property
    def is_draining(self) -> bool:
        """Whether this node takes no sessions any more."""
        return bool(self.state.settings().get("draining"))

    @property
    def free_gpus(self) -> int:
        """GPUs that no living session has."""
        living = (s.record for s in self.sessions.values() if s.is_living)
        return self.identity.gpus - sum(record.gpu_count for record in living)

    def settings_of(self, session: Session) -> Settings:
        """The settings that hold for a session."""
        return combine(self.state.settings(), session.record.settings)

    def limit_of(self, record: Record) -> int:
        """How much anonymous memory a session may have in RAM, in bytes; 0: as much as it likes."""
        return limit_of(self.settings, record.settings)

    # -- beginning and end

    def start(self) -> None:
        """Find out what has become of every session, and begin to watch; needs a running loop."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self.children.reap)
        for record in self.state.records():
            session = self.sessions[record.name] = Session(record)
            try:
                with Store.open(self.store, create=True) as store:
                    self._repair(session, store, watched=False)
            except LzyError as error:  # the store is away, say: the rounds try again
                with contextlib.suppress(StoreUnavailable):
                    self.update(session, "failure", f"not looked into: {error}", failure=str(error))
                if session.record.state in LIVING:
                    self._watch_end(session)
            self.tell_terminal(session.record)
            self._follow_ports(session.record)
        self.passages.start()
        self.arrivals.conclude_all()
        self.departures.keep_followed()
        for session in self.sessions.values():
            if session.record.moving:
                self.spawn(self.departures.keep_asking(session))
        self.children.reap()

    async def stop(self) -> None:
        """End the operations under way, which leaves everything whole; the rest stays as it is."""
        self.is_stopping = True
        self._told.set()
        self.children.interrupt()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        deadline = time.monotonic() + 5
        while self._is_at_work and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.ports.close()
        self.passages.close()
        self.contacts.close()
        self.chronicle.close()
        self.state.close()

    @property
    def _is_at_work(self) -> bool:
        locked = any(session.lock.locked() for session in self.sessions.values())
        return locked or self.children.are_at_work

    def spawn(self, work: Any) -> None:
        """Run a coroutine beside everything else, until it or the agent ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)

    def _forget_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            if isinstance(error, LzyError):
                return  # whoever asked is told; the rounds settle what is left open
            asyncio.get_running_loop().call_exception_handler(
                {"message": "work of the agent failed", "exception": error}
            )

    # -- sessions

    def find(self, name: str) -> Session:
        """The session of that name. Raises NotFound."""
        if session := self.sessions.get(name):
            return session
        raise NotFound(f"there is no session {name[:200]}", remedy="see lzy ps")

    def promise(self, name: str) -> bool:
        """Give that name to a program that is about to be started, unless another waits for it."""
        now_s = time.monotonic()
        self._promised = {n: until_s for n, until_s in self._promised.items() if until_s > now_s}
        if name in self._promised:
            return False
        self._promised[name] = now_s + _PROMISED_S
        return True

    def add(
        self, record: Record, words: str, actor_uid: int | None, *, checkpoint: bool = True
    ) -> Session:
        """Begin to look after a session; `checkpoint`: take its first one beside that."""
        if self.is_draining:
            raise Busy(
                f"{self.identity.name} is being drained",
                remedy=f"choose another node, or lzy drain --undo {self.identity.name}",
            )
        self.state.insert(record, "attached", words, actor_uid)
        self._promised.pop(record.name, None)
        session = self.sessions[record.name] = Session(record)
        self._watch_end(session)
        self.ring()
        if checkpoint:
            self.spawn(self.operate(session, CHECKPOINT, why="attach", actor_uid=actor_uid))
        return session

    async def detach(self, session: Session, actor_uid: int | None) -> None:
        """Look after it no longer; its process and its images stay."""
        self.call_off(session)
        async with session.lock:
            if session.record.moving:
                raise Busy(
                    f"session {session.record.name} is on its way to another node",
                    remedy="try again when it is there: see lzy ps",
                )
            self.state.remove(session.record, "is no longer looked after", actor_uid)
            self.forget(session)

    def depart(self, session: Session, target: OtherNode, words: str, *, followed: bool) -> None:
        """Look after it no longer: it lives on another node; `followed`: which reads here yet."""
        image = session.record.image if followed else ""
        told = self.passages.describe(session, target.address)
        self.state.depart(
            session.record, target.epoch, target.node, words, followed=image, forwarded=told
        )
        self.departures.keep_followed()
        place = Place(target.name, target.node, target.address, target.epoch)
        self.passages.keep(place, told, self.ports.hand_over(target.name))
        self.counters["migrated"] = self.counters.get("migrated", 0) + 1
        self.forget(session)

    def forget(self, session: Session) -> None:
        """Let go of a session whose record goes, or has gone."""
        tell_state(session.record.name, self.home, {"state": "gone"})
        self._let_go(session)
        self.ports.release(session.record.name)
        Cgroup.inside(self.home, session.record.name, make=False).dissolve()
        self.sessions.pop(session.record.name, None)
        self.limits.forget(session.record.name)
        self.ring()

    def update(
        self,
        session: Session,
        kind: str = "",
        words: str = "",
        actor_uid: int | None = None,
        **changes: Any,
    ) -> None:
        """Change a session's record on disk, and tell who follows the events."""
        session.record = self.state.update(
            session.record, kind=kind, words=words, actor_uid=actor_uid, **changes
        )
        if "state" in changes or "moving" in changes:
            self.tell_terminal(session.record)
            self._follow_ports(session.record)
        if kind:
            self.counters[kind] = self.counters.get(kind, 0) + 1
            self.ring()

    def _follow_ports(self, record: Record) -> None:
        """Keep its ports, or free them for it: also where it is made beside us, on this machine."""
        self.passages.end(record.name)
        address, own = record.moving.get("address"), self.identity.address
        if address and own and split_address(address)[0] == split_address(own)[0]:
            self.ports.release(record.name)
        else:
            self.ports.follow(record)

    def tell_terminal(self, record: Record) -> None:
        """Let the keeper of its terminal, if it has one, know how the session is."""
        pid = record.pid if record.state in LIVING else 0
        state = "moving" if record.moving and record.state == HIBERNATED else record.state
        facts = {"state": state, "pid": pid, "exit_status": record.exit_status}
        tell_state(record.name, self.home, {**facts, "failure": record.failure})

    def ring(self) -> None:
        """Wake who waits for events."""
        self._told.set()
        self._told = asyncio.Event()

    async def await_event(self, timeout_s: float) -> None:
        """Come back when something was told, or after the time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._told.wait()

    # -- operations

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
                order = self.order(session, verb, why, image, terminal)
                if verb == WAKE and more is None:
                    more = self.arrivals.source_of(order.image or session.record.image)
                order = order._replace(**(more or {}))
                return await self.carry_out(session, order, actor_uid, progress)
        finally:
            session.waiting -= 1

    def order(
        self, session: Session, verb: str, why: str, image: str = "", terminal: str = ""
    ) -> Order:
        """What an operation on a session is told."""
        return self.order_of(session.record, verb, why, image, terminal)

    def order_of(
        self, record: Record, verb: str, why: str, image: str = "", terminal: str = ""
    ) -> Order:
        """The same of a session that need not be one of ours yet."""
        return Order(
            verb,
            record,
            self.store,
            self.folder / "locks" / f"{record.name}.lock",
            why,
            image,
            terminal,
            str(self._output(record)) if verb == WAKE else "",
            listeners=self.ports.descriptors(record.name) if verb == WAKE else {},
            limit_bytes=self.limit_of(record),
            heat=self.limits.heat_path(record.name),
        )

    def _is_needed(self, session: Session, verb: str, image: str) -> bool:
        """Whether there is something to do. Raises Busy, NotFound if it cannot be done."""
        record = session.record
        if self.sessions.get(record.name) is not session:
            raise NotFound(
                f"session {record.name} was detached", remedy="lzy attach PID has it back"
            )
        if self.is_stopping:
            raise Busy("the agent is about to stop", remedy="start it again: lzy up")
        if verb == WAKE:
            if record.moving and record.moving["step"] != BACK:
                raise Busy(
                    f"session {record.name} is on its way to {record.moving['node']}",
                    remedy=record.failure or "see lzy ps",
                )
            if self.is_draining and record.state in ASLEEP and not record.moving:
                raise Busy(
                    f"{self.identity.name} is being drained",
                    remedy=f"lzy migrate {record.name}, or lzy drain --undo {self.identity.name}",
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
        self.update(session, intent=verb, state=_BEGINS.get(verb, session.record.state))
        order = order._replace(record=session.record)
        reach("operation.intended")
        session.progress = {"verb": verb, "began_unix_s": time.time(), "stage": "begins"}
        session.progress |= {"done_bytes": 0, "total_bytes": 0}

        def listen(told: dict[str, Any]) -> None:
            if session.progress is not None:
                session.progress |= told
            if progress:
                progress(told)

        work = asyncio.ensure_future(self.children.run(order, listen))
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
        if "done" in outcome:
            report: dict[str, Any] = outcome["done"]
            self._write_done(session, order, report, actor_uid)
            reach("operation.recorded")
            return report
        error = errors.revive(outcome["error"])
        passes = order.verb == LIMIT and isinstance(error, Busy)
        failure = None if passes else error
        with Store.open(self.store) as store:
            self._repair(session, store, watched=True, failure=failure, order=order)
        if session.record.state == _LEADS_TO.get(order.verb):
            return {}  # it was killed so late that it was done
        raise error

    @staticmethod
    def unpack(outcome: dict[str, Any]) -> dict[str, Any]:
        """The report of an operation that is not on a session of ours, or its error."""
        if "done" in outcome:
            done: dict[str, Any] = outcome["done"]
            return done
        raise errors.revive(outcome["error"])

    def _write_done(
        self, session: Session, order: Order, report: dict[str, Any], actor_uid: int | None
    ) -> None:
        verb, record = order.verb, session.record
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
                "protected_until_unix_s": self.state.clock.now_s()
                + self.settings_of(session).after_wake_s,
            }
        self.update(session, kind, words, actor_uid, **changes)
        if verb in (HIBERNATE, MIGRATE):
            self._let_go(session)
        elif verb == WAKE:
            self._watch_end(session)

    # -- what has become of sessions

    def _repair(
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
        record = session.record
        with operations.hold(self.folder / "locks" / f"{record.name}.lock"):
            found = find_out(store, record, watched=watched, status=status)
        changes = dict(found.changes)
        kind, words = found.kind, found.words
        if failure and order and changes.get("state", record.state) != _LEADS_TO.get(order.verb):
            failures = record.failures + 1
            backoff_s = min(_BACKOFF_S * 2.0 ** min(failures - 1, 30), _LONGEST_BACKOFF_S)
            changes |= {
                "failure": str(failure),
                "failures": failures,
                "protected_until_unix_s": self.state.clock.now_s() + backoff_s,
            }
            kind, words = "failure", f"cannot {order.verb} it: {failure}"
        elif order and failure is None and kind == "repaired":
            kind = ""  # it is tried again, as often as it takes
        if changes or kind:
            self.update(session, kind, words, **changes)
        if session.record.state not in LIVING:
            self._let_go(session)
        elif session.pidfd < 0 or session.record.pid != record.pid:
            self._watch_end(session)

    def settle(self, session: Session, status: int | None = None) -> None:
        """Look whether the record is still true; for who holds the session's lock.

        Raises StoreUnavailable, and then the rounds try again.
        """
        session.ended_with = status if status is not None else session.ended_with
        with Store.open(self.store, create=True) as store:
            self._repair(session, store, watched=True, status=session.ended_with)
        session.ended_with = None

    def _watch_end(self, session: Session) -> None:
        self._let_go(session)
        self.children.exits.pop(session.record.pid, None)
        loop = asyncio.get_running_loop()
        if session.open_process():
            loop.add_reader(session.pidfd, self._hear_end, session)
            self._hold_to_share(session)
        else:
            loop.call_soon(self._hear_end, session)

    def _let_go(self, session: Session) -> None:
        if session.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(session.pidfd)
        session.close_process()

    def _hold_to_share(self, session: Session) -> None:
        """Have it in a cgroup with what it asked for: its weight, and its bound of memory."""
        asked, session.memory_limit_bytes = session.record.requests, 0
        if not (asked.get("cpu") or asked.get("memory_bytes")):
            return
        group = Cgroup.inside(self.home, session.record.name)
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
        self.spawn(self._note_end(session, session.record.epoch, pidfd))

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
                status = self.children.exits.get(record.pid)
            if self.sessions.get(record.name) is session:
                try:
                    self.settle(session, status)
                except LzyError:
                    self._let_go(session)  # by which the rounds know that it is not settled
                    raise

    def call_off(self, session: Session) -> bool:
        """Have an eviction not happen of which only notice was given; whether there was one."""
        if session.called_off is None:
            return False
        session.called_off.set()
        return True

    def _open_image(self, name: str) -> Image:
        with Store.open(self.store) as store:
            return store.load_unchecked(name)

    def _wake_for(self, name: str, port: int) -> None:
        """Somebody has connected to a port of a session that hibernates."""
        self.call(self.sessions[name], f"a connection to port {port}")

    def call(self, session: Session, why: str) -> None:
        """Somebody uses a session that hibernates: have it woken, once, where there is room."""
        name = session.record.name
        if name in self._called:
            return
        self._called.add(name)
        with contextlib.suppress(StoreUnavailable):
            self.update(session, CALLED, why)
        self.spawn(self._wake_where_there_is_room(session, why))

    async def _wake_where_there_is_room(self, session: Session, why: str) -> None:
        """Have the migrator say on which node, if it has heard of the call; else wake it here."""

        def sleeps() -> bool:
            known = self.sessions.get(session.record.name) is session
            return known and session.record.state == HIBERNATED and not session.lock.locked()

        name = session.record.name
        deadline = time.monotonic() + (_MIGRATOR_ANSWERS_S if self.listening_migrators else 0)
        try:
            while sleeps() and (self.departures.is_leaving(name) or time.monotonic() < deadline):
                await self.await_event(_LOOKS_EVERY_S)
            if sleeps():
                await self.operate(session, WAKE, why=why)
        finally:
            self._called.discard(name)

    def _output(self, record: Record) -> Path:
        """The file for what a woken session prints where nobody hears it any more."""
        path = self.home / "logs" / f"{record.name}.log"
        path.touch(mode=0o600)
        return path
