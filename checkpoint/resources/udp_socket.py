"""UDP sockets: address, peer, options, and the datagrams that wait with their senders' addresses.

A datagram is sent again from the address it came from: from the process's own socket there, from a
socket of the moment, or (as root, IPv4) with that address written into it. One that cannot be sent
again is lost, as UDP allows.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING, Any

from ..linux import sockets as kernel
from . import socket_state as state
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class UdpSocket(Kind):
    rank = 42

    def claims(self, opened: Opened) -> bool:
        return state.is_socket_of(opened, _FAMILIES, (socket.IPPROTO_UDP,))

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        with state.borrowed(opened.fd) as sock:
            entry = state.describe_socket(opened, sock)
            name = sock.getsockname()
            entry["name"] = list(name) if name[1] else None
            entry["peer_name"] = None
            with contextlib.suppress(OSError):
                entry["peer_name"] = list(sock.getpeername())
            entry["messages"] = state.peek(opened, sock)
            entry["groups"] = kernel.memberships(sock)
            return entry

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        sock = state.make_socket(entry)
        reuse = entry["options"].get("SO_REUSEADDR", 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        if entry["name"] is not None:
            state.bind_again(sock, tuple(entry["name"]))
        if entry["peer_name"] is not None:
            try:
                sock.connect(tuple(entry["peer_name"]))
            except OSError as error:
                if error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                    raise
        for group in entry["groups"]:
            with contextlib.suppress(OSError):  # the interface is not here
                kernel.join(sock, group)
        return sock.detach()

    def settle(self, index: int, entry: Entry, assembly: Assembly) -> None:
        with state.borrowed(assembly.local[index]) as sock:
            if entry["messages"]:
                room = sum(2 * len(m["data"]) + 4096 for m in entry["messages"])
                kernel.set_buffer_bytes(sock, None, room)
                for message in entry["messages"]:
                    _send_again(message, entry, assembly)
            state.settle_options(sock, entry)


def _send_again(message: dict[str, Any], entry: Entry, assembly: Assembly) -> None:
    data, source = state.decode(message["data"]), tuple(message["from"])
    host, port = entry["name"][0], entry["name"][1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    if "." in source[0] and host == "::1":
        host = "::ffff:127.0.0.1"
    for index, other in assembly.of_kind(KIND.name):
        if other["name"] is not None and _is_at(other["name"], source):
            with state.borrowed(assembly.local[index]) as sender:
                sender.sendto(data, (host, port))
            return
    with socket.socket(entry["family"], socket.SOCK_DGRAM) as sender:
        try:
            sender.bind(source)
            sender.sendto(data, (host, port))
            return
        except OSError:
            pass
    with contextlib.suppress(OSError):
        kernel.send_as(source[0], source[1], host, port, data)


def _is_at(name: list[Any], source: tuple[Any, ...]) -> bool:
    return name[1] == source[1] and name[0] in (source[0], "0.0.0.0", "::")


KIND = UdpSocket()
