"""The agent: it keeps the sessions of a node, and is their parent once it has woken them.

One thread does everything, on an event loop, so that it can fork at any time; what takes long is
done by `operations`. Each thing that an agent does for its sessions is a part of its own, which
knows the agent: `turns` has operations done, `lives` hears of processes' ends, `calls` wakes who is
wanted, `departures` and `arrivals` move sessions, `limits` holds them to their memory, `ports` and
`passages` keep their connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from pathlib import Path
from typing import Any

from ..checkpoint.errors import Busy, LzyError, NotFound, StoreUnavailable
from ..checkpoint.image import Image
from ..checkpoint.linux.process import PR_SET_CHILD_SUBREAPER, prctl
from ..checkpoint.store import Store
from .arriving import Arrivals
from .authority import agent_place
from .calls import Calls
from .cgroups import Cgroup
from .children import Children
from .chronicle import Chronicle
from .departing import Departures
from .identity import read_identity
from .limits import Limits
from .lives import Lives
from .moving import OtherNode
from .operations import CHECKPOINT
from .passages import Passages, Place
from .peers import Contacts, split_address
from .ports import Ports
from .session import Session
from .settings import Settings, combine, limit_of
from .state import HIBERNATED, LIVING, Record, State
from .terminal.starting import tell_state
from .turns import Turns

_PROMISED_S = 30.0  # from when a name is given until the program that it is for has begun


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
        self.lives = Lives(self)
        self.calls = Calls(self)
        self.turns = Turns(self)
        self.ports = Ports(self._open_image, self.calls.call_to_port)
        self.passages = Passages(self)
        self.limits = Limits(self)
        self.sessions: dict[str, Session] = {}
        self._promised: dict[str, float] = {}
        self.began_unix_s = time.time()
        self.counters: dict[str, int] = {}
        self.children = Children(self.folder / "agent.log")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._told = asyncio.Event()
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

    def lock_of(self, record: Record) -> Path:
        """The lock of a session between processes: operations and repairs hold it."""
        return self.folder / "locks" / f"{record.name}.lock"

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
                    self.lives.repair(session, store, watched=False)
            except LzyError as error:  # the store is away, say: the rounds try again
                with contextlib.suppress(StoreUnavailable):
                    self.update(session, "failure", f"not looked into: {error}", failure=str(error))
                if session.record.state in LIVING:
                    self.lives.watch(session)
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
        self.lives.watch(session)
        self.ring()
        if checkpoint:
            self.spawn(self.turns.operate(session, CHECKPOINT, why="attach", actor_uid=actor_uid))
        return session

    async def detach(self, session: Session, actor_uid: int | None) -> None:
        """Look after it no longer; its process and its images stay."""
        session.call_off()
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
        self.lives.let_go(session)
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

    def _open_image(self, name: str) -> Image:
        with Store.open(self.store) as store:
            return store.load_unchecked(name)
