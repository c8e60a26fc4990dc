"""System V semaphores and message queues: what there are, their values and messages.

Sources: semctl(2), msgop(2), sysvipc(7), proc_sysvipc(5); asm-generic/sembuf.h and msgbuf.h.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import Final, NamedTuple

from . import syscall

SYS_SEMGET: Final = 64  # x86-64
SYS_SEMCTL: Final = 66
SYS_MSGGET: Final = 68
SYS_MSGSND: Final = 69
SYS_MSGRCV: Final = 70
SYS_MSGCTL: Final = 71
CREATE_NEW: Final = 0o3000  # IPC_CREAT | IPC_EXCL
NO_WAIT: Final = 0o4000
IPC_SET: Final = 1
SETALL: Final = 17
_IPC_RMID, _IPC_STAT = 0, 2
_GETPID, _GETALL = 11, 13
_NO_ERROR, _COPY = 0o10000, 0o40000
SEMAPHORES, QUEUES = "sem", "msg"
"""The kinds, as the kernel's files call them."""
# struct ipc64_perm (key, uid, gid, cuid, cgid, mode); both begin with it, of 48 bytes
_RIGHTS = struct.Struct("<i5I24x")
_QUEUE = struct.Struct("<3q3Q2i16x")  # msqid64_ds: three times, bytes, messages, room, two pids
_TYPE = struct.Struct("<q")


class Found(NamedTuple):
    """One line of /proc/sysvipc; `users` are the pids of who used it last, as seen from here."""

    number: int
    key: int
    mode: int
    owner: tuple[int, int]
    users: frozenset[int]
    size: int
    """Semaphores of a set; bytes in a queue."""


class Message(NamedTuple):
    """A message of a queue, with its type (mtype)."""

    kind: int
    content: bytes


def list_all(kind: str) -> list[Found]:
    """All of one kind in our IPC namespace that we may read; proc_sysvipc(5)."""
    try:
        with open(f"/proc/sysvipc/{kind}") as file:
            names, *lines = (line.split() for line in file)
    except FileNotFoundError:  # a kernel without System V IPC
        return []
    found = []
    for line in lines:
        fields = {
            name: int(word, 8 if name == "perms" else 10)
            for name, word in zip(names, line, strict=True)
        }
        number = fields[f"{kind}id" if kind == SEMAPHORES else "msqid"]
        count = fields["nsems" if kind == SEMAPHORES else "cbytes"]
        found.append(
            Found(
                number,
                fields["key"],
                fields["perms"] & 0o777,
                (fields["uid"], fields["gid"]),
                _users_of(number, count)
                if kind == SEMAPHORES
                else frozenset((fields["lspid"], fields["lrpid"])) - {0},
                count,
            )
        )
    return found


def _users_of(semaphores: int, count: int) -> frozenset[int]:
    try:
        pids = {syscall(SYS_SEMCTL, semaphores, at, _GETPID, 0) for at in range(count)}
    except OSError:
        return frozenset()  # not ours to read, or gone meanwhile
    return frozenset(pids - {0})


def read_values(semaphores: int, count: int) -> list[int]:
    """The values of a set of semaphores."""
    values = (ctypes.c_ushort * count)()
    syscall(SYS_SEMCTL, semaphores, 0, _GETALL, ctypes.addressof(values))
    return list(values)


def pack_values(values: list[int]) -> bytes:
    """As SETALL takes them."""
    return struct.pack(f"<{len(values)}H", *values)


def read_room_bytes(queue: int) -> int:
    """How many bytes a queue may hold."""
    buffer = ctypes.create_string_buffer(256)
    syscall(SYS_MSGCTL, queue, _IPC_STAT, ctypes.addressof(buffer))
    return int(_QUEUE.unpack_from(buffer, _RIGHTS.size)[5])


def read_messages(queue: int, most_bytes: int) -> list[Message]:
    """All messages in order; they stay. ENOSYS: this kernel gives no copies (MSG_COPY)."""
    buffer = ctypes.create_string_buffer(_TYPE.size + most_bytes)
    flags = _COPY | NO_WAIT | _NO_ERROR
    messages: list[Message] = []
    while True:
        try:
            length = syscall(
                SYS_MSGRCV, queue, ctypes.addressof(buffer), most_bytes, len(messages), flags
            )
        except OSError as error:
            if error.errno == errno.ENOMSG:
                return messages
            raise
        (kind,) = _TYPE.unpack_from(buffer)
        messages.append(Message(kind, buffer.raw[_TYPE.size : _TYPE.size + length]))


def pack_message(message: Message) -> bytes:
    """A struct msgbuf."""
    return _TYPE.pack(message.kind) + message.content


def pack_owner(owner: tuple[int, int], mode: int, room_bytes: int = 0) -> bytes:
    """As IPC_SET takes it, of semaphores or of a queue."""
    return _RIGHTS.pack(0, *owner, 0, 0, mode) + _QUEUE.pack(0, 0, 0, 0, 0, room_bytes, 0, 0)


def choose_next(kind: str, number: int) -> None:
    """Have the next one that anybody makes get that number, if it is free.

    Source: Documentation/admin-guide/sysctl/kernel.rst, sem_next_id and msg_next_id.
    """
    try:
        with open(f"/proc/sys/kernel/{kind}_next_id", "w") as file:
            file.write(str(number))
    except OSError:  # not root, or a kernel without CONFIG_CHECKPOINT_RESTORE: the number tells
        pass


def remove(kind: str, number: int) -> None:
    """Remove semaphores or a queue."""
    if kind == SEMAPHORES:
        syscall(SYS_SEMCTL, number, 0, _IPC_RMID, 0)
    else:
        syscall(SYS_MSGCTL, number, _IPC_RMID, 0)
