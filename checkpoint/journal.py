"""What a pager must not forget when it is killed: one shared, memory-mapped file per process.

The kernel writes userfaultfd messages straight into the mapping, in the same read(2) that takes
them off its queue. So there is no moment at which an event (memory removed, moved, unmapped,
forked) is known to nobody: it waits in the kernel or it stands in the file, whoever is killed
when. A new pager replays the file and knows what lies where.

    0       header: magic, version, index of the area in use, (start, end) of two areas,
            length of the facts, then the facts as JSON (what is paged from where)
    8192    status: numbers and a line of text for people, written as it changes, never replayed
    12288   areas: records of 32 bytes, ended by a record whose first u64 is 0

A record is a struct uffd_msg as the kernel wrote it, or one of our own (kinds from 0xE0). An area
begins with a snapshot (CONTEXT and PIECE records) and grows by events. When it is full a new area
is written beside it and then put in use by one 8-byte store.

Guarantees: a record counts from the moment its first u64 is not 0, and that is stored last.
Page faults are never kept: a thread that waits is asked again by UFFDIO_WAKE.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .errors import Busy, Damaged, NotFound
from .linux import PAGE_BYTES, address_of
from .linux.uffd import EVENT_FORK, EVENT_PAGEFAULT, MESSAGE_BYTES

Record = tuple[int, int, int, int]

SOURCE = 0xE1  # what follows comes from context A
PIECE = 0xE2  # addresses [A, B) of the present source wait for the image's at + C (mod 2^64)
GONE = 0xE3  # context A is served no more; its descriptor is about to be closed
CONTEXT = 0xE4  # snapshot: context A exists (in a pager's shared table), nothing missing yet
MOVED = 0xE5  # snapshot: what is at [A, B) of the present source has been moved there

MAIN = 0
"""The context of the restored process itself; those of forked children go by descriptor number."""

_MAGIC = 0x314A_5245_4741_505A  # "ZPAGERJ1"
_VERSION = 1
_STATUS_AT = 8192
_AREAS_AT = 12288
_FACTS_AT = 128
_MOST_FACTS_BYTES = _STATUS_AT - _FACTS_AT
_TEXT_AT = _STATUS_AT + 512
_MOST_TEXT_BYTES = 2048
_LEAVES_WITHIN_S = 5.0
_LOOKS_EVERY_S = 0.0005
_GROWTH_RECORDS = 4 * 1024
_LEAST_GROWTH_RECORDS = 512
_WORDS = MESSAGE_BYTES // 8

_PAGER_PID, _KEEPER_PID, _PHASE, _FAULTS, _INSTALLED, _STALLED, _MISSING, _TEXT_BYTES = range(8)
_ROUSED = 8

WORKING, CLOSING, FINISHED = 0, 1, 2
"""Phases: pages are missing; all in, the process's descriptor is being closed; nothing left."""


class Status(NamedTuple):
    """How a pager is doing; as current as the journal is."""

    pager_pid: int
    keeper_pid: int
    phase: int
    faults: int
    installed_bytes: int
    stalled_faults: int
    missing_bytes: int
    message: str
    roused: bool


def journal_path(directory: Path, pid: int) -> Path:
    """Where the journal for process `pid` lies."""
    return directory / f"{pid}.pager"


def log_path(journal: Path) -> Path:
    """The pager's log, beside its journal."""
    return journal.with_suffix(".log")


