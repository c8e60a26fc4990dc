"""What the agent knows, in SQLite: one row for each session, and the history of the node.

*Guarantee*: a change is on disk when the call returns (WAL, synchronous=FULL), all of it or
nothing, and with the event that tells of it. An operation is written down as the record's intent
before it begins, and crossed out together with what came of it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..checkpoint import proc
from ..checkpoint.errors import Busy, Damaged, NotFound, StoreUnavailable
from .clock import Clock

RUNNING, DOZING = "running", "dozing"
HIBERNATING, HIBERNATED, WAKING = "hibernating", "hibernated", "waking"
MIGRATING = "migrating"
ENDED, FAILED = "ended", "failed"

LIVING: Final = frozenset({RUNNING, DOZING, HIBERNATING, MIGRATING})
"""States in which the session's process exists."""

ASLEEP: Final = frozenset({HIBERNATED, ENDED, FAILED})
"""States from which it can be woken, if it has an image."""

NEXT: Final = {
    RUNNING: {DOZING, HIBERNATING, MIGRATING, ENDED, FAILED, HIBERNATED},
    DOZING: {RUNNING, HIBERNATING, MIGRATING, ENDED, FAILED, HIBERNATED},
    HIBERNATING: {HIBERNATED, RUNNING, DOZING, ENDED, FAILED},
    MIGRATING: {HIBERNATED, RUNNING, DOZING, ENDED, FAILED},
    HIBERNATED: {WAKING, RUNNING, FAILED},
    WAKING: {RUNNING, DOZING, HIBERNATED, ENDED, FAILED},
    ENDED: {WAKING, RUNNING},
    FAILED: {WAKING, RUNNING},
}
"""The ways between states. Some are only taken by others: by `lzy dump` and `lzy restore`."""

_MOST_EVENTS = 20_000
_VERSION = 5
_SCHEMA = """
CREATE TABLE sessions (
    name TEXT PRIMARY KEY,
    owner_uid INTEGER NOT NULL,
    state TEXT NOT NULL,
    since_unix_s REAL NOT NULL,
    attached_unix_s REAL NOT NULL,
    pid INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    boot_id TEXT NOT NULL,
    command TEXT NOT NULL,
    image TEXT NOT NULL DEFAULT '',
    image_bytes INTEGER NOT NULL DEFAULT 0,
    number INTEGER NOT NULL DEFAULT 0,
    epoch INTEGER NOT NULL DEFAULT 1,
    intent TEXT NOT NULL DEFAULT '',
    hold_until_unix_s REAL,
    protected_until_unix_s REAL,
    woken_unix_s REAL,
    failures INTEGER NOT NULL DEFAULT 0,
    failure TEXT NOT NULL DEFAULT '',
    exit_status INTEGER,
    memory_bytes INTEGER NOT NULL DEFAULT 0,
    peak_memory_bytes INTEGER NOT NULL DEFAULT 0,
    idle_gaps TEXT NOT NULL DEFAULT '[]',
    settings TEXT NOT NULL DEFAULT '{}'
) STRICT;
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    unix_s REAL NOT NULL,
    session TEXT NOT NULL,
    owner_uid INTEGER NOT NULL,
    kind TEXT NOT NULL,
    words TEXT NOT NULL,
    actor_uid INTEGER
) STRICT;
CREATE TABLE settings (name TEXT PRIMARY KEY, value REAL) STRICT;
"""
_GROWN = {
    1: """
ALTER TABLE sessions ADD COLUMN requests TEXT NOT NULL DEFAULT '{}';
ALTER TABLE sessions ADD COLUMN gpu_count INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sessions ADD COLUMN moving TEXT NOT NULL DEFAULT '{}';
ALTER TABLE sessions ADD COLUMN waiting_since_unix_s REAL;
CREATE TABLE arrivals (
    name TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    source TEXT NOT NULL,
    state TEXT NOT NULL,
    document TEXT NOT NULL,
    unix_s REAL NOT NULL,
    PRIMARY KEY (name, epoch)
) STRICT;
CREATE TABLE departures (
    name TEXT PRIMARY KEY,
    epoch INTEGER NOT NULL,
    node TEXT NOT NULL,
    unix_s REAL NOT NULL
) STRICT
""",
    2: "ALTER TABLE departures ADD COLUMN followed TEXT NOT NULL DEFAULT ''",
    3: "CREATE TABLE clocks (boot_id TEXT PRIMARY KEY, ahead_s REAL NOT NULL) STRICT",
    4: "ALTER TABLE departures ADD COLUMN forwarded TEXT NOT NULL DEFAULT ''",
}
"""What makes a database of each earlier version one of the next."""


