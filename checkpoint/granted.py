"""A userfaultfd in a process whose user may not make one: by a device that lzy opens and hands in.

The kernel lets only root's processes make one that hears of its own faults; but who holds
/dev/userfaultfd may, too (Linux 6.1), whoever opened it. lzy passes it over a pair of sockets in
the process (SCM_RIGHTS, unix(7)), and the process makes its userfaultfd from it and closes it, all
of this in one list of calls.
"""

from __future__ import annotations

import _socket
import array
import os

from .linux import process, uffd
from .linux.detached import take_descriptor
from .linux.layouts import pack_message_header
from .tracee import Tracee

_CONTROL_BYTES = 64


def may_grant() -> bool:
    """Whether we have the device."""
    return os.access(uffd.DEVICE, os.R_OK | os.W_OK)


def open_granted(tracee: Tracee) -> tuple[int, tuple[int, int]]:
    """Numbers in the stopped process of a new userfaultfd, and of a pair of sockets.

    Precondition: an arena is mapped. Raises OSError (no such device), KernelError.
    """
    leader = tracee.speaker
    batch = tracee.batch()
    pair = batch.room(8)
    kind = process.SOCK_SEQPACKET | process.SOCK_CLOEXEC
    batch.call(process.SYS_SOCKETPAIR, process.AF_UNIX, kind, 0, pair)
    tracee.run(leader, batch)
    ends = memoryview(batch.read(pair, 8)).cast("i")
    numbers = ends[0], ends[1]
    _send_device(tracee.pid, numbers[0])
    batch = tracee.batch()
    content, control = batch.room(8), batch.room(_CONTROL_BYTES)
    vector = batch.put(content.to_bytes(8, "little") + (8).to_bytes(8, "little"))
    header = batch.put(pack_message_header(vector, control, _CONTROL_BYTES))
    batch.call(
        process.SYS_RECVMSG, numbers[1], header, int(_socket.MSG_CMSG_CLOEXEC), what="recvmsg"
    )
    device = _next_free(tracee.pid)
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    made = batch.call(process.SYS_IOCTL, device, uffd.USERFAULTFD_IOC_NEW, flags, what=uffd.DEVICE)
    batch.call(process.SYS_CLOSE, device)
    tracee.run(leader, batch)
    return batch.results[made], numbers


def _send_device(pid: int, number: int) -> None:
    device = os.open(uffd.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        pidfd = os.pidfd_open(pid)
        try:
            sending = _socket.socket(fileno=take_descriptor(pidfd, number))
        finally:
            os.close(pidfd)
        try:
            rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [device]))
            sending.sendmsg([b"d"], [rights])
        finally:
            sending.close()
    finally:
        os.close(device)


def _next_free(pid: int) -> int:
    """The number that the next descriptor of the stopped process gets."""
    used = set(map(int, os.listdir(f"/proc/{pid}/fd")))
    return next(number for number in range(len(used) + 1) if number not in used)
