"""Sockets with both ends inside, with bytes on the way; sockets that listen; one end outside.

Argument: an empty folder for the names of unix sockets. If `outside` follows, the program first
says the port it listens at, and waits for the tester to connect.
"""

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable

from dialogue import PATIENCE_S, Proof, converse, say

folder = sys.argv[1]
socket.setdefaulttimeout(None)


def receive(end: socket.socket, length: int) -> bytes:
    end.settimeout(PATIENCE_S)
    data = b""
    while len(data) < length and (piece := end.recv(length - len(data))):
        data += piece
    return data


def tcp_pair(family: int, address: str) -> tuple[socket.socket, socket.socket, socket.socket]:
    listener = socket.create_server((address, 0), family=family)
    client = socket.create_connection(listener.getsockname()[:2])
    return listener, client, listener.accept()[0]


def exchange(left: socket.socket, right: socket.socket) -> bool:
    left.sendall(b"over" * 10_000)
    good = receive(right, 40_000) == b"over" * 10_000
    right.sendall(b"back")
    return good and receive(left, 4) == b"back"


def main() -> None:
    once: dict[str, Callable[[], bool]] = {}  # What can be seen one time only.
    always: dict[str, Callable[[], bool]] = {}

    for name, family, address in (
        ("v4", socket.AF_INET, "127.0.0.1"),
        ("v6", socket.AF_INET6, "::1"),
    ):
        listener, client, server = tcp_pair(family, address)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        client.sendall(b"to server, " * 1000)
        server.sendall(b"to client, " * 2000)
        names = client.getsockname(), client.getpeername(), server.getsockname()
        once[f"tcp {name} queued to server"] = lambda server=server: (
            receive(server, 11_000) == b"to server, " * 1000
        )
        once[f"tcp {name} queued to client"] = lambda client=client: (
            receive(client, 22_000) == b"to client, " * 2000
        )
        always[f"tcp {name} names"] = lambda names=names, c=client, s=server: (
            (c.getsockname(), c.getpeername(), s.getsockname()) == names
        )
        always[f"tcp {name} options"] = lambda c=client, s=server: bool(
            c.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            and s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        )
        always[f"tcp {name} works"] = lambda c=client, s=server: exchange(c, s) and exchange(s, c)

        def accepts(listener: socket.socket = listener) -> bool:
            caller = socket.create_connection(listener.getsockname()[:2])
            with caller, listener.accept()[0] as called:
                return exchange(caller, called)

        always[f"tcp {name} listens"] = accepts

    _, half_client, half_server = tcp_pair(socket.AF_INET, "127.0.0.1")
    half_client.sendall(b"last words")
    half_client.shutdown(socket.SHUT_WR)
    once["half closed"] = lambda: (
        receive(half_server, 99) == b"last words"
        and half_server.send(b"answer") == 6
        and receive(half_client, 6) == b"answer"
    )

    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    udp_client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp_client.connect(udp.getsockname())

    def udp_works() -> bool:
        udp_client.send(b"datagram")
        udp.settimeout(PATIENCE_S)
        data, sender = udp.recvfrom(99)
        return data == b"datagram" and sender == udp_client.getsockname()

    always["udp"] = udp_works

    kinds = {"stream": socket.SOCK_STREAM, "dgram": socket.SOCK_DGRAM}
    for name, kind in {**kinds, "seqpacket": socket.SOCK_SEQPACKET}.items():
        left, right = socket.socketpair(type=kind)
        for message in (b"one", b"", b"three") if name == "dgram" else (b"one", b"2", b"three"):
            left.send(message)
        right.send(b"backwards")

        def queued(left: socket.socket = left, right: socket.socket = right) -> bool:
            left.settimeout(PATIENCE_S)
            right.settimeout(PATIENCE_S)
            if right.type == socket.SOCK_STREAM:
                return receive(right, 9) == b"one2three" and left.recv(99) == b"backwards"
            middle = b"" if right.type == socket.SOCK_DGRAM else b"2"
            messages = [right.recv(99) for _ in range(3)]
            return messages == [b"one", middle, b"three"] and left.recv(99) == b"backwards"

        once[f"unix {name} queued"] = queued
        always[f"unix {name} works"] = lambda left=left, right=right: (
            right.send(b"again") == 5 and left.recv(99) == b"again"
        )

    unix_listener = socket.socket(socket.AF_UNIX)
    unix_listener.bind(os.path.join(folder, "listener"))
    unix_listener.listen(5)
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0abstract {os.getpid()}")
    abstract.listen(5)

    def unix_accepts(listener: socket.socket) -> bool:
        caller = socket.socket(socket.AF_UNIX)
        caller.connect(listener.getsockname())
        with caller, listener.accept()[0] as called:
            return exchange(caller, called)

    always["unix listens"] = lambda: unix_accepts(unix_listener)
    always["abstract listens"] = lambda: unix_accepts(abstract)
    unix_client = socket.socket(socket.AF_UNIX)
    unix_client.connect(os.path.join(folder, "listener"))
    unix_server = unix_listener.accept()[0]
    unix_client.sendall(b"through a name")
    once["unix connected, queued"] = lambda: receive(unix_server, 14) == b"through a name"
    always["unix connected"] = lambda: exchange(unix_client, unix_server)

    credentials_left, credentials_right = socket.socketpair(type=socket.SOCK_DGRAM)
    credentials_right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def tells_who() -> bool:
        credentials_left.send(b"who")
        _, ancillary, _, _ = credentials_right.recvmsg(9, 99)
        return struct.unpack("3i", ancillary[0][2])[0] == os.getpid()

    always["credentials"] = tells_who

    if "outside" in sys.argv:
        door = socket.create_server(("127.0.0.1", 0))
        say(str(door.getsockname()[1]))
        stranger = door.accept()[0]
        stranger.recv(5)  # "first"; what follows stays queued

        def peer_gone() -> bool:
            """As after a network loss: what had arrived is read, then comes the end."""
            stranger.settimeout(PATIENCE_S)
            data = b""
            with contextlib.suppress(ConnectionError):
                while piece := stranger.recv(99):
                    data += piece
            return data == b"queued"

        once["outside"] = peer_gone

    def prove() -> Proof:
        proof: Proof = {name: check() for name, check in once.items()}
        once.clear()
        return proof | {name: check() for name, check in always.items()}

    converse(prove, lambda: half_server.recv(1))


main()
