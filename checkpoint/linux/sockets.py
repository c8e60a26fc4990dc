"""Sockets as the kernel knows them: options worth keeping, states, and what only netlink tells.

Sources: socket(7), ip(7), ipv6(7), tcp(7), udp(7), unix(7), sock_diag(7), linux/unix_diag.h,
linux/tcp.h, asm-generic/socket.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import select
import socket
import struct

TCP_ESTABLISHED, TCP_SYN_SENT, TCP_SYN_RECV, TCP_FIN_WAIT1, TCP_FIN_WAIT2 = 1, 2, 3, 4, 5
TCP_TIME_WAIT, TCP_CLOSE, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_LISTEN, TCP_CLOSING = 6, 7, 8, 9, 10, 11
TCP_OWN_END_SHUT = (TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSING, TCP_LAST_ACK, TCP_TIME_WAIT)
_END_HAS_COME = (TCP_TIME_WAIT, TCP_CLOSE, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING)
SHUT_READ_BIT, SHUT_WRITE_BIT = 1, 2

SIOCINQ = 0x541B
SIOCOUTQ = 0x5411
SO_PEEK_OFF = 42
SO_GET_FILTER = 26
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_BUF_LOCK = 72
LOCK_SNDBUF, LOCK_RCVBUF = 1, 2
TCP_ULP = 31
TCP_REPAIR = 19
TCP_REPAIR_QUEUE = 20
TCP_REPAIR_ON, TCP_REPAIR_OFF_QUIETLY = 1, -1
TCP_QUEUE_SEQ = 21
TCP_RECV_QUEUE, TCP_SEND_QUEUE = 1, 2
_MSG_CMSG_CLOEXEC = 0x40000000

_BASE, _IP, _TCP, _IPV6, _UDP, _NETLINK = 1, 0, 6, 41, 17, 270
OPTIONS: dict[str, tuple[int, int]] = {
    # socket(7). SO_SNDBUF and SO_RCVBUF are apart: the kernel doubles and tunes them.
    "SO_REUSEADDR": (_BASE, 2),
    "SO_REUSEPORT": (_BASE, 15),
    "SO_BINDTODEVICE": (_BASE, 25),
    "SO_MARK": (_BASE, 36),
    "SO_DONTROUTE": (_BASE, 5),
    "SO_BROADCAST": (_BASE, 6),
    "SO_KEEPALIVE": (_BASE, 9),
    "SO_OOBINLINE": (_BASE, 10),
    "SO_LINGER": (_BASE, 13),
    "SO_PASSCRED": (_BASE, 16),
    "SO_RCVLOWAT": (_BASE, 18),
    "SO_RCVTIMEO": (_BASE, 20),
    "SO_SNDTIMEO": (_BASE, 21),
    "SO_TIMESTAMP": (_BASE, 29),
    "SO_PASSSEC": (_BASE, 34),
    "SO_TIMESTAMPNS": (_BASE, 35),
    "SO_RXQ_OVFL": (_BASE, 40),
    "SO_PEEK_OFF": (_BASE, SO_PEEK_OFF),
    "SO_SELECT_ERR_QUEUE": (_BASE, 45),
    "SO_NOFCS": (_BASE, 43),
    "SO_TIMESTAMPING": (_BASE, 37),
    "SO_TXTIME": (_BASE, 61),
    "SO_PREFER_BUSY_POLL": (_BASE, 69),
    "SO_BUSY_POLL_BUDGET": (_BASE, 70),
    "SO_TXREHASH": (_BASE, 74),
    "SO_RCVMARK": (_BASE, 75),
    "SO_RCVPRIORITY": (_BASE, 82),
    "SO_PASSRIGHTS": (_BASE, 83),
    "SO_BUSY_POLL": (_BASE, 46),
    "SO_MAX_PACING_RATE": (_BASE, 47),
    "SO_ZEROCOPY": (_BASE, 60),
    "SO_PASSPIDFD": (_BASE, 76),
    # ip(7)
    "IP_FREEBIND": (_IP, 15),
    "IP_TRANSPARENT": (_IP, 19),
    "IP_BIND_ADDRESS_NO_PORT": (_IP, 24),
    "IP_LOCAL_PORT_RANGE": (_IP, 51),
    "IP_TOS": (_IP, 1),
    "IP_TTL": (_IP, 2),
    "IP_RECVOPTS": (_IP, 6),
    "IP_PKTINFO": (_IP, 8),
    "IP_MTU_DISCOVER": (_IP, 10),
    "IP_RECVERR": (_IP, 11),
    "IP_RECVTTL": (_IP, 12),
    "IP_RECVTOS": (_IP, 13),
    "IP_RECVORIGDSTADDR": (_IP, 20),
    "IP_RETOPTS": (_IP, 7),
    "IP_PASSSEC": (_IP, 18),
    "IP_CHECKSUM": (_IP, 23),
    "IP_RECVFRAGSIZE": (_IP, 25),
    "IP_RECVERR_RFC4884": (_IP, 26),
    "IP_MINTTL": (_IP, 21),
    "IP_MULTICAST_TTL": (_IP, 33),
    "IP_MULTICAST_LOOP": (_IP, 34),
    "IP_MULTICAST_IF": (_IP, 32),
    "IP_MULTICAST_ALL": (_IP, 49),
    "IP_UNICAST_IF": (_IP, 50),
    # ipv6(7)
    "IPV6_V6ONLY": (_IPV6, 26),
    "IPV6_FREEBIND": (_IPV6, 78),
    "IPV6_TRANSPARENT": (_IPV6, 75),
    "IPV6_UNICAST_HOPS": (_IPV6, 16),
    "IPV6_MULTICAST_IF": (_IPV6, 17),
    "IPV6_MULTICAST_HOPS": (_IPV6, 18),
    "IPV6_MULTICAST_LOOP": (_IPV6, 19),
    "IPV6_MULTICAST_ALL": (_IPV6, 29),
    "IPV6_MTU_DISCOVER": (_IPV6, 23),
    "IPV6_RECVERR": (_IPV6, 25),
    "IPV6_RECVPKTINFO": (_IPV6, 49),
    "IPV6_RECVHOPLIMIT": (_IPV6, 51),
    "IPV6_RECVTCLASS": (_IPV6, 66),
    "IPV6_TCLASS": (_IPV6, 67),
    "IPV6_UNICAST_IF": (_IPV6, 76),
    "IPV6_RECVERR_RFC4884": (_IPV6, 31),
    "IPV6_FLOWINFO_SEND": (_IPV6, 33),
    "IPV6_RECVHOPOPTS": (_IPV6, 53),
    "IPV6_RECVRTHDR": (_IPV6, 56),
    "IPV6_RECVDSTOPTS": (_IPV6, 58),
    "IPV6_RECVPATHMTU": (_IPV6, 60),
    "IPV6_DONTFRAG": (_IPV6, 62),
    "IPV6_AUTOFLOWLABEL": (_IPV6, 70),
    "IPV6_ADDR_PREFERENCES": (_IPV6, 72),
    "IPV6_MINHOPCOUNT": (_IPV6, 73),
    "IPV6_RECVORIGDSTADDR": (_IPV6, 74),
    "IPV6_RECVFRAGSIZE": (_IPV6, 77),
    # tcp(7). What the kernel tunes by itself (segment size, window clamp) is left to it.
    "TCP_NODELAY": (_TCP, 1),
    "TCP_CORK": (_TCP, 3),
    "TCP_KEEPIDLE": (_TCP, 4),
    "TCP_KEEPINTVL": (_TCP, 5),
    "TCP_KEEPCNT": (_TCP, 6),
    "TCP_SYNCNT": (_TCP, 7),
    "TCP_LINGER2": (_TCP, 8),
    "TCP_DEFER_ACCEPT": (_TCP, 9),
    "TCP_CONGESTION": (_TCP, 13),
    "TCP_THIN_LINEAR_TIMEOUTS": (_TCP, 16),
    "TCP_USER_TIMEOUT": (_TCP, 18),
    "TCP_FASTOPEN": (_TCP, 23),
    "TCP_NOTSENT_LOWAT": (_TCP, 25),
    "TCP_SAVE_SYN": (_TCP, 27),
    "TCP_INQ": (_TCP, 36),
    "TCP_THIN_DUPACK": (_TCP, 17),
    "TCP_FASTOPEN_CONNECT": (_TCP, 30),
    "TCP_FASTOPEN_NO_COOKIE": (_TCP, 34),
    "TCP_TX_DELAY": (_TCP, 37),
    # netlink(7)
    "NETLINK_PKTINFO": (_NETLINK, 3),
    "NETLINK_BROADCAST_ERROR": (_NETLINK, 4),
    "NETLINK_NO_ENOBUFS": (_NETLINK, 5),
    "NETLINK_CAP_ACK": (_NETLINK, 10),
    "NETLINK_EXT_ACK": (_NETLINK, 11),
    "NETLINK_GET_STRICT_CHK": (_NETLINK, 12),
    "TCP_RTO_MAX_MS": (_TCP, 44),
    "TCP_RTO_MIN_US": (_TCP, 45),
    "TCP_DELACK_MAX_US": (_TCP, 46),
    # udp(7)
    "UDP_NO_CHECK6_TX": (_UDP, 101),
    "UDP_NO_CHECK6_RX": (_UDP, 102),
    "UDP_SEGMENT": (_UDP, 103),
    "UDP_GRO": (_UDP, 104),
    # Last, because IP_TOS changes it.
    "SO_PRIORITY": (_BASE, 12),
}
BEFORE_BIND = frozenset(
    {
        "SO_REUSEPORT",
        "SO_BINDTODEVICE",
        "SO_MARK",
        "IP_FREEBIND",
        "IP_TRANSPARENT",
        "IP_BIND_ADDRESS_NO_PORT",
        "IP_LOCAL_PORT_RANGE",
        "IPV6_V6ONLY",
        "IPV6_FREEBIND",
        "IPV6_TRANSPARENT",
    }
)
FOR_SPEED_ONLY = frozenset(
    {
        "SO_BUSY_POLL",
        "SO_BUSY_POLL_BUDGET",
        "SO_PREFER_BUSY_POLL",
        "SO_MAX_PACING_RATE",
        "SO_PRIORITY",
        "SO_TXREHASH",
        "TCP_CONGESTION",
        "TCP_FASTOPEN",
    }
)
"""Options without which a socket behaves the same, so that a kernel may lack them."""
_LEVELS_OF_FAMILY: dict[int, set[int]] = {
    socket.AF_UNIX: {_BASE},
    socket.AF_NETLINK: {_BASE, _NETLINK},
    socket.AF_INET: {_BASE, _IP, _TCP, _UDP},
    socket.AF_INET6: {_BASE, _IP, _IPV6, _TCP, _UDP},
}


@functools.cache
def _options_known(family: int, kind: int, protocol: int) -> list[tuple[str, int, int]]:
    levels = _LEVELS_OF_FAMILY[family]
    return [
        (name, level, option)
        for name, (level, option) in OPTIONS.items()
        if level in levels
        and (level not in (_TCP, _UDP) or level == protocol)
        and (kind == socket.SOCK_DGRAM or "MULTICAST" not in name)
    ]


def options_of(sock: socket.socket) -> dict[str, bytes]:
    """The values of all OPTIONS that this socket knows, as the kernel writes them."""
    answer = {}
    for name, level, option in _options_known(sock.family, sock.type, sock.proto):
        try:
            answer[name] = sock.getsockopt(level, option, 64)
        except OSError:
            continue  # this kernel or this socket does not know the option
    return answer


def set_option(sock: socket.socket, name: str, value: bytes) -> None:
    """Set one of OPTIONS."""
    sock.setsockopt(*OPTIONS[name], value)


def buffer_bytes(sock: socket.socket) -> tuple[int | None, int | None]:
    """Sizes of (send, receive) buffers the program has chosen; None where the kernel tunes it.

    In bytes as given to setsockopt: the kernel doubles them. Source: socket(7); SO_BUF_LOCK, 5.14.
    """
    try:
        locked = sock.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK)
    except OSError:
        return None, None  # an older kernel does not tell who chose: let it go on tuning
    send = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
    receive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
    return (send if locked & LOCK_SNDBUF else None, receive if locked & LOCK_RCVBUF else None)


def set_buffer_bytes(sock: socket.socket, send: int | None, receive: int | None) -> None:
    """Choose buffer sizes, beyond the sysctl limits where we may; None leaves it to the kernel."""
    for size, forced, usual in (
        (send, SO_SNDBUFFORCE, socket.SO_SNDBUF),
        (receive, SO_RCVBUFFORCE, socket.SO_RCVBUF),
    ):
        if size is not None:
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, size)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, usual, size)
    chosen = (LOCK_SNDBUF if send is not None else 0) | (LOCK_RCVBUF if receive is not None else 0)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, chosen)


# Plain classes: a NamedTuple takes a millisecond to make, and every restore would pay for it.


class Message:
    """One message (or, of a stream, some bytes) in a receive queue."""

    def __init__(self, data: bytes, sender: object, descriptors: list[int]) -> None:
        self.data = data
        self.sender = sender
        """The address as Python's socket module writes it; None or empty if there is none."""
        self.descriptors = descriptors
        """Duplicates of those that are under way with it (SCM_RIGHTS); ours to close."""
        self.descriptions: list[int | None] = []
        """What they are, once somebody has taken them to look."""

    def close(self) -> None:
        """Close the duplicates."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def peek_messages(sock: socket.socket, largest_bytes: int, *, ended: bool) -> list[Message]:
    """Everything in the receive queue, in order, consuming nothing, not even a waiting error.

    `largest_bytes` bounds one message; `ended` says that nothing more can come, so that an empty
    message of a SOCK_SEQPACKET socket means the end. One look is enough for a stream and for an
    empty queue; only for further messages SO_PEEK_OFF is used, and put back (socket(7)).
    """
    ready = readiness(sock)
    if ready & select.POLLERR and not ready & select.POLLIN:
        return []
    is_stream = sock.type == socket.SOCK_STREAM
    # A stream is read no further than its queue: beyond, an error or end of file waits.
    unread = _queue_bytes(sock.fileno(), SIOCINQ) if is_stream else 1
    if not unread:
        return []
    try:
        offset = sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    except OSError:
        offset = -1  # TCP knows it since Linux 6.9 only
    first = None
    if offset < 0:
        first = _peek(sock, max(unread, largest_bytes))
        if first is None or (sock.type == socket.SOCK_SEQPACKET and not first.data and ended):
            return []
        # One byte of a TCP stream may be urgent and is left out.
        if (
            is_stream
            and not first.descriptors
            and (len(first.data) >= unread or sock.proto == _TCP)
        ):
            return [first]
        if first.data:
            first.close()  # it is peeked at again
    # An empty message that was peeked at is passed over from now on (__skb_try_recv_from_queue).
    messages = [first] if offset < 0 and first and not first.data else []
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        while unread > 0 and (message := _peek(sock, largest_bytes)) is not None:
            if sock.type == socket.SOCK_SEQPACKET and not message.data and ended:
                break
            if is_stream:
                unread -= len(message.data) or unread
            messages.append(message)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)
    return messages


def most_pieces(sender: int) -> int:
    """In how many pieces, at most, what is under way from a unix stream socket was sent.

    All that is under way is on its sender's account, with the room that the kernel has made for it
    (SIOCOUTQ; sock_alloc_send_pskb), and there is least room in a piece of a single byte.
    """
    one, two = socket.socketpair()
    with one, two:
        one.send(b"x")
        return queued_to_send(sender) // queued_to_send(one.fileno())


def _peek(sock: socket.socket, largest_bytes: int) -> Message | None:
    """One message at the offset to peek at, or None."""
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | _MSG_CMSG_CLOEXEC
    try:
        data, ancillary, answer, sender = sock.recvmsg(largest_bytes, 4096, flags)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.EINVAL):
            return None
        raise
    if answer & socket.MSG_TRUNC:
        raise OSError(errno.EMSGSIZE, "a message is larger than the queue")
    return Message(data, sender, _take_descriptors(ancillary))


def readiness(sock: socket.socket) -> int:
    """What poll(2) says of a socket now, as POLLIN, POLLRDHUP, POLLERR…; nothing is taken."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLOUT | select.POLLRDHUP)
    return dict(poll.poll(0)).get(sock.fileno(), 0)


