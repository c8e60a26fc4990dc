"""Unix sockets: pairs with queued messages, listeners, and ends whose other end is outside."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM", "SOCK_SEQPACKET"])
def test_pair_keeps_its_messages(cycle: Any, kind: str) -> None:
    """Queued bytes arrive in order, and messages keep their boundaries, also empty ones."""

    def hold() -> tuple[int, int]:
        one, two = socket.socketpair(socket.AF_UNIX, getattr(socket, kind))
        for message in (b"", b"first", b"", b"", b"second" * 1000):
            one.send(message)
        two.send(b"back")
        return one.detach(), two.detach()

    def prove(state: tuple[int, int]) -> Any:
        one, two = (socket.socket(fileno=fd) for fd in state)
        two.setblocking(False)
        if kind == "SOCK_STREAM":
            heard = [two.recv(100_000)]
        else:
            heard = [two.recv(100_000) for _ in range(5)]
        heard.append(one.recv(100))
        one.send(b"works")
        return [*heard, two.recv(100)]

    expected = [b"first" + b"second" * 1000]
    if kind != "SOCK_STREAM":
        expected = [b"", b"first", b"", b"", b"second" * 1000]
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


@pytest.mark.shows("survives", "abstract names of unix sockets")
def test_abstract_listener(cycle: Any) -> None:
    """A name in the abstract namespace is taken again."""
    name = b"\0lzy-test-%d" % os.getpid()

    def hold() -> int:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(name)
        listener.listen()
        return listener.detach()

    assert cycle(hold, lambda number: socket.socket(fileno=number).getsockname()) == name


@pytest.mark.shows(
    "cut",
    "a unix socket whose other end is outside: what was queued, then end of file",
)
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


@pytest.mark.parametrize("form", ["path", "relative", "abstract"])
@pytest.mark.parametrize("listening", [True, False])
def test_accepted_connection_keeps_its_names(
    cycle: Any, tmp_path: Path, form: str, listening: bool
) -> None:
    """Both ends say the same names; the queue of unread bytes is there; the listener accepts."""
    names = {
        "path": str(tmp_path / "server"),
        "relative": "server",
        "abstract": b"\0lzy-names-%d" % os.getpid(),
    }
    address = names[form]

    def hold() -> Any:
        os.chdir(tmp_path)
        listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(5)
        client.bind(str(tmp_path / "client"))
        client.connect(address)
        server, _ = listener.accept()
        client.send(b"to server")
        server.send(b"to client")
        numbers = [client.detach(), server.detach(), listener.detach()]
        if not listening:
            os.close(numbers.pop())
        return numbers

    def prove(numbers: list[int]) -> Any:
        os.chdir(tmp_path)
        client, server, *listeners = (socket.socket(fileno=fd) for fd in numbers)
        assert server.recv(99) == b"to server"
        assert client.recv(99) == b"to client"
        for listener in listeners:
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(address)
                listener.accept()[0].close()
        return client.getpeername(), server.getsockname(), server.getpeername()

    assert cycle(hold, prove) == (address, address, str(tmp_path / "client"))


def test_a_client_that_waits_to_be_accepted_waits_again(cycle: Any, tmp_path: Path) -> None:
    """The listener of the process accepts it after the cycle."""
    path = str(tmp_path / "server")

    def hold() -> Any:
        listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(5)
        client.connect(path)
        return listener.detach(), client.detach()

    def prove(numbers: Any) -> bytes:
        listener, client = (socket.socket(fileno=fd) for fd in numbers)
        server, _ = listener.accept()
        client.send(b"at last")
        return server.recv(99)

    assert cycle(hold, prove) == b"at last"


def test_shut_ends_stay_shut(cycle: Any) -> None:
    """Half a connection that was shut gives end of file after what was queued."""

    def hold() -> Any:
        one, two = socket.socketpair()
        one.send(b"last")
        one.shutdown(socket.SHUT_WR)
        return one.detach(), two.detach()

    def prove(numbers: Any) -> Any:
        one, two = (socket.socket(fileno=fd) for fd in numbers)
        heard = [two.recv(9), two.recv(9)]
        two.send(b"other way")
        return [*heard, one.recv(9)]

    assert cycle(hold, prove) == [b"last", b"", b"other way"]


@pytest.mark.shows("survives", "unix datagrams with their senders")
def test_datagrams_with_names(cycle: Any, tmp_path: Path) -> None:
    """Each datagram comes from the name of its sender; destinations stay chosen."""

    def hold() -> list[int]:
        server, one, two = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3))
        server.bind(str(tmp_path / "server"))
        one.bind(str(tmp_path / "one"))
        one.connect(str(tmp_path / "server"))
        one.send(b"from one")
        two.sendto(b"from nobody", str(tmp_path / "server"))
        return [server.detach(), one.detach(), two.detach()]

    def prove(numbers: list[int]) -> Any:
        server, one, _ = (socket.socket(fileno=fd) for fd in numbers)
        server.setblocking(False)
        heard = [server.recvfrom(99), server.recvfrom(99)]
        one.send(b"more")
        return [*heard, server.recvfrom(99)]

    one = str(tmp_path / "one")
    assert cycle(hold, prove) == [(b"from one", one), (b"from nobody", None), (b"more", one)]


@pytest.mark.shows("refused", "a unix socket whose name somebody else serves by now")
def test_a_name_somebody_serves_by_now_is_busy(cycle: Any, tmp_path: Path) -> None:
    """The restore is refused before anything is made; the server is left alone."""
    from lzy.checkpoint.errors import Busy

    path = str(tmp_path / "socket")

    def hold() -> int:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        return listener.detach()

    cycle.describe(hold)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(path)
        stranger.listen()
        with pytest.raises(Busy, match="socket"):
            cycle.restore(lambda: None)
        assert os.path.exists(path)


@pytest.mark.shows("survives", "descriptors under way in a unix socket (SCM_RIGHTS)")
@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_descriptors_on_their_way_arrive(cycle: Any, kind: int, tmp_path: Path) -> None:
    """With the very message they were sent with; shared with who has them open, or by nobody."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")

    def hold() -> Any:
        one, two = socket.socketpair(socket.AF_UNIX, kind)
        held, sent = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
        memory = os.memfd_create("under way")
        os.write(memory, b"content")
        os.lseek(held, 3, os.SEEK_SET)
        os.lseek(sent, 7, os.SEEK_SET)
        one.send(b"before")
        socket.send_fds(one, [b"with"], [held, sent])
        one.send(b"between")
        socket.send_fds(one, [b"again"], [memory])
        one.send(b"after")
        os.close(sent)
        os.close(memory)
        return one.detach(), two.detach(), held

    def prove(state: Any) -> Any:
        with socket.socket(fileno=state[1]) as two:
            heard = []
            for length_bytes in (6, 4, 7, 5, 5):
                data, fds, _, _ = socket.recv_fds(two, length_bytes, 8)
                heard.append((data, [os.pread(fd, 99, 0) for fd in fds]))
                if len(fds) == 2:
                    heard.append([os.lseek(fd, 0, os.SEEK_CUR) for fd in fds])
                    os.lseek(fds[0], 5, os.SEEK_SET)
                    heard.append(os.lseek(state[2], 0, os.SEEK_CUR))
            return heard

    assert cycle(hold, prove) == [
        (b"before", []),
        (b"with", [b"0123456789"] * 2),
        [3, 7],
        5,
        (b"between", []),
        (b"again", [b"content"]),
        (b"after", []),
    ]


