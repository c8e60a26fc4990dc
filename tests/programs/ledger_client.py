"""Keeps using a ledger, wherever it is: `ledger_client.py PORT ADDRESS…`, until its stdin ends.

Each message is sent until it is answered, to whichever address answers. For each line that it
reads, and at the end, it prints as JSON how many messages there were, the longest time that one
took since it was asked last, and what was wrong: nothing, if each was heard once by one and the
same process. At the end it has that look at all of its memory.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

PAUSE_S = 0.005


class Ledger:
    """Whoever answers at one of the addresses."""

    def __init__(self, port: int, addresses: list[str]) -> None:
        self._places = [(address, port) for address in addresses]
        self._connection: socket.socket | None = None

    def ask(self, number: int) -> bytes:
        """What it answers; asked until it does."""
        while True:
            try:
                if self._connection is None:
                    self._connection = socket.create_connection(self._places[0], 0.3)
                    self._connection.settimeout(5)
                self._connection.sendall(b"%d\n" % number)
                answer = b""
                while not answer.endswith(b"\n"):
                    piece = self._connection.recv(4096)
                    if not piece:
                        raise ConnectionError("closed")
                    answer += piece
                return answer
            except OSError:
                if self._connection is not None:
                    self._connection.close()
                self._connection = None
                self._places.append(self._places.pop(0))
                time.sleep(0.002)


def main() -> None:
    ledger = Ledger(int(sys.argv[1]), sys.argv[2:])
    number, longest_s, wrong, tokens = 0, 0.0, [], set()

    def look_at(answer: bytes, expected: int) -> None:
        said, total, token = answer.split()
        tokens.add(token)
        if int(said) != expected or int(total) != number or len(tokens) != 1:
            wrong.append(answer.decode())

    def tell() -> None:
        told = {"messages": number, "longest_s": longest_s, "wrong": wrong[:5]}
        print(json.dumps(told), flush=True)

    print("ready", flush=True)
    while True:
        if select.select([sys.stdin], [], [], PAUSE_S)[0]:
            if not sys.stdin.readline():
                break
            tell()
            longest_s = 0.0
        number += 1
        began_s = time.monotonic()
        look_at(ledger.ask(number), number)
        longest_s = max(longest_s, time.monotonic() - began_s)
    look_at(ledger.ask(0), 0)
    tell()


if __name__ == "__main__":
    main()