class Record(NamedTuple):
    """One session as it is on disk; the names say the units.

    Until and since when something is (`since`, `waiting_since`, `hold_until`, `protected_until`) is
    of `State.clock`, when something happened (`attached`, `woken`) of the wall clock.
    `pid`, `start_time` (clock ticks after boot) and `boot_id` name the process, the last one if
    there is none. `image` is the checkpoint that it goes on from, `image_bytes` the memory that it
    holds, `number` the newest that its
    session had when this was written: a newer one in the store was taken since. `epoch` counts its
    lives.
    """

    name: str
    owner_uid: int
    state: str
    since_unix_s: float
    attached_unix_s: float
    pid: int
    start_time: int
    boot_id: str
    command: str
    image: str = ""
    image_bytes: int = 0
    number: int = 0
    epoch: int = 1
    intent: str = ""
    hold_until_unix_s: float | None = None
    protected_until_unix_s: float | None = None
    woken_unix_s: float | None = None
    failures: int = 0
    failure: str = ""
    exit_status: int | None = None
    memory_bytes: int = 0
    peak_memory_bytes: int = 0
    idle_gaps: tuple[float, ...] = ()
    settings: dict[str, float | None] = {}  # noqa: RUF012 - never changed in place
    requests: dict[str, Any] = {}  # noqa: RUF012 - cpu, memory_bytes, gpu, node: what was asked for
    gpu_count: int = 0
    moving: dict[str, Any] = {}  # noqa: RUF012 - empty unless it is on its way; see `moving`
    waiting_since_unix_s: float | None = None


OFFERED, ACCEPTING, ACCEPTED, REFUSED = "offered", "accepting", "accepted", "refused"
"""Of an arrival: announced; being made here; it lives here; it never will."""


class Arrival(NamedTuple):
    """A session that another node wants to bring here, as life number `epoch`.

    Accepted and refused are final: whoever asks later gets that answer, for ever.
    """

    name: str
    epoch: int
    source: str
    state: str
    document: dict[str, Any]
    unix_s: float


class Event(NamedTuple):
    """One line of history. `actor_uid` is who asked for it, None for lzy itself."""

    number: int
    unix_s: float
    session: str
    owner_uid: int
    kind: str
    words: str
    actor_uid: int | None


