"""POSIX message queues: opened again by their names, as files are; messages stay in the kernel.

Nobody can look at a message without taking it. So those of a queue are not in the image: they wait
in the kernel, which keeps a queue until somebody removes its name. One that is empty, or had lost
its name and was empty, is made anew where it is missing.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from ..errors import Incompatible
from ..linux import message_queues as kernel
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_DELETED = " (deleted)"


class MessageQueue(Kind):
    rank = 58

    def claims(self, opened: Opened) -> bool:
        return (
            opened.link.startswith("/")
            and "/" not in opened.link[1:].removesuffix(_DELETED)
            and opened.mode == stat.S_IFREG
            and not opened.is_path_only
            and kernel.file_system_type(opened.fd) == kernel.MESSAGE_QUEUES
        )

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        queue = kernel.look_at(opened.fd)
        nameless = opened.status.st_nlink == 0
        if nameless and queue.messages:
            raise opened.refusal(
                f"it holds {queue.messages} messages and has no name any more, so that they would "
                "end with the process",
                "let the process receive them, then dump again",
            )
        if kernel.notified(opened.fd) in [holder.pid for holder in survey.holders]:
            raise opened.refusal(
                "the process waits to be notified of a message (mq_notify)",
                "let the process give that up (mq_notify with NULL), then dump again",
            )
        status = opened.status
        return {
            "path": opened.link.removesuffix(_DELETED) if nameless else opened.link,
            "nameless": nameless,
            "mode": status.st_mode & 0o7777,
            "owner": [status.st_uid, status.st_gid],
            "inode": status.st_ino,
            "most_messages": queue.most_messages,
            "message_bytes": queue.message_bytes,
            "messages": queue.messages,
        }

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        if entry["nameless"]:
            return _open_nameless(index, entry, assembly)
        name = entry["path"][1:]
        try:
            fd = kernel.open_queue(name, _flags(entry))
        except FileNotFoundError:
            if entry["messages"]:
                raise Incompatible(
                    f"the message queue {entry['path']} of the process is not here, and with it "
                    f"the {entry['messages']} messages that it held",
                    remedy="restore where the process was dumped, before that machine is started "
                    "again; or have messages received before the next dump",
                    path=entry["path"],
                ) from None
            fd = kernel.make(name, _flags(entry), *_shape(entry))
            _give_away(fd, entry)
        found = kernel.look_at(fd)
        if (found.most_messages, found.message_bytes) != _shape(entry)[1:]:
            os.close(fd)
            raise Incompatible(
                f"the message queue {entry['path']} is another one by now: it takes "
                f"{found.most_messages} messages of {found.message_bytes} bytes, not "
                f"{entry['most_messages']} of {entry['message_bytes']}",
                remedy="remove it (mq_unlink), then restore again",
                path=entry["path"],
            )
        return fd


def _flags(entry: Entry) -> int:
    flags: int = entry["flags"] & (os.O_ACCMODE | os.O_NONBLOCK)
    return flags | os.O_CLOEXEC


def _shape(entry: Entry) -> tuple[int, int, int]:
    return entry["mode"], entry["most_messages"], entry["message_bytes"]


def _open_nameless(index: int, entry: Entry, assembly: Assembly) -> int:
    """The queue of that inode if it is made already, or a new one that had a name for a moment."""
    first = next(i for i, e in assembly.of_kind(KIND.name) if e["inode"] == entry["inode"])
    if first != index:
        return os.open(f"/proc/self/fd/{assembly.make(first)}", _flags(entry))
    name = entry["path"][1:]
    try:
        made = kernel.make(name, os.O_RDWR | os.O_CLOEXEC, *_shape(entry))
    except FileExistsError:  # another queue's by now
        name = f"lzy-{os.getpid()}-{entry['inode']}"
        made = kernel.make(name, os.O_RDWR | os.O_CLOEXEC, *_shape(entry))
    try:
        kernel.unlink(name)
        _give_away(made, entry)
        return os.open(f"/proc/self/fd/{made}", _flags(entry))
    finally:
        os.close(made)


def _give_away(fd: int, entry: Entry) -> None:
    if (os.geteuid(), os.getegid()) != tuple(entry["owner"]):
        os.fchown(fd, *entry["owner"])


KIND = MessageQueue()
