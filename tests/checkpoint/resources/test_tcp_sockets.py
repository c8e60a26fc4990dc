"""TCP: listeners, connections with both ends inside, and peers that are gone."""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import Any

import pytest


def _pattern(start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a stream whose every byte tells its place."""
    period = bytes(range(251))
    return (period * ((end - start) // 251 + 2))[start % 251 :][: end - start]


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


@pytest.mark.shows("survives", "bytes under way in a TCP connection inside")
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
                sent += client.send(_pattern(sent, sent + 5000))
        except BlockingIOError:
            pass
        client.shutdown(socket.SHUT_WR)
        return client.detach(), server.detach(), sent

    def prove(state: tuple[int, int, int]) -> Any:
        server = socket.socket(fileno=state[1])
        data = bytearray()
        while piece := server.recv(1 << 20):
            data += piece
        expected = _pattern(0, state[2])
        server.send(b"back")
        return bytes(data) == expected, len(data), socket.socket(fileno=state[0]).recv(9)

    same, length, back = cycle(hold, prove)
    assert same
    assert length > 100_000
    assert back == b"back"


@pytest.mark.shows("cut", "a TCP connection to the outside: what had arrived, then end of file")
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


def test_ipv6_pair_with_one_end_shut_and_its_listener_closed(cycle: Any) -> None:
    """A half-closed connection is half-closed again, over IPv6 and without its listener."""

    def hold() -> Any:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            client = socket.create_connection(listener.getsockname()[:2])
            server, _ = listener.accept()
        server.send(b"bye")
        server.shutdown(socket.SHUT_WR)
        return client.detach(), server.detach()

    def prove(numbers: Any) -> Any:
        client, server = (socket.socket(fileno=fd) for fd in numbers)
        heard = [client.recv(9), client.recv(9)]
        client.send(b"still")
        return [*heard, server.recv(9), client.getpeername() == server.getsockname()]

    assert cycle(hold, prove) == [b"bye", b"", b"still", True]


@pytest.mark.shows("survives", "a TCP client of its own that is not accepted yet")
def test_a_client_that_waits_to_be_accepted_waits_again(cycle: Any) -> None:
    """The listener of the process accepts it after the cycle."""

    def hold() -> Any:
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        return listener.detach(), client.detach()

    def prove(numbers: Any) -> bytes:
        listener, client = (socket.socket(fileno=fd) for fd in numbers)
        server, _ = listener.accept()
        client.send(b"at last")
        return server.recv(99)

    assert cycle(hold, prove) == b"at last"


@pytest.mark.shows("refused", "bytes sent to a TCP connection that is not accepted yet")
def test_bytes_sent_to_a_connection_not_yet_accepted_are_a_reason_to_wait(cycle: Any) -> None:
    """They lie in a queue that no descriptor leads to."""
    from lzy.checkpoint.errors import Unsupported

    def hold() -> Any:
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        client.send(b"x")
        return listener.detach(), client.detach()

    with pytest.raises(Unsupported, match="not accepted"):
        cycle.describe(hold)


@pytest.mark.shows("refused", "a TCP listener whose port is taken")
def test_a_taken_port_is_busy(cycle: Any) -> None:
    """The error names the address and says how to find who has it."""
    from lzy.checkpoint.errors import Busy

    def hold() -> Any:
        listener = socket.create_server(("127.0.0.1", 0))
        return listener.fileno(), listener.getsockname(), listener.detach()

    address = cycle.describe(hold)[1]
    with (
        socket.create_server(address),
        pytest.raises(Busy, match=str(address[1])) as caught,
    ):
        cycle.restore(lambda: None)
    assert "ss -" in caught.value.remedy
    cycle.restore(lambda: None)


def test_a_connection_that_was_reset_stays_broken(cycle: Any) -> None:
    """The error that waited to be read is read after the cycle."""

    def hold() -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        server.close()
        return client.detach()

    def prove(number: int) -> Any:
        client = socket.socket(fileno=number)
        try:
            client.recv(1)
        except ConnectionResetError:
            return "reset", client.recv(1)
        return "alive"

    assert cycle(hold, prove) == ("reset", b"")


def test_fresh_bound_and_connecting_sockets(cycle: Any) -> None:
    """A socket not yet used, one with an address only, and one whose connection is on its way."""

    def hold() -> Any:
        fresh, bound, connecting = (socket.socket() for _ in range(3))
        fresh.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1234)
        bound.bind(("127.0.0.1", 0))
        name = bound.getsockname()
        full = socket.create_server(("127.0.0.1", 0), backlog=0)
        connecting.setblocking(False)
        first = socket.create_connection(full.getsockname())
        assert connecting.connect_ex(full.getsockname()) == errno.EINPROGRESS
        first.detach()
        return fresh.detach(), bound.detach(), connecting.detach(), full.detach(), name

    def prove(state: Any) -> Any:
        fresh, bound, connecting, full = (socket.socket(fileno=fd) for fd in state[:4])
        full.settimeout(5)
        accepted = [full.accept()[1], full.accept()[1]]
        assert connecting.getsockname() in accepted
        return (
            fresh.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            fresh.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR),
            bound.getsockname() == state[4],
            connecting.getpeername() == full.getsockname(),
        )

    assert cycle(hold, prove) == (1234, 0, True, True)


def test_describing_leaves_sockets_as_they_were(cycle: Any) -> None:
    """Queues, options and blocking are the same after a look; the process goes on."""
    import signal

    from lzy.checkpoint.resources import describe_descriptors

    def hold() -> Any:
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        client.setblocking(False)
        server, _ = listener.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            while True:
                client.send(b"x" * 65536)
        except BlockingIOError:
            pass
        return listener.detach(), client.detach(), server.detach()

    cycle.describe(hold, end=False)
    process = cycle.processes[0]
    again = describe_descriptors(process.pid, process.pidfd, cycle.objects)
    assert again == cycle.table
    os.kill(process.pid, signal.SIGCONT)
    reuse = [e["options"].get("SO_REUSEADDR") for e in again["descriptions"] if "options" in e]
    assert reuse.count(1) == 3


@pytest.mark.shows("changed", "a TCP connection inside whose port is taken: other ports")
def test_a_pair_whose_port_is_taken_is_connected_elsewhere(cycle: Any) -> None:
    """A client's port that another process got meanwhile does not stand in the way."""

    def hold() -> Any:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
        client.send(b"kept")
        return client.fileno(), server.detach(), client.getsockname(), client.detach()

    def prove(state: Any) -> bytes:
        return socket.socket(fileno=state[1]).recv(9)

    state = cycle.describe(hold)
    with socket.socket() as thief:
        thief.bind(state[2])
        assert cycle.restore(lambda: prove(state)) == b"kept"


def test_an_end_that_refuses_to_read_refuses_again(cycle: Any) -> None:
    """shutdown(SHUT_RD) of one end alone."""

    def hold() -> Any:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
        client.shutdown(socket.SHUT_RD)
        return client.detach(), server.detach()

    def prove(state: Any) -> Any:
        client, server = (socket.socket(fileno=fd) for fd in state)
        client.send(b"one way")
        return client.recv(1), server.recv(9)

    assert cycle(hold, prove) == (b"", b"one way")


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_under_way_arrives_once_and_in_order(cycle: Any, seed: int) -> None:
    """Random traffic, buffers and ends on many connections: each byte arrives, none twice."""
    import random

    def hold() -> Any:
        chance = random.Random(seed)
        connections = []
        for _ in range(8):
            host = chance.choice(["127.0.0.1", "::1"])
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.create_server((host, 0), family=family) as listener:
                client = socket.create_connection(listener.getsockname()[:2])
                server, _ = listener.accept()
            if chance.random() < 0.3:
                server.setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVBUF, chance.randrange(30000, 60000)
                )
            ends = [client, server]
            written, taken = [0, 0], [0, 0]  # by each end; from each end by the other
            for end in ends:
                end.setblocking(False)
            for _ in range(chance.randrange(30)):
                way = chance.randrange(2)
                start = written[way]
                data = _pattern(start, start + chance.randrange(1, 40000))
                try:
                    written[way] += ends[way].send(data)
                    if chance.random() < 0.4:
                        taken[way] += len(ends[1 - way].recv(chance.randrange(1, 30000)))
                except BlockingIOError:
                    continue
            shut = [chance.random() < 0.3 for _ in ends]
            for end, is_shut in zip(ends, shut, strict=True):
                if is_shut:
                    end.shutdown(socket.SHUT_WR)
            connections.append((client.detach(), server.detach(), written, taken, shut))
        return connections

    def prove(connections: Any) -> list[str]:
        faults = []
        for client, server, written, taken, shut in connections:
            ends = [socket.socket(fileno=client), socket.socket(fileno=server)]
            for way in (0, 1):
                if not shut[way]:
                    ends[way].shutdown(socket.SHUT_WR)
                reader = ends[1 - way]
                reader.settimeout(10)
                data = bytearray()
                while piece := reader.recv(1 << 20):
                    data += piece
                expected = _pattern(taken[way], written[way])
                if data != expected:
                    faults.append(f"{len(data)} bytes instead of {len(expected)}")
        return faults

    assert cycle(hold, prove) == []
