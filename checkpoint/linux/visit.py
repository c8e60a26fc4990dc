"""What a thread that waits in the kernel shows of itself: its system call, and its signal frames.

Sources: arch/x86/entry/syscalls/syscall_64.tbl, futex(2), sigreturn(2),
arch/x86/include/uapi/asm/sigcontext.h (struct sigcontext_64, struct _fpx_sw_bytes).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

WAITS: Final = frozenset(
    {
        0,  # read
        7,  # poll
        23,  # select
        34,  # pause
        35,  # nanosleep
        43,  # accept
        45,  # recvfrom
        47,  # recvmsg
        61,  # wait4
        128,  # rt_sigtimedwait
        130,  # rt_sigsuspend
        219,  # restart_syscall: goes on with poll, nanosleep, or a futex wait that has a timeout
        230,  # clock_nanosleep
        232,  # epoll_wait
        247,  # waitid
        270,  # pselect6
        271,  # ppoll
        281,  # epoll_pwait
        288,  # accept4
        299,  # recvmmsg
        441,  # epoll_pwait2
    }
)

_SYS_FUTEX: Final = 202
_FUTEX_COMMAND_MASK: Final = 0x7F  # without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME
_FUTEX_WAIT_BITSET: Final = 9


def is_condition_wait(number: int, operation: int) -> bool:
    """Whether it is the futex wait of a semaphore, condition or join rather than of a lock.

    glibc (nptl/futex-internal.c) waits with FUTEX_WAIT_BITSET where a thread is to be woken by
    another, and with FUTEX_WAIT (lowlevellock.c) for a mutex and for its own locks, malloc's too.
    """
    return number == _SYS_FUTEX and operation & _FUTEX_COMMAND_MASK == _FUTEX_WAIT_BITSET


# Offsets from the return address of a signal's handler, which is the first word of struct
# rt_sigframe: the saved stack pointer, cs, and the address of the floating point state.
_FRAME_BYTES: Final = 304
_SAVED_RSP: Final = 168
_SAVED_CS: Final = 192
_SAVED_STATE: Final = 232
_USER_CS: Final = 0x33
_MAGIC_PLACE: Final = 464  # in the floating point state, sw_reserved: FP_XSTATE_MAGIC1
_MAGIC: Final = 0x46505853


def holds_signal_frame(stack: bytes, bottom: int, restorers: Iterable[int]) -> bool:
    """Whether a handler of a signal runs on that stack, whose first byte is at `bottom`.

    `restorers` are the addresses handlers return to. They also stand in every struct sigaction that
    lies on the stack; so a frame must look like one, with what the kernel has saved in it.
    """
    for restorer in restorers:
        word = restorer.to_bytes(8, "little")
        place = stack.find(word)
        while place >= 0:
            if place % 8 == bottom % 8 and _is_signal_frame(stack, place, bottom):
                return True
            place = stack.find(word, place + 1)
    return False


def _is_signal_frame(stack: bytes, place: int, bottom: int) -> bool:
    if place + _FRAME_BYTES > len(stack):
        return False
    (rsp,) = struct.unpack_from("<Q", stack, place + _SAVED_RSP)
    (cs,) = struct.unpack_from("<H", stack, place + _SAVED_CS)
    (state,) = struct.unpack_from("<Q", stack, place + _SAVED_STATE)
    magic_place = state - bottom + _MAGIC_PLACE
    if cs != _USER_CS or not bottom + place < state < rsp or magic_place + 4 > len(stack):
        return False
    return bool(struct.unpack_from("<I", stack, magic_place)[0] == _MAGIC)
