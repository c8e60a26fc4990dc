"""Netlink sockets that only ask or listen: routes, sockets, device events, generic netlink.

What the kernel keeps for such a socket is its port, its groups and its options; a question that is
not answered to the end is not made again. Those of other protocols (audit, netfilter, IPsec) may
stand for rules in the kernel, and are refused.
"""

from __future__ import annotations

import errno
import select
import socket
from typing import TYPE_CHECKING

from ..linux import sockets as kernel
from . import socket_state as state
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_ROUTE, _SOCK_DIAG, _KOBJECT_UEVENT, _GENERIC = 0, 4, 15, 16  # linux/netlink.h
_PROTOCOLS = (_ROUTE, _SOCK_DIAG, _KOBJECT_UEVENT, _GENERIC)
_READ_THEM = "let the process read them, then dump again"


class NetlinkSocket(Kind):
    rank = 44

    def claims(self, opened: Opened) -> bool:
        return state.is_socket_of(opened, (socket.AF_NETLINK,), _PROTOCOLS)

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        with state.borrowed(opened.fd) as sock:
            entry = state.describe_socket(opened, sock)
            if kernel.readiness(sock) & select.POLLIN:
                raise opened.refusal("the kernel's messages in it are unread", _READ_THEM)
            if kernel.is_answering(opened.status.st_ino):
                raise opened.refusal("the kernel is just answering through it", _READ_THEM)
            return entry | {
                "port": sock.getsockname()[0],
                "groups": kernel.netlink_groups(sock),
                "peer_name": list(sock.getpeername()),
            }

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        sock = state.make_socket(entry)
        if entry["port"]:
            try:
                sock.bind((entry["port"], 0))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                sock.bind((0, 0))  # as the kernel chooses for one that does not ask
        for group in entry["groups"]:
            kernel.join_netlink_group(sock, group)
        if any(entry["peer_name"]):
            sock.connect(tuple(entry["peer_name"]))
        return sock.detach()

    def settle(self, index: int, entry: Entry, assembly: Assembly) -> None:
        with state.borrowed(assembly.local[index]) as sock:
            state.settle_options(sock, entry)


KIND = NetlinkSocket()
