"""Huge pages: asking that small ones of another process be put together; those set aside.

Sources: madvise(2) MADV_COLLAPSE (Linux 6.1), process_madvise(2),
Documentation/admin-guide/mm/transhuge.rst.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final

from . import syscall
from .descriptors import file_system_type

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


# Those that are set aside, Documentation/admin-guide/mm/hugetlbpage.rst.

MAP_HUGETLB: Final = 0x40000
MFD_HUGETLB: Final = 0x4
_SIZE_SHIFT: Final = 26  # MAP_HUGE_SHIFT, MFD_HUGE_SHIFT: the logarithm of the size stands there
_MAGIC: Final = 0x958458F6  # HUGETLBFS_MAGIC of linux/magic.h


def size_flag(size_bytes: int) -> int:
    """What is added to MAP_HUGETLB or MFD_HUGETLB for pages of that size."""
    return (size_bytes.bit_length() - 1) << _SIZE_SHIFT


def lies_in_them(fd: int) -> bool:
    """Whether the file behind `fd` is on a hugetlbfs."""
    return file_system_type(fd) == _MAGIC


def pool(size_bytes: int) -> str:
    """The folder of the kernel in which pages of that size are counted, and their number set."""
    return f"/sys/kernel/mm/hugepages/hugepages-{size_bytes >> 10}kB"


def count_free(size_bytes: int) -> int:
    """How many pages of that size a new mapping could have; with what may be made on demand."""
    try:
        free, promised, surplus, most = (
            int(Path(pool(size_bytes), name).read_text())
            for name in (
                "free_hugepages",
                "resv_hugepages",
                "surplus_hugepages",
                "nr_overcommit_hugepages",
            )
        )
    except FileNotFoundError:  # this machine has none of that size
        return 0
    return free - promised + max(most - surplus, 0)
