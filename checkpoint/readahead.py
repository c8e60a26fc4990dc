"""Reads and authenticates chunks ahead of need, in processes that do nothing else.

Threads would do, but they and the one that answers faults would hand the GIL to each other several
times a chunk: measured, that costs more than the reading (docs/pager.md). A reader gets a copy of
the image by fork and shares only buffers; it never touches the memory of the process that is paged,
and it dies with its parent.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
from collections.abc import Iterable
from typing import NoReturn, Protocol

from .linux import address_of
from .linux.detached import die_with_parent, set_name

_READY, _FAILED = 1, 2
_MOST_SLOTS = 256


class Reader(Protocol):
    """What can be read: an image."""

    def read_chunk(self, chunk: int, into: memoryview) -> int: ...


class Slot:
    """A page-aligned buffer for one window: what was read for `key` lies at `address`."""

    __slots__ = ("address", "buffer", "free", "key", "length_bytes")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.address = address_of(buffer)
        self.length_bytes = 0
        self.key = -1
        self.free = True


def make_slots(count: int, window_bytes: int) -> list[Slot]:
    """Buffers for `count` windows, in memory that forked children share."""
    whole = memoryview(mmap.mmap(-1, count * window_bytes))
    return [
        Slot(whole[start : start + window_bytes])
        for start in range(0, count * window_bytes, window_bytes)
    ]


class Readahead:
    """Chunks asked for by a key of the caller's choice, at most `depth` at a time.

    `done_fd` becomes readable whenever a read has ended, and one of `reader_fds` when a reader has
    died. The slots are a ring: asked for, and used again, in the same order; reader r of n reads
    into every n-th slot. Shared between the processes are three words for each slot: the chunk,
    how its read ended, its length. Each has one writer at a time.
    """

    def __init__(
        self,
        image: Reader,
        depth: int,
        window_bytes: int,
        private: Iterable[int] = (),
        *,
        readers: int = 1,
    ) -> None:
        """`private`: descriptors that the readers must not hold."""
        depth = min(depth, _MOST_SLOTS)
        depth -= depth % readers  # so that the slot after the last is again the first reader's
        self._slots = make_slots(depth, window_bytes)
        self._words = memoryview(mmap.mmap(-1, _MOST_SLOTS * 24)).cast("Q")
        self._by_key: dict[int, int] = {}
        self._next = 0
        self.room = depth
        self._jobs_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE) for _ in range(readers)]
        self.done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.reader_fds: list[int] = []
        self._pids: list[int] = []
        self._ends = select.poll()
        self._done = select.poll()
        self._done.register(self.done_fd, select.POLLIN)
        parent = os.getpid()
        for reader in range(readers):
            pid = os.fork()
            if pid == 0:
                self._read(image, reader, parent, private)
            self._pids.append(pid)
            self.reader_fds.append(os.pidfd_open(pid))
            self._ends.register(self.reader_fds[-1], select.POLLIN)

    def __contains__(self, key: int) -> bool:
        """Whether `key` was asked for and neither taken nor dropped."""
        return key in self._by_key

    def ask(self, key: int, chunk: int) -> None:
        """Begin reading `chunk`. Precondition: there is room, and `key` is not asked for."""
        number = self._next
        slot = self._slots[number]
        slot.key = key
        slot.free = False
        self._by_key[key] = number
        self._words[3 * number] = chunk
        self._words[3 * number + 1] = 0
        self._next = (number + 1) % len(self._slots)
        self.room -= 1
        os.eventfd_write(self._jobs_fds[number % len(self._jobs_fds)], 1)

    def is_ready(self, key: int) -> bool:
        """Whether the read of `key` has ended."""
        return self._words[3 * self._by_key[key] + 1] != 0

    def is_whole(self) -> bool:
        """Whether all readers live; else what was asked for may never be read."""
        return not self._ends.poll(0)

    def take(self, key: int) -> Slot | None:
        """What was read for `key`, to be handed back by `give_back`.

        None when it was not asked for, is being read, or could not be read.
        """
        number = self._by_key.get(key)
        if number is None:
            return None
        state = self._words[3 * number + 1]
        if state == 0:
            return None
        del self._by_key[key]
        slot = self._slots[number]
        if state == _FAILED:
            self.give_back(slot)
            return None
        slot.length_bytes = self._words[3 * number + 2]
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
        for fd in (*self._jobs_fds, *self.reader_fds, self.done_fd):
            os.close(fd)

    def _read(self, image: Reader, reader: int, parent: int, private: Iterable[int]) -> NoReturn:
        try:
            die_with_parent(parent)
            set_name("lzy-reader")
            os.nice(1)  # whoever waits for a page comes first, but not by much: it needs us
            for fd in private:
                os.close(fd)
            words, slots, done_fd = self._words, self._slots, self.done_fd
            jobs_fd, readers = self._jobs_fds[reader], len(self._jobs_fds)
            number = reader
            while True:
                os.eventfd_read(jobs_fd)
                try:
                    length = image.read_chunk(words[3 * number], slots[number].buffer)
                    words[3 * number + 2] = length
                    words[3 * number + 1] = _READY
                except Exception:  # who asked reads it again and sees for itself
                    words[3 * number + 1] = _FAILED
                os.eventfd_write(done_fd, 1)
                number = (number + readers) % len(slots)
        finally:
            os._exit(1)
