"""Operations on a session, each in a forked child of the agent that the engine's crash ends alone.

The child has all modules loaded, one thread, and none of the agent's descriptors. It dies with the
agent (PR_SET_PDEATHSIG), which every step of the engine survives unharmed, and holds the session's
lock until it has gone: whoever comes after it waits for that, so that no two work on one session.
It tells its progress, and at last what came of it, in lines of JSON through a pipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ..checkpoint import doze as dozing
from ..checkpoint import proc
from ..checkpoint.copies import enter_copy
from ..checkpoint.dump import dump
from ..checkpoint.errors import Busy, Incompatible, KernelError, LzyError, NotFound
from ..checkpoint.history import list_numbers, require_image
from ..checkpoint.host import check_host
from ..checkpoint.journal import is_held, journal_path
from ..checkpoint.limit import Heat, release
from ..checkpoint.lineage import find_lineage, write_lineage
from ..checkpoint.linux.detached import (
    close_all_but,
    die_with_parent,
    forget_signals,
    set_name,
)
from ..checkpoint.pager import resume_pager
from ..checkpoint.resources import RestoreOptions
from ..checkpoint.restore import Restorer
from ..checkpoint.stages import reach
from ..checkpoint.store import Store
from . import errors
from .processes import find_living, is_alive
from .state import Record
from .terminal.returning import find_terminal
from .terminal.starting import hold_input

if TYPE_CHECKING:
    from ..checkpoint.image import Image

CHECKPOINT, HIBERNATE, WAKE, DOZE, ROUSE = "checkpoint", "hibernate", "wake", "doze", "rouse"
MIGRATE, PREPARE, FETCH, VERIFY = "migrate", "prepare", "fetch", "verify"
LIMIT = "limit"
_LOCK_PATIENCE_S = 20.0
_TELL_EVERY_S = 0.2
_TAKES_DOWN_AFTER_S = 1.0
_TRIES_AS_IT_IS, _PAUSE_S = 2, 0.1

Report = dict[str, Any]


class Order(NamedTuple):
    """What an operation is to do: `verb` to the session of `record`, for the reason `why`.

    `image`: which to wake, empty for the newest. `terminal`: that of who wakes it, for a session
    that was on one. `output`: a file for what it prints, if nobody else hears that any more.
    """

    verb: str
    record: Record
    store: Path
    lock: Path
    why: str = ""
    image: str = ""
    terminal: str = ""
    output: str = ""
    peer_address: str = ""
    """Of an arrival: the node that has its image, where we have not the same store,"""
    peer_subject: str = ""
    fleet: str = ""
    """and our certificates."""
    prepared: str = ""
    """Of an arrival: the image that was looked at just before, which has most of its packs."""
    follows: bool = False
    """Of an arrival: what packs are not here yet are read at that node."""
    most_bytes: int | None = None
    """How much may be fetched before an image is used; the rest is left for later."""
    bytes_per_s: float = 0.0
    """How fast; 0: as fast as it goes."""
    verified: str = ""
    """Of a migration: the image that was read and found right just before."""
    listeners: dict[str, int] = {}  # noqa: RUF012 - never changed in place
    """Sockets that were kept for the session while it slept, by address."""
    limit_bytes: int = 0
    """How much anonymous memory it may have in RAM; 0: as much as it likes."""
    heat: Path = Path()
    """Where is kept what is known of how warm its memory is."""
    has_room: bool = False
    """Of a limit: there is room for all of it, should what is away have to come in first."""


class Started(NamedTuple):
    """The child, and our end of its pipe."""

    pid: int
    reading: int


def begin(order: Order) -> Started:
    """Fork the child that does it. Precondition: the caller has one thread."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reading, False)
    agent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Started(pid, reading)
    try:
        _be_alone(agent, writing, *order.listeners.values())
        _live(order, writing)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def begin_aside(work: Callable[[], None]) -> int:
    """Fork a child that does `work`, which is of no session, and ends; its pid."""
    agent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _be_alone(agent, 2)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _be_alone(agent: int, *kept: int) -> None:
    """Keep nothing of the agent's but its log, the pipe, and sockets to be handed over."""
    gc.freeze()  # what is garbage of the agent's must not close descriptors of ours
    signal.set_wakeup_fd(-1)
    die_with_parent(agent)
    forget_signals()
    set_name("lzy-operation")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    close_all_but([0, 1, 2, *kept])


def _live(order: Order, writing: int) -> NoReturn:
    """Do it and tell what came of it."""
    teller = _Teller(writing)
    report: Report
    try:
        with hold(order.lock):
            with Store.open(order.store, create=True) as store:
                report = {"done": _VERBS[order.verb](order, store, teller)}
            reach("operation.done")
            teller.tell(report)
    except LzyError as error:
        teller.tell({"error": errors.describe(error)})
    except OSError as error:
        told = KernelError(f"cannot {order.verb} {order.record.name}: {error}", error.errno or 0)
        teller.tell({"error": errors.describe(told)})
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        words = f"cannot {order.verb} {order.record.name}: {type(error).__name__}: {error}"
        teller.tell({"error": errors.describe(LzyError(words, remedy="see the agent's log"))})
    if order.verb == MIGRATE:  # what it left to be taken down would be in the way of its next life
        time.sleep(_TAKES_DOWN_AFTER_S)
    os._exit(0)


