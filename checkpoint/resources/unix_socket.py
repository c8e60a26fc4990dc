"""Unix sockets: pairs with what is queued in them, listeners, and ends whose other end is outside.

Who is connected to whom only netlink tells (unix_diag). Both ends here: connected again, with the
queued messages and their boundaries. The other end outside: a stream gives what was queued and
then end of file; a datagram socket is connected to the same path again if somebody is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import Busy, Incompatible, LzyError
from ..linux import sockets as kernel
from . import socket_state as state
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_ROOM = 64  # backlog while connections are made again


class UnixSocket(Kind):
    rank = 40

    def claims(self, opened: Opened) -> bool:
        return state.is_socket_of(opened, (socket.AF_UNIX,), (0,))

    def look(self, opened: Opened, survey: Survey) -> None:
        with contextlib.suppress(LzyError):  # then it is refused, when it is described
            state.find_travelling(_messages(opened), survey)

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        with state.borrowed(opened.fd) as sock:
            entry = state.describe_socket(opened, sock)
            facts = _facts(opened)
            entry["name"] = state.address_to_json(sock.getsockname())
            entry["shutdown"] = facts.shutdown
            if isinstance(entry["name"], str):
                entry["file"] = _describe_file(entry["name"], facts, opened.witness)
                entry["folder"] = os.readlink(f"/proc/{opened.witness}/cwd")
            if facts.state == kernel.TCP_LISTEN:
                return entry | {"form": "listening", "backlog": facts.send_queue}
            entry["failed"] = bool(kernel.readiness(sock) & select.POLLERR)
            by_inode = {other.status.st_ino: other for other in survey.of_kind(self.name)}
            peer = by_inode.get(facts.peer_inode or 0)
            entry["messages"] = state.describe_messages(opened, sock, _messages(opened), peer)
            return entry | self._describe_peer(opened, sock, facts, by_inode)

    def _describe_peer(
        self,
        opened: Opened,
        sock: socket.socket,
        facts: kernel.UnixState,
        by_inode: dict[int, Opened],
    ) -> Entry:
        if facts.peer_inode is None:
            # A stream's peer stays known after its death; without one it never was connected.
            return {"form": "unconnected"}
        if peer := by_inode.get(facts.peer_inode):
            return {"form": "connected", "peer": peer.index}
        own = opened.status.st_ino
        for other in by_inode.values():
            if facts.peer_inode == 0 and own in _facts(other).waiting:
                if kernel.queued_to_send(opened.fd):
                    raise opened.refusal(
                        "it has sent bytes to a connection that is not accepted yet",
                        "let the process accept it, then dump again",
                        passes=True,
                    )
                return {"form": "waiting", "listener": other.index}
        with contextlib.suppress(OSError):
            return {"form": "gone", "peer_name": state.address_to_json(sock.getpeername())}
        return {"form": "gone"}

    def check(self, entry: Entry, assembly: Assembly) -> None:
        if isinstance(entry["name"], str) and entry["form"] in ("listening", "unconnected"):
            with _at_folder(entry):
                _refuse_if_served(entry)

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        form = entry["form"]
        if form == "connected":
            _make_connected(index, entry, assembly)
        elif form == "listening":
            sock = state.make_socket(entry)
            _bind(sock, entry)
            sock.listen(max(entry["backlog"], _ROOM))  # `place` says the right number
            assembly.adopt(index, sock.detach())
        elif form == "waiting":
            # Its listener comes first, and then this one waits in its queue again.
            assembly.make(entry["listener"])
            listener = assembly.entries[entry["listener"]]
            sock = state.make_socket(entry)
            if entry["name"] is not None:
                _bind(sock, entry)
            with _at_folder(listener):
                sock.connect(state.address_from_json(listener["name"]))
            assembly.adopt(index, sock.detach())
        elif form == "gone" and (
            entry["type"] != socket.SOCK_DGRAM or _is_stand_in(index, entry, assembly)
        ):
            _make_gone(index, entry, assembly)
        else:
            _make_datagram(index, entry, assembly)
        return assembly.local[index]

    def settle(self, index: int, entry: Entry, assembly: Assembly) -> None:
        if _is_stand_in(index, entry, assembly):
            return
        assembly.once("unix messages", lambda: _queue_datagrams(assembly))
        with state.borrowed(assembly.local[index]) as sock:
            if entry["form"] in ("connected", "unconnected"):
                _shut(sock, entry["shutdown"])
            state.settle_options(sock, entry)

    def place(self, entry: Entry, fd: int, local: dict[int, int], holder: int) -> None:
        # SO_PEERCRED tells who called listen(2): say it again from the process itself.
        if entry["form"] == "listening" and entry.get("holder", 0) == holder:
            with state.borrowed(fd) as sock:
                sock.listen(entry["backlog"])


def _facts(opened: Opened) -> kernel.UnixState:
    inode = opened.status.st_ino

    def ask() -> kernel.UnixState:
        try:
            return kernel.unix_state(inode)
        except FileNotFoundError as error:
            raise opened.refusal(
                "this network namespace does not know the socket, or the kernel lacks unix_diag",
                "run lzy in the network namespace of the process, with the module unix_diag",
            ) from error

    return opened.survey.once(("unix", inode), ask)


def _messages(opened: Opened) -> list[kernel.Message]:
    """What is in its queue, looked at once: a second look passes over empty messages."""

    def look() -> list[kernel.Message]:
        facts = _facts(opened)
        if facts.state == kernel.TCP_LISTEN:
            return []
        with state.borrowed(opened.fd) as sock:
            ended = bool(facts.shutdown & kernel.SHUT_READ_BIT)
            return state.look_at_queue(sock, ended=ended)

    return opened.survey.once(("unix messages", opened.index), look)


# --- making ----------------------------------------------------------------------------------


def _make_connected(index: int, entry: Entry, assembly: Assembly) -> None:
    """Make an end and, if both ends point at each other, the other one with it."""
    other_index = entry["peer"]
    other = assembly.entries[other_index]
    if entry["type"] == socket.SOCK_DGRAM and (
        other.get("peer") != index or entry["name"] is not None or other["name"] is not None
    ):
        _make_datagram(index, entry, assembly)
        return
    one, two = _pair(index, other_index, assembly)
    # First of all they are there: they may be under way in themselves, or in one another.
    assembly.adopt(index, one.detach())
    assembly.adopt(other_index, two.detach())
    if entry["type"] != socket.SOCK_DGRAM:
        for sender, messages in ((index, other["messages"]), (other_index, entry["messages"])):
            with state.borrowed(assembly.local[sender]) as sock:
                _queue(sock, messages, assembly)


def _pair(index: int, other_index: int, assembly: Assembly) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, with the names the ends had where that is possible."""
    entry, other = assembly.entries[index], assembly.entries[other_index]
    if entry["name"] is not None or other["name"] is not None:
        listeners = {
            repr(found["name"]): at
            for at, found in assembly.of_kind(KIND.name)
            if found["form"] == "listening"
        }
        # The accepted end has its listener's name.
        swapped = other["name"] is None or repr(entry["name"]) in listeners
        caller, accepted = (other, entry) if swapped else (entry, other)
        # A name that somebody else has by now is lost; the connection is not.
        with contextlib.suppress(OSError, LzyError):
            one, two = _connect_by_name(
                caller, accepted, listeners.get(repr(accepted["name"])), assembly
            )
            return (two, one) if swapped else (one, two)
    return socket.socketpair(entry["family"], entry["type"], entry["protocol"])


