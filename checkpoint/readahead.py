"""Reads and authenticates chunks ahead of need, in a thread that does nothing else.

Reading, hashing and decompressing let go of the GIL, so they run beside the installing of pages.
The thread never touches the process's memory: what it has read is only bytes until the one thread
that knows what lies where decides to use them.
"""

from __future__ import annotations

import _thread
import contextlib
import mmap
import os
import select
from _queue import SimpleQueue
from typing import Protocol

from .linux.uffd import address_of


class Reader(Protocol):
    """What can be read: an image."""

    def read_chunk(self, chunk: int, into: memoryview) -> int: ...


class Slot:
    """A page-aligned buffer for one window, at `address`, and what became of the last read."""

    __slots__ = ("address", "buffer", "error", "length_bytes")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.address = address_of(buffer)
        self.length_bytes = 0
        self.error: BaseException | None = None


class Readahead:
    """Chunks asked for by a key of the caller's choice, at most `depth` at a time.

    `done_fd` becomes readable whenever a read has ended.

    Preconditions: one thread asks and takes. Both sides share only queues and dictionaries, whose
    single operations are atomic under the GIL.
    """

    def __init__(self, depth: int, window_bytes: int) -> None:
        whole = memoryview(mmap.mmap(-1, depth * window_bytes))
        self._free = [
            Slot(whole[start : start + window_bytes])
            for start in range(0, depth * window_bytes, window_bytes)
        ]
        self._asked: set[int] = set()
        self._ready: dict[int, Slot] = {}
        self._jobs: SimpleQueue[tuple[int, Reader, int, Slot]] = SimpleQueue()
        self._started = False
        self.done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def room(self) -> int:
        """How many more reads may be asked for."""
        return len(self._free)

    def __contains__(self, key: int) -> bool:
        """Whether `key` was asked for and not taken."""
        return key in self._asked

    def ask(self, key: int, image: Reader, chunk: int) -> None:
        """Begin reading `chunk`. Precondition: there is room, and `key` is not asked for."""
        if not self._started:
            self._started = True
            _thread.start_new_thread(self._work, ())
        self._asked.add(key)
        self._jobs.put((key, image, chunk, self._free.pop()))

    def take(self, key: int) -> Slot | None:
        """The slot of a finished read, to be handed back by `give_back`; None if not finished."""
        slot = self._ready.pop(key, None)
        if slot is not None:
            self._asked.discard(key)
        return slot

    def give_back(self, slot: Slot) -> None:
        """The slot's bytes are not needed any more."""
        slot.error = None
        self._free.append(slot)

    def is_ready(self, key: int) -> bool:
        """Whether the read of `key` has ended."""
        return key in self._ready

    def drop_ready(self) -> None:
        """Make room: what was read and not taken is not wanted any more."""
        for key in list(self._ready):
            slot = self.take(key)
            if slot is not None:
                self.give_back(slot)

    def forget_all(self) -> None:
        """Wait until nothing is being read, and drop what was."""
        poll = select.poll()
        poll.register(self.done_fd, select.POLLIN)
        while len(self._ready) < len(self._asked):
            poll.poll(1000)
            self.clear_done()
        self.drop_ready()

    def clear_done(self) -> None:
        """Make `done_fd` unreadable until another read ends."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.done_fd)

    def _work(self) -> None:
        jobs, ready, done_fd = self._jobs, self._ready, self.done_fd
        while True:
            key, image, chunk, slot = jobs.get()
            try:
                slot.length_bytes = image.read_chunk(chunk, slot.buffer)
            except BaseException as error:
                slot.error = error
            ready[key] = slot
            os.eventfd_write(done_fd, 1)
