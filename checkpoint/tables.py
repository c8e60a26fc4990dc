"""The tables of an image that is being written: its chunks, packs and runs, numbered as they come.

Kept packed, for they are what grows with a session: about 220 bytes for each chunk, most of it the
dictionary that finds a repeated content again.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

from .image import CHUNK_RECORD, encode_pack
from .packs import Stored
from .patchwork import Piece, encode_pieces

_EMPTY_RECORD = bytes(CHUNK_RECORD.size)


class ImageTables:
    """What the workers of one writer have in common. Every method may be called from any thread.

    *Locks:* `_lock` guards it all and is never held during input or output. Counters may be read
    without it.
    """

    def __init__(self) -> None:
        self.raw_bytes = 0
        self.zero_bytes = 0
        self.repeated_bytes = 0
        self.reused_bytes = 0
        self.stored_bytes = 0
        self.chunk_count = 0
        self._lock = threading.Lock()
        self._numbers: dict[bytes, int] = {}
        self._records = bytearray()
        self._recorded = 0
        self._packs: dict[bytes, int] = {}
        self._pack_sizes: list[tuple[int, int]] = []
        self._runs: dict[int, bytes] = {}
        self._kept: dict[int, list[Piece]] = {}

    def number_chunk(self, content_id: bytes) -> tuple[int, bool]:
        """The number of a content, and whether it is new here and now the caller's to store."""
        number = self._numbers.get(content_id)
        if number is not None:
            return number, False
        with self._lock:
            number = self._numbers.setdefault(content_id, self.chunk_count)
            new = number == self.chunk_count
            if new:
                self.chunk_count += 1
                self._records.extend(_EMPTY_RECORD)
        return number, new

    def record_chunk(self, number: int, content_id: bytes, pack: bytes, place: Stored) -> None:
        """Say where the chunk of that number lies."""
        with self._lock:
            pack_number = self._packs.setdefault(pack, len(self._pack_sizes))
            if pack_number == len(self._pack_sizes):
                self._pack_sizes.append((0, 0))
            self._recorded += 1
            CHUNK_RECORD.pack_into(
                self._records,
                number * CHUNK_RECORD.size,
                content_id,
                pack_number,
                place.stored_bytes,
                place.offset,
                place.raw_bytes,
                place.encoding,
            )

    def record_pack(self, pack: bytes, length_bytes: int, chunk_count: int) -> None:
        """Say how large a pack is that chunks were recorded in."""
        with self._lock:
            self._pack_sizes[self._packs[pack]] = (length_bytes, chunk_count)

    def record_batch(
        self,
        number: int,
        runs: bytes,
        *,
        raw_bytes: int,
        zero_bytes: int,
        repeated_bytes: int,
        reused_bytes: int,
        stored_bytes: int,
    ) -> None:
        """Add the run records of one batch, and what it was made of, in bytes."""
        with self._lock:
            self._runs[number] = runs
            self.raw_bytes += raw_bytes
            self.zero_bytes += zero_bytes
            self.repeated_bytes += repeated_bytes
            self.reused_bytes += reused_bytes
            self.stored_bytes += stored_bytes

    def encode_chunks(self) -> bytearray:
        """The chunk table; ValueError should a chunk have been numbered and never stored."""
        if self._recorded != self.chunk_count:
            raise ValueError(f"{self.chunk_count - self._recorded} chunks were never stored")
        return self._records

    def encode_packs(self) -> bytes:
        """The pack list, in the order of the packs' numbers (that of the dictionary)."""
        return b"".join(
            encode_pack(pack, *self._pack_sizes[number]) for pack, number in self._packs.items()
        )

    def keep(self, address: int, pieces: list[Piece]) -> None:
        """Take pages of the window at `address` of space 0 from chunks that are there already."""
        self._kept[address] = pieces

    def encode_runs(self, *, ordered: bool) -> tuple[bytes, bytes]:
        """The run table and the pieces; call it last, when all chunks have their numbers.

        The batches were `ordered` by (space, address), or are sorted now. ValueError when a window
        was given twice.
        """
        runs = b"".join(self._runs[number] for number in sorted(self._runs))
        if ordered and not self._kept:
            return runs, b""
        records = sorted(struct.iter_unpack("<QQQ", runs), key=lambda run: (run[2] >> 32, run[0]))
        last = (-1, -1)
        for address, _, owner in records:
            if (owner >> 32, address) == last:
                raise ValueError(f"window {address:#x} of space {owner >> 32} was given twice")
            last = (owner >> 32, address)
        pieces = b""
        if self._kept:
            records, pieces = self._join(records)
        return b"".join(struct.pack("<QQQ", *record) for record in records), pieces

    def _join(self, records: list[Any]) -> tuple[list[tuple[int, int, int]], bytes]:
        """Put what was kept and what was written of the windows of space 0 together."""
        fresh = {address: (mask, chunk) for address, mask, chunk in records if not chunk >> 32}
        joined: list[tuple[int, int, int]] = []
        patchworks: list[list[Piece]] = []
        for address in sorted(fresh.keys() | self._kept.keys()):
            pieces = list(self._kept.get(address, ()))
            if address in fresh:
                mask, chunk = fresh[address]
                pieces.append(Piece(mask, mask, chunk))
            mask = sum(piece.taken for piece in pieces)
            if len(pieces) == 1 and pieces[0].held == mask:
                joined.append((address, mask, pieces[0].chunk))
            elif pieces:
                joined.append((address, mask, self.chunk_count + len(patchworks)))
                patchworks.append(pieces)
        joined += [record for record in records if record[2] >> 32]
        return joined, encode_pieces(patchworks)