def _connect_by_name(
    caller_entry: Entry, accepted_entry: Entry, listener: int | None, assembly: Assembly
) -> tuple[socket.socket, socket.socket]:
    """Connect through the process's own listener, else through one for the moment."""
    with contextlib.ExitStack() as undo:
        caller = undo.enter_context(state.make_socket(caller_entry))
        if caller_entry["name"] is not None:
            _bind(caller, caller_entry)
        if listener is not None:
            gate = undo.enter_context(state.reach(assembly, listener))
        else:
            gate = undo.enter_context(state.make_socket(accepted_entry))
            _bind(gate, accepted_entry)
        gate.listen(_ROOM)  # `place` says the right number again
        with _at_folder(accepted_entry):
            caller.connect(state.address_from_json(accepted_entry["name"]))
        accepted = _accept_ours(gate)
        return socket.socket(fileno=caller.detach()), accepted


def _accept_ours(gate: socket.socket) -> socket.socket:
    """Accept the connection that we made, turning strangers away."""
    while True:
        accepted, _ = gate.accept()
        credentials = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("=iII", credentials)[0] == os.getpid():
            return accepted
        accepted.close()


def _make_gone(index: int, entry: Entry, assembly: Assembly) -> None:
    """An end whose other end is gone: what was queued, then end of file."""
    if _is_stand_in(index, entry, assembly):
        flags = entry["flags"] & os.O_ACCMODE | os.O_CLOEXEC
        assembly.adopt(index, os.open(os.devnull, flags))
        return
    own, gone = socket.socketpair(entry["family"], entry["type"], entry["protocol"])
    assembly.adopt(index, own.detach())
    _queue(gone, entry["messages"], assembly)
    if entry["failed"]:  # to be closed with something unread is what resets the other end
        with state.borrowed(assembly.local[index]) as sock:
            sock.send(b"x")
    gone.close()


