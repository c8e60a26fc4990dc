"""A TCP server that must hear each message once: its ledger tells a lost one, and a second copy.

`ledger.py PORT [MEBIBYTES]`. A client sends lines `NUMBER`, counting up from 1, and repeats one
that was not answered; the answer is `NUMBER TOTAL TOKEN`: how many different ones were heard, and
what this very process drew when it began. Nothing here knows that processes can be moved.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys


def main() -> None:
    token = os.urandom(8).hex()
    ballast = [
        bytearray(os.urandom(1 << 20)) for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 8)
    ]
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("0.0.0.0", int(sys.argv[1])))
    listening.listen(16)
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    heard = 0
    rests = {}
    while ballast:
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
                at = number * 4096 % (1 << 20)
                ballast[number % len(ballast)][at : at + 4096] = os.urandom(4096)
                try:
                    sock.sendall(b"%d %d %s\n" % (number, heard, token.encode()))
                except OSError:
                    break


if __name__ == "__main__":
    main()
