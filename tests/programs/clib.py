"""The C library as the programs here call it: a failing call raises OSError, threads run on."""

import ctypes
import os
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any, restype: Any = ctypes.c_int) -> Any:
    """Call a function of the C library; -1 raises OSError with its errno."""
    function = getattr(libc, name)
    function.restype = restype
    result = function(*arguments)
    if result == -1 or (restype is ctypes.c_void_p and result == 2**64 - 1):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


class Timespec(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    @property
    def total_s(self) -> float:
        return self.seconds + self.nanoseconds / 1e9


class Itimerspec(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = (("interval", Timespec), ("value", Timespec))
