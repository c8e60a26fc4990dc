"""Machine code of our own, made callable: a few instructions where Python has no word for them.

The code lies in a private mapping that is written first and made executable (and no longer
writable) afterwards. Source: mmap(2), mprotect(2); System V AMD64 ABI for the callers.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

from . import libc

_mmap = libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_mprotect = libc.mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value

Address = int | bytes
Routine = Callable[[Address, Address, int, int], None]
"""Called with (source, destination, two numbers); bytes stand for their address."""


def make_routine(code: bytes) -> Routine:
    """Make `code` callable; the GIL is let go while it runs. It stays mapped for good.

    Raises OSError where memory may not become executable (SELinux' execmem, for one).
    """
    length_bytes = -(-len(code) // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _mmap(None, length_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address is None or address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    ctypes.memmove(address, code, len(code))
    if _mprotect(address, length_bytes, mmap.PROT_READ | mmap.PROT_EXEC):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    kind = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
    )
    return kind(address)


def buffer_address(buffer: memoryview | bytearray) -> int:
    """Address of a writable, contiguous, non-empty buffer; valid as long as the buffer is held."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
