"""System V shared memory: segments, their owners and what is attached. Source: shmctl(2)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final, NamedTuple

from . import syscall

SYS_SHMAT: Final = 30  # x86-64
_SYS_SHMGET: Final = 29
_SYS_SHMCTL: Final = 31
_SYS_SHMDT: Final = 67
SHM_RDONLY: Final = 0o10000
_IPC_PRIVATE: Final = 0
_IPC_CREAT: Final = 0o1000
_IPC_EXCL: Final = 0o2000
_IPC_RMID, _IPC_SET, _IPC_STAT = 0, 1, 2
_SHM_DEST: Final = 0o1000  # marked to go with the last who has it attached
_NEXT_ID: Final = "/proc/sys/kernel/shm_next_id"
# struct shmid64_ds: ipc64_perm (key, uid, gid, cuid, cgid, mode), size, three times, two pids
_STATUS = struct.Struct("<i4II 24x Q 3q 2i 24x")


class Segment(NamedTuple):
    """A segment as its id leads to it; `mode` holds the rights only."""

    key: int
    owner: tuple[int, int]
    mode: int
    removed: bool
    size_bytes: int
    changed_unix_s: int
    """When it was made, or given another owner or other rights."""
    maker: int


def look_at(segment: int) -> Segment:
    """What the kernel says of a segment; EINVAL or EIDRM when there is none."""
    buffer = ctypes.create_string_buffer(256)
    syscall(_SYS_SHMCTL, segment, _IPC_STAT, ctypes.addressof(buffer))
    key, uid, gid, _, _, mode, size, _, _, changed, maker, _ = _STATUS.unpack_from(buffer)
    return Segment(key, (uid, gid), mode & 0o777, bool(mode & _SHM_DEST), size, changed, maker)


def exists(segment: int) -> bool:
    """Whether that id leads to a segment."""
    try:
        look_at(segment)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EIDRM):
            return False
        raise
    return True


def make(wanted: int, key: int, size_bytes: int, mode: int) -> int:
    """A new segment, under the id `wanted` where that is free; EEXIST: the key is taken.

    Source: Documentation/admin-guide/sysctl/kernel.rst, shm_next_id.
    """
    try:
        with open(_NEXT_ID, "w") as file:
            file.write(str(wanted))
    except OSError:  # not root, or a kernel without CONFIG_CHECKPOINT_RESTORE
        pass
    return syscall(_SYS_SHMGET, key, size_bytes, _IPC_CREAT | _IPC_EXCL | mode)


def give(segment: int, owner: tuple[int, int], mode: int) -> None:
    """Set a segment's owner and rights."""
    buffer = ctypes.create_string_buffer(256)
    syscall(_SYS_SHMCTL, segment, _IPC_STAT, ctypes.addressof(buffer))
    struct.pack_into("<2I", buffer, 4, *owner)
    struct.pack_into("<I", buffer, 20, mode)
    syscall(_SYS_SHMCTL, segment, _IPC_SET, ctypes.addressof(buffer))


def remove(segment: int) -> None:
    """Have a segment go with the last who has it attached."""
    syscall(_SYS_SHMCTL, segment, _IPC_RMID, 0)


def attach(segment: int) -> int:
    """Attach it here; its address."""
    return syscall(SYS_SHMAT, segment, 0, 0)


def detach(address: int) -> None:
    """Detach what is attached at that address."""
    syscall(_SYS_SHMDT, address)


def fill(address: int, file: int, length_bytes: int) -> None:
    """Copy a file's bytes to memory of ours."""
    done = 0
    while done < length_bytes:
        part = (ctypes.c_char * (length_bytes - done)).from_address(address + done)
        count = os.preadv(file, [part], done)
        if count == 0:
            return
        done += count
