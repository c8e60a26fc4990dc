"""What sessions held and whether they were in use, over days: readings, kept where they differ.

For pictures only, nothing is decided by it. So it is a file of its own, which may lose the last
seconds in a power cut, and is begun anew when it is damaged; where the disk is full when the agent
starts, that agent keeps them in memory.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .session import Session

_SCHEMA = """
CREATE TABLE IF NOT EXISTS readings (
    unix_s REAL NOT NULL,
    session TEXT NOT NULL,
    owner_uid INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL,
    is_active INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS by_session ON readings (session, unix_s);
"""
_DIFFERS_SHARE = 0.1
_DIFFERS_BYTES = 4 << 20
_KEPT_S = 14 * 86400.0
_MOST_READINGS = 200_000
_SWEPT_EVERY = 1000


class Kept(NamedTuple):
    """One session at one moment: resident memory of its processes, and whether it was in use."""

    unix_s: float
    session: str
    owner_uid: int
    memory_bytes: int
    is_active: bool


class Chronicle:
    """The open file; used by one thread."""

    def __init__(self, path: Path) -> None:
        self._last: dict[str, tuple[int, bool]] = {}
        self._written = 0
        try:
            self._database = _open(path)
        except (sqlite3.OperationalError, OSError):
            self._database = _connect(":memory:")
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._database = _open(path)

    def note(self, sessions: Iterable[Session]) -> None:
        """Keep what was just read of `sessions`, of those for which it is another than before."""
        now, rows = time.time(), []
        for session in sessions:
            name, found = session.record.name, (session.memory_bytes, session.is_active)
            if not session.is_known or not _differs(self._last.get(name), found):
                continue
            self._last[name] = found
            rows.append((now, name, session.record.owner_uid, found[0], int(found[1])))
        if not rows:
            return
        with contextlib.suppress(sqlite3.Error):  # a full disk, say: pictures can wait
            self._database.executemany("INSERT INTO readings VALUES (?, ?, ?, ?, ?)", rows)
            self._written += len(rows)
            if self._written >= _SWEPT_EVERY:
                self._written = 0
                self._sweep(now)

    def readings(self, after_unix_s: float, session: str = "") -> list[Kept]:
        """Those after a moment, oldest first; of one session if one is named."""
        rows = self._database.execute(
            "SELECT unix_s, session, owner_uid, memory_bytes, is_active FROM readings"
            " WHERE unix_s > ? AND (? = '' OR session = ?) ORDER BY unix_s",
            (after_unix_s, session, session),
        )
        return [Kept(at_s, name, uid, held, bool(active)) for at_s, name, uid, held, active in rows]

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _sweep(self, now: float) -> None:
        self._database.execute("DELETE FROM readings WHERE unix_s < ?", [now - _KEPT_S])
        self._database.execute(
            "DELETE FROM readings WHERE rowid <= (SELECT max(rowid) FROM readings) - ?",
            [_MOST_READINGS],
        )


def describe_reading(kept: Kept) -> dict[str, Any]:
    """A reading as `/v1/readings` shows it."""
    document = kept._asdict()
    del document["owner_uid"]
    return document


def _open(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)
    return _connect(path)


def _connect(path: Path | str) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
        database.execute(f"PRAGMA {pragma}")
    database.executescript(_SCHEMA)
    database.execute("SELECT count(*) FROM readings").fetchone()
    return database


def _differs(before: tuple[int, bool] | None, now: tuple[int, bool]) -> bool:
    if before is None or before[1] != now[1]:
        return True
    return abs(now[0] - before[0]) > max(_DIFFERS_SHARE * before[0], _DIFFERS_BYTES)
