"""Locks of open files: they go with the last descriptor, and so with whoever is killed.

Source: fcntl(2), "Open file description locks" (Linux 3.15). They know nothing of flock(2).
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

_STRUCT_FLOCK: Final = "hhqqi4x"  # type, whence, start, length, pid (0), as on every 64-bit Linux


def _pack(kind: int) -> bytes:
    return struct.pack(_STRUCT_FLOCK, kind, os.SEEK_SET, 0, 1, 0)


_SHARED = _pack(fcntl.F_RDLCK)
_ALONE = _pack(fcntl.F_WRLCK)
_NONE = _pack(fcntl.F_UNLCK)


def share(fd: int) -> None:
    """Hold the file together with others; waits while somebody holds it alone. OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _SHARED)


def claim(fd: int) -> bool:
    """Hold the file alone, if nobody else holds it just now; whether it is so. OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _ALONE)
    except BlockingIOError:
        return False
    return True


def release(fd: int) -> None:
    """Hold the file no more."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _NONE)
