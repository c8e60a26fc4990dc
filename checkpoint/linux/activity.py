"""What tells from outside whether a process is in use: its sockets' bytes, its waits, its end.

Sources: sock_diag(7), include/uapi/linux/inet_diag.h and tcp.h, include/uapi/linux/pidfd.h,
arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import Final, NamedTuple

WAITS_FOR_OTHERS: Final = frozenset(
    {0, 7, 23, 43, 45, 47, 232, 270, 271, 281, 288, 299, 441}
)  # fmt: skip
"""read, poll, select, accept, recvfrom, recvmsg, epoll_wait, pselect6, ppoll, epoll_pwait, accept4,
recvmmsg, epoll_pwait2: a thread in one of these waits until somebody has something for it."""

WAITS_FOR_EVENTS: Final = frozenset({232, 281, 441})
"""The epoll ones: where an event loop is between two events."""

PF_EXITING: Final = 0x4  # of the flags in proc_pid_stat(5)

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INET_DIAG_INFO = 2
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2
_MESSAGE = struct.Struct("=BBBB 2s2s 48x IIII")  # struct inet_diag_msg, from the sockid on
_ATTRIBUTE = struct.Struct("=HH")
_ACKED_AT, _RECEIVED_AT = 120, 128  # struct tcp_info: tcpi_bytes_acked, tcpi_bytes_received
_TCP_LISTEN, _TCP_TIME_WAIT = 10, 6

_PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xff, 11, struct pidfd_info of 64 bytes)
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_INFO = struct.Struct("=QQ 11I i")


class TcpSocket(NamedTuple):
    """One TCP socket: bytes in both directions since it was made, and what nobody has read yet.

    `queued` are bytes, for a listening socket connections that wait to be accepted.
    """

    listens: bool
    port: int
    queued: int
    moved_bytes: int


def list_tcp_sockets() -> dict[int, TcpSocket]:
    """Every TCP socket of this network namespace by its inode; raises OSError."""
    found: dict[int, TcpSocket] = {}
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as asked:
        for family in (socket.AF_INET, socket.AF_INET6):
            wanted = _REQUEST.pack(
                family,
                socket.IPPROTO_TCP,
                1 << (_INET_DIAG_INFO - 1),
                0xFFFFFFFF & ~(1 << _TCP_TIME_WAIT),
            )
            header = _HEADER.pack(
                _HEADER.size + len(wanted),
                _SOCK_DIAG_BY_FAMILY,
                _NLM_F_REQUEST | _NLM_F_DUMP,
                family,
                0,
            )
            asked.send(header + wanted)
            while _take(asked.recv(1 << 18), found):
                pass
    return found


def _take(answer: bytes, found: dict[int, TcpSocket]) -> bool:
    """Parse one datagram of the kernel's; whether more follow."""
    at = 0
    while at + _HEADER.size <= len(answer):
        length, kind, _, _, _ = _HEADER.unpack_from(answer, at)
        if kind == _NLMSG_DONE:
            return False
        if kind == _NLMSG_ERROR:
            (number,) = struct.unpack_from("=i", answer, at + _HEADER.size)
            raise OSError(-number, f"sock_diag: {os.strerror(-number)}")
        if length < _HEADER.size:
            raise OSError(f"sock_diag answered a message of {length} bytes")
        start = at + _HEADER.size
        _, state, _, _, port, _, read_queue, _, _, inode = _MESSAGE.unpack_from(answer, start)
        info = _find_info(answer, start + _MESSAGE.size, at + length)
        listens = state == _TCP_LISTEN
        moved = 0
        if not listens and len(info) >= _RECEIVED_AT + 8:
            moved = sum(struct.unpack_from("=QQ", info, _ACKED_AT))
        found[inode] = TcpSocket(listens, int.from_bytes(port, "big"), read_queue, moved)
        at += -(-length // 4) * 4
    return True


def _find_info(answer: bytes, at: int, end: int) -> bytes:
    """The attribute that holds struct tcp_info; empty where there is none."""
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(answer, at)
        if length < _ATTRIBUTE.size:
            break
        if kind == _INET_DIAG_INFO:
            return answer[at + _ATTRIBUTE.size : at + length]
        at += -(-length // 4) * 4
    return b""


def exit_status(pidfd: int) -> int | None:
    """How the process that `pidfd` names has ended, as waitpid(2) says it, be it whose child.

    None where the kernel does not tell (before Linux 6.15), or while its parent has not waited.
    """
    asked = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, asked)
    except OSError:
        return None
    answer = _PIDFD_INFO.unpack(asked)
    return int(answer[-1]) if answer[0] & _PIDFD_INFO_EXIT else None
