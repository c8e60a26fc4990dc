"""A TCP server that must hear each message once: its ledger tells a lost one, and a second copy.

`ledger.py PORT [MEBIBYTES]`. A client sends lines `NUMBER`, counting up from 1, and repeats one
that was not answered; the answer is `NUMBER TOTAL TOKEN`: how many different ones were heard, and
what this very process drew when it began. Each writes a page of its memory anew, of random bytes,
and looks at that page and at another before; `0` has it look at all. A byte that it did not write
makes the token `wrong` from then on. Nothing here knows that processes can be moved.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import zlib
from array import array

PAGE_BYTES = 4096
MEBIBYTE = 1 << 20
SCATTER = 2654435761  # prime to how many pages there are


class Memory:
    """Random pages, and what each of them adds up to."""

    def __init__(self, mebibytes: int) -> None:
        self._parts = [bytearray(os.urandom(MEBIBYTE)) for _ in range(mebibytes)]
        self._count = mebibytes * MEBIBYTE // PAGE_BYTES
        self._sums = array("I", map(self._add_up, range(self._count)))

    def write(self, number: int) -> bool:
        """Write a page anew; whether it, and another, were as they should be."""
        page = number % len(self._parts) * (MEBIBYTE // PAGE_BYTES) + number % 256
        right = self._is_right(page) and self._is_right(number * SCATTER % self._count)
        self._page(page)[:] = os.urandom(PAGE_BYTES)
        self._sums[page] = self._add_up(page)
        return right

    def is_all_right(self) -> bool:
        return all(map(self._is_right, range(self._count)))

    def _is_right(self, page: int) -> bool:
        return self._add_up(page) == self._sums[page]

    def _add_up(self, page: int) -> int:
        return zlib.crc32(self._page(page))

    def _page(self, page: int) -> memoryview:
        part, at = divmod(page * PAGE_BYTES, MEBIBYTE)
        return memoryview(self._parts[part])[at : at + PAGE_BYTES]


def main() -> None:
    token = os.urandom(8).hex()
    memory = Memory(int(sys.argv[2]) if len(sys.argv) > 2 else 8)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("0.0.0.0", int(sys.argv[1])))
    listening.listen(16)
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    heard = 0
    rests = {}
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            if sock is listening:
                accepted = listening.accept()[0]
                rests[accepted] = b""
                selector.register(accepted, selectors.EVENT_READ)
                continue
            try:
                piece = sock.recv(4096)
            except OSError:
                piece = b""
            if not piece:
                selector.unregister(sock)
                sock.close()
                del rests[sock]
                continue
            *lines, rests[sock] = (rests[sock] + piece).split(b"\n")
            for line in lines:
                number = int(line)
                if number == heard + 1:
                    heard = number
                if not (memory.write(number) if number else memory.is_all_right()):
                    token = "wrong"
                try:
                    sock.sendall(b"%d %d %s\n" % (number, heard, token.encode()))
                except OSError:
                    break


if __name__ == "__main__":
    main()
