"""Contents of an image that are no process's own memory: of nameless files, and of /dev/shm's.

Each is a space of the image, numbered from 1, stored once however many processes map it. What the
processes write is copied while they stand still, so that they can run on while it is stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .content import CopiedPages, FilePages, data_ranges, windows_of
from .errors import Unsupported
from .setaside import page_bytes_of

if TYPE_CHECKING:
    from .worker import PageSource


class Objects:
    """The contents found so far. Implements `ObjectSink` for `resources`."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._copies: dict[int, tuple[CopiedPages, list[tuple[int, int]]]] = {}
        self._only_read: set[int] = set()
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

    def copy_written(self, window_pages: int) -> None:
        """Keep what the processes may write as it is now."""
        for number, descriptor in enumerate(self.descriptors, 1):
            if number not in self._only_read:
                windows = _windows(descriptor, window_pages)
                self._copies[number] = CopiedPages(FilePages(descriptor), windows), windows

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
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        for copied, _ in self._copies.values():
            copied.close()
        self._copies.clear()


def _occupied_bytes(descriptor: int) -> int:
    status = os.fstat(descriptor)
    return min(status.st_size, status.st_blocks * 512)


def _windows(descriptor: int, window_pages: int) -> list[tuple[int, int]]:
    return windows_of(data_ranges(descriptor, os.fstat(descriptor).st_size), window_pages)
