"""Telling the kernel to start writing a file's pages to disk now, long before anyone waits for it.

Without it dirty pages gather until fsync(2), which then waits for all of them; started early, the
disk works while the next chunks are hashed.
"""

from __future__ import annotations

import errno

from . import syscall

_NR_SYNC_FILE_RANGE = 277  # x86-64, asm/unistd_64.h
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: start writeback of dirty pages, wait for none


def start_writeback(descriptor: int, offset: int, length_bytes: int) -> None:
    """Start writing that range to disk and return; no promise about when it arrives.

    A hint only: where the file system or a filter knows no such call, nothing happens.
    Source: sync_file_range(2). Raises OSError where the kernel reports a failure (EIO, ENOSPC).
    """
    try:
        syscall(_NR_SYNC_FILE_RANGE, descriptor, offset, length_bytes, _SYNC_FILE_RANGE_WRITE)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ESPIPE, errno.EINVAL, errno.EPERM):
            raise
