"""What all sockets have in common: their options, and the messages in their queues as JSON."""

from __future__ import annotations

import base64
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..errors import Incompatible
from ..linux import sockets as kernel

if TYPE_CHECKING:
    from .assembly import Assembly
    from .kind import Entry
    from .survey import Opened, Survey


@contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket object for a descriptor that somebody else owns."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def is_socket_of(opened: Opened, families: tuple[int, ...], protocols: tuple[int, ...]) -> bool:
    """Whether the description is a socket of one of the families and protocols."""
    if not opened.link.startswith("socket:") or opened.is_path_only:
        return False
    with borrowed(opened.fd) as sock:
        return sock.family in families and sock.proto in protocols


def describe_socket(opened: Opened, sock: socket.socket) -> Entry:
    """Family, type, protocol, and the options that are not what a fresh socket has."""
    if not opened.survey.once("same network", lambda: _same_network(opened.survey.witness)):
        raise opened.refusal(
            "it belongs to another network namespace than lzy's",
            "run lzy in the network of the process (in its container, or with `nsenter -n`)",
        )
    # A socket's O_NONBLOCK must not be touched: Python would set it on a socket with a timeout.
    if filters := _filters(sock):
        raise opened.refusal(filters, "let the process remove it (SO_DETACH_FILTER)")
    family, kind, protocol = sock.family, sock.type, sock.proto

    def ask_fresh() -> dict[str, bytes]:
        with socket.socket(family, kind, protocol) as fresh:
            return kernel.options_of(fresh)

    usual = opened.survey.once(("options", family, kind, protocol), ask_fresh)
    options = {
        name: _to_json(value)
        for name, value in kernel.options_of(sock).items()
        if usual.get(name) != value
    }
    send, receive = kernel.buffer_bytes(sock)
    return {
        "family": int(family),
        "type": int(kind),
        "protocol": protocol,
        "options": options,
        "send_buffer_bytes": send,
        "receive_buffer_bytes": receive,
    }


def make_socket(entry: Entry) -> socket.socket:
    """A fresh socket with those options that count before it has an address."""
    sock = socket.socket(entry["family"], entry["type"], entry["protocol"])
    try:
        for name, value in entry["options"].items():
            if name in kernel.BEFORE_BIND:
                _set(sock, name, value)
    except BaseException:
        sock.close()
        raise
    return sock


def settle_options(sock: socket.socket, entry: Entry) -> None:
    """Give a socket the options it had."""
    for name in kernel.OPTIONS:
        if name not in entry["options"]:
            continue
        if name in kernel.BEFORE_BIND:
            # Set by make_socket where that was possible; some cannot be set any more.
            with suppress(Incompatible):
                _set(sock, name, entry["options"][name])
        else:
            _set(sock, name, entry["options"][name])
    # It was set to get an address on which connections of old may linger.
    if "SO_REUSEADDR" not in entry["options"] and entry["family"] != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    kernel.set_buffer_bytes(sock, entry["send_buffer_bytes"], entry["receive_buffer_bytes"])


def peek(opened: Opened, sock: socket.socket) -> list[dict[str, Any]]:
    """The receive queue as `[{"data": base64, "from": address}]`; nothing is consumed."""
    return describe_messages(opened, sock, look_at_queue(sock))


