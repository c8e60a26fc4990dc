"""Memory files (memfd_create): content and name come from the image; seals are put on last."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from ..linux import descriptors as kernel
from .kind import Entry, Finish, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey


class MemoryFile(Kind):
    rank = 12

    def claims(self, opened: Opened) -> bool:
        return opened.link.startswith("/memfd:") and not opened.is_path_only

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        status = opened.status
        reader = opened.fd
        if not opened.readable:
            reader = os.open(f"/proc/self/fd/{opened.fd}", os.O_RDONLY | os.O_CLOEXEC)
            survey.duplicates.append(reader)
        return {
            "name": opened.link.removeprefix("/memfd:").removesuffix(" (deleted)"),
            "object": survey.objects.add_file(reader, key=(status.st_dev, status.st_ino)),
            "mode": status.st_mode & 0o7777,
            "seals": fcntl.fcntl(opened.fd, fcntl.F_GET_SEALS),
        }

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        content = assembly.objects.open(entry["object"])
        try:
            os.fchmod(content, entry["mode"])
            flags = entry["flags"] & ~(os.O_ASYNC | kernel.O_TMPFILE) | os.O_CLOEXEC
            fd = os.open(f"/proc/self/fd/{content}", flags)
        finally:
            os.close(content)
        os.lseek(fd, entry["position"], os.SEEK_SET)
        return fd

    def finish(self, entry: Entry, fd: int, finish: Finish) -> None:
        # Now only: content and writable mappings had to come before.
        missing = entry["seals"] & ~fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not missing:
            return
        writer = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.fcntl(writer, fcntl.F_ADD_SEALS, missing)
        finally:
            os.close(writer)


KIND = MemoryFile()
