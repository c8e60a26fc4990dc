"""POSIX message queues by the kernel's own calls; names have no slash. Source: mq_overview(7)."""

from __future__ import annotations

import ctypes
import os
import re
import struct
from typing import Final, NamedTuple

from . import syscall
from .descriptors import MESSAGE_QUEUES, file_system_type

__all__ = [
    "MESSAGE_QUEUES",
    "Queue",
    "file_system_type",
    "look_at",
    "make",
    "notified",
    "open_queue",
    "unlink",
]

_SYS_MQ_OPEN: Final = 240  # x86-64
_SYS_MQ_UNLINK: Final = 241
_SYS_MQ_GETSETATTR: Final = 245
_ATTRIBUTES = struct.Struct("=8q")  # struct mq_attr: flags, maxmsg, msgsize, curmsgs, 4 reserved


class Queue(NamedTuple):
    """How many messages a queue takes, of how many bytes, and how many it holds."""

    most_messages: int
    message_bytes: int
    messages: int


def look_at(queue: int) -> Queue:
    """A queue's attributes, mq_getattr(3)."""
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    syscall(_SYS_MQ_GETSETATTR, queue, 0, ctypes.addressof(buffer))
    return Queue(*_ATTRIBUTES.unpack(buffer.raw)[1:4])


def notified(queue: int) -> int:
    """The process (as our namespace numbers it) that is to be told of a message; 0: nobody."""
    own = os.open(f"/proc/self/fd/{queue}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = re.search(rb"NOTIFY_PID:(\d+)", os.pread(own, 256, 0))
    finally:
        os.close(own)
    return int(found[1]) if found else 0


def open_queue(name: str, flags: int) -> int:
    """Open a queue that is there; ours is close-on-exec. Source: mq_open(3)."""
    buffer = ctypes.create_string_buffer(os.fsencode(name))
    return syscall(_SYS_MQ_OPEN, ctypes.addressof(buffer), flags, 0, 0)


def make(name: str, flags: int, mode: int, most_messages: int, message_bytes: int) -> int:
    """Make a queue that must not be there yet, and open it."""
    attributes = _ATTRIBUTES.pack(0, most_messages, message_bytes, 0, 0, 0, 0, 0)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    path = ctypes.create_string_buffer(os.fsencode(name))
    fd = syscall(
        _SYS_MQ_OPEN,
        ctypes.addressof(path),
        flags | os.O_CREAT | os.O_EXCL,
        mode,
        ctypes.addressof(buffer),
    )
    os.fchmod(fd, mode)  # whatever the umask
    return fd


def unlink(name: str) -> None:
    """Remove a queue's name. Source: mq_unlink(3)."""
    buffer = ctypes.create_string_buffer(os.fsencode(name))
    syscall(_SYS_MQ_UNLINK, ctypes.addressof(buffer))
