"""The other threads of a stopped process wait inside it until one has made its calls, whoever dies.

A tracer's death lets all threads go on. Calls between which nobody else may run would then be seen
half done: so the others wait in a futex(2), which the one that makes the calls wakes as its last.
They wait for a while at most, should it never come to that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from . import machine
from .batch import Batch
from .errors import LzyError
from .linux import memory, process
from .machine import Call

if TYPE_CHECKING:
    from .tracee import Thread, Tracee

SLOT_BYTES: Final = 512
"""Room in the arena for each thread."""
_WORD_BYTES = 16
_WAITS_AT_MOST_S = 5
_ALL: Final = (1 << 31) - 1


def room_bytes(tracee: Tracee) -> int:
    """How much of the arena `parked` needs at its end."""
    return SLOT_BYTES * len(tracee.threads) + _WORD_BYTES


@contextmanager
def parked(tracee: Tracee, worker: Thread) -> Iterator[Release]:
    """While the block runs all threads but `worker` wait; what it yields ends a batch of that one.

    Precondition: the arena has `room_bytes` at its end of which nobody else makes use, all zeros.
    """
    others = [thread for thread in tracee.threads.values() if thread is not worker]
    base = tracee.arena + tracee.arena_bytes - room_bytes(tracee)
    word = base + SLOT_BYTES * len(tracee.threads)
    started: list[tuple[Thread, Batch]] = []
    release = Release(word, bool(others))
    try:
        for slot, thread in enumerate(others):
            place = base + slot * SLOT_BYTES + machine.CONTEXT_BYTES
            batch = Batch(place, SLOT_BYTES - machine.CONTEXT_BYTES)
            until = batch.put(struct.pack("<qq", _WAITS_AT_MOST_S, 0))
            batch.call(process.SYS_FUTEX, word, process.FUTEX_WAIT_PRIVATE, 0, until, tolerate=True)
            tracee.start(thread, batch)
            started.append((thread, batch))
        yield release
    except BaseException:  # its calls may have ended before the last
        with suppress(LzyError, OSError):
            woken = bytearray(struct.pack("<Q", 1))
            memory.write_process(tracee.witness, [(word, len(woken))], memoryview(woken))
            wake = (word, process.FUTEX_WAKE_PRIVATE, _ALL)
            tracee.run_one(worker, Call(process.SYS_FUTEX, wake))
        raise
    finally:
        for thread, batch in started:
            tracee.finish(thread, batch)


class Release:
    """The last calls of a batch: who waits goes on, and who was about to does not begin."""

    def __init__(self, word: int, is_awaited: bool) -> None:
        self._word = word
        self._is_awaited = is_awaited

    def add_to(self, batch: Batch) -> None:
        """Have the others go on behind what the batch holds."""
        if self._is_awaited:  # the time is not 0
            batch.call(process.SYS_CLOCK_GETTIME, 0, self._word, tolerate=True)
            batch.call(
                process.SYS_FUTEX, self._word, process.FUTEX_WAKE_PRIVATE, _ALL, tolerate=True
            )
