"""Puts huge pages together again behind a wake or a checkpoint, where the process may have them.

What a pager installs are small pages, whatever was there before the dump; and what is written
while it is under account, or while a snapshot of it lives, becomes small. The kernel's own daemon
(khugepaged) would find them in some minutes; until then a pass over the memory costs more.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import mapping_flags, proc
from .content import holds_own_pages, intersect
from .errors import LzyError
from .linux import memory
from .linux.hugepages import HUGE_PAGE_BYTES, collapse
from .proc import Vma

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MOST_REFUSED = 8  # one after the other: memory that cannot be huge
_GIVE_UP = (errno.EPERM, errno.ESRCH, errno.ENOSYS, errno.ENOMEM)


def gather_huge_pages(
    pid: int, ranges: Sequence[tuple[int, int]], vmas: Sequence[Vma] | None = None
) -> int:
    """As `restore_huge_pages`, of these ascending ranges; `vmas` were the mappings a moment ago."""
    try:
        pidfd = proc.open_shared(pid)
    except OSError:
        return 0
    try:
        return restore_huge_pages(pid, pidfd, within=ranges, vmas=vmas)
    finally:
        os.close(pidfd)


def restore_huge_pages(
    pid: int,
    pidfd: int,
    *,
    within: Sequence[tuple[int, int]] | None = None,
    vmas: Sequence[Vma] | None = None,
) -> int:
    """Collapse every range of 2 MiB that is all there and may be huge; how many it were.

    One at a time with as long a pause behind it, for the process cannot fault or map while the
    kernel copies one. Ends early when the kernel refuses again and again. Raises nothing.
    """
    collapsed = refused = 0
    pause_s = 0.0
    try:
        for start in _whole_ranges(pid, within, vmas):
            if refused > _MOST_REFUSED:
                break
            time.sleep(pause_s)
            began = time.monotonic()
            try:
                collapse(pidfd, start, HUGE_PAGE_BYTES)
                collapsed += 1
                refused = 0
            except OSError as error:
                if error.errno in _GIVE_UP:
                    break
                refused += 1  # memory that cannot be huge, or not now: leave it to the kernel
            pause_s = time.monotonic() - began
    except (LzyError, OSError):
        pass  # the process ended, or a kernel that cannot tell which pages are there
    return collapsed


def _whole_ranges(
    pid: int, within: Sequence[tuple[int, int]] | None, vmas: Sequence[Vma] | None
) -> Iterator[int]:
    """Starts of aligned 2 MiB of small pages, none of them missing, that may become huge."""
    always = "[always]" in _SETTING.read_text()
    pagemap = os.open(f"/proc/{proc.witness(pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for vma in vmas or mapping_flags.mappings(pid):
            allowed = "hg" in vma.flags or (always and "nh" not in vma.flags)
            if not allowed or vma.kind != "anonymous" or not holds_own_pages(vma):
                continue
            present = memory.PAGE_IS_PRESENT
            none = memory.PAGE_IS_PFNZERO | memory.PAGE_IS_HUGE
            places = [(vma.start, vma.end)]
            if within is not None:
                places = intersect(places, list(within))
            for low, high in (
                run
                for place in places
                for run in memory.scan_pages(pagemap, *place, every=present, none=none)
            ):
                start = (low + HUGE_PAGE_BYTES - 1) & -HUGE_PAGE_BYTES
                while start + HUGE_PAGE_BYTES <= high:
                    yield start
                    start += HUGE_PAGE_BYTES
    finally:
        os.close(pagemap)
