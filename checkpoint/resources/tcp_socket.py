"""TCP sockets: listeners, connections with both ends here, and ends whose peer is outside.

A connection with both ends in the process is made again between the same addresses through a
listener that exists for the moment (before the process's own, so that no stranger's connection can
come in between), with the bytes under way in both directions and the ends that were shut. A peer
outside cannot be brought back: its end here gives what was queued and then end of file, as after
the loss of the network, over a connection of our own whose other side is closed.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from typing import TYPE_CHECKING, Any

from ..errors import Busy, Incompatible
from ..linux import sockets as kernel
from . import socket_state as state
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_TRIES = 100
_ROOM = 128  # backlog while connections are made again


class TcpSocket(Kind):
    rank = 41

    def claims(self, opened: Opened) -> bool:
        return state.is_socket_of(opened, _FAMILIES, (socket.IPPROTO_TCP,))

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        with state.borrowed(opened.fd) as sock:
            if ulp := _upper_protocol(sock):
                raise opened.refusal(
                    f"the kernel does {ulp} on it", "let the process close it, then dump again"
                )
            entry = state.describe_socket(opened, sock)
            facts = kernel.tcp_state(sock)
            entry["state"] = facts.state
            name = sock.getsockname()
            entry["name"] = list(name) if name[1] else None
            if facts.state == kernel.TCP_LISTEN:
                return entry | {"form": "listening", "backlog": facts.backlog}
            ready = kernel.readiness(sock)
            if facts.state == kernel.TCP_CLOSE and not ready & select.POLLRDHUP:
                return entry | {"form": "unconnected"}
            with contextlib.suppress(OSError):
                entry["peer_name"] = list(sock.getpeername())
            if facts.state == kernel.TCP_SYN_SENT:
                return entry | {"form": "connecting", "peer_name": _aimed_at(opened)}
            entry["reading_shut"] = bool(ready & select.POLLRDHUP)
            entry["failed"] = bool(ready & select.POLLERR)
            if (peer := _find_peer(opened, survey)) is not None:
                entry["messages"] = _peek_with_bytes_under_way(opened, peer, sock)
                return entry | {"form": "connected", "peer": peer.index}
            entry["messages"] = state.peek(opened, sock)
            if (listener := _find_waiting_room(entry, opened, survey)) is not None:
                return entry | {"form": "waiting", "listener": listener}
            return entry | {"form": "gone"}

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        assembly.once("tcp pairs", lambda: _make_all_pairs(assembly))
        if index in assembly.local:
            return assembly.local[index]
        form = entry["form"]
        if form == "gone":
            return assembly.adopt(index, _make_gone(index, entry, assembly))
        if form == "listening" and address_key(entry) in assembly.options.listeners:
            return assembly.adopt(index, os.dup(assembly.options.listeners[address_key(entry)]))
        sock = state.make_socket(entry)
        if entry["name"] is not None:
            _bind(sock, entry)
        if form == "listening":
            sock.listen(max(entry["backlog"], _ROOM))  # `settle` says the right number
        elif form == "waiting":
            with state.reach(assembly, entry["listener"]) as listener:
                address = _reachable(listener.getsockname(), entry)
            sock.connect(address)
        return assembly.adopt(index, sock.detach())

    def settle(self, index: int, entry: Entry, assembly: Assembly) -> None:
        if _is_stand_in(index, entry, assembly):
            return
        with state.borrowed(assembly.local[index]) as sock:
            if entry["form"] == "connected" and _is_deaf(entry, assembly):
                sock.shutdown(socket.SHUT_RD)
            if entry["form"] == "gone" and entry["state"] in (
                *kernel.TCP_OWN_END_SHUT,
                kernel.TCP_CLOSE,
            ):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
            if entry["form"] == "listening":
                sock.listen(entry["backlog"])
            elif entry["form"] == "connecting" and entry["peer_name"]:
                # The network lost the first attempt; this is the next.
                sock.setblocking(False)
                with contextlib.suppress(OSError):
                    sock.connect(tuple(entry["peer_name"]))
            state.settle_options(sock, entry)


# --- listening for a process that is away -----------------------------------------------------


def list_all_listening(table: Entry) -> list[Entry]:
    """The listening sockets of a table."""
    entries = [entry for entry in table["descriptions"] if entry["kind"] == KIND.name]
    return [entry for entry in entries if entry["form"] == "listening"]


def list_listening(table: Entry) -> list[Entry]:
    """The listening sockets of a table that others can listen at meanwhile.

    Not those whose port has connections with both ends inside: making these again needs the port.
    """
    entries = [entry for entry in table["descriptions"] if entry["kind"] == KIND.name]
    inner = {
        entry["name"][1]
        for entry in entries
        if entry["form"] in ("connected", "waiting") and entry["name"]
    } | {entry["peer_name"][1] for entry in entries if entry["form"] == "waiting"}
    return [entry for entry in list_all_listening(table) if entry["name"][1] not in inner]


def address_key(entry: Entry) -> str:
    """What tells one listening socket of a process from its others."""
    return f"{entry['family']} {entry['name'][0]} {entry['name'][1]}"


def keep_listening(entry: Entry) -> socket.socket:
    """A socket that listens where that of `entry` did. Raises OSError: the address is taken."""
    sock = state.make_socket(entry)
    try:
        _bind(sock, entry)
        sock.listen(max(entry["backlog"], 1))
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


# --- describing ------------------------------------------------------------------------------


def _upper_protocol(sock: socket.socket) -> str:
    try:
        name = sock.getsockopt(socket.IPPROTO_TCP, kernel.TCP_ULP, 16)
    except OSError:
        return ""
    return name.rstrip(b"\0").decode(errors="replace")


def _plain(address: Any) -> tuple[str, int]:
    """Address and port, an IPv4 address in IPv6 clothes as what it is."""
    return address[0].removeprefix("::ffff:") if "." in address[0] else address[0], address[1]


def _ends(opened: Opened) -> tuple[tuple[str, int], tuple[str, int]] | None:
    def ask() -> tuple[tuple[str, int], tuple[str, int]] | None:
        with state.borrowed(opened.fd) as sock:
            try:
                return _plain(sock.getsockname()), _plain(sock.getpeername())
            except OSError:
                return None

    return opened.survey.once(("tcp ends", opened.index), ask)


def _find_peer(opened: Opened, survey: Survey) -> Opened | None:
    """The other end of a connection, if the process has it too."""
    ends = _ends(opened)
    if ends is None:
        return None
    by_ends = survey.once(
        "tcp by ends", lambda: {_ends(other): other for other in survey.of_kind(KIND.name)}
    )
    return by_ends.get((ends[1], ends[0]))


def _aimed_at(opened: Opened) -> list[Any] | None:
    """Where a connection that is not yet established goes (getpeername does not tell)."""
    name = "tcp6" if _family(opened) == socket.AF_INET6 else "tcp"
    with open(f"/proc/{opened.survey.witness}/net/{name}", encoding="ascii") as file:
        for line in file:
            words = line.split()
            if len(words) > 9 and words[9] == str(opened.status.st_ino):
                return list(_address_of(words[2]))
    return None


def _family(opened: Opened) -> int:
    with state.borrowed(opened.fd) as sock:
        return sock.family


def _address_of(text: str) -> tuple[str, int]:
    """`0100007F:1F90` of /proc/net/tcp (words in the machine's order) as an address."""
    host, port = text.split(":")
    words = [int(host[at : at + 8], 16) for at in range(0, len(host), 8)]
    raw = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, raw), int(port, 16)