class hold:
    """The session's lock, held while the block runs by this process alone.

    Raises Busy when another has it for longer than an operation takes to die.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(self._descriptor)
                    raise Busy(
                        f"another process works on {self._path.stem}",
                        remedy="try again later",
                    ) from None
                time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


class _Teller:
    """The child's end of the pipe; nobody may be there any more to hear it."""

    def __init__(self, writing: int) -> None:
        self._writing = writing
        self._told_s = 0.0

    def tell(self, document: Report) -> None:
        with contextlib.suppress(OSError):
            os.write(self._writing, json.dumps(document, default=str).encode() + b"\n")

    def progress(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told_s >= _TELL_EVERY_S:
            self._told_s = now
            self.tell({"progress": {"stage": stage, "done_bytes": done, "total_bytes": total}})


# -- what they do ------------------------------------------------------------------------------


def _checkpoint(order: Order, store: Store, teller: _Teller) -> Report:
    record = _prepare(order, store)
    report = dump(
        record.pid,
        store,
        name=record.name,
        leave_running=True,
        why=order.why,
        progress=teller.progress,
    )
    return {**report._asdict(), **_image_facts(store, record.name, report.image)}


def _hibernate(order: Order, store: Store, teller: _Teller) -> Report:
    record = _prepare(order, store)
    with hold_input(record.name):
        report = dump(record.pid, store, name=record.name, why=order.why, progress=teller.progress)
    return {**report._asdict(), **_image_facts(store, record.name, report.image)}


def _migrate(order: Order, store: Store, teller: _Teller) -> Report:
    record = _prepare(order, store)
    with hold_input(record.name):
        report = dump(
            record.pid,
            store,
            name=record.name,
            why="migrate",
            take_down=False,  # it stands still until we have said that it is gone
            verified=order.verified,
            progress=teller.progress,
        )
    return {**report._asdict(), **_image_facts(store, record.name, report.image)}


def _verify(order: Order, store: Store, teller: _Teller) -> Report:
    return store.verify(order.image, teller.progress)._asdict()


def _prepare_arrival(order: Order, store: Store, teller: _Teller) -> Report:
    """Have an image here, and see that a restore of it would not be refused."""
    fetched = left = 0
    if order.peer_address:
        from .authority import client_context
        from .fetching import fetch_image
        from .peers import Peer

        peer = Peer(order.peer_address, order.peer_subject, client_context(Path(order.fleet)))
        fetched, left = fetch_image(
            store,
            order.image,
            peer,
            teller.progress,
            most_bytes=order.most_bytes,
            bytes_per_s=order.bytes_per_s,
        )
    if left:
        return {"fetched_bytes": fetched, "left_bytes": left}
    with store.load(order.image) as image:
        check_host(image.document["host"], image.name)
        for path in sorted({vma["path"] for vma in _file_mappings(image)}):
            if not os.path.exists(path):
                raise Incompatible(
                    f"image {image.name} needs {path}, which is not here",
                    remedy="have the same files on both nodes",
                    path=path,
                )
    return {"fetched_bytes": fetched, "left_bytes": 0}


def _fetch(order: Order, store: Store, teller: _Teller) -> Report:
    """Have all of an image of which a session runs already."""
    reach("move.fetching")
    return _prepare_arrival(order, store, teller)


def _file_mappings(image: Image) -> list[dict[str, Any]]:
    vmas = image.document.get("vmas", [])
    return [v for v in vmas if v["kind"] == "file" and not v["path"].endswith(" (deleted)")]


def _doze(order: Order, store: Store, teller: _Teller) -> Report:
    record = _prepare(order, store)
    report = dozing.doze(record.pid, store, name=record.name, progress=teller.progress)
    return {**report._asdict(), **_image_facts(store, record.name, report.image)}


def _limit(order: Order, store: Store, teller: _Teller) -> Report:
    record = _prepare(order, store)
    heat = Heat.load(order.heat, record.pid) or Heat(record.pid)
    tries = _TRIES_AS_IT_IS
    while True:
        try:
            report = release(
                record.pid,
                store,
                order.limit_bytes,
                heat,
                name=record.name,
                spared=record.image,  # as long as the record names it
                progress=teller.progress,
            )
            break
        except Busy:
            tries -= 1
            if tries < 0 or not order.has_room or not dozing.is_dozing(record.pid):
                raise
            time.sleep(_PAUSE_S)
            if not tries:  # it has moved what is away, or has children
                with contextlib.suppress(NotFound):
                    dozing.begin_to_rouse(record.pid)
    heat.save(order.heat)
    return {**report._asdict(), **_image_facts(store, record.name, report.image)}


def away_bytes(record: Record) -> int:
    """How much of a living session's memory is away, about."""
    missing = dozing.missing_bytes(record.pid)  # once it was woken, with what was never there
    return min(missing, record.image_bytes) if missing > 1 else 0  # 1: its pager has yet to leave


def _rouse(order: Order, store: Store, teller: _Teller) -> Report:
    record = _prepare(order, store)
    if order.limit_bytes:
        there_bytes = dozing.resident_bytes(record.pid)
        if there_bytes + away_bytes(record) > order.limit_bytes:
            return {"pid": record.pid}  # what it touches comes
    with contextlib.suppress(NotFound):  # all of it is there already
        dozing.begin_to_rouse(record.pid)
    return {"pid": record.pid}


def _wake(order: Order, store: Store, teller: _Teller) -> Report:
    record = order.record
    if living := find_living(store, record):
        return {"pid": living.pid, "start_time": living.start_time, "already": True}
    name = require_image(store, order.image or record.image or record.name)
    known: frozenset[bytes] = frozenset()
    if order.prepared:
        with store.load_unchecked(order.prepared) as before:
            known = frozenset(pack for pack, _ in before.packs)
    with _open(order, store, name, known) as image:
        kept = find_terminal(record.name, record.owner_uid, image.document)
        options = _options(order._replace(terminal=kept or order.terminal), image)
        options = options._replace(listeners=order.listeners)
        on_demand = 0 < order.limit_bytes < image.raw_bytes
        restorer = Restorer(image, False, None, teller.progress, on_demand=on_demand)
        report = restorer.restore("auto", options)
    facts = _image_facts(store, record.name, name)
    start = proc.start_time(report.pid)
    return {**report._asdict(), **facts, "start_time": start, "already": False}


def _open(order: Order, store: Store, name: str, known: frozenset[bytes]) -> Image:
    """The image to wake, which may have packs that follow."""
    if not order.follows:
        return store.load(name, known=known)
    from .elsewhere import Elsewhere, follow

    image = store.load_unchecked(name)
    try:
        follow(image, Elsewhere(order.peer_address, order.peer_subject, Path(order.fleet)))
        image.check_packs(known)
        return image
    except BaseException:
        image.close()
        raise


_VERBS = {
    CHECKPOINT: _checkpoint,
    HIBERNATE: _hibernate,
    MIGRATE: _migrate,
    PREPARE: _prepare_arrival,
    FETCH: _fetch,
    VERIFY: _verify,
    DOZE: _doze,
    ROUSE: _rouse,
    LIMIT: _limit,
    WAKE: _wake,
}


def _prepare(order: Order, store: Store) -> Record:
    """See that the session's own process is there, served by a pager if need be, and known."""
    record = order.record
    if not is_alive(record.pid, record.start_time, record.boot_id):
        raise NotFound(
            f"process {record.pid} of session {record.name} has ended",
            remedy=f"lzy wake {record.name} goes back to its last image",
            pid=record.pid,
        )
    from ..checkpoint.home import run_directory

    journal = journal_path(run_directory(), record.pid)
    if journal.exists() and not is_held(journal):
        with contextlib.suppress(Busy, NotFound):
            resume_pager(record.pid)
    own = find_lineage(record.pid, store)
    if own is None and record.image:  # that small file was lost
        write_lineage(record.pid, store.path, record.name, record.number, record.image)
    enter_copy(record.pid)
    return record


def _image_facts(store: Store, session: str, name: str) -> Report:
    """What the record says of an image: its name, what it holds, the session's newest number."""
    with store.load_unchecked(name) as image:
        held = image.raw_bytes
    return {"image": name, "image_bytes": held, "number": max(list_numbers(store, session))}


def _options(order: Order, image: Image) -> RestoreOptions:
    """Where the woken process's standard descriptors point, where nobody is at their other end."""
    table: dict[str, Any] = image.document["descriptors"]
    output: list[str | None] = []
    for number in (1, 2):
        form = _leads_outside(table, number)
        kept = order.output if form == "pipe" or (form and not order.terminal) else ""
        output.append(kept or None)
    return RestoreOptions(stdout=output[0], stderr=output[1], terminal=order.terminal or None)


def _leads_outside(table: dict[str, Any], number: int) -> str:
    """`terminal` or `pipe` when that descriptor's other end was somebody else's, else empty."""
    place = table["descriptors"].get(str(number))
    if place is None:
        return ""
    entries = table["descriptions"]
    entry = entries[place["description"]]
    if entry["kind"] == "terminal" and entry["form"] == "outside":
        return "terminal"
    if entry["kind"] == "pipe" and "path" not in entry:
        ends = [other for other in entries if other.get("pipe") == entry["pipe"]]
        return "pipe" if len(ends) == 1 else ""
    return ""
