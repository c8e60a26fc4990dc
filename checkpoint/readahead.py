"""Reads and authenticates chunks ahead of need, in processes that do nothing else.

Threads would do, but they and the one that answers faults would hand the GIL to each other several
times a chunk: measured, that costs more than the reading (docs/pager.md). A reader gets a copy of
the image by fork and shares buffers; it dies with its parent. Where it was said where a chunk goes
(`Goal`) it installs it as well, as long as that has not been called off (`lzy.checkpoint.fence`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn, Protocol

from .fence import Fence
from .linux import PAGE_BYTES, address_of
from .linux.detached import die_with_parent, set_name
from .linux.uffd import Userfaultfd

_READY, _FAILED, _INSTALLED = 1, 2, 3
_CHUNK, _STATE, _LENGTH, _EPOCH, _CALLS, _COUNT, _PARTS = range(7)
MOST_PARTS = 8
_WORDS = _PARTS + 3 * MOST_PARTS
_MOST_SLOTS = 256
_PIECE_BYTES = 128 << 10  # installed in one go: so long a message waits to be read, about 40 µs
_OF_ITS_OWN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_NO_CHUNK = (1 << 64) - 1


class Reader(Protocol):
    """What can be read: an image."""

    def read_chunk(self, chunk: int, into: memoryview) -> int: ...


class Goal(NamedTuple):
    """Where a chunk goes: parts (address in the process, offset in the chunk, length in bytes).

    With that everything in [low, high) of the process is there. `chunk_bytes`: how long it must be.
    At most MOST_PARTS parts.
    """

    low: int
    high: int
    parts: Sequence[tuple[int, int, int]]
    chunk_bytes: int


def _holds(goal: Goal | None, address: int) -> bool:
    return goal is not None and (address < 0 or goal.low <= address < goal.high)


class Slot:
    """A page-aligned buffer for one window: what was read for `key` lies at `address`.

    `installed`: the goal, if a reader has installed it all and no event was read since.
    """

    __slots__ = (
        "address", "buffer", "epoch", "free", "goal", "installed", "key", "length_bytes", "number",
    )  # fmt: skip

    def __init__(self, number: int, buffer: memoryview) -> None:
        self.number = number
        self.buffer = buffer
        self.address = address_of(buffer)
        self.length_bytes = 0
        self.key = -1
        self.epoch = 0
        self.goal: Goal | None = None
        self.installed: Goal | None = None
        self.free = True


def make_slots(count: int, window_bytes: int) -> list[Slot]:
    """Buffers for `count` windows, in memory that forked children share."""
    whole = memoryview(mmap.mmap(-1, count * window_bytes))
    return [
        Slot(number, whole[number * window_bytes : (number + 1) * window_bytes])
        for number in range(count)
    ]


class Readahead:
    """Chunks asked for by a key of the caller's choice, at most `depth` at a time.

    `done_fd` becomes readable when a read has ended that was not installed, or that was waited for
    (`call_when_done`), and one of `reader_fds` when a reader has died. The slots are a ring: asked
    for, and used again, in the same order; whichever reader is free takes the next. Shared between
    the processes are some words for each slot: what to do, how it ended. Each has one writer at a
    time. `epoch` and `fence` tell whether what was ordered still stands.
    """

    def __init__(
        self,
        image: Reader,
        depth: int,
        window_bytes: int,
        private: Iterable[int] = (),
        *,
        readers: int = 1,
        fence: Fence | None = None,
        uffd: Userfaultfd | None = None,
    ) -> None:
        """`private`: descriptors that the readers must not hold; with `fence` and `uffd` they
        install.
        """
        depth = min(depth, _MOST_SLOTS)
        self._slots = make_slots(depth, window_bytes)
        self._near = Slot(-1, memoryview(mmap.mmap(-1, window_bytes, flags=_OF_ITS_OWN)))
        self._words = memoryview(mmap.mmap(-1, _MOST_SLOTS * 8 * _WORDS)).cast("Q")
        self._by_key: dict[int, Slot] = {}
        self._asked = bytearray()
        self._next = 0
        self.room = depth
        self._uffd = uffd
        self._fence = fence if uffd is not None else None
        self._jobs_fd, self._give_fd = os.pipe2(os.O_CLOEXEC)
        self.done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.reader_fds: list[int] = []
        self._pids: list[int] = []
        self._ends = select.poll()
        self._done = select.poll()
        self._done.register(self.done_fd, select.POLLIN)
        parent = os.getpid()
        for _ in range(readers):
            pid = os.fork()
            if pid == 0:
                self._read(image, parent, private)
            self._pids.append(pid)
            self.reader_fds.append(os.pidfd_open(pid))
            self._ends.register(self.reader_fds[-1], select.POLLIN)

    def __contains__(self, key: int) -> bool:
        """Whether `key` was asked for and neither taken nor dropped."""
        return key in self._by_key

    @property
    def installs(self) -> bool:
        """Whether the readers install what they are given a goal for."""
        return self._fence is not None

    def ask(self, key: int, chunk: int, goal: Goal | None = None) -> None:
        """Note that `chunk` is to be read, and installed if `goal` says where; see `begin`.

        Precondition: there is room, and `key` is not asked for.
        """
        number = self._next
        slot = self._slots[number]
        slot.key = key
        slot.free = False
        slot.goal = slot.installed = None
        self._by_key[key] = slot
        words, at = self._words, _WORDS * number
        words[at + _CHUNK] = chunk
        words[at + _STATE] = words[at + _COUNT] = words[at + _CALLS] = 0
        if goal is not None and self._fence is not None:
            slot.goal = goal
            slot.epoch = words[at + _EPOCH] = self._fence.epoch
            words[at + _LENGTH] = goal.chunk_bytes
            words[at + _COUNT] = len(goal.parts)
            place = at + _PARTS
            for part in goal.parts:
                words[place], words[place + 1], words[place + 2] = part
                place += 3
        self._next = (number + 1) % len(self._slots)
        self.room -= 1
        self._asked.append(number)

    def begin(self) -> None:
        """Have the readers do what was asked for."""
        if self._asked:
            os.write(self._give_fd, self._asked)
            self._asked.clear()

    def is_ready(self, key: int) -> bool:
        """Whether the read of `key` has ended."""
        return self._words[_WORDS * self._by_key[key].number + _STATE] != 0

    def is_installed(self, key: int, address: int = -1) -> bool:
        """Whether a reader has installed all of it (and `address`), and no event was read since."""
        slot = self._by_key.get(key)
        return slot is not None and self._is_installed(slot) and _holds(slot.goal, address)

    def _is_installed(self, slot: Slot) -> bool:
        return (
            slot.goal is not None
            and self._words[_WORDS * slot.number + _STATE] == _INSTALLED
            and self._fence is not None
            and slot.epoch == self._fence.epoch
        )

    def is_whole(self) -> bool:
        """Whether all readers live; else what was asked for may never be read."""
        return not self._ends.poll(0)

    def take(self, key: int) -> Slot | None:
        """What was read for `key`, to be handed back by `give_back`.

        None when it was not asked for, is being read, could not be read, or was installed before
        an event came. What was `installed` has left nothing in the slot's buffer.
        """
        slot = self._by_key.get(key)
        if slot is None:
            return None
        at = _WORDS * slot.number
        state = self._words[at + _STATE]
        if state == 0:
            return None
        del self._by_key[key]
        slot.installed = slot.goal if self._is_installed(slot) else None
        if state == _FAILED or (state == _INSTALLED and slot.installed is None):
            self.give_back(slot)
            return None
        slot.length_bytes = self._words[at + _LENGTH]
        return slot

    def give_back(self, slot: Slot) -> None:
        """The slot's bytes are not needed any more."""
        slot.free = True
        slots = self._slots
        # Room grows from the oldest slot on: the ring is used in order.
        oldest = (self._next + self.room) % len(slots)
        while self.room < len(slots) and slots[oldest].free:
            self.room += 1
            oldest = (oldest + 1) % len(slots)

    def installed(self) -> list[Goal]:
        """The goals that readers have reached. Precondition: the fence is closed."""
        slots = self._by_key.values()
        return [slot.goal for slot in slots if slot.goal is not None and self._is_installed(slot)]

    def is_coming(self, key: int, address: int) -> bool:
        """Whether a reader is to install `key`, and with it `address`, and has not done so yet."""
        slot = self._by_key.get(key)
        return (
            slot is not None
            and _holds(slot.goal, address)
            and self._fence is not None
            and slot.epoch == self._fence.epoch
            and self._words[_WORDS * slot.number + _STATE] == 0
        )

    def spare(self, key: int) -> None:
        """Nobody needs `key` any more: not to be read, if no reader has begun."""
        self._words[_WORDS * self._by_key[key].number + _CHUNK] = _NO_CHUNK

    def call_when_done(self, key: int) -> None:
        """Have `done_fd` become readable when the read of `key` ends, unless it has already."""
        self._words[_WORDS * self._by_key[key].number + _CALLS] = 1

    def clear_done(self) -> None:
        """Make `done_fd` unreadable until another read ends."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.done_fd)

    def wait_done(self, timeout_s: float) -> None:
        """Wait until a read ends."""
        self._done.poll(timeout_s * 1000)

    def close(self) -> None:
        """End the readers."""
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)  # not reaped yet: the number is still its own
        for pid in self._pids:
            os.waitpid(pid, 0)
        for fd in (self._jobs_fd, self._give_fd, *self.reader_fds, self.done_fd):
            os.close(fd)

    # -- in a reader

    def _read(self, image: Reader, parent: int, private: Iterable[int]) -> NoReturn:
        try:
            die_with_parent(parent)
            set_name("lzy-reader")
            os.nice(1)  # whoever waits for a page comes first, but not by much: it needs us
            for fd in (*private, self._give_fd):
                os.close(fd)
            if self._fence is not None:
                self._fence.join()
            words, done_fd, jobs_fd = self._words, self.done_fd, self._jobs_fd
            while job := os.read(jobs_fd, 1):
                at = _WORDS * job[0]
                try:
                    state = self._do(image, self._slots[job[0]], at, parent)
                except Exception:  # who asked reads it again and sees for itself
                    state = _FAILED
                words[at + _STATE] = state
                if state != _INSTALLED or words[at + _CALLS]:
                    os.eventfd_write(done_fd, 1)
        finally:
            os._exit(1)

    def _do(self, image: Reader, slot: Slot, at: int, parent: int) -> int:
        """Do what is asked for in a slot; how it ended."""
        words = self._words
        chunk = words[at + _CHUNK]
        if chunk == _NO_CHUNK:
            return _FAILED
        if not words[at + _COUNT]:
            words[at + _LENGTH] = image.read_chunk(chunk, slot.buffer)
            return _READY
        wanted_bytes = words[at + _LENGTH]
        near = self._near  # the same again and again: it stays in this processor's cache
        length = image.read_chunk(chunk, near.buffer)
        if length == wanted_bytes and self._install(at, near.address, parent):
            return _INSTALLED
        slot.buffer[:length] = near.buffer[:length]
        words[at + _LENGTH] = length
        return _READY

    def _install(self, at: int, address: int, parent: int) -> bool:
        """Install as a slot's words say, as long as that stands; whether all is in."""
        words, uffd, fence = self._words, self._uffd, self._fence
        assert fence is not None
        assert uffd is not None
        epoch = words[at + _EPOCH]
        first = at + _PARTS
        for place in range(first, first + 3 * words[at + _COUNT], 3):
            target, left = words[place], words[place + 2]
            source = address + words[place + 1]
            while left:
                stands = fence.enter(epoch)
                try:
                    # Whoever has followed our pager has waited for us, or we see that it is gone.
                    if not stands or os.getppid() != parent:
                        return False
                    while left:
                        try:
                            done = uffd.copy(target, source, min(left, _PIECE_BYTES))
                        except FileExistsError:  # a page is there, and whoever waits may look
                            done = PAGE_BYTES
                            uffd.wake(target, done)
                        target += done
                        source += done
                        left -= done
                        if fence.is_wanted:
                            break
                except OSError:  # whatever it is: who asked sees for itself
                    return False
                finally:
                    fence.leave()
        return True
