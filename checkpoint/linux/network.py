"""A network of one's own: an empty one whose loopback works, network_namespaces(7)."""

from __future__ import annotations

import fcntl
import socket
import struct

from .process import unshare

CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
_IFREQ = struct.Struct("16sh22x")  # struct ifreq of netdevice(7), 40 bytes on x86-64


def enter_new_network() -> None:
    """Leave the present network for an empty one, and take its loopback into use.

    The calling thread's alone, so a program with other threads had better not. Raises OSError:
    EPERM without CAP_SYS_ADMIN, ENOSPC when there are too many (user.max_net_namespaces).
    """
    unshare(CLONE_NEWNET)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        asked = fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
        flags: int = _IFREQ.unpack(asked)[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))