def _peek_with_bytes_under_way(
    opened: Opened, peer: Opened, sock: socket.socket
) -> list[dict[str, Any]]:
    """Our queue, and behind it what the peer has written and could not deliver yet.

    The kernel delivers while we look, so both are taken again until nothing arrived in between.
    """
    with state.borrowed(peer.fd) as sender:
        for _ in range(_TRIES):
            arrived = kernel.arrived_tcp_bytes(sock)
            messages = state.peek(opened, sock)
            try:
                unsent = kernel.unsent_tcp_bytes(sender, sock)
            except PermissionError as error:
                raise opened.refusal(
                    "bytes are under way to it that only root can see",
                    "run lzy as root (CAP_NET_ADMIN), or let the process read first",
                ) from error
            if kernel.arrived_tcp_bytes(sock) == arrived:
                data = b"".join(state.decode(message["data"]) for message in messages)
                return [{"data": state.encode(data + unsent)}] if data or unsent else []
    raise opened.refusal(
        "bytes do not cease to arrive at it", "dump again a little later", passes=True
    )


def _find_waiting_room(entry: Entry, opened: Opened, survey: Survey) -> int | None:
    """The listener of the process in whose queue the other end still waits to be accepted."""
    ends = _ends(opened)
    if ends is None or entry["state"] != kernel.TCP_ESTABLISHED:
        return None
    for listener, (host, port) in survey.once("tcp listeners", lambda: _crowded(survey)):
        if port != ends[1][1] or host not in (ends[1][0], "0.0.0.0", "::"):
            continue
        if _received_unaccepted(opened, ends):
            raise opened.refusal(
                "it has sent bytes to a connection that is not accepted yet",
                "let the process accept it, then dump again",
                passes=True,
            )
        return listener
    return None