class State:
    """The open database; used by one thread."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        self._path = path
        self._database = sqlite3.connect(path, isolation_level=None)
        try:
            self._prepare(path)
        except sqlite3.OperationalError as error:  # a full disk, a folder that is gone
            self._database.close()
            raise _unavailable("read", path, error) from error
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise Damaged(
                f"{path} is no database of the agent: {error}",
                remedy="move it away; images stay, and lzy attach finds processes again",
                path=str(path),
            ) from error

    def _prepare(self, path: Path) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
            self._database.execute(f"PRAGMA {pragma}")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version < _VERSION:
            with self._transaction():
                steps = [_GROWN[number] for number in range(max(version, 1), _VERSION)]
                for step in [*([] if version else [_SCHEMA]), *steps]:
                    for statement in filter(str.strip, step.split(";")):
                        self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version={_VERSION}")
        elif version != _VERSION:
            raise Damaged(
                f"{path} was written by another version of lzy ({version}, not {_VERSION})",
                remedy="use that version, or move the file away",
                path=str(path),
            )

        self.clock = self._find_clock()

    def _find_clock(self) -> Clock:
        """The clock of this home in this boot, be it that an agent before us has begun it."""
        boot = proc.boot_id()
        found = self._database.execute(
            "SELECT ahead_s FROM clocks WHERE boot_id = ?", [boot]
        ).fetchone()
        if found:
            return Clock(found[0])
        clock = Clock()
        (newest_s,) = self._database.execute("SELECT max(since_unix_s) FROM sessions").fetchone()
        if newest_s and newest_s > clock.now_s():  # the wall clock is not set yet, or set back
            clock.ahead_s += newest_s - clock.now_s()
        with suppress(StoreUnavailable), self._transaction():
            self._database.execute("DELETE FROM clocks")
            self._database.execute("INSERT INTO clocks VALUES (?, ?)", (boot, clock.ahead_s))
        return clock

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    # -- sessions

    def records(self) -> list[Record]:
        """All sessions, the one that was attached first first."""
        rows = self._database.execute(
            f"SELECT {_COLUMNS} FROM sessions ORDER BY attached_unix_s, name"
        )
        return [_record(row) for row in rows]

    def insert(self, record: Record, kind: str, words: str, actor_uid: int | None) -> None:
        """Begin a session. Raises Busy when there is one of that name."""
        with self._transaction():
            self._insert(record)
            self._tell(record.name, record.owner_uid, kind, words, actor_uid)

    def _insert(self, record: Record) -> None:
        marks = ", ".join("?" * len(Record._fields))
        try:
            self._database.execute(
                f"INSERT INTO sessions ({_COLUMNS}) VALUES ({marks})", _row(record)
            )
        except sqlite3.IntegrityError as error:
            raise Busy(
                f"there is a session {record.name} already", remedy="choose another --name"
            ) from error

    def update(
        self,
        record: Record,
        *,
        kind: str = "",
        words: str = "",
        actor_uid: int | None = None,
        **changes: Any,
    ) -> Record:
        """Write `changes` of a record, and with a `kind` an event; the record as it is now."""
        state = changes.get("state", record.state)
        if state != record.state:
            if state not in NEXT[record.state]:
                raise ValueError(f"{record.name} cannot go from {record.state} to {state}")
            changes.setdefault("since_unix_s", self.clock.now_s())
        changed = record._replace(**changes)
        sets = ", ".join(f"{name} = ?" for name in changes)
        values = [_column(name, getattr(changed, name)) for name in changes]
        with self._transaction():
            if changes:
                done = self._database.execute(
                    f"UPDATE sessions SET {sets} WHERE name = ?", [*values, record.name]
                )
                if done.rowcount != 1:
                    raise NotFound(f"there is no session {record.name}")
            if kind:
                self._tell(record.name, record.owner_uid, kind, words, actor_uid)
        return changed

    def remove(self, record: Record, words: str, actor_uid: int | None) -> None:
        """Forget a session; its images stay."""
        with self._transaction():
            self._database.execute("DELETE FROM sessions WHERE name = ?", [record.name])
            self._tell(record.name, record.owner_uid, "detached", words, actor_uid)

    # -- sessions that come and go

    def arrival(self, name: str, epoch: int) -> Arrival | None:
        """What is known of that life of a session; None: nothing."""
        found = self._database.execute(
            "SELECT * FROM arrivals WHERE name = ? AND epoch = ?", (name, epoch)
        ).fetchone()
        return _arrival(found) if found else None

    def open_arrivals(self) -> list[Arrival]:
        """Those that are being made here, or were when the agent died."""
        found = self._database.execute("SELECT * FROM arrivals WHERE state = ?", (ACCEPTING,))
        return [_arrival(row) for row in found]

    def note_arrival(
        self,
        arrival: Arrival,
        *,
        insert: Record | None = None,
        remove: Record | None = None,
        words: str = "",
    ) -> None:
        """Write an arrival, and in the same transaction the session's record, or its removal.

        What is known of an earlier departure of the session from here goes when it is accepted.
        """
        with self._transaction():
            self._database.execute(
                "INSERT INTO arrivals VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name, epoch)"
                " DO UPDATE SET state = excluded.state, document = excluded.document,"
                " unix_s = excluded.unix_s",
                arrival._replace(document=json.dumps(arrival.document)),  # type: ignore[arg-type]  # as a row has it
            )
            if insert:
                self._insert(insert)
            if arrival.state == ACCEPTED:  # it is back; refused, it is where it left to
                self._database.execute(
                    "DELETE FROM departures WHERE name = ? AND epoch < ?",
                    (arrival.name, arrival.epoch),
                )
            if remove:
                self._database.execute("DELETE FROM sessions WHERE name = ?", [remove.name])
            if words and (about := insert or remove):
                kind = "arrived" if arrival.state != REFUSED else "failure"
                self._tell(about.name, about.owner_uid, kind, words, None)

    def forget_offer(self, name: str, epoch: int) -> None:
        """Forget an arrival of which nothing has come yet."""
        self._database.execute(
            "DELETE FROM arrivals WHERE name = ? AND epoch = ? AND state = ?",
            (name, epoch, OFFERED),
        )

    def depart(
        self,
        record: Record,
        epoch: int,
        node: str,
        words: str,
        *,
        followed: str = "",
        forwarded: dict[str, Any] | None = None,
    ) -> None:
        """The session lives on another node from now on, as life number `epoch`.

        `followed`: the image that the other node reads here until it has all of it; `forwarded`:
        ports of this node that lead to it.
        """
        with self._transaction():
            self._database.execute("DELETE FROM sessions WHERE name = ?", [record.name])
            self._database.execute(
                "INSERT OR REPLACE INTO departures"
                " (name, epoch, node, unix_s, followed, forwarded) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    record.name,
                    epoch,
                    node,
                    time.time(),
                    followed,
                    json.dumps(forwarded) if forwarded else "",
                ),
            )
            self._tell(record.name, record.owner_uid, "migrated", words, None)

    def departed_to(self, name: str) -> tuple[str, int] | None:
        """(node, epoch) of a session that left from here, where it has not come back since."""
        found = self._database.execute(
            "SELECT node, epoch FROM departures WHERE name = ?", [name]
        ).fetchone()
        return (str(found[0]), int(found[1])) if found else None

    def followed(self) -> set[str]:
        """The images that other nodes read here."""
        rows = self._database.execute("SELECT followed FROM departures WHERE followed != ''")
        return {image for (image,) in rows}

    def forwarded(self) -> list[tuple[str, int, str, dict[str, Any]]]:
        """(session, its life, its node, what was said of its ports), of ports that lead there."""
        rows = self._database.execute(
            "SELECT name, epoch, node, forwarded FROM departures WHERE forwarded != ''"
        )
        return [(name, epoch, node, json.loads(told)) for name, epoch, node, told in rows]

    def end_forwarding(self, name: str) -> None:
        """Its ports lead nowhere any more."""
        self._database.execute("UPDATE departures SET forwarded = '' WHERE name = ?", [name])

    def end_following(self, name: str, epoch: int, node: str) -> None:
        """That node has all of what it read here."""
        self._database.execute(
            "UPDATE departures SET followed = '' WHERE name = ? AND epoch = ? AND node = ?",
            (name, epoch, node),
        )

    def following(self) -> list[Arrival]:
        """Sessions that live here, or did, or are made just now, and of which not all has come."""
        wanted = (ACCEPTED, ACCEPTING)
        found = self._database.execute("SELECT * FROM arrivals WHERE state IN (?, ?)", wanted)
        arrivals = [_arrival(row) for row in found]
        return [arrival for arrival in arrivals if arrival.document.get("follows")]

    # -- events

    def tell(
        self, session: str, owner_uid: int, kind: str, words: str, actor_uid: int | None = None
    ) -> None:
        """Write an event by itself."""
        with self._transaction():
            self._tell(session, owner_uid, kind, words, actor_uid)

    def _tell(
        self, session: str, owner_uid: int, kind: str, words: str, actor_uid: int | None
    ) -> None:
        added = self._database.execute(
            "INSERT INTO events (unix_s, session, owner_uid, kind, words, actor_uid)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (time.time(), session, owner_uid, kind, words, actor_uid),
        )
        if added.lastrowid and added.lastrowid % 1000 == 0:
            self._database.execute(
                "DELETE FROM events WHERE number <= ?", [added.lastrowid - _MOST_EVENTS]
            )

    def events(self, after: int, *, session: str = "", most: int = 1000) -> list[Event]:
        """Events numbered above `after`, oldest first; of one session if one is named."""
        rows = self._database.execute(
            "SELECT number, unix_s, session, owner_uid, kind, words, actor_uid FROM events"
            " WHERE number > ? AND (? = '' OR session = ?) ORDER BY number LIMIT ?",
            (after, session, session, most),
        )
        return [Event(*row) for row in rows]

    def last_event(self, before: int = 0) -> int:
        """The newest event's number; with `before` the one so many events earlier."""
        (newest,) = self._database.execute("SELECT max(number) FROM events").fetchone()
        return max(0, (newest or 0) - before)

    # -- settings of the node

    def settings(self) -> dict[str, float | None]:
        """What was set, by name; see `settings`."""
        return dict(self._database.execute("SELECT name, value FROM settings").fetchall())

    def set(self, values: dict[str, float | None]) -> None:
        """Write settings of the node."""
        with self._transaction():
            self._database.executemany(
                "INSERT INTO settings VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                list(values.items()),
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block or nothing. Raises StoreUnavailable when the disk refuses."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except BaseException as error:
            if self._database.in_transaction:  # SQLite may have rolled it back itself
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise _unavailable("write", self._path, error) from error
            raise


def _unavailable(doing: str, path: Path, error: sqlite3.Error) -> StoreUnavailable:
    return StoreUnavailable(
        f"cannot {doing} {path}, in which the agent keeps its sessions: {error}",
        remedy=f"make room on the disk of {path.parent.parent}; all sessions stay as they are",
        path=str(path),
    )


_COLUMNS = ", ".join(Record._fields)
_AS_JSON: Final = ("idle_gaps", "settings", "requests", "moving")


def _column(name: str, value: Any) -> Any:
    return json.dumps(value) if name in _AS_JSON else value


def _row(record: Record) -> list[Any]:
    return [_column(name, value) for name, value in record._asdict().items()]


def _arrival(row: tuple[Any, ...]) -> Arrival:
    name, epoch, source, state, document, unix_s = row
    return Arrival(name, epoch, source, state, json.loads(document), unix_s)


def _record(row: tuple[Any, ...]) -> Record:
    record = Record(*row)
    found = {name: json.loads(str(getattr(record, name))) for name in _AS_JSON}
    return record._replace(**{**found, "idle_gaps": tuple(found["idle_gaps"])})
