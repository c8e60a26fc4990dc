"""POSIX message queues: one that holds messages, one that is empty, one without a name any more."""

import ctypes
import errno
import os
import struct

from clib import call
from dialogue import Proof, converse

ATTRIBUTES = struct.Struct("8q")


def open_queue(name: str, flags: int, most: int = 4, size: int = 64) -> int:
    attributes = ATTRIBUTES.pack(0, most, size, 0, 0, 0, 0, 0)
    return int(call("mq_open", name.encode(), flags | os.O_CREAT, 0o640, attributes))


def look_at(queue: int) -> "tuple[int, ...]":
    """Flags, most messages, their size, messages there."""
    buffer = ctypes.create_string_buffer(ATTRIBUTES.size)
    call("mq_getattr", queue, buffer)
    return ATTRIBUTES.unpack(buffer.raw)[:4]


def send(queue: int, text: bytes, priority: int) -> None:
    call("mq_send", queue, text, ctypes.c_size_t(len(text)), priority)


def receive(queue: int) -> "tuple[bytes, int]":
    buffer, priority = ctypes.create_string_buffer(64), ctypes.c_uint()
    length = call(
        "mq_receive",
        queue,
        buffer,
        ctypes.c_size_t(64),
        ctypes.byref(priority),
        restype=ctypes.c_ssize_t,
    )
    return buffer.raw[:length], priority.value


def main() -> None:
    name = f"/lzy-test-{os.getpid()}-"
    one = open_queue(name + "one", os.O_RDWR)
    writer = open_queue(name + "one", os.O_WRONLY | os.O_NONBLOCK)
    empty = open_queue(name + "empty", os.O_RDWR | os.O_NONBLOCK, 3, 32)
    nameless = open_queue(name + "gone", os.O_RDWR, 2, 16)
    again = open_queue(name + "gone", os.O_RDONLY | os.O_NONBLOCK, 2, 16)
    call("mq_unlink", (name + "gone").encode())
    sent = [(b"low", 1), (b"high", 9), (b"low too", 1)]
    for text, priority in sent:
        send(one, text, priority)

    def prove() -> Proof:
        proof: Proof = {
            "attributes": look_at(one) == (0, 4, 64, 3),
            "non-blocking": look_at(writer) == (os.O_NONBLOCK, 4, 64, 3),
            "empty": look_at(empty) == (os.O_NONBLOCK, 3, 32, 0),
            "without a name": look_at(nameless) == (0, 2, 16, 0),
            "mode": os.fstat(one).st_mode & 0o777 == 0o640,
        }
        if not all(proof.values()):
            return proof  # what follows might wait for ever
        got = [receive(one) for _ in range(3)]
        proof["messages"] = got == [(b"high", 9), (b"low", 1), (b"low too", 1)]
        for text, priority in sent:
            send(writer, text, priority)
        send(one, b"fourth", 0)
        try:
            send(writer, b"fifth", 0)
        except OSError as error:
            proof["full"] = error.errno == errno.EAGAIN
        proof["the fourth is last"] = [receive(one) for _ in range(4)][3] == (b"fourth", 0)
        for text, priority in sent:
            send(one, text, priority)
        send(nameless, b"through it", 0)
        proof["through it"] = receive(again) == (b"through it", 0)
        return proof

    converse(prove, lambda: send(writer, b"more", 3))


main()
