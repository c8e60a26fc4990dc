"""Contents of an image that are no process's own memory: of nameless files, and of /dev/shm's.

Each is a space of the image, numbered from 1, stored once however many processes map it. What the
processes write is copied while they stand still, so that they can run on while it is stored.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .content import CopiedPages, FilePages, data_ranges, make_room, windows_of
from .errors import Unsupported
from .named import is_in_folder
from .setaside import page_bytes_of

if TYPE_CHECKING:
    from .proc import Vma
    from .worker import PageSource

_LITTLE_BYTES = 4 << 20  # so much is made as fast as it is asked for


class Objects:
    """The contents found so far. Implements `ObjectSink` for `resources`."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._copies: dict[int, tuple[CopiedPages, list[tuple[int, int]]]] = {}
        self._only_read: set[int] = set()
        self._room = memoryview(b"")
        self.mapped: set[int] = set()
        """Numbers of named ones that a process writes through a shared mapping."""
        self.descriptors: list[int] = []
        self.described: list[dict[str, Any]] = []

    def add_file(self, fd: int, *, key: tuple[int, int]) -> int:
        """Take the content of the open file `fd`, known as `key` (device, inode); its number."""
        if key in self._numbers:
            return self._numbers[key]
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Unsupported(
                f"cannot read the content of {os.readlink(f'/proc/self/fd/{fd}')}: "
                f"{error.strerror}",
                remedy="have the process close it",
            ) from error
        status = os.fstat(own)
        number = self._numbers[key] = len(self.descriptors) + 1
        self.descriptors.append(own)
        self.described.append(
            {
                "space": number,
                "length_bytes": status.st_size,
                "name": os.readlink(f"/proc/self/fd/{own}"),
                "mode": status.st_mode & 0o7777,
                "owner": [status.st_uid, status.st_gid],
            }
        )
        if size_bytes := page_bytes_of(own):
            self.described[-1]["huge_page_bytes"] = size_bytes
        return number

    def add_named(
        self, fd: int, *, key: tuple[int, int], path: str, writes: bool, maps: bool = False
    ) -> int:
        """As `add_file`, of one that is at `path` in /dev/shm (see `named`).

        `writes`: the process may write it; `maps`: through a shared mapping.
        """
        known = key in self._numbers
        number = self.add_file(fd, key=key)
        described = self.described[number - 1]
        if "path" not in described:
            described |= {"name": path, "path": path}
        if not known:
            self._only_read.add(number)
        if writes:
            self._only_read.discard(number)
        if maps:
            self.mapped.add(number)
        return number

    def find(self, key: tuple[int, int]) -> int:
        """The number of the content that is known as `key`, or 0."""
        return self._numbers.get(key, 0)

    def named(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, what is described of it) of those that have a name in /dev/shm."""
        return ((n, each) for n, each in enumerate(self.described, 1) if "path" in each)

    @property
    def total_bytes(self) -> int:
        """How much memory or disk all of it takes."""
        return sum(map(_occupied_bytes, self.descriptors))

    @property
    def written_bytes(self) -> int:
        """As `total_bytes`, of what the processes may write."""
        numbered = enumerate(self.descriptors, 1)
        return sum(_occupied_bytes(fd) for number, fd in numbered if number not in self._only_read)

    def make_room(self, mapped: Iterable[tuple[int, Vma]], most_bytes: int) -> None:
        """Before the processes (pids with their mappings) stand still: memory to copy it to.

        To make it takes longer than to copy. What turns out not to fit gets memory then.
        """
        sizes = {}
        for pid, vma in mapped:
            if vma.shared and "mw" in vma.flags and (vma.kind == "memory" or is_in_folder(vma)):
                with contextlib.suppress(OSError):  # not root, or it is gone
                    status = os.stat(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}")
                    sizes[vma.device, vma.inode] = status.st_blocks * 512
        if _LITTLE_BYTES <= sum(sizes.values()) <= most_bytes:
            self._room = make_room(sum(sizes.values()), at_once=True)

    def copy_written(self, window_pages: int) -> None:
        """Keep what the processes may write as it is now."""
        room = self._room
        for number, descriptor in enumerate(self.descriptors, 1):
            if number not in self._only_read:
                windows = _windows(descriptor, window_pages)
                copied = CopiedPages(FilePages(descriptor), windows, room)
                self._copies[number] = copied, windows
                room = room[copied.length_bytes :]

    def contents(
        self, window_pages: int
    ) -> Iterator[tuple[int, PageSource, list[tuple[int, int]]]]:
        """(number, its pages, its windows) of each; what was copied as it was then."""
        for number, descriptor in enumerate(self.descriptors, 1):
            if number in self._copies:
                copied, windows = self._copies.pop(number)
                yield number, copied, windows
                copied.close()
            else:
                yield number, FilePages(descriptor), _windows(descriptor, window_pages)

    def close(self) -> None:
        """Close all, and let go of copies."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        for copied, _ in self._copies.values():
            copied.close()
        self._copies.clear()
        self._room = memoryview(b"")


def _occupied_bytes(descriptor: int) -> int:
    status = os.fstat(descriptor)
    return min(status.st_size, status.st_blocks * 512)


def _windows(descriptor: int, window_pages: int) -> list[tuple[int, int]]:
    return windows_of(data_ranges(descriptor, os.fstat(descriptor).st_size), window_pages)
