"""Letting TCP connections of an ended process go so that its ports are free at once.

The kernel keeps a closed connection for a minute (TIME_WAIT), which would stand in the way of the
same addresses at restore. So lzy holds copies of the connections while the process is ended, and
then closes them in its own way.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from ..linux import descriptors as kernel
from . import socket_state as state


def hold_connections(
    pidfd: int, table: dict[str, Any], pidfds: dict[int, int] | None = None
) -> list[tuple[int, bool]]:
    """Duplicate the TCP connections of the frozen process that `table` describes.

    `pidfds` are those of the other processes of a tree, by their numbers in it.

    To be called while it is frozen, just before it is ended; the answer is for
    `release_descriptors`: (our descriptor, whether both ends are in the process).
    """
    held: list[tuple[int, bool]] = []
    found = {}
    for holder, places in [*table.get("others", {}).items(), (0, table["descriptors"])]:
        owner = (pidfds or {})[int(holder)] if int(holder) else pidfd
        found.update({place["description"]: (owner, int(n)) for n, place in places.items()})
    try:
        for index, entry in enumerate(table["descriptions"]):
            if index not in found:
                continue  # it is under way, and open nowhere
            if entry["kind"] == "tcp_socket" and entry["form"] != "listening":
                fd = kernel.duplicate_from(*found[index])
                held.append((fd, entry["form"] in ("connected", "waiting")))
    except BaseException:
        for fd, _ in held:
            os.close(fd)
        raise
    return held


def release_descriptors(held: Sequence[tuple[int, bool]], *, ended: bool = True) -> None:
    """Close what `hold_connections` held, once the process is dead.

    Connections inside the process vanish without a trace (reset, nobody is left to notice). Peers
    outside get the usual end, but the port may be bound again meanwhile. With `ended` false (the
    process lives on after all) the copies are merely closed, which changes nothing.
    """
    for fd, inside in held:
        if ended:
            with state.borrowed(fd) as sock, contextlib.suppress(OSError):
                if inside:
                    linger = struct.pack("=ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                else:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        os.close(fd)
