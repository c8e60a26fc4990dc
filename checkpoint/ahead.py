"""What of a first checkpoint is read before anything stands still.

The process comes under account (see `tracking`), and then its memory is read while it runs and
writes. Of that draft the checkpoint keeps what was not written since: the process stands still no
longer than for any later checkpoint, however large it is. A draft by itself is of no moment at all,
and nothing but the checkpoint that it was made for ever sees it.

*Guarantee.* A page is protected before it is read, so whatever is written to it from then on makes
it count as written; and what is mapped meanwhile is not under account, so that counts as well.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import mapping_flags, proc, tracking
from .content import own_page_ranges, windows_of
from .draft import Draft
from .inheritance import length_bytes
from .linux import PAGE_BYTES, memory
from .working_set import order_windows

if TYPE_CHECKING:
    from .writer import ImageWriter

LEAST_BYTES = 64 << 20
"""Of less memory the stop is as short without."""

_MOST_ROUNDS = 3
_LITTLE_BYTES = 16 << 20  # written meanwhile: it is soon copied during the stop
_PART = 8  # or more windows than that of those just read: a round gains little, and is stored too


def read_ahead(pid: int, number: int, writer: ImageWriter, order: Sequence[int]) -> Draft:
    """Read the memory of a running process, under the account with its descriptor `number`.

    Again what it has written meanwhile, until that is little, or grows. `order`: which windows are
    to be stored first. Raises NotFound when it ends, OSError, and what the writer raises.
    """
    source, counted = RunningPages(pid), writer.counted
    rows: dict[int, tuple[int, int]] = {}
    try:
        for _ in range(_MOST_ROUNDS):
            vmas = mapping_flags.mappings(pid)
            written = tracking.protect_running(pid, number, vmas)
            pages = dict(windows_of(own_page_ranges(pid, vmas), writer.window_pages))
            touched = [address for address, _ in windows_of(written, writer.window_pages)]
            windows = [(address, pages[address]) for address in touched if address in pages]
            writer.add_space(source, order_windows(windows, order), space=0)
            for address, _ in windows:  # what is all zeros now has no row
                rows.pop(address, None)
            rows |= writer.set_aside()
            written = tracking.written_ranges(pid, mapping_flags.mappings(pid))
            again = len(windows_of(written, writer.window_pages))
            if length_bytes(written) <= _LITTLE_BYTES or again > len(windows) // _PART:
                break
    finally:
        source.close()
        writer.count_as(counted)
    return Draft(rows, writer.chunk_count, writer.window_pages)


class RunningPages:
    """A `PageSource` over a process that runs: what is not there any more reads as zeros."""

    def __init__(self, pid: int) -> None:
        self._pid = proc.witness(pid)
        self._memory = memory.open_memory(self._pid)

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        """Fill `into` with the runs.

        Through /proc/PID/mem, which stays with the memory of the program that it was opened for,
        and only looks (see `content.ProcessPages`). Of one that has ended all is zeros: then there
        is no account either by which anything of it could hold. To raise would end the whole dump.
        """
        position = 0
        for address, length in runs:
            self._read(address, into[position : position + length])
            position += length

    def _read(self, address: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._memory, [into[done:]], address + done)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EFAULT):
                    raise
                count = 0
            if count == 0:
                count = PAGE_BYTES - (address + done) % PAGE_BYTES
                into[done : done + count] = bytes(count)
            done += count

    def close(self) -> None:
        os.close(self._memory)