class Journal:
    """An open, locked journal. `address` is where the next messages are to be read to.

    Preconditions: one thread writes. The lock (flock(2)) belongs to the open file, so it lives as
    long as any process that inherited the descriptor.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path
        self._map()
        words = self._words
        if words[0] != _MAGIC or words[1] != _VERSION or words[2] > 1 or words[7] > 8000:
            raise Damaged(f"{path} is no journal of a pager", path=str(path))
        start, end = words[3 + 2 * words[2]], words[4 + 2 * words[2]]
        if not _AREAS_AT <= start < end <= self._length or (start | end) % PAGE_BYTES:
            raise Damaged(f"{path} is no journal of a pager", path=str(path))
        self._first = start // 8
        self._tail = self._first
        self._end = end // 8
        facts = json.loads(bytes(self._bytes[_FACTS_AT : _FACTS_AT + words[7]]))
        self.facts: dict[str, Any] = facts
        self.source = MAIN

    def _map(self) -> None:
        self._length = os.fstat(self.fd).st_size
        if self._length < _AREAS_AT + PAGE_BYTES:
            raise Damaged(f"{self.path} is cut", path=str(self.path))
        # MAP_POPULATE: the kernel's write must not have to wait for a page while we are killed.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._mapping = mmap.mmap(self.fd, self._length, flags)
        self._bytes = memoryview(self._mapping)
        self._words = self._bytes.cast("Q")
        self._base = address_of(memoryview(self._mapping))

    # -- making, opening

    @classmethod
    def create(
        cls,
        path: Path,
        facts: dict[str, Any],
        pieces: Iterable[tuple[int, int, int]],
        moved: Iterable[tuple[int, int]] = (),
        *,
        lock: int = -1,
    ) -> Journal:
        """A new journal, locked, saying that `pieces` (start, end, shift) are missing.

        `moved` are ranges whose content, missing or not, has come from elsewhere.

        A stale one is replaced, and held until it is: else somebody could take over from it just
        then, and two would serve. `lock`: who calls holds it already (`lock_journal`), and lets go.
        Raises Busy when a living pager holds the one that is there, and does not leave within
        seconds.
        """
        text = json.dumps(facts, separators=(",", ":")).encode()
        if len(text) > _MOST_FACTS_BYTES:
            raise ValueError("the facts of a journal must fit into its header")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if lock < 0:
            with contextlib.suppress(NotFound):
                lock = lock_journal(path, within_s=_LEAVES_WITHIN_S)
                try:
                    return cls.create(path, facts, pieces, moved, lock=lock)
                finally:
                    os.close(lock)
        records = [(PIECE, start, end, shift) for start, end, shift in pieces]
        records += [(MOVED, start, end, 0) for start, end in moved]
        capacity = _area_bytes(len(records))
        draft = path.with_suffix(f".{os.getpid()}.new")
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Both areas now: on a disk that fills up meanwhile the process must not stall for one.
            os.posix_fallocate(fd, 0, _AREAS_AT + 2 * capacity)
            header = (_MAGIC, _VERSION, 0, _AREAS_AT, _AREAS_AT + capacity, 0, 0, len(text))
            os.pwrite(fd, b"".join(word.to_bytes(8, "little") for word in header), 0)
            os.pwrite(fd, text, _FACTS_AT)
            journal = cls(fd, path)
            for record in records:
                journal.append(*record)
            os.rename(draft, path)
        except BaseException:
            os.close(fd)
            draft.unlink(missing_ok=True)
            raise
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal:
        """The journal that is there, locked. Raises NotFound, Busy (a pager lives), Damaged."""
        fd = lock_journal(path)
        try:
            return cls(fd, path)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Let go of mapping and descriptor; the lock goes with the last inherited descriptor."""
        self._words.release()
        self._bytes.release()
        self._mapping.close()
        os.close(self.fd)

    def delete(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    # -- growing

    @property
    def address(self) -> int:
        """Where in memory the next record stands: the buffer for read(2)."""
        return self._base + self._tail * 8

    @property
    def room_bytes(self) -> int:
        """How much fits before `rewrite` is due; the last record stays free as the end mark."""
        return (self._end - self._tail) * 8 - MESSAGE_BYTES

    def append(self, kind: int, a: int = 0, b: int = 0, c: int = 0) -> None:
        """Add a record of our own."""
        words, tail = self._words, self._tail
        words[tail + 1] = a & 0xFFFFFFFFFFFFFFFF
        words[tail + 2] = b & 0xFFFFFFFFFFFFFFFF
        words[tail + 3] = c & 0xFFFFFFFFFFFFFFFF
        words[tail] = kind
        self._tail = tail + _WORDS

    def name_source(self, context: int) -> None:
        """Say whose messages come next."""
        if context != self.source:
            self.append(SOURCE, context)
            self.source = context

    def take(self, length_bytes: int, faults: list[int], events: list[Record]) -> None:
        """Sort what read(2) put at `address`: addresses of faults, and events, in order.

        Events stay in the journal; with only faults their place is used again.
        """
        words = self._words
        at = self._tail
        stop = at + length_bytes // 8
        kept = at
        while at < stop:
            kind = words[at] & 0xFF
            if kind == EVENT_PAGEFAULT:
                faults.append(words[at + 2])
            else:
                events.append((kind, words[at + 1], words[at + 2], words[at + 3]))
                kept = at + _WORDS
            at += _WORDS
        while at > kept:  # from the back: whoever replays stops at the first zero
            at -= _WORDS
            words[at] = 0
        self._tail = kept

    def replay(self) -> Iterator[Record]:
        """All records that count, oldest first, without faults; then the journal can grow again."""
        words, at = self._words, self._first
        last = self._end - _WORDS
        while at < last and words[at]:
            kind = words[at] & 0xFF
            if kind != EVENT_PAGEFAULT:
                if kind == SOURCE:
                    self.source = words[at + 1]
                yield kind, words[at + 1], words[at + 2], words[at + 3]
            at += _WORDS
        self._tail = at

    def children(self) -> set[int]:
        """The contexts of forked children, by their tokens."""
        children: set[int] = set()
        for kind, a, _, _ in self.replay():
            if kind == CONTEXT:
                children.add(a)
            elif kind == EVENT_FORK:
                children.add(a & 0xFFFFFFFF)
            elif kind == GONE:
                children.discard(a)
        return children

    def forget(self, children: Iterable[int]) -> None:
        """Note that nobody holds these contexts any more. Precondition: it was replayed."""
        for child in children:
            if self.room_bytes < 2 * MESSAGE_BYTES:
                raise Busy(f"journal {self.path} has no room for what became of forked children")
            self.append(GONE, child)

    def rewrite(self, records: list[Record]) -> None:
        """Begin a new area with these records (a snapshot) in place of all that was."""
        in_use = self._words[2]
        start, needed = self._find_area(len(records))
        words = self._words
        self._bytes[start : start + needed] = bytes(needed)
        self._first = self._tail = start // 8
        self._end = (start + needed) // 8
        self.source = MAIN
        for record in records:
            self.append(*record)
        other = 1 - in_use
        words[3 + 2 * other] = start
        words[4 + 2 * other] = start + needed
        words[2] = other

    def _find_area(self, records: int) -> tuple[int, int]:
        """(where it begins, its bytes) beside the area that is in use; the file grows if need be.

        On a full disk, what there is serves, if it is not filled at once.
        """
        first, end = self._first * 8, self._end * 8
        needed = _area_bytes(records)
        if first - _AREAS_AT >= needed:
            return _AREAS_AT, needed
        if self._length - end >= needed:
            return end, needed
        try:
            os.posix_fallocate(self.fd, 0, end + needed)
        except OSError:
            room, start = max((first - _AREAS_AT, _AREAS_AT), (self._length - end, end))
            if room < (records + _LEAST_GROWTH_RECORDS) * MESSAGE_BYTES:
                raise
            return start, room
        self._words.release()
        self._bytes.release()
        self._map()
        return end, needed

    # -- status

    def set_pids(self, *, pager_pid: int | None = None, keeper_pid: int | None = None) -> None:
        """Say who serves and who watches."""
        if pager_pid is not None:
            self._words[_STATUS_AT // 8 + _PAGER_PID] = pager_pid
        if keeper_pid is not None:
            self._words[_STATUS_AT // 8 + _KEEPER_PID] = keeper_pid

    def set_numbers(self, *, faults: int, installed: int, stalled: int, missing: int) -> None:
        """Say how far it is: faults answered, bytes installed, faults stalled, bytes missing."""
        at = _STATUS_AT // 8
        self._words[at + _FAULTS] = faults
        self._words[at + _INSTALLED] = installed
        self._words[at + _STALLED] = stalled
        self._words[at + _MISSING] = missing

    def set_message(self, message: str) -> None:
        """A line for people: what is wrong at present, or nothing."""
        text = message.encode()[:_MOST_TEXT_BYTES]
        self._words[_STATUS_AT // 8 + _TEXT_BYTES] = 0
        self._bytes[_TEXT_AT : _TEXT_AT + len(text)] = text
        self._words[_STATUS_AT // 8 + _TEXT_BYTES] = len(text)

    @property
    def phase(self) -> int:
        """WORKING, CLOSING or FINISHED."""
        return self._words[_STATUS_AT // 8 + _PHASE]

    @phase.setter
    def phase(self, value: int) -> None:
        self._words[_STATUS_AT // 8 + _PHASE] = value

    @property
    def is_roused(self) -> bool:
        """Whether somebody has asked for all of the memory (see `rouse`)."""
        return self._words[_STATUS_AT // 8 + _ROUSED] != 0


def rouse(path: Path) -> None:
    """Ask whoever serves from this journal to bring all of the memory in. Raises NotFound."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"there is no journal {path}", path=str(path)) from error
    try:
        os.pwrite(fd, (1).to_bytes(8, "little"), _STATUS_AT + 8 * _ROUSED)
    finally:
        os.close(fd)


def read_phase(fd: int) -> int:
    """The phase in the journal open as `fd`, for who has not mapped it."""
    return int.from_bytes(os.pread(fd, 8, _STATUS_AT + 8 * _PHASE), "little")


def is_held(path: Path) -> bool:
    """Whether a living pager or keeper holds the journal."""
    try:
        os.close(lock_journal(path))
    except Busy:
        return True
    return False


def read_status(path: Path) -> tuple[dict[str, Any], Status]:
    """Facts and status of a journal, read without locking it. Raises NotFound, Damaged."""
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(_AREAS_AT)
    except FileNotFoundError as error:
        raise NotFound(f"there is no journal {path}", path=str(path)) from error
    if len(head) < _AREAS_AT or int.from_bytes(head[:8], "little") != _MAGIC:
        raise Damaged(f"{path} is no journal of a pager", path=str(path))
    words = memoryview(head).cast("Q")
    at = _STATUS_AT // 8
    text = head[_TEXT_AT : _TEXT_AT + min(words[at + _TEXT_BYTES], _MOST_TEXT_BYTES)]
    facts = json.loads(head[_FACTS_AT : _FACTS_AT + words[7]])
    status = Status(
        pager_pid=words[at + _PAGER_PID],
        keeper_pid=words[at + _KEEPER_PID],
        phase=words[at + _PHASE],
        faults=words[at + _FAULTS],
        installed_bytes=words[at + _INSTALLED],
        stalled_faults=words[at + _STALLED],
        missing_bytes=words[at + _MISSING],
        message=text.decode("utf-8", "replace"),
        roused=words[at + _ROUSED] != 0,
    )
    return facts, status


def _area_bytes(records: int) -> int:
    length = (2 * records + _GROWTH_RECORDS) * MESSAGE_BYTES
    return (length + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


def lock_journal(path: Path, within_s: float = 0.0) -> int:
    """The journal that is there, opened and locked: nobody else takes over until it is closed.

    Raises NotFound, Busy (it is held, and for longer than `within_s`).
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"there is no journal {path}", path=str(path)) from error
        try:
            _await_lock(fd, path, deadline)
            if _is_at(path, fd):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # another has taken its place before we had it


def _await_lock(fd: int, path: Path, deadline_s: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline_s:
                raise Busy(
                    f"journal {path} is held by a living pager",
                    remedy="that pager serves the process; `lzy pager --status` shows how it does",
                    path=str(path),
                ) from error
            time.sleep(_LOOKS_EVERY_S)  # its pager is done, and has yet to end


def _is_at(path: Path, fd: int) -> bool:
    """Whether an open file is what the path leads to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False
