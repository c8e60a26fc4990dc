"""Who is signalled when a description becomes ready: F_SETOWN, F_SETSIG and O_ASYNC."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Any

from ..linux import descriptors as kernel

if TYPE_CHECKING:
    from .kind import Entry, Finish
    from .survey import Opened


def describe_owner(opened: Opened) -> dict[str, Any]:
    """`{"owner": [OWNER_*, id], "signal": n}`, each only where it is not the default."""
    answer: dict[str, Any] = {}
    kind, identity = kernel.signal_owner(opened.fd)
    if identity:
        answer["owner"] = [kind, identity]
    if signal := fcntl.fcntl(opened.fd, kernel.F_GETSIG):
        answer["signal"] = signal
    return answer


def give_owner(entry: Entry, fd: int, finish: Finish) -> None:
    """Name the owner again, by the ids the new process has here; one that is gone is nobody."""
    if signal := entry.get("signal"):
        fcntl.fcntl(fd, kernel.F_SETSIG, signal)
    if "owner" not in entry:
        return
    kind, identity = entry["owner"]
    if kind == kernel.OWNER_TID:
        identity = finish.tids.get(identity, identity)
    else:
        identity = finish.pids.get(identity, identity)
    try:
        kernel.set_signal_owner(fd, kind, identity)
    except ProcessLookupError:
        # As if that process had ended: the kernel then signals nobody.
        kernel.set_signal_owner(fd, kind, 0)


def ask_for_signals(entry: Entry, number: int) -> None:
    """Turn O_ASYNC on through the final number, which is the one the signal will tell."""
    if entry["flags"] & os.O_ASYNC:
        fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | os.O_ASYNC)
