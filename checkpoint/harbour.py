"""Where userfaultfds of forked children outlive us: the queue of a socket in the process itself.

The kernel hands a forked child's userfaultfd to whoever reads the message, and only there it
exists. So a duplicate is sent (SCM_RIGHTS, unix(7)) into a socket pair whose two ends are
descriptors of the restored process, which never looks at them. What lies in the queue stays open as
long as that process, or a child that inherited the pair, lives. The next pager takes duplicates by
peeking.
"""

from __future__ import annotations

import _socket  # `socket` itself costs a restore milliseconds of import
import array
import contextlib
import fcntl
import os
import struct

from .linux.detached import SO_PEEK_OFF

_TOKEN = struct.Struct("<Q")
_MOST_IN_QUEUE = 4096


def make_harbour(lowest_number: int) -> tuple[int, int]:
    """Both ends of a new pair, as descriptors from `lowest_number` on that live through an exec."""
    ends = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    first, second = [fcntl.fcntl(end.fileno(), fcntl.F_DUPFD, lowest_number) for end in ends]
    for end in ends:
        end.close()
    return first, second


class Harbour:
    """The pair: `sending` and `receiving` are our duplicates of its ends; not owned.

    A child goes by its token, the descriptor number under which its pager got it.
    """

    def __init__(self, sending: int, receiving: int) -> None:
        self._sending = _socket.socket(fileno=sending)
        self._receiving = _socket.socket(fileno=receiving)
        self._sending.setblocking(False)

    def close(self) -> None:
        """Let go of the two descriptors without closing them."""
        self._sending.detach()
        self._receiving.detach()

    def stow(self, token: int, fd: int) -> None:
        """Leave a duplicate of `fd`; OSError when the queue is full."""
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [fd]))
        self._sending.sendmsg([_TOKEN.pack(token)], [rights])

    def look(self) -> dict[int, int]:
        """Duplicates of what lies there, {token: descriptor}; the queue stays as it is."""
        found: dict[int, int] = {}
        with contextlib.suppress(OSError):  # nothing more
            for offset in range(0, _MOST_IN_QUEUE * _TOKEN.size, _TOKEN.size):
                self._receiving.setsockopt(_socket.SOL_SOCKET, SO_PEEK_OFF, offset)
                flags = _socket.MSG_PEEK | _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
                self._take(found, flags)
        self._receiving.setsockopt(_socket.SOL_SOCKET, SO_PEEK_OFF, -1)
        return found

    def release(self, token: int) -> None:
        """Take the child's descriptor out of the queue: it is served no more."""
        found: dict[int, int] = {}
        with contextlib.suppress(OSError):
            while True:
                self._take(found, _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC)
        for number, fd in found.items():
            if number != token:
                with contextlib.suppress(OSError):
                    self.stow(number, fd)
            os.close(fd)

    def _take(self, found: dict[int, int], flags: int) -> None:
        room = _socket.CMSG_SPACE(4)
        content, rights, _, _ = self._receiving.recvmsg(_TOKEN.size, room, flags)
        fds = array.array("i")
        for _, kind, data in rights:
            if kind == _socket.SCM_RIGHTS:
                fds.frombytes(data[:4])
        if len(content) != _TOKEN.size or len(fds) != 1:
            raise OSError("the queue holds something else")
        (token,) = _TOKEN.unpack(content)
        if token in found:
            os.close(found[token])  # the number was used again: the later one counts
        found[token] = fds[0]