def test_descriptors_in_a_stream_arrive_with_their_byte(cycle: Any) -> None:
    """As multiprocessing sends them: one byte, which brings them, again and again."""

    def hold() -> Any:
        one, two = socket.socketpair()
        for number in range(3):
            count = os.eventfd(number + 1)
            socket.send_fds(one, [b"%d" % number], [count])
            os.close(count)
        one.send(b"after")
        return one.detach(), two.detach()

    def prove(state: Any) -> Any:
        with socket.socket(fileno=state[1]) as two:
            heard = [socket.recv_fds(two, 9, 8)[:2] for _ in range(4)]
            return [(data, [os.eventfd_read(fd) for fd in fds]) for data, fds in heard]

    assert cycle(hold, prove) == [(b"0", [1]), (b"1", [2]), (b"2", [3]), (b"after", [])]


def test_looking_at_descriptors_on_their_way_takes_nothing(cycle: Any) -> None:
    """Twice described, it is the same; nothing is left open here."""

    def hold() -> Any:
        one, two = socket.socketpair()
        socket.send_fds(one, [b"x"], [0])
        return one.detach(), two.detach()

    before = len(os.listdir("/proc/self/fd"))
    cycle.describe(hold, end=False)
    assert len(os.listdir("/proc/self/fd")) == before + 1  # the pidfd of the child


def send_with_counts(sender: socket.socket, pieces: list[tuple[bytes, int]]) -> None:
    """Each piece in a message of its own, with so many eventfds that count where it is sent."""
    at = 0
    for piece, count in pieces:
        counts = [os.eventfd(at + 1) for _ in range(count)]
        socket.send_fds(sender, [piece], counts) if counts else sender.send(piece)
        for descriptor in counts:
            os.close(descriptor)
        at += len(piece)


@pytest.mark.parametrize("passing", [False, True], ids=["plain", "with credentials"])
def test_descriptors_in_a_stream_arrive_with_their_bytes(cycle: Any, passing: bool) -> None:
    """Each is received with the first of the bytes it was sent with, and not with others."""
    sent = [(b"bytes", 1), (b"more of them", 2), (b"x", 1), (b"and so on", 3), (b"no more", 0)]

    def hold() -> Any:
        one, two = socket.socketpair()
        if passing:
            two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        send_with_counts(one, sent)
        return one.detach(), two.detach()

    def prove(state: Any) -> Any:
        heard, found = b"", []
        with socket.socket(fileno=state[1]) as two:
            assert two.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == passing
            two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
            while len(heard) < sum(len(piece) for piece, _ in sent):
                data, fds, _, _ = socket.recv_fds(two, 1, 8)  # a byte at a time: who brings what
                heard += data
                found += [(len(heard), os.eventfd_read(fd)) for fd in fds]
        return heard, found

    heard, found = cycle(hold, prove)
    assert heard == b"".join(piece for piece, _ in sent)
    assert len(found) == sum(count for _, count in sent)
    assert all(at == count for at, count in found)