def look_at_queue(sock: socket.socket, *, ended: bool = False) -> list[kernel.Message]:
    """Everything in the receive queue; nothing is consumed. `ended`: nothing more can come."""
    largest_bytes = max(1 << 20, 2 * sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
    return kernel.peek_messages(sock, largest_bytes, ended=ended)


def describe_messages(
    opened: Opened,
    sock: socket.socket,
    messages: list[kernel.Message],
    sender: Opened | None = None,
) -> list[dict[str, Any]]:
    """As `peek`, of what was looked at; `sender` is the other end of a stream, if it is there."""
    if any(message.descriptions for message in messages):
        if sock.type == socket.SOCK_STREAM:
            _refuse_unclear(opened, messages, sender)
        return [_describe_message(opened, message) for message in messages]
    if sock.type == socket.SOCK_STREAM:
        data = b"".join(message.data for message in messages)
        return [{"data": encode(data)}] if data else []
    return [
        {"data": encode(message.data), "from": address_to_json(message.sender)}
        for message in messages
    ]


_MAY_TRAVEL = (
    "file", "memfd", "device", "eventfd", "timerfd", "signalfd",
    "pipe", "unix_socket", "tcp_socket", "udp_socket",
)  # fmt: skip


def find_travelling(messages: list[kernel.Message], survey: Survey) -> None:
    """Say of each message which descriptions are under way in it (SCM_RIGHTS)."""
    for message in messages:
        survey.duplicates += message.descriptors
        taken, message.descriptors = message.descriptors, []
        message.descriptions = [survey.find_travelling(fd, _MAY_TRAVEL) for fd in taken]


def _refuse_unclear(opened: Opened, messages: list[kernel.Message], sender: Opened | None) -> None:
    """Raise Unsupported if nothing tells with which bytes of a stream its descriptors were sent.

    A look at a stream gives descriptors together with whatever bytes come before, up to the last of
    those that they were sent with, however short the look (the kernel's unix_stream_read_generic).
    So it is known of a single byte; and of several if no more pieces are under way than were seen.
    """
    unclear = [message for message in messages if message.descriptions and len(message.data) > 1]
    if unclear and (sender is None or kernel.most_pieces(sender.fd) > len(messages)):
        raise opened.refusal(
            "descriptors are on their way through it (SCM_RIGHTS), and nothing tells with which "
            f"of {len(unclear[0].data)} bytes",
            "let the process receive them, then dump again",
            passes=True,
        )


def _describe_message(opened: Opened, message: kernel.Message) -> dict[str, Any]:
    """A message with what is under way in it (SCM_RIGHTS), as indexes of descriptions."""
    described: dict[str, Any] = {
        "data": encode(message.data),
        "from": address_to_json(message.sender),
    }
    if None in message.descriptions:
        raise opened.refusal(
            "a descriptor is on its way through it (SCM_RIGHTS) that no process has open",
            "let the process receive it, then dump again",
            passes=True,
        )
    if message.descriptions:
        described["descriptors"] = message.descriptions
    return described


def encode(data: bytes) -> str:
    """Bytes as text for JSON."""
    return base64.b64encode(data).decode()


def decode(text: str) -> bytes:
    """The reverse of `encode`."""
    return base64.b64decode(text)


def fill(sender: socket.socket, data: bytes, what: str) -> None:
    """Send into a connection whose other end nobody reads yet, with room made for all of it."""
    if not data:
        return
    kernel.set_buffer_bytes(sender, len(data) + (1 << 16), None)
    sender.setblocking(False)
    view = memoryview(data)
    try:
        while view:
            view = view[sender.send(view) :]
    except BlockingIOError as error:
        raise Incompatible(
            f"the {len(data)} bytes under way in {what} are more than this machine lets a socket "
            "hold",
            remedy="raise net.core.wmem_max with sysctl, or restore as root",
        ) from error


def address_to_json(address: object) -> Any:
    """An address as JSON: a path as text, an abstract name as `{"abstract": base64}`."""
    if isinstance(address, bytes):
        return {"abstract": encode(address)}
    if isinstance(address, tuple):
        return list(address)
    return address or None


def address_from_json(value: Any) -> Any:
    """The reverse of `address_to_json`."""
    if isinstance(value, dict):
        return decode(value["abstract"])
    if isinstance(value, list):
        return tuple(value)
    return value


def bind_again(sock: socket.socket, address: Any) -> None:
    """Bind to the address of old; Incompatible (or Busy) says why that cannot be."""
    from ..errors import Busy

    try:
        sock.bind(address)
    except OSError as error:
        import errno

        if error.errno == errno.EADDRINUSE:
            raise Busy(
                f"the address {address} that the process used is taken",
                remedy="end the process that uses it (`ss -lntup` and `ss -lx` name it), then "
                "restore again",
                address=address,
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise Incompatible(
                f"this machine has no address {address[0]}, which the process used",
                remedy="restore where that address exists, or add it (`ip addr add`)",
                address=address,
            ) from error
        raise


def reach(assembly: Assembly, index: int) -> socket.socket:
    """A socket object of our own for description `index`, made when it was not yet."""
    return socket.socket(fileno=os.dup(assembly.make(index)))


def _same_network(pid: int) -> bool:
    theirs, ours = os.stat(f"/proc/{pid}/ns/net"), os.stat("/proc/self/ns/net")
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def _filters(sock: socket.socket) -> str:
    try:
        found = bool(sock.getsockopt(socket.SOL_SOCKET, kernel.SO_GET_FILTER, 1024))
    except OSError:
        found = True
    return "it has a packet filter (BPF)" if found else ""


def _set(sock: socket.socket, name: str, value: Any) -> None:
    try:
        kernel.set_option(sock, name, _from_json(value))
    except OSError as error:
        if name in kernel.FOR_SPEED_ONLY:
            return
        raise Incompatible(
            f"cannot set the socket option {name} to {value}: {error.strerror}",
            remedy="restore as root, or on a machine that has what the option names",
            option=name,
        ) from error


def _to_json(value: bytes) -> Any:
    return struct.unpack("=i", value)[0] if len(value) == 4 else {"bytes": encode(value)}


def _from_json(value: Any) -> bytes:
    return struct.pack("=i", value) if isinstance(value, int) else decode(value["bytes"])
