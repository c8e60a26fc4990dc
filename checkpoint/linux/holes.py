"""Freeing disk blocks in the middle of a file, whose length and offsets stay; fallocate(2)."""

from __future__ import annotations

import errno

from . import syscall

_FALLOCATE = 285  # system call number, x86-64
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


def punch_hole(descriptor: int, offset: int, length_bytes: int) -> bool:
    """Free whole blocks of that range, which reads as zeros then; False where that cannot be done.

    Raises OSError for what is not the file system's lack of it (EIO, EPERM…).
    """
    mode = _KEEP_SIZE | _PUNCH_HOLE
    try:
        syscall(_FALLOCATE, descriptor, mode, offset, length_bytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True
