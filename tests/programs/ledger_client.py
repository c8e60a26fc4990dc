"""Keeps using a ledger, wherever it is: `ledger_client.py PORT ADDRESS…`, until its stdin ends.

Each message is sent until it is answered, to whichever address answers. At the end it prints, as
JSON, how many there were, the longest time that one took, and what was wrong: nothing, if each was
heard once by one and the same process.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time


def main() -> None:
    port, addresses = int(sys.argv[1]), sys.argv[2:]
    number, longest_s, wrong, tokens = 0, 0.0, [], set()
    connection, at = None, 0
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.005)[0]:
        number += 1
        began_s = time.monotonic()
        while True:
            try:
                if connection is None:
                    connection = socket.create_connection((addresses[at], port), 0.3)
                    connection.settimeout(5)
                connection.sendall(b"%d\n" % number)
                answer = b""
                while not answer.endswith(b"\n"):
                    piece = connection.recv(4096)
                    if not piece:
                        raise ConnectionError("closed")
                    answer += piece
                break
            except OSError:
                if connection is not None:
                    connection.close()
                connection, at = None, (at + 1) % len(addresses)
                time.sleep(0.002)
        longest_s = max(longest_s, time.monotonic() - began_s)
        heard, total, token = answer.split()
        tokens.add(token)
        if int(heard) != number or int(total) != number or len(tokens) != 1:
            wrong.append(answer.decode())
    print(json.dumps({"messages": number, "longest_s": longest_s, "wrong": wrong[:5]}))


if __name__ == "__main__":
    main()
