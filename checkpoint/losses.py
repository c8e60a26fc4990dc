"""What descriptors lose when their processes are dumped and come back: what is cut, what changes.

Told beforehand (`foresight`) of entries as the kinds describe them, in the words of who uses them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from .linux import sockets
from .resources import socket_state
from .resources.kind import Entry
from .resources.survey import Survey

CUT: Final = "cut"  # it ends for the process, as when a network or a neighbour fails
CHANGED: Final = "changed"  # it comes back as something else


class Loss(NamedTuple):
    """One thing that would not be as before, and who has it: a process, by its numbers there."""

    outcome: str
    pid: int
    descriptors: list[int]
    words: str


def find_losses(entries: list[Entry], survey: Survey) -> list[Loss]:
    """What of the descriptions of frozen processes would be cut, or come back as another thing."""
    carriers = _find_carriers(entries)
    ends: dict[str, set[int]] = {}
    for entry in entries:
        if entry["kind"] == "pipe" and "pipe" in entry:
            ends.setdefault(entry["pipe"], set()).add(entry["flags"] & os.O_ACCMODE)
    losses = []
    for index, (entry, opened) in enumerate(zip(entries, survey.opened, strict=True)):
        place, way, numbers, at = opened, "", opened.numbers, index
        while place.travels and at in carriers:
            at = carriers[at]
            place, numbers = survey.opened[at], []
            way = f"what is under way in it (SCM_RIGHTS), {opened.link}: "
        for outcome, words in _becomes(entry, ends, numbers):
            losses.append(Loss(outcome, place.pid, place.numbers, way + words))
        if entry.get("form") == "listening" and (count := _count_strangers(index, entries, survey)):
            words = f"{count} that wait to be accepted end" if count > 1 else "one that waits ends"
            losses.append(Loss(CUT, place.pid, place.numbers, f"of its connections {words}"))
    return losses


def _find_carriers(entries: list[Entry]) -> dict[int, int]:
    """Of each description that is under way, the socket in which it is, through others or not."""
    return {
        index: at
        for at, entry in enumerate(entries)
        if entry["kind"] == "unix_socket"
        for message in entry.get("messages", ())
        for index in message.get("descriptors", ())
    }


def _count_strangers(index: int, entries: list[Entry], survey: Survey) -> int:
    """How many connections from elsewhere wait for a listening socket to accept them."""
    entry, listener = entries[index], survey.opened[index]
    if entry["kind"] == "unix_socket":
        own = {opened.status.st_ino for opened in survey.of_kind("unix_socket")}
        return len(set(sockets.unix_state(listener.status.st_ino).waiting) - own)
    inside = sum(1 for other in entries if other.get("listener") == index)
    with socket_state.borrowed(listener.fd) as sock:
        return max(sockets.tcp_state(sock).waiting - inside, 0)


def _becomes(
    entry: Entry, ends: dict[str, set[int]], numbers: list[int]
) -> Iterator[tuple[str, str]]:
    kind, form = entry["kind"], entry.get("form")
    standard = any(number <= 2 for number in numbers)
    if form == "gone" and standard and not entry["messages"]:
        whom = _spell(entry.get("peer_name"))
        yield CHANGED, f"{whom}, at its other end, is not part of the image: it is /dev/null then"
    elif kind == "tcp_socket" and form == "gone" and not entry.get("failed"):
        peer = _spell(entry.get("peer_name"))
        yield CUT, f"its connection to {peer} ends: what had arrived is read, then end of file"
    elif kind == "tcp_socket" and form == "connecting":
        yield CHANGED, f"it connects to {_spell(entry.get('peer_name'))} once more"
    elif kind == "unix_socket" and form == "gone" and entry["type"] == socket.SOCK_DGRAM:
        to = _spell(entry.get("peer_name"))
        yield CHANGED, f"it is connected to {to} again if somebody serves that then"
    elif kind == "unix_socket" and form == "gone":
        name = entry.get("peer_name")
        whom = f"at {_spell(name)}" if name else "at its other end"
        yield CUT, f"the process {whom} is not part of the image: end of file"
    elif kind == "pipe" and "path" not in entry and "pipe" in entry:
        modes = ends[entry["pipe"]]
        if os.O_RDWR not in modes and len(modes) == 1:
            if os.O_RDONLY in modes:
                yield CUT, "who writes into this pipe is not part of the image: end of file"
            elif standard:
                yield CHANGED, "who reads this pipe is not part of the image: it is /dev/null then"
            else:
                yield CUT, "who reads this pipe is not part of the image: EPIPE"
    elif kind == "terminal" and form == "outside":
        yield CHANGED, f"{entry.get('path')} is the terminal of whoever restores it, or /dev/null"
    elif kind == "file" and form == "unlinked":
        yield CHANGED, f"{entry['path']} was deleted: its content comes back as a memory file"


def _spell(address: Any) -> str:
    if isinstance(address, (list, tuple)) and len(address) >= 2:
        host, port = address[0], address[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return str(address or "somewhere")
