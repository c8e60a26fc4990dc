"""Unix sockets: pairs with queued messages, listeners, and ends whose other end is outside."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM", "SOCK_SEQPACKET"])
def test_pair_keeps_its_messages(cycle: Any, kind: str) -> None:
    """Queued bytes arrive in order, and messages keep their boundaries, also empty ones."""

    def hold() -> tuple[int, int]:
        one, two = socket.socketpair(socket.AF_UNIX, getattr(socket, kind))
        for message in (b"first", b"", b"second" * 1000):
            one.send(message)
        two.send(b"back")
        return one.detach(), two.detach()

    def prove(state: tuple[int, int]) -> Any:
        one, two = (socket.socket(fileno=fd) for fd in state)
        two.setblocking(False)
        if kind == "SOCK_STREAM":
            heard = [two.recv(100_000)]
        else:
            heard = [two.recv(100_000) for _ in range(3)]
        heard.append(one.recv(100))
        one.send(b"works")
        return [*heard, two.recv(100)]

    expected = [b"first" + b"second" * 1000]
    if kind != "SOCK_STREAM":
        expected = [b"first", b"", b"second" * 1000]
    assert cycle(hold, prove) == [*expected, b"back", b"works"]


def test_listener_is_reachable_under_its_path_again(cycle: Any, tmp_path: Path) -> None:
    """The dead socket's file is replaced; its mode stays."""
    path = str(tmp_path / "socket")

    def hold() -> int:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        os.chmod(path, 0o640)
        listener.listen(3)
        return listener.detach()

    def prove(number: int) -> Any:
        listener = socket.socket(fileno=number)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            accepted, _ = listener.accept()
            client.send(b"hello")
            return accepted.recv(10), listener.getsockname(), os.stat(path).st_mode & 0o777

    assert cycle(hold, prove) == (b"hello", path, 0o640)


def test_abstract_listener(cycle: Any) -> None:
    """A name in the abstract namespace is taken again."""
    name = b"\0lzy-test-%d" % os.getpid()

    def hold() -> int:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(name)
        listener.listen()
        return listener.detach()

    assert cycle(hold, lambda number: socket.socket(fileno=number).getsockname()) == name


def test_end_whose_other_end_is_outside(cycle: Any) -> None:
    """The queued bytes, then end of file; writing breaks."""
    ours, theirs = socket.socketpair()
    number_outside = theirs.fileno()
    ours.send(b"queued")

    def hold() -> int:
        pidfd = os.pidfd_open(os.getppid())
        from lzy.checkpoint.linux.descriptors import duplicate_from

        fd = duplicate_from(pidfd, number_outside)
        os.close(pidfd)
        return fd

    def prove(number: int) -> Any:
        sock = socket.socket(fileno=number)
        heard = [sock.recv(100), sock.recv(100)]
        try:
            sock.send(b"x")
        except BrokenPipeError:
            heard.append(b"broken")
        return heard

    with ours, theirs:
        assert cycle(hold, prove) == [b"queued", b"", b"broken"]