def _take_descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a peeked message: duplicates, ours."""
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(data) // 4
            found += struct.unpack(f"={count}i", data[: 4 * count])
    return found


class TcpState:
    """What TCP_INFO says: state, and for a listener its queue of unaccepted connections."""

    def __init__(self, state: int, waiting: int, backlog: int) -> None:
        self.state = state
        self.waiting = waiting
        self.backlog = backlog


def tcp_state(sock: socket.socket) -> TcpState:
    """State of a TCP socket. Source: linux/tcp.h, struct tcp_info; tcp_get_info()."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    # tcpi_unacked and tcpi_sacked of a listener are the accept queue's length and its limit.
    waiting, backlog = struct.unpack_from("=II", raw, 24)
    return TcpState(raw[0], waiting, backlog)


def arrived_tcp_bytes(receiver: socket.socket) -> int:
    """How many bytes have ever arrived. The network goes on while processes are frozen."""
    raw = receiver.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    return int(struct.unpack_from("=Q", raw, 128)[0])


def unsent_tcp_bytes(sender: socket.socket, receiver: socket.socket) -> bytes:
    """Bytes that `sender` has written and that have not reached `receiver`, its other end.

    Both must be of frozen processes; both are left as they were. The answer counts only if
    `arrived_tcp_bytes` is the same before and after. Needs CAP_NET_ADMIN (PermissionError), but
    only if there are such bytes. Source: struct tcp_info in linux/tcp.h; TCP_REPAIR_QUEUE in
    net/ipv4/tcp.c, which lets the send queue be peeked at.
    """
    unacknowledged = queued_to_send(sender.fileno())
    missing = _undelivered(sender, receiver) if unacknowledged else 0
    if not missing:
        return b""
    with _Repair(sender):
        sender.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
        # What the receiver has but has not acknowledged yet comes first in this queue. If an
        # acknowledgement comes now, the kernel takes what is unsent for sent, and sends it again
        # a little later (tcp_write_xmit): a delay, which also makes its counters useless to us.
        data = sender.recv(unacknowledged, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    return data[-missing:]


def _undelivered(sender: socket.socket, receiver: socket.socket) -> int:
    """How many bytes are between two ends: written here and not yet in the queue there."""
    try:
        written = _sequence(sender, TCP_SEND_QUEUE)
        missing = (written - _sequence(receiver, TCP_RECV_QUEUE)) & 0xFFFFFFFF
    except PermissionError:
        missing = _undelivered_by_counters(sender, receiver)
    # The end of the stream counts as a byte, if it is under way.
    if tcp_state(sender).state in TCP_OWN_END_SHUT:
        missing -= tcp_state(receiver).state not in _END_HAS_COME
    return missing


def _sequence(sock: socket.socket, queue: int) -> int:
    """The number of the next byte of a queue."""
    with _Repair(sock):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        return sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF


def _undelivered_by_counters(sender: socket.socket, receiver: socket.socket) -> int:
    """The same without privilege, the end of the stream included if it is under way."""
    here = sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
    if len(here) < 216:
        raise OSError(errno.ENOSYS, "TCP_INFO tells too little: Linux 4.19 or later is needed")
    (not_sent,) = struct.unpack_from("=I", here, 144)
    sent, sent_again = struct.unpack_from("=QQ", here, 200)
    missing = sent - sent_again + not_sent - arrived_tcp_bytes(receiver)
    shut = here[0] in TCP_OWN_END_SHUT
    if shut and tcp_state(receiver).state in _END_HAS_COME:
        missing += 1  # it is among what has arrived and not among what was sent
    elif shut and not not_sent:
        missing += 1  # it was sent, and is not counted there either
    return int(missing)


class _Repair:
    """A TCP socket in repair mode for a while; it forgets SO_REUSEADDR, which is put back."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)

    def __enter__(self) -> None:
        self.sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON)

    def __exit__(self, *_: object) -> None:
        self.sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_QUIETLY)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, self.reuse)


# --- unix sockets, by netlink --------------------------------------------------------------------

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_SHOW = 0x01 | 0x02 | 0x04 | 0x08 | 0x10  # name, vfs, peer, pending connections, queue lengths
_DIAG_VFS, _DIAG_PEER, _DIAG_ICONS, _DIAG_RQLEN, _DIAG_SHUTDOWN = 1, 2, 3, 4, 6


class UnixState:
    """What unix_diag says of one socket."""

    def __init__(self, state: int, attributes: dict[int, bytes]) -> None:
        waiting = attributes.get(_DIAG_ICONS, b"")
        lengths = attributes.get(_DIAG_RQLEN, bytes(8))
        peer = attributes.get(_DIAG_PEER)
        file = attributes.get(_DIAG_VFS)
        self.state = state
        """TCP_ESTABLISHED (connected), TCP_LISTEN or TCP_CLOSE."""
        self.peer_inode: int | None = struct.unpack("=I", peer)[0] if peer else None
        """None without a peer; 0 for one that no process has (dead, or not accepted yet)."""
        self.waiting: list[int] = list(struct.unpack(f"={len(waiting) // 4}I", waiting))
        """Inodes of the clients that wait to be accepted."""
        self.send_queue: int = struct.unpack_from("=I", lengths, 4)[0]
        """Of a listener: its backlog."""
        self.shutdown = attributes.get(_DIAG_SHUTDOWN, b"\0")[0]
        """SHUT_READ_BIT | SHUT_WRITE_BIT."""
        self.file_inode: int | None = struct.unpack_from("=I", file)[0] if file else None
        """Inode of the socket's file (its low 32 bits)."""


def unix_state(inode: int) -> UnixState:
    """What the kernel knows of the unix socket `inode` in our network namespace.

    Raises FileNotFoundError if there is none. Source: sock_diag(7).
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as link:
        no_cookie = 0xFFFFFFFF
        body = struct.pack(
            "=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, _SHOW, no_cookie, no_cookie
        )
        length_bytes = 16 + len(body)
        link.send(struct.pack("=IHHII", length_bytes, _SOCK_DIAG_BY_FAMILY, 1, 1, 0) + body)
        reply = link.recv(65536)
    length_bytes, kind = struct.unpack_from("=IH", reply)
    if kind == _NLMSG_ERROR:
        number = -struct.unpack_from("=i", reply, 16)[0]
        raise OSError(number, os.strerror(number))
    state = reply[18]
    attributes: dict[int, bytes] = {}
    position = 32
    while position + 4 <= length_bytes:
        size, name = struct.unpack_from("=HH", reply, position)
        attributes[name] = reply[position + 4 : position + size]
        position += size + 3 & ~3
    return UnixState(state, attributes)


def queued_to_send(fd: int) -> int:
    """Bytes that a socket has sent and the other end has not taken. Source: SIOCOUTQ, unix(7)."""
    return _queue_bytes(fd, SIOCOUTQ)


def _queue_bytes(fd: int, request: int) -> int:
    return int(struct.unpack("=i", fcntl.ioctl(fd, request, bytes(4)))[0])


# --- datagrams -----------------------------------------------------------------------------------


def send_as(source: str, source_port: int, host: str, port: int, data: bytes) -> None:
    """Send an IPv4 datagram to this machine that claims to come from `source`.

    Needs CAP_NET_RAW. Source: raw(7), RFC 768 (checksum 0: none), RFC 791.
    """
    source_raw = socket.inet_aton(source.removeprefix("::ffff:"))
    host_raw = socket.inet_aton(host.removeprefix("::ffff:"))
    datagram = struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(datagram), 0, 0, 64, _UDP, 0, source_raw, host_raw
    )
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
        sender.sendto(header + datagram, (socket.inet_ntoa(host_raw), 0))


_MCAST_JOIN_GROUP = 42
_MCAST_MSFILTER = 48


def memberships(sock: socket.socket) -> list[list[object]]:
    """Multicast groups that a socket has joined, as [interface index, group].

    No call lists them; each group that any socket of this machine has joined is asked for.
    Source: ip(7), RFC 3678 (MCAST_MSFILTER), /proc/net/igmp, /proc/net/igmp6.
    """
    found: list[list[object]] = []
    for interface, group in _groups_of_machine(sock.family):
        address = _sockaddr_storage(sock.family, group)
        level = _IP if sock.family == socket.AF_INET else _IPV6
        request = struct.pack("=I4x", interface) + address + struct.pack("=II", 0, 0)
        if _answers(sock, level, _MCAST_MSFILTER, request):
            found.append([interface, group])
    return found


def join(sock: socket.socket, group: list[object]) -> None:
    """Join a multicast group again. Source: RFC 3678, MCAST_JOIN_GROUP."""
    interface, address = group
    level = _IP if sock.family == socket.AF_INET else _IPV6
    request = struct.pack("=I4x", interface) + _sockaddr_storage(sock.family, str(address))
    sock.setsockopt(level, _MCAST_JOIN_GROUP, request)


_NETLINK_ADD_MEMBERSHIP, _NETLINK_LIST_MEMBERSHIPS = 1, 9


def netlink_groups(sock: socket.socket) -> list[int]:
    """The groups that a netlink socket listens to. Source: netlink(7), NETLINK_LIST_MEMBERSHIPS."""
    words = sock.getsockopt(_NETLINK, _NETLINK_LIST_MEMBERSHIPS, 512)
    mask = int.from_bytes(words, "little")
    return [bit + 1 for bit in range(mask.bit_length()) if mask >> bit & 1]


def join_netlink_group(sock: socket.socket, group: int) -> None:
    """Listen to a group. Source: netlink(7), NETLINK_ADD_MEMBERSHIP."""
    sock.setsockopt(_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)


def is_answering(inode: int) -> bool:
    """Whether the kernel has more to say to a question put through that netlink socket.

    Source: /proc/net/netlink, its column Dump.
    """
    with open("/proc/net/netlink", encoding="ascii") as file:
        rows = [line.split() for line in file]
    dump, last = rows[0].index("Dump"), rows[0].index("Inode")
    return any(row[last] == str(inode) and row[dump] != "0" for row in rows[1:])


def _groups_of_machine(family: int) -> list[tuple[int, str]]:
    groups: list[tuple[int, str]] = []
    interface = 0
    try:
        if family == socket.AF_INET:
            with open("/proc/net/igmp", encoding="ascii") as file:
                for line in file.readlines()[1:]:
                    words = line.split()
                    if not line.startswith("\t"):
                        interface = int(words[0])
                    else:
                        raw = struct.pack("=I", int(words[0], 16))
                        groups.append((interface, socket.inet_ntoa(raw)))
        else:
            with open("/proc/net/igmp6", encoding="ascii") as file:
                for line in file:
                    words = line.split()
                    raw = bytes.fromhex(words[2])
                    groups.append((int(words[0]), socket.inet_ntop(socket.AF_INET6, raw)))
    except FileNotFoundError:
        return []
    return groups


def _sockaddr_storage(family: int, address: str) -> bytes:
    raw = socket.inet_pton(family, address)
    if family == socket.AF_INET:
        return struct.pack("=HH4s", family, 0, raw).ljust(128, b"\0")
    return struct.pack("=HHI16sI", family, 0, 0, raw, 0).ljust(128, b"\0")


def _answers(sock: socket.socket, level: int, option: int, request: bytes) -> bool:
    """Whether getsockopt(2) answers a request that is itself an argument (Python has no way)."""
    import ctypes

    from . import libc

    buffer = ctypes.create_string_buffer(request, len(request))
    length_bytes = ctypes.c_uint(len(request))
    libc.getsockopt.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 2
    result: int = libc.getsockopt(
        sock.fileno(), level, option, buffer, ctypes.addressof(length_bytes)
    )
    return result == 0