def _is_stand_in(index: int, entry: Entry, assembly: Assembly) -> bool:
    """Whether it is standard output to somebody gone, which becomes /dev/null."""
    return entry["form"] == "gone" and assembly.is_standard(index) and not entry["messages"]


def _make_datagram(index: int, entry: Entry, assembly: Assembly) -> None:
    """A socket with its name; datagram sockets get their destination when all have names."""
    sock = state.make_socket(entry)
    if entry["name"] is not None:
        _bind(sock, entry)
    assembly.adopt(index, sock.detach())


def _queue_datagrams(assembly: Assembly) -> bool:
    """Connect the datagram sockets and queue their messages, now that every name exists."""
    sockets = [
        (index, entry)
        for index, entry in assembly.of_kind(KIND.name)
        if entry["type"] == socket.SOCK_DGRAM and not _is_stand_in(index, entry, assembly)
    ]
    senders = {repr(entry["name"]): index for index, entry in sockets if entry["name"] is not None}
    for index, entry in sockets:
        with contextlib.ExitStack() as stack:
            for message in entry["messages"]:
                name = message.get("from")
                if repr(name) in senders:
                    sender_fd = assembly.local[senders[repr(name)]]
                    sender = stack.enter_context(state.borrowed(sender_fd))
                elif entry["form"] == "connected" and _is_mutual(index, entry, assembly):
                    sender = stack.enter_context(state.borrowed(assembly.local[entry["peer"]]))
                else:
                    sender = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                _send_datagram(sender, entry, message, assembly)
    for index, entry in sockets:
        with state.borrowed(assembly.local[index]) as sock:
            target = None
            if entry["form"] == "connected":
                target = state.address_from_json(assembly.entries[entry["peer"]]["name"])
                folder = assembly.entries[entry["peer"]]
            elif entry["form"] == "gone":
                target = state.address_from_json(entry.get("peer_name"))
                folder = entry
            if target is not None:
                # Nobody there any more: sending fails as it would have with the peer's death.
                with _at_folder(folder), contextlib.suppress(OSError):
                    sock.connect(target)
    return True


def _is_mutual(index: int, entry: Entry, assembly: Assembly) -> bool:
    return bool(assembly.entries[entry["peer"]].get("peer") == index)


def _send_datagram(
    sender: socket.socket, entry: Entry, message: dict[str, Any], assembly: Assembly
) -> None:
    data, rights = state.decode(message["data"]), _rights(message, assembly)
    kernel.set_buffer_bytes(sender, max(len(data) * 2, 1 << 20), None)
    blocking = sender.getblocking()
    sender.setblocking(False)
    try:
        if entry["name"] is not None:
            with _at_folder(entry):
                sender.sendmsg([data], rights, 0, state.address_from_json(entry["name"]))
        else:
            sender.sendmsg([data], rights)
    except BlockingIOError as error:
        raise Incompatible(
            "the queued datagrams are more than this machine lets a socket hold",
            remedy="raise net.unix.max_dgram_qlen with sysctl",
        ) from error
    finally:
        sender.setblocking(blocking)


