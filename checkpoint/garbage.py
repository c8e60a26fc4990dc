"""Collecting garbage: what no manifest names is removed, when nobody writes.

Writers hold a shared flock(2) on the store's lock file and the collection an exclusive one, which
the kernel lets go of however its holder dies. Should a single manifest be unreadable, nothing is
removed: what it names cannot be known.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, NamedTuple

from .errors import Busy
from .packs import pack_file
from .unavailable import unavailable
from .working_set import remove_strays

if TYPE_CHECKING:
    from .store import Store


class GarbageReport(NamedTuple):
    """What a collection removed and what it kept."""

    removed_packs: int
    removed_bytes: int
    removed_temporaries: int
    kept_packs: int
    kept_bytes: int


def collect_garbage(store: Store) -> GarbageReport:
    """Remove packs that no image needs, and what writers that died left behind.

    Raises Busy while an image is being written, Damaged when a manifest cannot be trusted.
    """
    lock = store.open_lock()
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"store {store.path} is being written",
                remedy="collect garbage when the dump is over",
            ) from error
        needed: set[str] = set()
        for name in store.names():
            with store.load_unchecked(name) as image:
                needed.update(pack_file(pack) for pack, _ in image.packs)
        try:
            return _sweep(store, needed)
        except OSError as error:
            raise unavailable(f"remove garbage from {store.path}", error) from error
    finally:
        os.close(lock)


def _sweep(store: Store, needed: set[str]) -> GarbageReport:
    removed_packs = removed_bytes = removed_temporaries = kept_packs = kept_bytes = 0
    for name in os.listdir(store.packs):
        length_bytes = os.stat(name, dir_fd=store.packs, follow_symlinks=False).st_size
        if name in needed:
            kept_packs += 1
            kept_bytes += length_bytes
        elif name.endswith(".pack"):
            os.unlink(name, dir_fd=store.packs)
            removed_packs += 1
            removed_bytes += length_bytes
    for name in os.listdir(store.temporary):
        length_bytes = os.stat(name, dir_fd=store.temporary, follow_symlinks=False).st_size
        with contextlib.suppress(IsADirectoryError):
            os.unlink(name, dir_fd=store.temporary)
            removed_temporaries += 1
            removed_bytes += length_bytes
    removed_temporaries += remove_strays(store.path, store.names())
    os.fsync(store.packs)
    os.fsync(store.temporary)
    return GarbageReport(removed_packs, removed_bytes, removed_temporaries, kept_packs, kept_bytes)