@pytest.mark.shows("refused", "descriptors under way in a unix stream behind bytes sent without")
@pytest.mark.parametrize("pieces", [[(b"before", 0), (b"with", 1)], [(b"x" * 5000, 1)]])
def test_descriptors_with_unknown_bytes_of_a_stream_are_refused(cycle: Any, pieces: Any) -> None:
    """Where there may be several pieces nobody can tell which of the bytes brings them."""
    from lzy.checkpoint.errors import Unsupported

    def hold() -> Any:
        one, two = socket.socketpair()
        send_with_counts(one, pieces)
        return one.detach(), two.detach()

    with pytest.raises(Unsupported, match="SCM_RIGHTS") as caught:
        cycle.describe(hold)
    assert caught.value.remedy


@pytest.mark.shows("survives", "ends of pipes and sockets that are under way and open nowhere else")
def test_ends_that_only_travel_arrive(cycle: Any) -> None:
    """As servers hand connections to workers: with what is queued in them, one within another."""

    def hold() -> Any:
        one, two = socket.socketpair()
        read, write = os.pipe()
        near, far = socket.socketpair()
        inner, outer = socket.socketpair()
        os.write(write, b"in the pipe")
        os.write(os.dup(outer.fileno()), b"deeper")
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
        client.sendall(b"request")
        socket.send_fds(far, [b"queued!"], [inner.fileno()])
        inner.close()
        socket.send_fds(one, [b"x"], [read, near.fileno(), accepted.fileno()])
        os.close(read)
        near.close()
        accepted.close()
        kept = [it.detach() for it in (one, two, far, outer, client)]
        return [*kept, write]

    def prove(state: Any) -> Any:
        _one, two, far, outer, client = (socket.socket(fileno=fd) for fd in state[:5])
        _, (read, near, accepted), _, _ = socket.recv_fds(two, 9, 9)
        os.write(state[5], b" and more")
        heard = [os.read(read, 99)]
        with socket.socket(fileno=near) as near, socket.socket(fileno=accepted) as accepted:
            data, (inner,), _, _ = socket.recv_fds(near, 7, 9)
            heard += [data, os.read(inner, 99), accepted.recv(99)]
            for sender, receiver in ((accepted, client), (near, far)):
                sender.send(b"answer")
                heard.append(receiver.recv(9))
            os.write(inner, b"out")
            heard.append(outer.recv(9))
        os.close(inner)
        os.close(read)
        return heard

    assert cycle(hold, prove) == [
        b"in the pipe and more", b"queued!", b"deeper", b"request", b"answer", b"answer", b"out",
    ]  # fmt: skip


@pytest.mark.shows("refused", "an epoll or the like under way that no process has open")
def test_an_epoll_that_only_travels_is_refused(cycle: Any) -> None:
    """What it watches it knows under the numbers of a process that has it open."""
    from lzy.checkpoint.errors import Unsupported

    def hold() -> Any:
        one, two = socket.socketpair()
        with select.epoll() as epoll:
            socket.send_fds(one, [b"x"], [epoll.fileno()])
        return one.detach(), two.detach()

    with pytest.raises(Unsupported, match="SCM_RIGHTS") as caught:
        cycle.describe(hold)
    assert caught.value.remedy


@pytest.mark.shows("refused", "a socket of another network namespace")
def test_a_socket_of_another_network_is_refused(cycle: Any) -> None:
    """It would be made again where nobody could reach it."""
    import ctypes

    from lzy.checkpoint.errors import Unsupported

    def hold() -> int:
        clone_newnet = 0x40000000
        assert ctypes.CDLL(None).unshare(clone_newnet) == 0
        return socket.create_server(("127.0.0.1", 0)).detach()

    with pytest.raises(Unsupported, match="network namespace"):
        cycle.describe(hold)


def test_an_error_that_waits_is_not_taken_and_waits_again(cycle: Any) -> None:
    """A peer that closed with bytes unread: ECONNRESET once, then end of file."""
    from lzy.checkpoint.resources import describe_descriptors

    def hold() -> int:
        one, two = socket.socketpair()
        two.send(b"data")
        one.send(b"never read")
        two.close()
        return one.detach()

    def prove(number: int) -> Any:
        sock = socket.socket(fileno=number)
        heard: list[Any] = [sock.recv(9)]
        try:
            heard.append(sock.recv(9))
        except ConnectionResetError:
            heard.append("reset")
        return [*heard, sock.recv(9)]

    number = cycle.describe(hold, end=False)
    process = cycle.processes[0]
    again = describe_descriptors(process.pid, process.pidfd, cycle.objects)
    assert again == cycle.table
    assert cycle.restore(lambda: prove(number)) == [b"data", "reset", b""]
