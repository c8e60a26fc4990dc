"""Network devices whose frames a process reads and writes: TAP, if_tun.h and tuntap.rst."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_SUMS_AND_SEGMENTS: Final = 0x01 | 0x02 | 0x04  # TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
MOST_FRAME_BYTES: Final = (1 << 16) + 64  # unsegmented, with its virtio header


def open_tap(name: str) -> int:
    """A device of that name in our network namespace, gone when the descriptor is closed.

    What is read of one such device can be written to another as it is: frames come before they are
    cut into segments and summed, with a header (struct virtio_net_hdr) that says what is left to
    do. Reads and writes do not wait. Raises OSError.
    """
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("=16sH22x", name.encode(), flags))
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _SUMS_AND_SEGMENTS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