def _crowded(survey: Survey) -> list[tuple[int, tuple[str, int]]]:
    """Listeners with connections that wait to be accepted, and their addresses."""
    found = []
    for other in survey.of_kind(KIND.name):
        with state.borrowed(other.fd) as sock:
            facts = kernel.tcp_state(sock)
            if facts.state == kernel.TCP_LISTEN and facts.waiting:
                found.append((other.index, _plain(sock.getsockname())))
    return found


def _received_unaccepted(opened: Opened, ends: tuple[tuple[str, int], tuple[str, int]]) -> bool:
    """Whether the unaccepted other end has bytes in its queue, from /proc/net/tcp."""
    for name in ("tcp", "tcp6"):
        path = f"/proc/{opened.survey.witness}/net/{name}"
        with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
            next(file)
            for line in file:
                words = line.split()
                found = (_plain(_address_of(words[1])), _plain(_address_of(words[2])))
                if found == (ends[1], ends[0]):
                    return int(words[4].split(":")[1], 16) > 0
    return False


# --- making ----------------------------------------------------------------------------------


def _bind(sock: socket.socket, entry: Entry) -> None:
    # Connections of old may linger on the port; the option is put right when all are made.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    state.bind_again(sock, tuple(entry["name"]))


def _reachable(listener: Any, entry: Entry) -> Any:
    """Where to connect to reach a listener: where the connection of old went."""
    return tuple(entry["peer_name"]) if entry.get("peer_name") else listener


def _make_all_pairs(assembly: Assembly) -> bool:
    """Make every connection that has both ends here."""
    listening = {
        entry["name"][1] for _, entry in assembly.of_kind(KIND.name) if entry["form"] == "listening"
    }
    for index, entry in assembly.of_kind(KIND.name):
        if entry["form"] == "connected" and index not in assembly.local:
            other_index = entry["peer"]
            # The end at a listener's port was accepted; the other called connect.
            if entry["name"][1] in listening:
                _make_pair(other_index, index, assembly)
            else:
                _make_pair(index, other_index, assembly)
    return True


def _make_pair(caller_index: int, accepted_index: int, assembly: Assembly) -> None:
    caller_entry, accepted_entry = assembly.entries[caller_index], assembly.entries[accepted_index]
    try:
        caller, accepted = _connect(caller_entry, accepted_entry)
    except (Busy, Incompatible):
        # Somebody has one of the ports, or this machine other addresses: that the ends are
        # connected matters more than what they are called.
        caller, accepted = _connect_anywhere(caller_entry, accepted_entry)
    _fill_and_shut(caller, caller_entry, accepted_entry)
    _fill_and_shut(accepted, accepted_entry, caller_entry)
    assembly.adopt(caller_index, caller.detach())
    assembly.adopt(accepted_index, accepted.detach())


