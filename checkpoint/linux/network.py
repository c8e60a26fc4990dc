"""A network of one's own, network_namespaces(7), and what goes with it to live apart."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence

from . import syscall
from .namespaces import CLONE_NEWNS
from .process import unshare
from .users import CLONE_NEWUSER

CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
_SYS_SETNS = 308
_KINDS = {
    "user": CLONE_NEWUSER,
    "net": CLONE_NEWNET,
    "ipc": CLONE_NEWIPC,
    "mnt": CLONE_NEWNS,
}
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
_IFREQ = struct.Struct("16sh22x")  # struct ifreq of netdevice(7), 40 bytes on x86-64


def enter_apart() -> None:
    """Leave the present network for an empty one, and take its loopback into use.

    Message queues and the like (ipc_namespaces(7)) are new and empty, too. The calling thread's
    alone, so a program with other threads had better not. Raises OSError: EPERM without
    CAP_SYS_ADMIN, ENOSPC when there are too many (user.max_net_namespaces).
    """
    unshare(CLONE_NEWNET | CLONE_NEWIPC)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        asked = fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
        flags: int = _IFREQ.unpack(asked)[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))


def join_apart(pid: int, kinds: Sequence[str] = ("net", "ipc")) -> None:
    """Enter namespaces of process `pid`, setns(2): of these kinds, that of users first.

    The calling thread's alone, which for `user` must be the only one. Raises OSError: EPERM without
    CAP_SYS_ADMIN over them.
    """
    for name in kinds:
        descriptor = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscall(_SYS_SETNS, descriptor, _KINDS[name])
        finally:
            os.close(descriptor)
