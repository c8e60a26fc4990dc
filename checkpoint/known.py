"""What the store already has: chunk ids of its packs, found in one dictionary look-up.

Indexes are read and authenticated at the first question, newest packs first: a checkpoint of a
process that was idle asks none. Per chunk only its id and a running number are kept; the number
leads back to the pack and its record.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from .errors import LzyError
from .keys import DIGEST_BYTES, StoreKeys
from .packs import PackIndex, Stored, read_index

if TYPE_CHECKING:
    from .image import Image

MOST_KNOWN_CHUNKS = 400_000
"""Bounds the memory of a dump (about 60 MB); older packs beyond it are not deduplicated against."""


class Found(NamedTuple):
    """Where a content is: a pack, its size and how many chunks it has, and the place in it."""

    pack: bytes
    length_bytes: int
    chunk_count: int
    place: Stored


class KnownChunks:
    """The chunks of the packs in `folder` (a descriptor of the directory)."""

    def __init__(self, folder: int, keys: StoreKeys, *, most: int = MOST_KNOWN_CHUNKS) -> None:
        self._folder = folder
        self._keys = keys
        self._most = most
        self._lock = threading.Lock()
        self._loaded = False
        self._numbers: dict[bytes, int] = {}
        self._first_numbers: list[int] = []
        self._packs: list[PackIndex] = []
        self._expected: dict[bytes, Found] = {}

    def expect(self, image: Image, chunks: Iterable[int]) -> None:
        """Know these chunks of `image` in any case. Precondition: nobody asks meanwhile."""
        for chunk in chunks:
            content_id, number, place = image.chunk_place(chunk)
            pack, length_bytes = image.packs[number]
            count = image.pack_chunk_counts[number]
            self._expected[content_id] = Found(pack, length_bytes, count, place)

    def forgo(self) -> None:
        """Know nothing: so little is to be written that finding it again is not worth the look."""
        self._loaded = True

    def _load(self) -> None:
        with self._lock:
            if not self._loaded:
                self._read_indexes(self._folder, self._keys, self._most)
                self._loaded = True

    def _read_indexes(self, folder: int, keys: StoreKeys, most: int) -> None:
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                pack_hex, dot, suffix = entry.name.partition(".")
                if dot and suffix == "pack" and len(pack_hex) == 32:
                    try:
                        names.append(
                            (entry.stat().st_mtime_ns, bytes.fromhex(pack_hex), entry.name)
                        )
                    except (OSError, ValueError):
                        continue
        total = 0
        for _, pack, name in sorted(names, reverse=True):
            try:
                descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
            except OSError:
                continue
            try:
                index = read_index(descriptor, pack, keys)
            except (OSError, LzyError):
                continue  # damaged or newer than we know: no reason not to write a new image
            finally:
                os.close(descriptor)
            if total + len(index) > most:
                break
            ids = index.ids
            split = [ids[at : at + DIGEST_BYTES] for at in range(0, len(ids), DIGEST_BYTES)]
            self._numbers.update(zip(split, range(total, total + len(split)), strict=True))
            self._first_numbers.append(total)
            self._packs.append(index)
            total += len(index)

    def __len__(self) -> int:
        self._load()
        return len(self._numbers)

    def find(self, content_id: bytes) -> Found | None:
        """Where the store has that content, or None."""
        if (expected := self._expected.get(content_id)) is not None:
            return expected
        if not self._loaded:
            self._load()
        number = self._numbers.get(content_id)
        if number is None:
            return None
        at = bisect_right(self._first_numbers, number) - 1
        pack = self._packs[at]
        place = pack.place(number - self._first_numbers[at])
        return Found(pack.pack, pack.length_bytes, len(pack), place)