def _connect(caller_entry: Entry, accepted_entry: Entry) -> tuple[socket.socket, socket.socket]:
    """Connect two sockets between the addresses of old, through a listener for the moment."""
    with contextlib.ExitStack() as undo:
        gate = undo.enter_context(state.make_socket(accepted_entry))
        _bind(gate, accepted_entry)
        gate.listen(_ROOM)
        caller = undo.enter_context(state.make_socket(caller_entry))
        _bind(caller, caller_entry)
        caller.connect(tuple(caller_entry["peer_name"]))
        accepted = _accept_from(gate, caller)
        return socket.socket(fileno=caller.detach()), accepted


def _connect_anywhere(
    caller_entry: Entry, accepted_entry: Entry
) -> tuple[socket.socket, socket.socket]:
    """Connect two sockets over this machine's own addresses, at any ports."""
    # Plain sockets: a device or an address of elsewhere (SO_BINDTODEVICE…) would not lead here.
    with contextlib.ExitStack() as undo:
        gate = undo.enter_context(socket.socket(accepted_entry["family"], accepted_entry["type"]))
        if accepted_entry["family"] == socket.AF_INET6:
            gate.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        gate.listen(_ROOM)
        caller = undo.enter_context(socket.socket(caller_entry["family"], caller_entry["type"]))
        host = "127.0.0.1" if caller_entry["family"] == socket.AF_INET else "::1"
        if accepted_entry["family"] == socket.AF_INET and host == "::1":
            host = "::ffff:127.0.0.1"
        try:
            caller.connect((host, gate.getsockname()[1]))
        except OSError:
            if host != "::1":
                raise
            caller.connect(("::ffff:127.0.0.1", gate.getsockname()[1]))
        accepted = _accept_from(gate, caller)
        return socket.socket(fileno=caller.detach()), accepted


def _accept_from(gate: socket.socket, caller: socket.socket) -> socket.socket:
    """Accept the connection that `caller` made, turning strangers away."""
    while True:
        accepted, address = gate.accept()
        if _plain(address) == _plain(caller.getsockname()):
            return accepted
        accepted.close()


def _fill_and_shut(sock: socket.socket, entry: Entry, other: Entry) -> None:
    """Send what was under way to the other end; then shut our end if it was shut."""
    data = b"".join(state.decode(message["data"]) for message in other["messages"])
    state.fill(sock, data, f"a TCP connection to {entry['peer_name']}")
    if entry["state"] in kernel.TCP_OWN_END_SHUT:
        sock.shutdown(socket.SHUT_WR)


def _is_deaf(entry: Entry, assembly: Assembly) -> bool:
    """Whether the end refuses to read more (SHUT_RD) although the other end may write."""
    peer: Entry = assembly.entries[entry["peer"]]
    return entry["reading_shut"] and peer["state"] not in kernel.TCP_OWN_END_SHUT


def _make_gone(index: int, entry: Entry, assembly: Assembly) -> int:
    """An end whose peer is gone: what was queued, then end of file or the old failure."""
    if _is_stand_in(index, entry, assembly):
        return os.open(os.devnull, entry["flags"] & os.O_ACCMODE | os.O_CLOEXEC)
    own, gone = _connect_anywhere(entry, entry)
    data = b"".join(state.decode(message["data"]) for message in entry["messages"])
    state.fill(gone, data, "a TCP connection")
    if entry["failed"]:
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    gone.close()
    return own.detach()


def _is_stand_in(index: int, entry: Entry, assembly: Assembly) -> bool:
    """Whether it is standard output to somebody gone, which becomes /dev/null."""
    return entry["form"] == "gone" and assembly.is_standard(index) and not entry["messages"]


KIND = TcpSocket()
