"""System V shared memory: what a process has attached is there again, under its id.

A segment outlives the processes that have it attached. So one that is still there is attached as it
is by now, as an open file is opened; one that is gone (with another boot, say) is made anew from
the image. One that was to go with its last user (IPC_RMID) is the process's own, and made anew.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Any

from . import proc
from .errors import Busy, Unsupported
from .linux import PAGE_BYTES, sysv
from .proc import Vma


def find_refusals(pid: int, vmas: list[Vma]) -> Iterator[Unsupported]:
    """Why attached segments cannot be attached again: only part of one is mapped."""
    last: tuple[int, int, int] | None = None
    for vma in [*vmas, None]:
        if vma is not None and last == (vma.inode, vma.start, vma.offset):
            last = (vma.inode, vma.end, vma.offset + vma.length)
            continue
        if last and last[2] != -(-sysv.look_at(last[0]).size_bytes // PAGE_BYTES) * PAGE_BYTES:
            yield _partial(pid, last[0], last[1])
        last = None
        if vma is not None and vma.kind == "segment":
            if vma.offset:
                yield _partial(pid, vma.inode, vma.start)
            else:
                last = (vma.inode, vma.end, vma.length)


def _partial(pid: int, segment: int, address: int) -> Unsupported:
    return Unsupported(
        f"pid {pid} has mapped only a part of System V shared memory {segment} (at {address:#x})",
        remedy="have the program detach it, or attach all of it (shmat)",
        pid=pid,
        address=address,
    )


def describe_segment(vma: Vma) -> dict[str, Any]:
    """The segment behind a mapping, whose inode is its id."""
    segment = sysv.look_at(vma.inode)
    return {"number": vma.inode, "boot_id": proc.boot_id(), **segment._asdict()}


class Segments:
    """The segments that a restore has made or found, held until its processes have them."""

    def __init__(self) -> None:
        self._attached: list[int] = []
        self._made: list[int] = []

    def make(self, vmas: Iterable[dict[str, Any]], objects: list[int]) -> None:
        """Make or find all that `vmas` need; each then says which, as `segment_here`.

        `objects` are descriptors of the contents. Raises Busy when an id or key is another's.
        """
        here: dict[int, int] = {}
        for vma in vmas:
            if vma["kind"] == "segment":
                described = vma["segment"]
                number = described["number"]
                if number not in here:
                    here[number] = self._make_one(described, objects[vma["object"] - 1])
                vma["segment_here"] = here[number]

    def _make_one(self, described: dict[str, Any], content: int) -> int:
        wanted: int = described["number"]
        if sysv.exists(wanted) and not described["removed"]:
            found = {**sysv.look_at(wanted)._asdict(), "boot_id": proc.boot_id()}
            if all(list_as_tuple(described[name]) == value for name, value in found.items()):
                return wanted
            raise _taken(wanted)
        try:
            key = 0 if described["removed"] else described["key"]
            made = sysv.make(wanted, key, described["size_bytes"], described["mode"])
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            raise Busy(
                f"System V shared memory with the key {described['key']:#x} is another's by now",
                remedy="remove it (`ipcs -m` lists it, `ipcrm -M KEY` removes it)",
            ) from error
        self._made.append(made)
        if made != wanted and not described["removed"]:
            raise _taken(wanted)
        address = sysv.attach(made)
        self._attached.append(address)
        sysv.fill(address, content, described["size_bytes"])
        owner = (described["owner"][0], described["owner"][1])
        if sysv.look_at(made).owner != owner:
            sysv.give(made, owner, described["mode"])
        if described["removed"]:  # from now on it lives as long as it is attached
            sysv.remove(made)
            self._made.remove(made)
        return made

    def detach(self) -> None:
        """Let go of all, which the processes have. Before a pager is forked: it would have them."""
        while self._attached:
            sysv.detach(self._attached.pop())

    def remove(self) -> None:
        """The restore has failed: what was made for it goes."""
        self.detach()
        while self._made:
            sysv.remove(self._made.pop())


def list_as_tuple(value: Any) -> Any:
    """What JSON has made a list of, as it was."""
    return tuple(value) if isinstance(value, list) else value


def _taken(number: int) -> Busy:
    return Busy(
        f"System V shared memory {number}, which the process had attached, is another's by now",
        remedy=f"remove it if nobody needs it (`ipcrm -m {number}`), then restore again",
    )
