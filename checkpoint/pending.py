"""Packs on their way to disk: they grow in `tmp/`, are synced without haste, and appear together.

Writeback of a pack begins while it grows, so the fsync(2) that promises its arrival has little to
wait for by the time it comes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from .keys import StoreKeys
from .packs import PackWriter

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in total), at most about ten times a second."""

_PROGRESS_S = 0.1
_MOST_OPEN_PACKS = 32


class PendingPacks:
    """The packs of one writer; `temporary` and `published` are descriptors of directories."""

    def __init__(self, temporary: int, published: int, keys: StoreKeys) -> None:
        self._temporary = temporary
        self._published = published
        self._keys = keys
        self._lock = threading.Lock()
        self._names: set[str] = set()
        self._finished: list[PackWriter] = []
        self._unsynced: deque[PackWriter] = deque()

    def begin(self) -> PackWriter:
        """A new pack. Raises OSError."""
        pack = PackWriter(self._temporary, self._keys)
        with self._lock:
            self._names.add(pack.name)
        return pack

    def add(self, pack: PackWriter) -> None:
        """Take over a finished pack. Syncs the oldest when too many are open; raises OSError."""
        with self._lock:
            self._finished.append(pack)
            self._unsynced.append(pack)
            crowded = len(self._unsynced) > _MOST_OPEN_PACKS
            oldest = self._unsynced.popleft() if crowded else None  # the caller's alone now
        if oldest is not None:
            try:
                os.fsync(oldest.descriptor)
            finally:
                oldest.close()

    def publish(self, progress: Progress | None = None) -> None:
        """Every pack on disk, then under its own name, then the names on disk. Raises OSError."""
        total_bytes = sum(pack.length_bytes for pack in self._finished)
        done_bytes = 0
        told_s = 0.0
        for pack in self._finished:
            if progress is not None and time.monotonic() - told_s >= _PROGRESS_S:
                progress("sync", done_bytes, total_bytes)
                told_s = time.monotonic()
            if pack in self._unsynced:
                os.fsync(pack.descriptor)
                pack.close()
            done_bytes += pack.length_bytes
        for pack in self._finished:
            os.rename(pack.name, pack.name, src_dir_fd=self._temporary, dst_dir_fd=self._published)
            self._names.discard(pack.name)
        os.fsync(self._published)

    def discard(self) -> None:
        """Close all, and remove what was not published as far as possible.

        What was published stays: another writer may have found chunks in it already.
        """
        for pack in self._finished:
            pack.close()
        self._finished.clear()
        self._unsynced.clear()
        for name in self._names:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._temporary)
        self._names.clear()
