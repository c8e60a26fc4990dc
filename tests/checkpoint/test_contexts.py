"""What the kernel's answers mean when the memory of a process changes as pages are installed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import threading

import pytest

from lzy.checkpoint.contexts import Context, LayoutChanged
from lzy.checkpoint.linux import PAGE_BYTES, address_of
from lzy.checkpoint.linux import uffd as kernel
from lzy.checkpoint.missing import MissingPages

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAYMOVE, FIXED = 1, 2
PLACE, ELSEWHERE = 0x620000000000, 0x630000000000
LENGTH = 4 * PAGE_BYTES


class TooLate(kernel.Userfaultfd):
    """One whose copy looked for the VMA when it had been moved, as it may: no place is there."""

    def copy(self, target: int, source: int, length_bytes: int) -> int:
        raise OSError(errno.ENOENT, "no registered VMA there")


@pytest.mark.parametrize("moves", [True, False])
def test_a_place_that_moves_just_now_is_not_passed_over(moves: bool) -> None:
    """No place while an event is on its way: look again, and forget nothing; without one, pass."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
    assert libc.mmap(PLACE, LENGTH, mmap.PROT_READ, flags, -1, 0) == PLACE
    source = mmap.mmap(-1, LENGTH)
    fd = kernel.create()
    mover = threading.Thread(
        target=libc.mremap,
        args=(PLACE, LENGTH, LENGTH, MAYMOVE | FIXED, ctypes.c_void_p(ELSEWHERE)),
    )
    missing = MissingPages()
    missing.add(PLACE, PLACE + LENGTH)
    context = Context(0, fd, missing)
    try:
        kernel.enable(fd)
        kernel.register(fd, PLACE, LENGTH)
        context.uffd = TooLate(fd)
        context.uffd.make_pollable()
        if moves:
            mover.start()  # it waits until its event is read
            waiting = select.poll()
            waiting.register(fd, select.POLLIN)
            assert waiting.poll(10_000)
            with pytest.raises(LayoutChanged):
                context.install(PLACE, address_of(memoryview(source)), LENGTH, forgets=True)
        else:
            assert context.install(PLACE, address_of(memoryview(source)), LENGTH, forgets=True) == 0
        assert missing.length_bytes == LENGTH
    finally:
        message = ctypes.create_string_buffer(16 * kernel.MESSAGE_BYTES)
        while mover.is_alive():
            context.uffd.read(ctypes.addressof(message), len(message))
            mover.join(0.001)
        os.close(fd)  # first: nobody hears of what goes then, or it would be waited for
        libc.munmap(PLACE, LENGTH)
        libc.munmap(ELSEWHERE, LENGTH)
