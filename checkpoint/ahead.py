"""What of a checkpoint is read before anything stands still.

Where there is no image before, the process comes under account (see `tracking`), and then its
memory is read while it runs and writes; where there is one, and much was written since, that is. Of
that draft the checkpoint keeps what was not written since: the process stands still no longer,
however large it is, and however much it wrote. A draft by itself is of no moment at all, and
nothing but the checkpoint that it was made for ever sees it.

*Guarantee.* A page is protected before it is read, so whatever is written to it from then on makes
it count as written; and what is mapped meanwhile is not under account, so that counts as well.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import mapping_flags, proc, tracking
from .content import join_ranges, own_page_ranges, subtract, windows_of
from .increment import plan_checkpoint
from .inheritance import length_bytes
from .linux import PAGE_BYTES, memory
from .working_set import order_windows

if TYPE_CHECKING:
    from .draft import Draft
    from .image import Image
    from .writer import ImageWriter

Range = tuple[int, int]

LEAST_BYTES = 64 << 20
"""Of less memory the stop is as short without."""

_LITTLE_BYTES = 16 << 20  # so much is soon copied during the stop
_MOST_ROUNDS = 3
_PART = 8  # or more windows than that of those just read: a round gains little, and is stored too
_SPARE_PIECES = 1  # of a window, for what is written of it until the stop


def is_much(written: Sequence[Range]) -> bool:
    """Whether to copy what was written would take longer than a stop should."""
    return length_bytes(written) > _LITTLE_BYTES


class Ahead(NamedTuple):
    """What was read ahead, and what it was read for."""

    draft: Draft
    written: list[Range]
    """What was written between the image before and this, ascending."""
    dense: list[Range]
    """Of that: what was written densely; see `tracking.Begun`."""
    windows: list[tuple[int, int]]
    """What was read, (address, mask of pages) each; of some windows a second time."""


def read_ahead(
    pid: int,
    number: int,
    writer: ImageWriter,
    order: Sequence[int],
    *,
    base: Image | None = None,
    left_out: Sequence[Range] = (),
) -> Ahead:
    """Read the memory of a running process, under the account with its descriptor `number`.

    With `base`, which the account began with, only what was written since, but for what is left out
    of it; that is on no record any more then. Again what it has written meanwhile, until that is
    little, or grows. `order`: which windows are to be stored first. Raises NotFound when it ends,
    OSError, and what the writer raises.
    """
    source, counted = RunningPages(pid), writer.counted
    draft: Draft | None = None
    changed: list[Range] = []
    dense: list[Range] = []
    read: list[tuple[int, int]] = []
    try:
        for _ in range(_MOST_ROUNDS):
            vmas = mapping_flags.mappings(pid)
            begun = tracking.protect_running(pid, number, vmas, left_out)
            changed += begun.written
            dense += begun.dense
            pages = own_page_ranges(pid, vmas)
            if held := draft or base:
                kept, windows = plan_checkpoint(held, pages, begun.written, spare=_SPARE_PIECES)
            else:
                windows = windows_of(pages, writer.window_pages)
            writer.add_space(source, order_windows(windows, order), space=0)
            if draft:
                writer.keep_draft(draft, kept, 0)
            elif base:
                writer.keep([(0, base, kept)])
            draft = writer.set_aside()
            read += windows
            written = tracking.written_ranges(pid, mapping_flags.mappings(pid))
            written = subtract(written, left_out)
            again = len(windows_of(written, writer.window_pages))
            if not is_much(written) or again > len(windows) // _PART:
                break
    finally:
        source.close()
        writer.count_as(counted)
    assert draft  # of the first round, at least
    return Ahead(draft, join_ranges(changed), join_ranges(dense), read)


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
