"""Connections inside a family: to a unix socket and a TCP port of the parent's, some not accepted.

Argument: an empty folder.
"""

import functools
import os
import socket
import sys

from dialogue import PATIENCE_S, Proof, converse
from kin import Answer, Child

BYTES = bytes(range(256)) * 50
listeners: "dict[str, socket.socket]" = {}


def listen() -> None:
    unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    unix.bind(os.path.join(sys.argv[1], "socket"))
    abstract.bind(f"\0lzy-test-{os.getpid()}")
    tcp, tcp6 = socket.socket(), socket.socket(socket.AF_INET6)
    tcp.bind(("127.0.0.1", 0))
    tcp6.bind(("::1", 0))
    listeners.update(unix=unix, abstract=abstract, tcp=tcp, tcp6=tcp6)
    for listener in listeners.values():
        listener.listen()


def be_client() -> Answer:
    """Connected to each listener twice; what it sends to one that accepted is on the way."""
    made = {}
    for name, listener in listeners.items():
        for which in ("accepted", "waiting"):
            sock = socket.socket(listener.family)
            sock.settimeout(PATIENCE_S)
            sock.connect(listener.getsockname())
            if which == "accepted":
                sock.sendall(BYTES)
            made[name, which] = sock
        listener.close()

    def answer(line: str) -> object:
        name, which, expected = line.split()
        sock = made[name, which]
        if expected == "BYTES":
            return receive(sock, len(BYTES)) == BYTES
        sock.sendall(expected.encode())
        return receive(sock, len(expected)) == expected[::-1].encode()

    return answer


def receive(sock: socket.socket, length_bytes: int) -> bytes:
    found = b""
    while len(found) < length_bytes and (piece := sock.recv(length_bytes - len(found))):
        found += piece
    return found


def main() -> None:
    listen()
    client = Child(be_client)
    accepted = {}
    for name, listener in listeners.items():
        accepted[name] = listener.accept()[0]
        accepted[name].settimeout(PATIENCE_S)
        accepted[name].sendall(BYTES)

    def exchange(name: str, which: str, ours: socket.socket) -> bool:
        client.say(f"{name} {which} ping")
        ours.sendall(receive(ours, 4)[::-1])
        return client.hear() == "True"

    @functools.lru_cache(None)
    def receive_all() -> "tuple[Proof, dict[str, socket.socket]]":
        proof: Proof = {}
        late = {}
        for name, listener in listeners.items():
            listener.settimeout(PATIENCE_S)
            proof[f"{name}: sent to us"] = receive(accepted[name], len(BYTES)) == BYTES
            proof[f"{name}: sent by us"] = client.ask(f"{name} accepted BYTES") == "True"
            late[name] = listener.accept()[0]
            late[name].settimeout(PATIENCE_S)
        return proof, late

    def prove() -> Proof:
        proof, late = receive_all()
        proof = dict(proof)
        for name in listeners:
            proof[f"{name}: on"] = exchange(name, "accepted", accepted[name])
            proof[f"{name}: on, accepted late"] = exchange(name, "waiting", late[name])
        return proof

    converse(prove, lambda: accepted["unix"].sendall(b"?"))


main()
