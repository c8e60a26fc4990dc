"""System V semaphores, one of which is waited for, and message queues: full, and empty."""

import ctypes
import os
import struct
import threading

from clib import call
from dialogue import PATIENCE_S, Proof, converse

CREATE, SET, STATUS = 0o1000, 1, 2
GETALL, SETVAL, SETALL = 13, 16, 17
NO_WAIT, COPY = 0o4000, 0o40000
VALUES = [3, 0, 32000]
MESSAGES = [(3, b"three"), (1, b"one" * 1000), (7, b""), (3, bytes(range(256)))]


def operate(semaphores: int, which: int, change: int) -> None:
    call("semop", semaphores, struct.pack("=Hhh", which, change, 0), ctypes.c_size_t(1))


def read_values(semaphores: int) -> "list[int]":
    values = (ctypes.c_ushort * 3)()
    call("semctl", semaphores, 0, GETALL, values)
    return list(values)


def look_at(name: str, number: int) -> "tuple[int, int, int, int]":
    """Key, user, group, rights."""
    buffer = ctypes.create_string_buffer(256)
    call("semctl" if name == "sem" else "msgctl", number, *([0] * (name == "sem")), STATUS, buffer)
    return struct.unpack_from("<i2I8xI", buffer)


def read_room(queue: int) -> int:
    buffer = ctypes.create_string_buffer(256)
    call("msgctl", queue, STATUS, buffer)
    return struct.unpack_from("<Q", buffer, 48 + 5 * 8)[0]


def read_messages(queue: int) -> "list[tuple[int, bytes]]":
    """All that are in the queue, in order; they stay there."""
    found = []
    buffer = ctypes.create_string_buffer(8192)
    while True:
        at = ctypes.c_long(len(found))
        try:
            size = ctypes.c_size_t(8000)
            length = call("msgrcv", queue, buffer, size, at, COPY | NO_WAIT, restype=ctypes.c_long)
        except OSError:
            return found
        found.append((struct.unpack_from("<q", buffer)[0], buffer.raw[8 : 8 + length]))


def main() -> None:
    key = 0x6C000000 | os.getpid()
    semaphores = call("semget", key, 3, CREATE | 0o640)
    call("semctl", semaphores, 0, SETALL, (ctypes.c_ushort * 3)(*VALUES))
    queue = call("msgget", key, CREATE | 0o620)
    for kind, content in MESSAGES:
        call("msgsnd", queue, struct.pack("<q", kind) + content, ctypes.c_size_t(len(content)), 0)
    empty = call("msgget", key | 1 << 24, CREATE | 0o600)
    call("msgsnd", empty, struct.pack("<q", 1), ctypes.c_size_t(0), 0)
    call("msgrcv", empty, ctypes.create_string_buffer(8), ctypes.c_size_t(0), 0, 0)
    told = threading.Semaphore(0)

    def wait() -> None:
        while True:
            operate(semaphores, 1, -1)
            told.release()

    threading.Thread(target=wait, daemon=True).start()
    owner = os.geteuid(), os.getegid()
    room = read_room(queue)

    def prove() -> Proof:
        proof: Proof = {
            "values": read_values(semaphores) == VALUES,
            "semaphores": look_at("sem", semaphores) == (key, *owner, 0o640),
            "messages": read_messages(queue) == MESSAGES,
            "queue": look_at("msg", queue) == (key, *owner, 0o620),
            "room": read_room(queue) == room,
            "empty": read_messages(empty) == [],
            "by key": call("semget", key, 0, 0) == semaphores and call("msgget", key, 0) == queue,
        }
        operate(semaphores, 1, 1)
        proof["waiting"] = told.acquire(timeout=PATIENCE_S)
        operate(semaphores, 0, -3)
        proof["taken"] = read_values(semaphores)[0] == 0
        operate(semaphores, 0, 3)
        return proof

    converse(prove, lambda: call("semctl", semaphores, 0, SETVAL, 9))


main()
