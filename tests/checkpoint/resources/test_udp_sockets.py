"""UDP: addresses, peers, groups, and the datagrams that wait."""

from __future__ import annotations

import os
import select
import socket
from typing import Any

import pytest

from lzy.checkpoint.linux.descriptors import duplicate_from


def _wait_for(sock: socket.socket) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    assert poll.poll(5000)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_datagrams_inside_keep_order_boundaries_and_senders(cycle: Any, host: str) -> None:
    """Queued datagrams arrive in order from where they came, also an empty one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET

    def hold() -> list[int]:
        one, two = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
        one.bind((host, 0))
        two.bind((host, 0))
        one.connect(two.getsockname())
        for message in (b"first", b"", b"x" * 5000):
            one.send(message)
        two.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        return [one.detach(), two.detach()]

    def prove(state: list[int]) -> Any:
        one, two = (socket.socket(fileno=fd) for fd in state)
        two.setblocking(False)
        heard = [two.recvfrom(9999) for _ in range(3)]
        one.send(b"again")
        heard.append(two.recvfrom(99))
        senders = {address for _, address in heard}
        return (
            [data for data, _ in heard],
            senders == {one.getsockname()},
            one.getpeername() == two.getsockname(),
            two.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST),
        )

    assert cycle(hold, prove) == ([b"first", b"", b"x" * 5000, b"again"], True, True, 1)


@pytest.mark.shows("survives", "datagrams that wait, with their senders' addresses")
def test_datagram_of_a_stranger_keeps_its_senders_address(cycle: Any) -> None:
    """Even while the stranger still uses that address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind(("127.0.0.1", 0))
        number = stranger.fileno()

        def hold() -> int:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("127.0.0.1", 0))
            pidfd = os.pidfd_open(os.getppid())
            with socket.socket(fileno=duplicate_from(pidfd, number)) as sender:
                sender.sendto(b"hello", sock.getsockname())
            os.close(pidfd)
            _wait_for(sock)
            return sock.detach()

        def prove(number: int) -> Any:
            sock = socket.socket(fileno=number)
            _wait_for(sock)
            return sock.recvfrom(99)

        assert cycle(hold, prove) == (b"hello", stranger.getsockname())


@pytest.mark.shows("survives", "multicast groups")
def test_multicast_group_is_joined_again(cycle: Any) -> None:
    """Datagrams sent to the group arrive after the cycle."""
    group = "239.7.7.7"

    def hold() -> Any:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", 0))
        request = socket.inet_aton(group) + socket.inet_aton("127.0.0.1")
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        return sock.fileno(), sock.getsockname()[1], sock.detach()

    def prove(state: Any) -> bytes:
        receiver = socket.socket(fileno=state[0])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(
                socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1")
            )
            sender.sendto(b"to all", (group, state[1]))
        _wait_for(receiver)
        return receiver.recv(99)

    assert cycle(hold, prove) == b"to all"
