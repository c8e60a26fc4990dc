"""Collecting garbage: what no manifest names is removed, when nobody writes.

Writers hold a shared flock(2) on the store's lock file and the collection an exclusive one, which
the kernel lets go of however its holder dies. Should a single manifest be unreadable, nothing is
removed: what it names cannot be known.

A pack of which only some chunks are still named is kept and *hollowed*: the disk blocks of the
others are freed, while offsets and length stay as manifests have them. So what a store takes is
what living images need, plus gaps too small to free (below 64 KiB), manifests and indexes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from .errors import Busy, Damaged, NotFound
from .image import CHUNK_RECORD
from .linux.holes import punch_hole
from .packs import PACK_HEADER_BYTES, pack_file, read_trailer
from .unavailable import unavailable
from .working_set import remove_strays

if TYPE_CHECKING:
    from .image import Image
    from .store import Store

_SMALLEST_HOLE_BYTES = 64 << 10


class GarbageReport(NamedTuple):
    """What a collection removed and what it kept."""

    removed_packs: int
    removed_bytes: int
    removed_temporaries: int
    kept_packs: int
    kept_bytes: int
    hollowed_bytes: int
    """Disk space freed inside kept packs, in this collection."""


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
        needed: dict[str, dict[int, int]] = {}
        for name in store.names():
            with store.load_unchecked(name) as image:
                _note_needed(image, needed)
        try:
            return _sweep(store, needed)
        except OSError as error:
            raise unavailable(f"remove garbage from {store.path}", error) from error
    finally:
        os.close(lock)


def _note_needed(image: Image, needed: dict[str, dict[int, int]]) -> None:
    """Add the chunks of an image to what is needed: {pack file: {offset: length in bytes}}."""
    packs = [needed.setdefault(pack_file(pack), {}) for pack, _ in image.packs]
    for _, pack, stored_bytes, offset, _, _ in CHUNK_RECORD.iter_unpack(image.chunk_records):
        packs[pack][offset] = stored_bytes


def _hollow(store: Store, name: str, chunks: dict[int, int]) -> int:
    """Free what lies between the chunks of a pack; the bytes of disk that this gave back."""
    descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=store.packs)
    try:
        before = os.fstat(descriptor).st_blocks
        _, _, (end, _), _ = read_trailer(descriptor, bytes.fromhex(name.removesuffix(".pack")))
        for position, length_bytes in _gaps(chunks, end):
            if not punch_hole(descriptor, position, length_bytes):
                return 0
        return (before - os.fstat(descriptor).st_blocks) * 512
    except Damaged:
        return 0  # `lzy verify` is for that
    finally:
        os.close(descriptor)


def _gaps(chunks: dict[int, int], end: int) -> Iterator[tuple[int, int]]:
    """(offset, length in bytes) of what lies between the chunks of a pack, where it is worth it."""
    position = PACK_HEADER_BYTES
    for offset, length_bytes in [*sorted(chunks.items()), (end, 0)]:
        if offset - position >= _SMALLEST_HOLE_BYTES:
            yield position, offset - position
        position = max(position, offset + length_bytes)


def measure_garbage(store: Store, without: Collection[str] = ()) -> int:
    """How many bytes a collection would give back, about, were the images `without` removed.

    Raises Damaged when a manifest cannot be trusted, as the collection does.
    """
    needed: dict[str, dict[int, int]] = {}
    for name in store.names():
        if name not in without:
            with contextlib.suppress(NotFound), store.load_unchecked(name) as image:
                _note_needed(image, needed)
    found = 0
    for name in os.listdir(store.packs):
        if not name.endswith(".pack"):
            continue
        status = os.stat(name, dir_fd=store.packs, follow_symlinks=False)
        if name in needed:
            gaps = sum(length_bytes for _, length_bytes in _gaps(needed[name], status.st_size))
            found += max(status.st_blocks * 512 - (status.st_size - gaps), 0) if gaps else 0
        else:
            found += status.st_size
    return found


def _sweep(store: Store, needed: dict[str, dict[int, int]]) -> GarbageReport:
    removed_packs = removed_bytes = removed_temporaries = kept_packs = kept_bytes = 0
    hollowed_bytes = 0
    for name in os.listdir(store.packs):
        length_bytes = os.stat(name, dir_fd=store.packs, follow_symlinks=False).st_size
        if name in needed:
            kept_packs += 1
            kept_bytes += length_bytes
            hollowed_bytes += _hollow(store, name, needed[name])
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
    return GarbageReport(
        removed_packs, removed_bytes, removed_temporaries, kept_packs, kept_bytes, hollowed_bytes
    )
