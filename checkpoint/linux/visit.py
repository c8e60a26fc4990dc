"""System calls in which a thread waits and holds nothing of libc.

Sources: arch/x86/entry/syscalls/syscall_64.tbl, futex(2).
"""

from __future__ import annotations

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
