"""The kernel's interface: numbers, struct layouts and system calls, each wrapped once.

No other package of lzy lays out a kernel struct or names a kernel number. One module per area;
every wrapper raises `OSError` (with errno) at the place of the call.
"""

from __future__ import annotations

import ctypes
import os

PAGE_BYTES = 4096

libc = ctypes.CDLL(None, use_errno=True)
_syscall = libc.syscall
_syscall.restype = ctypes.c_long
_U64 = ctypes.c_uint64


def syscall(number: int, *arguments: int) -> int:
    """Make system call `number` with integer arguments; return its result or raise OSError.

    The GIL is let go during the call. Source: syscall(2).
    """
    result: int = _syscall(
        ctypes.c_long(number), *(_U64(a & 0xFFFFFFFFFFFFFFFF) for a in arguments)
    )
    if result == -1:
        number_of_error = ctypes.get_errno()
        raise OSError(number_of_error, os.strerror(number_of_error))
    return result


def address_of(buffer: memoryview) -> int:
    """Where in our memory a writable buffer lies; the caller keeps it alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
