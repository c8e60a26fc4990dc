"""Children that talk over pipes and socket pairs, with bytes on the way between them."""

import array
import fcntl
import functools
import os
import select
import socket
import termios

from dialogue import Proof, converse
from kin import Answer, Child, read_exactly

LETTER = bytes(range(256)) * 20  # fits into a pipe
BOOK = bytes(range(251)) * 1000  # does not
NOTES = [b"one", b"two" * 50, b"three" * 100]

letters, books = os.pipe(), os.pipe()
near, far = socket.socketpair()
few, many = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


def be_sender() -> Answer:
    """Sends to its sibling; its own child is stopped by a pipe that is full."""
    near.sendall(LETTER)
    for note in NOTES:
        few.send(note)
    writer = os.fork()
    if not writer:
        rest = memoryview(BOOK)
        while rest:
            rest = rest[os.write(books[1], rest) :]
        os._exit(7)
    return lambda _: os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])


def be_reader() -> Answer:
    def answer(word: str) -> bool:
        if word == "letter":
            return read_exactly(letters[0], len(LETTER)) == LETTER
        if word == "sibling":
            return read_exactly(far.fileno(), len(LETTER)) == LETTER
        if word == "notes":
            return [many.recv(1000) for _ in NOTES] == NOTES
        far.sendall(word.encode())
        return near.recv(100) == word.encode()

    return answer


def await_full(pipe: int) -> None:
    """Wait until its reader would get as much as a pipe holds."""
    waiting = array.array("i", [0])
    while waiting[0] < fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ):
        fcntl.ioctl(pipe, termios.FIONREAD, waiting)
        select.select([], [], [], 0.001)


def main() -> None:
    os.write(letters[1], LETTER)
    sender, reader = Child(be_sender), Child(be_reader)
    await_full(books[0])

    @functools.lru_cache(None)
    def take_what_was_on_the_way() -> Proof:
        return {
            "letter": reader.ask("letter") == "True",
            "from a sibling": reader.ask("sibling") == "True",
            "datagrams, one by one": reader.ask("notes") == "True",
            "from a grandchild that waited": read_exactly(books[0], len(BOOK)) == BOOK,
            "which has ended since": sender.ask("wait") == "7",
        }

    def prove() -> Proof:
        return {**take_what_was_on_the_way(), "still connected": reader.ask("again") == "True"}

    def spoil() -> None:
        os.read(letters[0], 1)
        os.write(letters[1], b"?")

    converse(prove, spoil)


main()