def _queue(sender: socket.socket, messages: list[dict[str, Any]], assembly: Assembly) -> None:
    pieces = [state.decode(message["data"]) for message in messages]
    travelling = [_rights(message, assembly) for message in messages]
    if sender.type == socket.SOCK_STREAM and not any(travelling):
        state.fill(sender, b"".join(pieces), "a unix socket")
        return
    room = sum(len(piece) + 4096 for piece in pieces)
    if pieces:
        kernel.set_buffer_bytes(sender, room, None)
    sender.setblocking(False)
    for piece, rights in zip(pieces, travelling, strict=True):
        done = sender.sendmsg([piece], rights)
        while done < len(piece):  # of a stream only; the first bytes bring the descriptors
            done += sender.send(piece[done:])


def _rights(message: dict[str, Any], assembly: Assembly) -> list[tuple[int, int, bytes]]:
    """The descriptors that are under way with a message, as sendmsg(2) takes them."""
    ours = [assembly.make(index) for index in message.get("descriptors", ())]
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(ours)}i", *ours))] * bool(
        ours
    )


def _shut(sock: socket.socket, bits: int) -> None:
    ways = {
        kernel.SHUT_READ_BIT: socket.SHUT_RD,
        kernel.SHUT_WRITE_BIT: socket.SHUT_WR,
        kernel.SHUT_READ_BIT | kernel.SHUT_WRITE_BIT: socket.SHUT_RDWR,
    }
    if bits:
        with contextlib.suppress(OSError):
            sock.shutdown(ways[bits])


# --- names in the file system ------------------------------------------------------------------


def _describe_file(name: str, facts: kernel.UnixState, pid: int) -> dict[str, Any] | None:
    """Mode and owner of the socket's file if the name still leads to this socket."""
    path = name if name.startswith("/") else f"/proc/{pid}/cwd/{name}"
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISSOCK(status.st_mode):
        return None
    if facts.file_inode is not None and facts.file_inode != status.st_ino & 0xFFFFFFFF:
        return None
    return {"mode": stat.S_IMODE(status.st_mode), "user": status.st_uid, "group": status.st_gid}


@contextlib.contextmanager
def _at_folder(entry: Entry) -> Iterator[None]:
    """Work in the process's folder while a relative name is used."""
    name = entry.get("name")
    if not isinstance(name, str) or name.startswith("/"):
        yield
        return
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(entry["folder"])
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def _refuse_if_served(entry: Entry) -> None:
    """Refuse a name that another socket, or another kind of file, has by now."""
    name = entry["name"]
    try:
        status = os.lstat(name)
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(os.path.abspath(name))):
            raise
        return
    if entry["file"] is None:
        raise Incompatible(
            f"{name}, a name of the process's socket, belongs to somebody else since before the "
            "dump",
            remedy="move that file away, then restore again",
            path=name,
        )
    if not stat.S_ISSOCK(status.st_mode):
        raise Incompatible(
            f"{name} was a socket of the process and is another file now",
            remedy="move that file away, then restore again",
            path=name,
        )
    with socket.socket(socket.AF_UNIX, entry["type"]) as probe:
        probe.setblocking(False)
        try:
            probe.connect(name)
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                return
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
        raise Busy(
            f"another process serves the socket {name} of the process",
            remedy="end it (`ss -lxp` names it), then restore again",
            path=name,
        )


def _bind(sock: socket.socket, entry: Entry) -> None:
    """Bind to the name of old; the dead socket's file there is replaced."""
    name = state.address_from_json(entry["name"])
    if not isinstance(name, str):
        state.bind_again(sock, name)
        return
    with _at_folder(entry):
        _refuse_if_served(entry)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        sock.bind(name)
        file = entry.get("file")
        if file is None:
            os.unlink(name)
            return
        os.chmod(name, file["mode"])
        with contextlib.suppress(PermissionError):
            os.chown(name, file["user"], file["group"])


KIND = UnixSocket()
