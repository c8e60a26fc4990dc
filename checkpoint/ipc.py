"""System V semaphores and message queues of a tree: there again where they are not there any more.

A process holds nothing of them but numbers, and they outlive it. So those that are still there, on
the same boot and in the same IPC namespace, are used as they are by now. Elsewhere they are made
from the image, under their numbers: with another boot, or for a copy, which has its own namespace.

Whose they are nobody tells. Those belong to a tree that one of its processes was the last to use;
and all of a namespace that lzy has made, which it had to enter to dump the tree.

Until it holds all that it held, what is made has no rights for anybody: by that the remains of a
killed restore are known.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

from . import proc
from .errors import Busy, Incompatible
from .interrogate import decode, encode
from .linux import ipc as kernel
from .tracee import Tracee

_NOT_FOR_US = (errno.EACCES, errno.EIDRM, errno.EINVAL)  # others' rights; or it is gone meanwhile
_NAMES = {kernel.SEMAPHORES: ("semaphores", "s"), kernel.QUEUES: ("message queue", "q")}


def describe_ipc(pids: Iterable[int]) -> dict[str, Any]:
    """What belongs to a tree whose processes, stopped, have those pids; empty if nothing does."""
    members = set(pids)
    alone = _has_entered()
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in _NAMES:
        for one in kernel.list_all(kind):
            if alone or one.users & members:
                try:
                    described = _describe(kind, one)
                except OSError as error:
                    if error.errno not in _NOT_FOR_US:
                        raise
                else:
                    found.setdefault(kind, []).append(described)
    return {"boot_id": proc.boot_id(), "namespace": _namespace(), **found} if found else {}


def _has_entered() -> bool:
    """Whether we are in another IPC namespace than who started us: in that of a copy."""
    try:
        return os.stat(f"/proc/{os.getppid()}/ns/ipc").st_ino != _namespace()
    except OSError:
        return False


def _namespace() -> int:
    return os.stat("/proc/self/ns/ipc").st_ino


def _describe(kind: str, one: kernel.Found) -> dict[str, Any]:
    described = {"number": one.number, "key": one.key, "owner": one.owner, "mode": one.mode}
    if kind == kernel.SEMAPHORES:
        return described | {"values": kernel.read_values(one.number, one.size)}
    described["room_bytes"] = kernel.read_room_bytes(one.number)
    try:
        messages = kernel.read_messages(one.number, one.size)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return described | {"messages": None}
    return described | {"messages": [[it.kind, encode(it.content)] for it in messages]}


class Ipc:
    """What a restore makes of it, until its processes run."""

    def __init__(self, described: dict[str, Any]) -> None:
        """What is missing here is to be made. Raises Busy: another has a number or key by now."""
        self._missing: list[tuple[str, dict[str, Any]]] = []
        self._made: list[tuple[str, int]] = []
        stays = described["boot_id"] == proc.boot_id() and described["namespace"] == _namespace()
        for kind in _NAMES:
            here = {one.number: one for one in kernel.list_all(kind)}
            keys = {one.key for one in here.values()} - {0}
            for one in described.get(kind, ()):
                number, key = one["number"], one["key"]
                if (
                    number in here
                    and here[number].key == key
                    and one["mode"] > here[number].mode == 0
                ):
                    kernel.remove(kind, number)  # a killed restore has left it
                    del here[number]
                    keys.discard(key)
                if number not in here and key not in keys:
                    self._missing.append((kind, one))
                elif number not in here or here[number].key != key or not stays:
                    raise _taken(kind, number, key)

    def make(self, tracee: Tracee) -> None:
        """Make what is missing, by way of a process of the tree: it was the last to use it.

        Raises Busy, KernelError; Incompatible: messages could not be read when it was dumped.
        """
        for kind, one in self._missing:
            if kind == kernel.SEMAPHORES:
                self._make_semaphores(tracee, one)
            else:
                self._make_queue(tracee, one)

    def _make_one(self, tracee: Tracee, kind: str, one: dict[str, Any], *arguments: int) -> int:
        """Make one of either kind; its number."""
        kernel.choose_next(kind, one["number"])
        call = kernel.SYS_SEMGET if kind == kernel.SEMAPHORES else kernel.SYS_MSGGET
        batch = tracee.batch()
        made = batch.call(call, one["key"], *arguments, what=f"make {_NAMES[kind][0]}")
        number = tracee.run(tracee.speaker, batch).results[made]
        self._made.append((kind, number))
        if number != one["number"]:
            raise _taken(kind, one["number"], one["key"])
        return number

    def _make_semaphores(self, tracee: Tracee, one: dict[str, Any]) -> None:
        count = len(one["values"])
        number = self._make_one(tracee, kernel.SEMAPHORES, one, count, kernel.CREATE_NEW)
        batch = tracee.batch()
        values = batch.put(kernel.pack_values(one["values"]))
        batch.call(kernel.SYS_SEMCTL, number, 0, kernel.SETALL, values, what="semaphores")
        owner = batch.put(kernel.pack_owner(tuple(one["owner"]), one["mode"]))
        batch.call(kernel.SYS_SEMCTL, number, 0, kernel.IPC_SET, owner, what="their owner")
        tracee.run(tracee.speaker, batch)

    def _make_queue(self, tracee: Tracee, one: dict[str, Any]) -> None:
        if one["messages"] is None:
            raise Incompatible(
                f"the messages of System V message queue {one['number']} could not be read when "
                "the process was dumped",
                remedy="dump it under a kernel with CONFIG_CHECKPOINT_RESTORE",
            )
        number = self._make_one(tracee, kernel.QUEUES, one, kernel.CREATE_NEW)
        owner, room = tuple(one["owner"]), one["room_bytes"]
        batch = tracee.batch()
        rights = batch.put(kernel.pack_owner(owner, 0, room))
        batch.call(kernel.SYS_MSGCTL, number, kernel.IPC_SET, rights, what="a queue's room")
        for kind, content in one["messages"]:
            message = kernel.Message(kind, decode(content))
            place = batch.put(kernel.pack_message(message))
            length = len(message.content)
            batch.call(kernel.SYS_MSGSND, number, place, length, kernel.NO_WAIT, what="a message")
            if batch.full:
                tracee.run(tracee.speaker, batch)
                batch = tracee.batch()
        if not one["messages"]:  # so that it is known as one of the tree's
            place = batch.put(kernel.pack_message(kernel.Message(1, b"")))
            batch.call(kernel.SYS_MSGSND, number, place, 0, kernel.NO_WAIT, what="a message")
            batch.call(kernel.SYS_MSGRCV, number, place, 0, 0, kernel.NO_WAIT, what="it again")
        rights = batch.put(kernel.pack_owner(owner, one["mode"], room))
        batch.call(kernel.SYS_MSGCTL, number, kernel.IPC_SET, rights, what="a queue's owner")
        tracee.run(tracee.speaker, batch)

    def remove(self) -> None:
        """The restore has failed: what was made for it goes."""
        while self._made:
            kernel.remove(*self._made.pop())


def _taken(kind: str, number: int, key: int) -> Busy:
    name, letter = _NAMES[kind]
    return Busy(
        f"System V {name} {number} (key {key:#x}), which the process used, is another's by now",
        remedy=f"remove it if nobody needs it (`ipcs -{letter}` lists it, `ipcrm -{letter} NUMBER` "
        "removes it), or restore with --copy",
    )
