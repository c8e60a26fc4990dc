"""Huge pages of another process: asking that small ones be put together.

Sources: madvise(2) MADV_COLLAPSE (Linux 6.1), process_madvise(2),
Documentation/admin-guide/mm/transhuge.rst.
"""

from __future__ import annotations

import ctypes
from typing import Final

from . import syscall

HUGE_PAGE_BYTES: Final = 2 << 20
_PROCESS_MADVISE: Final = 440  # system call number, x86-64
_MADV_COLLAPSE: Final = 25


def collapse(pidfd: int, start: int, length_bytes: int) -> None:
    """Put the pages of an aligned range together to huge ones, of the process that `pidfd` names.

    Pages that are not there are made, as zeros. The process may use the memory meanwhile; it waits
    only where it changes its mappings or faults, while one huge page is copied. Raises OSError:
    EINVAL (not possible there, or not known to the kernel), EAGAIN (not now), ENOMEM, EPERM, ESRCH.
    """
    vector = (ctypes.c_uint64 * 2)(start, length_bytes)
    syscall(_PROCESS_MADVISE, pidfd, ctypes.addressof(vector), 1, _MADV_COLLAPSE, 0)
