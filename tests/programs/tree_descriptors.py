"""Descriptors that a fork has made common: one offset, one set of flags; and some sent by others.

Argument: an empty folder.
"""

import array
import fcntl
import functools
import os
import socket
import sys
from pathlib import Path

from dialogue import Proof, converse
from kin import Answer, Child

folder = Path(sys.argv[1])
TEXT = bytes(range(256)) * 4
(folder / "text").write_bytes(TEXT)
text = os.open(folder / "text", os.O_RDWR)
appended = os.open(folder / "log", os.O_RDWR | os.O_APPEND | os.O_CREAT)
os.mkfifo(folder / "fifo")
pipe = os.pipe()
near, far = socket.socketpair()
FIXED = 900


def be_reader() -> Answer:
    """Reads where its parent has stopped; has the same file open a second time, by itself."""
    own = os.open(folder / "text", os.O_RDONLY)
    os.lseek(own, 500, os.SEEK_SET)
    duplicate = fcntl.fcntl(text, fcntl.F_DUPFD, FIXED)
    os.set_inheritable(text, True)
    fifo = os.open(folder / "fifo", os.O_RDWR)
    os.write(fifo, b"in a fifo")
    fcntl.fcntl(pipe[0], fcntl.F_SETFL, os.O_NONBLOCK)  # of the description: the parent's, too
    lone = os.open(folder / "lone", os.O_RDWR | os.O_CREAT)
    os.write(lone, b"lone")
    os.unlink(folder / "lone")
    hidden = os.pipe()
    os.write(hidden[1], b"sent")
    rights = array.array("i", [hidden[0], lone])
    far.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    def answer(word: str) -> object:
        if word == "own":
            os.lseek(own, -10, os.SEEK_CUR)
            return os.read(own, 10) == TEXT[490:500]
        if word == "flags":
            return [os.get_inheritable(number) for number in (text, duplicate)]
        if word == "lone":
            return os.pread(lone, 100, 0)
        if word == "hidden":
            return os.write(hidden[1], b"!")
        if word == "append":
            return os.write(appended, b"c")
        return os.read(int(word), 10) == os.pread(text, 10, os.lseek(text, 0, os.SEEK_CUR) - 10)

    return answer


def main() -> None:
    reader = Child(be_reader)
    os.lseek(text, 123, os.SEEK_SET)
    fifo = os.open(folder / "fifo", os.O_RDWR)

    @functools.lru_cache(None)
    def receive() -> Proof:
        _, ancillary, _, _ = near.recvmsg(1, socket.CMSG_SPACE(8))
        sent, lone = array.array("i", ancillary[0][2])
        reader.ask("hidden")
        os.pwrite(lone, b"!!!!!", 4)
        return {
            "sent pipe": os.read(sent, 100) == b"sent!",
            "sent file": reader.ask("lone") == repr(b"lone!!!!!"),
            "fifo": os.read(fifo, 100) == b"in a fifo",
        }

    def prove() -> Proof:
        proof = receive()
        at = os.lseek(text, 0, os.SEEK_CUR)
        theirs = [reader.ask(str(number)) for number in (text, FIXED)]
        size = os.fstat(appended).st_size
        os.write(appended, b"p")
        reader.ask("append")
        flags = fcntl.fcntl(pipe[0], fcntl.F_GETFL)
        proof = {
            **proof,
            "read on by the child": theirs == ["True", "True"],
            "one offset": os.lseek(text, 0, os.SEEK_CUR) == at + 20,
            "at first": at == 123,
            "child's own offset": reader.ask("own") == "True",
            "flags of descriptors": reader.ask("flags") == "[True, True]",
            "flags of descriptions": bool(flags & os.O_NONBLOCK),
            "close-on-exec here": not os.get_inheritable(text),
            "appended": os.pread(appended, 2, size) == b"pc",
        }
        os.lseek(text, 123, os.SEEK_SET)
        return proof

    converse(prove, lambda: os.lseek(text, 1, os.SEEK_SET))


main()
