"""Files that are memory, tmpfs(5): known as such, made without a name, held by whom."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from typing import Final

from .descriptors import file_system_type

_MAGIC: Final = 0x01021994  # TMPFS_MAGIC of linux/magic.h
_LEFT_ALONE: Final = signal.SIGURG  # ignored unless somebody asks for it


def lies_in_memory(fd: int) -> bool:
    """Whether the file behind `fd` is on a tmpfs."""
    return file_system_type(fd) == _MAGIC


@contextlib.contextmanager
def held_alone(fd: int) -> Iterator[bool | None]:
    """Hold the file alone while the block runs; gives whether that is so, None if nobody can tell.

    A write lease, fcntl(2): the kernel grants it if there is no other open file description of the
    file, those that only mappings keep included, in whichever container. Who opens the file
    meanwhile waits until the block has ended (see `is_asked_for`).
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, _LEFT_ALONE)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        # EACCES: another user's file, and no CAP_LEASE; EINVAL: fs.leases-enable is 0
        yield False if error.errno == errno.EAGAIN else None
        return
    try:
        yield True
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def is_asked_for(fd: int) -> bool:
    """Whether somebody waits to open what is `held_alone`."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_WRLCK


def make_nameless(folder: str) -> int:
    """A new, empty file in `folder` that has no name yet, to be written; open(2) O_TMPFILE."""
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def give_name(fd: int, path: str) -> None:
    """Have a nameless file be at `path`; FileExistsError if there is one. Source: open(2)."""
    folder = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:  # with a folder, or Python would link the link
        os.link(str(fd), path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)
