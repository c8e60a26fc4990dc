"""TCP: listeners, connections with both ends inside, and peers that are gone."""

from __future__ import annotations

import os
import select
import socket
from typing import Any


def test_listener_accepts_at_the_same_address_with_its_options(cycle: Any) -> None:
    """A listener keeps address, backlog and options; strangers can connect again."""

    def hold() -> tuple[int, Any]:
        listener = socket.create_server(("127.0.0.1", 0), backlog=17)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
        address = listener.getsockname()
        return listener.detach(), address

    def prove(state: tuple[int, Any]) -> Any:
        listener = socket.socket(fileno=state[0])
        with socket.create_connection(state[1]) as client:
            accepted, _ = listener.accept()
            client.send(b"hello")
            heard = accepted.recv(10)
        return (
            heard,
            listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR),
            listener.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
            listener.getsockname() == state[1],
        )

    assert cycle(hold, prove) == (b"hello", 1, 1, 100_000, True)
    assert next(e for e in cycle.table["descriptions"] if "backlog" in e)["backlog"] == 17


def test_connection_with_both_ends_inside_keeps_its_bytes_and_addresses(cycle: Any) -> None:
    """Bytes under way in both directions arrive; the connection then works on; no TIME_WAIT."""

    def hold() -> list[int]:
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server, _ = listener.accept()
        client.send(b"request")
        server.send(b"reply")
        return [s.detach() for s in (listener, client, server)] + [client.fileno()]

    def prove(state: list[int]) -> Any:
        listener, client, server = (socket.socket(fileno=fd) for fd in state[:3])
        heard = [server.recv(100), client.recv(100)]
        client.send(b"again")
        heard.append(server.recv(100))
        names = (
            client.getpeername() == server.getsockname() == listener.getsockname(),
            client.getsockname() == server.getpeername(),
        )
        nodelay = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with socket.create_connection(listener.getsockname()) as other:
            listener.accept()[0].close()
            other.recv(1)
        return heard, names, nodelay

    heard, names, nodelay = cycle(hold, prove)
    assert heard == [b"request", b"reply", b"again"]
    assert names == (True, True)
    assert nodelay == 1


def test_bytes_that_did_not_fit_into_the_receiver_are_not_lost(cycle: Any) -> None:
    """What waits in the sender's queue because the receiver is full arrives too, once."""

    def hold() -> tuple[int, int, int]:
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        client.setblocking(False)
        sent = 0
        try:
            while True:
                sent += client.send(bytes((sent + i) % 251 for i in range(5000)))
        except BlockingIOError:
            pass
        client.shutdown(socket.SHUT_WR)
        return client.detach(), server.detach(), sent

    def prove(state: tuple[int, int, int]) -> Any:
        server = socket.socket(fileno=state[1])
        data = bytearray()
        while piece := server.recv(1 << 20):
            data += piece
        expected = bytes(i % 251 for i in range(state[2]))
        server.send(b"back")
        return bytes(data) == expected, len(data), socket.socket(fileno=state[0]).recv(9)

    same, length, back = cycle(hold, prove)
    assert same
    assert length > 100_000
    assert back == b"back"


def test_peer_outside_is_gone_after_the_queued_bytes(cycle: Any) -> None:
    """An end whose peer is another process gives its queued bytes, then end of file."""
    with socket.create_server(("127.0.0.1", 0)) as outside:
        address = outside.getsockname()
        received, sent = os.pipe()

        def hold() -> int:
            client = socket.create_connection(address)
            client.send(b"hi")
            client.setblocking(False)
            poll = select.poll()
            poll.register(client, select.POLLIN)
            poll.poll()
            return client.detach()

        import threading

        def serve() -> None:
            accepted, _ = outside.accept()
            accepted.send(b"queued")
            os.read(received, 1)
            accepted.close()

        server = threading.Thread(target=serve)
        server.start()
        try:
            number = cycle.describe(hold)

            def prove() -> Any:
                client = socket.socket(fileno=number)
                client.setblocking(True)
                heard = [client.recv(100), client.recv(100)]
                try:
                    for _ in range(3):
                        client.send(b"anybody?")
                        select.select([], [], [], 0.01)
                except OSError as error:
                    heard.append(type(error).__name__)
                return heard

            heard = cycle.restore(prove)
        finally:
            os.write(sent, b"x")
            server.join()
            os.close(received)
            os.close(sent)
    assert heard[:2] == [b"queued", b""]
    assert heard[2] in ("BrokenPipeError", "ConnectionResetError")
